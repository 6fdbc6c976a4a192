"""The bootstrap and the before/after comparison, against values worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rc_ray.config import EvaluationConfig
from rc_ray.core import schemas
from rc_ray.core.statistics import Interval, bootstrap_mean
from rc_ray.errors import DataError
from rc_ray.evaluation.compare import Comparison, ObjectiveComparison, compare

CONFIG = EvaluationConfig(num_bootstrap=200)


def test_the_bootstrap_is_deterministic_by_seed_and_contains_the_mean() -> None:
    values = np.random.default_rng(0).normal(3, 2, 50)
    first = bootstrap_mean(values, 0.95, 500, seed=1)
    assert bootstrap_mean(values, 0.95, 500, seed=1) == first
    assert bootstrap_mean(values, 0.95, 500, seed=2) != first
    assert first.mean == pytest.approx(values.mean())
    assert first.low < first.mean < first.high


def test_the_interval_has_the_ends_that_theory_gives() -> None:
    values = np.random.default_rng(1).normal(0, 2, 400)
    interval = bootstrap_mean(values, 0.95, 2000, seed=0)
    # A normal mean: 1.96 standard errors to either side; the bootstrap's own noise is a few per cent.
    half = 1.96 * values.std() / 20
    assert interval.mean - interval.low == pytest.approx(half, rel=0.1)
    assert interval.high - interval.mean == pytest.approx(half, rel=0.1)


def test_the_interval_narrows_with_data_and_widens_with_confidence() -> None:
    values = np.random.default_rng(2).normal(size=900)

    def width(data: np.ndarray, confidence: float = 0.95) -> float:
        interval = bootstrap_mean(data, confidence, 500, seed=0)
        return interval.high - interval.low

    assert width(values) < width(values[:100]) < width(values[:25])
    assert width(values, 0.5) < width(values, 0.9) < width(values, 0.99)


def test_constant_data_have_an_interval_without_width() -> None:
    assert bootstrap_mean(np.full(7, 2.5), 0.95, 100, seed=0) == Interval(2.5, 2.5, 2.5)
    assert bootstrap_mean(np.array([4.0]), 0.95, 100, seed=0) == Interval(4.0, 4.0, 4.0)


def test_no_data_have_no_mean() -> None:
    with pytest.raises(ValueError, match="no value"):
        bootstrap_mean(np.array([]), 0.95, 100, seed=0)


def groups(rewards: dict[str, dict[str, list[float | None]]], tokens: int = 4) -> pa.Table:
    """Scored groups by prompt id: {prompt: {objective: rewards}}; every answer has `tokens` tokens."""
    objectives = list(next(iter(rewards.values())))
    rows: list[dict[str, Any]] = [
        {
            "prompt_id": prompt,
            "prompt": [{"role": "user", "content": prompt}],
            "candidates": [
                {"text": str(i), "token_ids": [1] * tokens, "finish_reason": "stop", "seed": i, "logprob": -1.0}
                for i in range(len(values[objectives[0]]))
            ],
            **{schemas.reward_column(name): values[name] for name in objectives},
        }
        for prompt, values in rewards.items()
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema([*schemas.GROUP, *schemas.reward_fields(objectives)]))


BEFORE = groups(
    {
        "p1": {"helpful": [1.0, 3.0], "short": [0.0, 0.0]},
        "p2": {"helpful": [0.0, 0.0], "short": [1.0, 1.0]},
        "p3": {"helpful": [5.0, 5.0], "short": [2.0, 4.0]},
        "p4": {"helpful": [1.0, 1.0], "short": [1.0, 1.0]},
    }
)
AFTER = groups(
    {
        "p4": {"helpful": [1.0, 3.0], "short": [1.0, 1.0]},
        "p3": {"helpful": [5.0, 5.0], "short": [1.0, 1.0]},
        "p2": {"helpful": [-1.0, -1.0], "short": [1.0, 1.0]},
        "p1": {"helpful": [4.0, 4.0], "short": [2.0, 2.0]},
    },
    tokens=10,
)


def test_means_differences_and_win_rates_by_hand() -> None:
    result = compare(BEFORE, AFTER, ["helpful", "short"], CONFIG, seed=0)
    helpful, short = result.objectives["helpful"], result.objectives["short"]
    # Prompt means of helpful: 2, 0, 5, 1 before and 4, -1, 5, 2 after: two rise, one falls, one ties.
    assert helpful.before.mean == pytest.approx(8 / 4)
    assert helpful.after.mean == pytest.approx(10 / 4)
    assert helpful.difference.mean == pytest.approx(2 / 4)
    assert helpful.win_rate.mean == pytest.approx(2.5 / 4)
    # Of short: 0, 1, 3, 1 before and 2, 1, 1, 1 after: one rises, one falls, two tie.
    assert short.before.mean == pytest.approx(5 / 4)
    assert short.after.mean == pytest.approx(5 / 4)
    assert short.difference.mean == pytest.approx(0)
    assert short.win_rate.mean == pytest.approx(0.5)
    assert (result.num_prompts, result.num_left_out) == (4, 0)
    assert (result.mean_tokens_before, result.mean_tokens_after) == (4, 10)


def test_the_difference_is_paired_by_prompt() -> None:
    # Prompts differ widely, and every one of them gains exactly 1, so the difference has no width.
    before = groups({f"p{i}": {"a": [10.0 * i]} for i in range(20)})
    after = groups({f"p{i}": {"a": [10.0 * i + 1]} for i in reversed(range(20))})
    objective = compare(before, after, ["a"], CONFIG, seed=0).objectives["a"]
    assert objective.difference == Interval(1.0, 1.0, 1.0)
    assert objective.win_rate == Interval(1.0, 1.0, 1.0)
    assert objective.before.high - objective.before.low > 10


def test_the_comparison_depends_on_neither_row_order_nor_chance() -> None:
    once = compare(BEFORE, AFTER, ["helpful", "short"], CONFIG, seed=3)
    turned = compare(BEFORE.take([3, 1, 0, 2]), AFTER.take([2, 0, 1, 3]), ["helpful", "short"], CONFIG, seed=3)
    assert turned.as_dict() == once.as_dict()


def test_prompts_without_all_rewards_are_left_out_and_counted() -> None:
    before = groups(
        {
            "whole": {"a": [1.0, 1.0], "b": [1.0, 1.0]},
            "lacks-one": {"a": [9.0, None], "b": [9.0, 9.0]},
            "lacks-after": {"a": [9.0, 9.0], "b": [9.0, 9.0]},
            "no-answers": {"a": [], "b": []},
            "absent-after": {"a": [9.0], "b": [9.0]},
        }
    )
    after = groups(
        {
            "whole": {"a": [2.0, 2.0], "b": [0.0, 0.0]},
            "lacks-one": {"a": [9.0, 9.0], "b": [9.0, 9.0]},
            "lacks-after": {"a": [9.0, 9.0], "b": [None, 9.0]},
            "no-answers": {"a": [9.0], "b": [9.0]},
        }
    )
    result = compare(before, after, ["a", "b"], CONFIG, seed=0)
    assert (result.num_prompts, result.num_left_out) == (1, 4)
    assert result.objectives["a"].before.mean == 1.0
    assert result.objectives["b"].difference.mean == -1.0
    assert "1 held-out prompts, 4 left out" in result.lines()[-1]


def test_no_common_prompt_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no held-out prompt.*missing\.\*"):
        compare(groups({"x": {"a": [1.0]}}), groups({"y": {"a": [1.0]}}), ["a"], CONFIG, seed=0)
    with pytest.raises(DataError, match="no held-out prompt"):
        compare(groups({"x": {"a": [1.0]}}), groups({"x": {"a": [None]}}), ["a"], CONFIG, seed=0)


def test_the_table_is_aligned() -> None:
    wide, narrow = Interval(-1234.5, -2000, -1000), Interval(0.5, 0.25, 0.75)
    objectives = {"a": ObjectiveComparison(*[narrow] * 4), "a_long_name": ObjectiveComparison(narrow, wide, wide, narrow)}
    lines = Comparison(9, 0, 0.9, objectives, 12.4, 30).lines()
    table, summary = lines[:-1], lines[-1]
    assert len(table) == 3
    assert len({len(line) for line in table}) == 1
    assert table[0].split() == ["objective", "before", "after", "difference", "win", "rate"]
    assert table[1].startswith("a            0.500 [0.250, 0.750]")
    assert "+0.500 [+0.250, +0.750]" in table[1]
    assert "-1234.500 [-2000.000, -1000.000]" in table[2]
    assert summary == "9 held-out prompts, 90% paired bootstrap intervals, mean answer 12 -> 30 tokens"


def test_the_comparison_is_ready_for_json() -> None:
    recorded = compare(BEFORE, AFTER, ["helpful", "short"], CONFIG, seed=0).as_dict()
    assert set(recorded["objectives"]) == {"helpful", "short"}
    assert set(recorded["objectives"]["short"]["win_rate"]) == {"mean", "low", "high"}
    assert isinstance(recorded["objectives"]["short"]["win_rate"]["mean"], float)
