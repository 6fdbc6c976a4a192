"""The demo's own data: enough of each kind, no overlap, and no shortcut by length."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from rc_ray.config import RuleReward, load_config
from rc_ray.core.ids import prompt_id
from rc_ray.pipeline.prompts import EMBEDDED as PROMPT_FILES
from rc_ray.pipeline.prompts import check_source
from rc_ray.rewards.rule import load_function
from rc_ray.training.preferences import read_preferences

CATEGORIES = {"everyday_help", "sounds_harmful", "borderline_safety"}


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in PROMPT_FILES[name].read_text(encoding="utf-8").splitlines()]


def normal(text: str) -> str:
    return " ".join(text.lower().split())


def test_prompts_cover_all_categories_in_both_files() -> None:
    training, held_out = rows("embedded:demo-prompts"), rows("embedded:demo-eval-prompts")
    assert len(training) + len(held_out) >= 96
    for part in (training, held_out):
        counts = Counter(row["category"] for row in part)
        assert set(counts) == CATEGORIES
        assert min(counts.values()) >= len(part) / 6
        assert all(row["prompt"].strip() == row["prompt"] != "" for row in part)


def test_no_prompt_is_there_twice_or_in_both_files() -> None:
    texts = [normal(row["prompt"]) for name in PROMPT_FILES for row in rows(name)]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("objective", ["helpful", "harmless"])
def test_preferences_are_many_distinct_and_usable(objective: str) -> None:
    pairs, left_out = read_preferences(f"embedded:{objective}")
    assert not left_out
    assert len(pairs) >= 150
    assert len({prompt_id(pair.messages) for pair in pairs}) == len(pairs)
    assert len({normal(pair.messages[-1]["content"]) for pair in pairs}) == len(pairs)
    assert all(pair.chosen.strip() and pair.rejected.strip() for pair in pairs)
    assert all(normal(pair.chosen) != normal(pair.rejected) for pair in pairs)


@pytest.mark.parametrize("objective", ["helpful", "harmless"])
def test_length_does_not_tell_the_better_answer(objective: str) -> None:
    pairs, _ = read_preferences(f"embedded:{objective}")
    longer_rejected = sum(len(pair.rejected) > len(pair.chosen) for pair in pairs) / len(pairs)
    assert 0.4 <= longer_rejected <= 0.6


def test_the_demo_configuration_names_what_is_there() -> None:
    config = load_config("embedded:demo")
    assert check_source("prompts", config.prompts) != check_source("evaluation.prompts", config.evaluation.prompts)
    assert {"helpful", "harmless"} <= set(config.rewards)
    rules = [reward for reward in config.rewards.values() if isinstance(reward, RuleReward)]
    assert rules
    for rule in rules:
        load_function(rule.function, rule.args)
