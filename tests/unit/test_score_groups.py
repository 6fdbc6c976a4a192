"""What the scoring actor does when its reward cannot go on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import pyarrow as pa
import pytest

from rc_ray.config import RuleReward
from rc_ray.core import schemas
from rc_ray.generation.engine import EngineDied
from rc_ray.pipeline import actors
from rc_ray.pipeline.actors import ScoreGroups
from rc_ray.rewards.base import Score


class Left(BaseException):
    """Stands for the end of a process."""


def dead(prompts: list[Any], answers: list[str]) -> list[float]:
    raise EngineDied("the engine is gone")


def on_a_broken_device(prompts: list[Any], answers: list[str]) -> list[float]:
    raise RuntimeError("CUDA error: device-side assert triggered; the engine is gone")


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("reward", [dead, on_a_broken_device])
def test_a_reward_that_cannot_go_on_ends_its_process_and_nothing_is_missing_for_it(
    one_by_one: bool, reward: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(status: int) -> NoReturn:
        raise Left(status)

    monkeypatch.setattr(os, "_exit", leave)
    config = RuleReward(kind="rule", function=f"{__name__}:{reward.__name__}")
    # As on a GPU, so that it does not change the priority of this process.
    groups = ScoreGroups("x", config, None, True, 1, None, "score", 3, first=True, last=True, keep_scored=False)
    if one_by_one:
        monkeypatch.setattr(groups, "_score_together", lambda groups: None)
    row = {"prompt_id": "0" * 32, "prompt": [{"role": "user", "content": "hi"}], "candidates": [{"text": "a"}]}
    with pytest.raises(Left):
        groups(pa.Table.from_pylist([row], schema=schemas.GROUP))
    assert "the engine is gone" in capsys.readouterr().err


def template_refuses(prompts: list[Any], answers: list[str]) -> list[float]:
    if "refused" in answers:
        raise ValueError("not this one")
    return [1.0] * len(answers)


def test_an_error_costs_its_group_alone_even_with_a_single_attempt() -> None:
    config = RuleReward(kind="rule", function=f"{__name__}:template_refuses")
    groups = ScoreGroups("x", config, None, True, 1, None, "score", 1, first=True, last=True, keep_scored=False)
    rows = [
        {"prompt_id": f"{i:032}", "prompt": [{"role": "user", "content": "hi"}], "candidates": [{"text": text}]}
        for i, text in enumerate(["a", "refused", "b"])
    ]
    scored = groups(pa.Table.from_pylist(rows, schema=schemas.GROUP))
    assert scored.column("reward.x").to_pylist() == [[1.0], [None], [1.0]]
    missing = scored.column("missing.x").to_pylist()
    assert missing[0] is None
    assert "ValueError: not this one" in missing[1]


@pytest.mark.parametrize(("reads", "least", "most"), [(1, 3, 20), (0, 0, 0)])
def test_a_long_block_is_seen_to_go_on_as_long_as_its_reward_reads(
    reads: int, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        read = 0

        def figures(self) -> dict[str, int]:
            return {"num_texts": self.read}

        def score(self, prompts: list[Any], answers: list[str]) -> list[Score]:
            for _ in range(10):
                time.sleep(0.05)
                self.read += reads
            return [Score(1.0)] * len(answers)

    config = RuleReward(kind="rule", function=f"{__name__}:template_refuses")
    groups = ScoreGroups("x", config, None, True, 1, None, "score", 1, first=True, last=False, keep_scored=False)
    moved: list[tuple[Any, ...]] = []
    nothing = SimpleNamespace(remote=lambda *_: None)
    board = SimpleNamespace(
        advance=SimpleNamespace(remote=lambda *given: moved.append(given)), add_scoring=nothing, error=nothing
    )
    monkeypatch.setattr(actors, "MOVED_INTERVAL_S", 0.02)
    monkeypatch.setattr(groups, "_reward", Slow())
    monkeypatch.setattr(groups._reporter, "_board", board)
    monkeypatch.setattr(groups, "_report", lambda: None)
    monkeypatch.setattr(groups, "_figures", {"num_texts": 0})
    row = {"prompt_id": "0" * 32, "prompt": [{"role": "user", "content": "hi"}], "candidates": [{"text": "a"}]}
    assert groups(pa.Table.from_pylist([row], schema=schemas.GROUP)).column("reward.x").to_pylist() == [[1.0]]
    assert least <= len(moved) <= most
    assert set(moved) <= {("score", 0, 0)}
