"""What the scoring actor does when its reward cannot go on."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NoReturn

import pyarrow as pa
import pytest

from rc_ray.config import RuleReward
from rc_ray.core import schemas
from rc_ray.generation.engine import EngineDied
from rc_ray.pipeline.actors import ScoreGroups


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
