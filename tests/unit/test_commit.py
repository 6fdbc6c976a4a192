"""What is committed with a chunk, and what is taken back when too many of its groups failed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rc_ray.config import SelectionConfig
from rc_ray.core import schemas
from rc_ray.errors import ResumeError
from rc_ray.ledger.ledger import Ledger
from rc_ray.ledger.storage import Folder
from rc_ray.pipeline import actors, graph
from rc_ray.pipeline.graph import GroupRun

BOARD = SimpleNamespace(committed=SimpleNamespace(remote=lambda *_: None))


def run_at(folder: Path) -> GroupRun:
    at = [Folder.at(folder / name) for name in ("prompts", "groups", "ledger")]
    return GroupRun(None, at[0], at[1], Ledger(at[2]), "prompts", "sample", "score")  # type: ignore[arg-type]


def commit(run: GroupRun, objectives: list[str], stage: str = "score", **rewards: list[float]) -> None:
    """Chunk 0, one prompt with two candidates that have these rewards, in the order given."""
    answer = {"finish_reason": "stop", "seed": 0, "sum_logprob": -1.0, "token_ids": [1], "policy": None}
    group = {
        "prompt_id": "0" * 32, "prompt": [{"role": "user", "content": "q"}], "failure": None,
        "candidates": [{"text": text, **answer} for text in "ab"],
    }  # fmt: skip
    table = pa.Table.from_pylist([group], schema=schemas.GROUP)
    run.prompts.write_table("chunk-000000.parquet", table.select(["prompt_id", "prompt"]))
    for name, values in rewards.items():
        table = table.append_column(schemas.reward_fields([name])[0], pa.array([values], pa.list_(pa.float32())))
        table = table.append_column(schemas.reward_fields([name])[1], pa.array([None], pa.string()))
    block = table.append_column(actors.CHUNK, pa.array([0], pa.int32())).append_column(actors.SAMPLED, pa.array([False]))
    selection = SelectionConfig() if stage == "score" else None
    actors.commit_groups(block, run.ledger, stage, run.prompts, run.groups, objectives, stage == "sample", BOARD, selection)


def test_rewards_are_in_the_same_order_in_all_files(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    for given in ({"a": [1.0, 2.0], "b": [3.0, 5.0]}, {"b": [3.0, 5.0], "a": [1.0, 2.0]}):
        commit(run, ["a", "b"], **given)
        table = pq.read_table(tmp_path / "groups" / "chunk-000000.parquet")
        assert schemas.scored_objectives(table.schema) == ["a", "b"]
        assert (table["reward.a"].to_pylist(), table["reward.b"].to_pylist()) == ([[1.0, 2.0]], [[3.0, 5.0]])


def test_a_chunk_without_a_reward_of_the_run_is_not_committed(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    with pytest.raises(ResumeError, match=r"chunk 0 has no reward\.a; nothing was committed"):
        commit(run, ["a", "b"], b=[3.0, 5.0])
    assert run.ledger.done("score") == set()
    commit(run, ["a", "b"], stage="score_b", b=[3.0, 5.0])  # one reward after the other
    assert run.ledger.done("score_b") == {0}


def test_a_commit_of_candidates_that_ray_repeats_leaves_their_rewards(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    commit(run, ["a"], stage="sample")
    commit(run, ["a"], a=[1.0, 2.0])
    commit(run, ["a"], stage="sample")
    assert pq.read_table(tmp_path / "groups" / "chunk-000000.parquet")["reward.a"].to_pylist() == [[1.0, 2.0]]


def test_rewards_go_with_the_candidates_that_are_given_back(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    records: dict[str, list[dict[str, Any]]] = {
        "sample": [{"failed": 0}, {"failed": 2}, {"failed": 0}],
        "score_a": [{"groups": 0}, {"groups": 0}, {"groups": 0}],  # as a fork writes them
        "score": [{"failed": 1}, {"failed": 0}, {"failed": 0}],
    }
    for stage, counts in records.items():
        for chunk, count in enumerate(counts):
            run.ledger.commit(stage, chunk, count, {})
    graph.give_back_failed(run, ["a", "b"], "score")
    assert {stage: run.ledger.done(stage) for stage in records} == {"sample": {0, 2}, "score_a": {0, 2}, "score": {2}}
    graph.give_back_failed(run, ["a", "b"], "score_a")
    assert run.ledger.done("score_a") == {0, 2}
