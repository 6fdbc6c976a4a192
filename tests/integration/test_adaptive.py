"""Adaptive N against a fixed one on real engines: the same pairs' prompts, fewer tokens, the same answers as far as they go."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import rc_ray
from rc_ray.errors import ClusterError, ConfigError
from tests.conftest import FinishedRun


def groups(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["prompt_id"]: row for row in pq.read_table(folder / "candidates").to_pylist()}


def paired(folder: Path) -> set[str]:
    return set(pq.read_table(folder / "pairs", columns=["prompt_id"]).column(0).to_pylist())


def test_more_candidates_only_where_there_is_no_pair_and_no_pair_is_lost(finished_run: FinishedRun, tmp_path: Path) -> None:
    config = copy.deepcopy(finished_run.config) | {
        "output": str(tmp_path / "run"),
        "training": {"enabled": False},
        "evaluation": {},
    }
    config["generation"] |= {"num_candidates": 2, "max_candidates": 6}
    result = rc_ray.run(config, emit=lambda _: None)
    fixed, adaptive = groups(finished_run.folder), groups(tmp_path / "run")
    assert adaptive.keys() == fixed.keys()
    sizes = set()
    for identity, group in adaptive.items():
        whole = fixed[identity]
        size = len(group["candidates"])
        sizes.add(size)
        answers = [[(c["text"], c["token_ids"], c["seed"]) for c in g["candidates"][:size]] for g in (group, whole)]
        assert answers[0] == answers[1]
        for name in ("helpful", "harmless", "length"):
            assert group[f"reward.{name}"] == pytest.approx(whole[f"reward.{name}"][:size], abs=1e-5)
        if identity not in paired(tmp_path / "run") and group["failure"] is None:
            assert size == 6
    assert sizes == {0, 2, 4, 6}
    assert paired(tmp_path / "run") == paired(finished_run.folder)
    tokens = [sum(len(c["token_ids"]) for g in run.values() for c in g["candidates"]) for run in (adaptive, fixed)]
    assert tokens[0] < tokens[1]
    assert result.metrics["sampling"]["tokens"] == tokens[0]
    assert result.metrics["identity"]["prompts"] == finished_run.result.metrics["identity"]["prompts"]


def test_adaptive_sampling_that_cannot_take_effect_is_refused(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    config = copy.deepcopy(tiny_config) | {"prompts": {"path": "unused"}, "output": str(tmp_path / "run")}
    config["generation"] |= {"num_candidates": 2, "max_candidates": 6}
    with pytest.raises(ConfigError, match="needs the rewards while it samples"):
        rc_ray.sample(config, "prompts.jsonl")
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    config |= {"prompts": {"path": str(tmp_path / "p.jsonl")}, "evaluation": {}, "cluster": {"mode": "phased"}}
    with pytest.raises(ClusterError, match="max_candidates needs all pools at once"):
        rc_ray.run(config, emit=lambda _: None)
