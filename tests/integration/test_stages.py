"""Stages on their own: on a run directory and on Datasets, one actor or several, and the same candidates every time."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import rc_ray
from rc_ray.cli import main
from rc_ray.config import SelectionConfig
from rc_ray.core.selection import select_pairs
from tests.conftest import FinishedRun
from tests.unit.selection_reference import group_table, numbered_groups


@pytest.fixture(scope="module")
def ray_session() -> Any:
    """One local Ray for the tests of this module, so that lazy Datasets can be read after a stage has returned."""
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def candidates(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Everything about the candidates by prompt, but for the log-probability, whose last digits depend on the batch."""
    return {
        row["prompt_id"]: [(c["seed"], c["token_ids"], c["text"], c["finish_reason"]) for c in row["candidates"]]
        for file in folder.glob("*.parquet")
        for row in pq.read_table(file, columns=["prompt_id", "candidates"]).to_pylist()
    }


def test_three_actors_and_other_chunks_in_another_order_give_the_same_candidates(
    finished_run: FinishedRun, tmp_path: Path, ray_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every block is larger than Ray Data would leave whole.
    monkeypatch.setattr(ray_session.data.DataContext.get_current(), "target_max_block_size", 256)
    prompts = Path(finished_run.config["prompts"]["path"]).read_text().splitlines(keepends=True)
    (tmp_path / "shuffled.jsonl").write_text("".join(random.Random(0).sample(prompts, len(prompts))))
    config = copy.deepcopy(finished_run.config) | {
        "output": str(tmp_path / "run"),
        "prompts": {"path": str(tmp_path / "shuffled.jsonl")},
    }
    rc_ray.sample(config, overrides=["generation.pool.size=3", "cluster.chunk_size=3"])
    again = candidates(tmp_path / "run" / "candidates")
    assert sum(bool(group) for group in again.values()) == 30
    assert again == candidates(finished_run.folder / "candidates")
    # Scoring and selection then add up to the same pairs, from the command line and in phased order.
    assert main(["score", str(tmp_path / "run")]) == 0
    assert main(["select", str(tmp_path / "run")]) == 0
    pairs = [
        pq.read_table(f / "pairs").sort_by("prompt_id").drop_columns(["gap"]) for f in (finished_run.folder, tmp_path / "run")
    ]
    columns = ["prompt_id", "chosen_index", "rejected_index"]
    assert pairs[0].select(columns).equals(pairs[1].select(columns))


def test_datasets_in_datasets_out(tiny_config: dict[str, Any], ray_session: Any) -> None:
    config = copy.deepcopy(tiny_config) | {"prompts": {"path": "not used", "column": "question"}, "output": "not used"}
    prompts = ray_session.data.from_items([{"question": q} for q in ("hello", "world", "hello", "")])
    groups = rc_ray.score(config, rc_ray.sample(config, prompts))
    assert not isinstance(groups, ray_session.data.dataset.MaterializedDataset)  # there is room for all pools at once
    groups = groups.materialize()
    rows = groups.take_all()
    assert sorted(str(r["failure"]) for r in rows) == ["None", "None", "duplicate_prompt", "empty_prompt"]
    assert all(len(r["candidates"]) == len(r["reward.helpful"]) == 6 for r in rows if r["failure"] is None)
    pairs, drops = rc_ray.select(config, groups)
    assert pairs.count() + drops.count() == 4
    assert {"duplicate_prompt", "empty_prompt"} <= {r["reason"] for r in drops.take_all()}


def test_transforms_are_fitted_to_the_whole_dataset(ray_session: Any) -> None:
    rewards = np.random.default_rng(0).normal(size=(60, 4, 3)).astype(np.float32)
    table = group_table(numbered_groups(rewards.tolist()), ["helpful", "harmless", "length"])
    transforms = {"helpful": {"kind": "zscore", "clip": [-1, 1]}, "harmless": {"kind": "quantile"}, "length": {"kind": "lsc"}}
    rule = {"kind": "rule", "function": "rc_ray.rewards.rules:length_near"}
    config = {
        "model": "not used", "output": "not used", "prompts": {"path": "not used"},
        "rewards": dict.fromkeys(transforms, rule), "selection": {"transforms": transforms},
    }  # fmt: skip
    parts = ray_session.data.from_arrow([table.slice(0, 13), table.slice(13, 1), table.slice(14)])
    pairs, drops = rc_ray.select(config, parts)
    expected = select_pairs(table, SelectionConfig(transforms=transforms)).pairs.sort_by("prompt_id")
    rows = sorted(pairs.take_all(), key=lambda row: row["prompt_id"])
    assert len(rows) + drops.count() == 60
    for column in ("prompt_id", "chosen_index", "rejected_index", "gap"):
        assert [row[column] for row in rows] == expected.column(column).to_pylist()


def test_command_line_stages_on_files(
    tiny_config: dict[str, Any], finished_run: FinishedRun, tmp_path: Path, ray_session: Any
) -> None:
    import yaml

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(finished_run.config))
    source = str(finished_run.folder / "candidates")
    assert main(["select", str(tmp_path / "config.yaml"), "--input", source, "--output", str(tmp_path / "selected")]) == 0
    pairs = pq.read_table(tmp_path / "selected" / "pairs")
    assert pairs.num_rows == pq.read_table(finished_run.folder / "pairs").num_rows
    options = [
        "--input",
        str(tmp_path / "selected" / "pairs"),
        "--output",
        str(tmp_path / "policy"),
        "--set",
        "training.max_steps=1",
    ]
    assert main(["train", str(tmp_path / "config.yaml"), *options]) == 0
    assert (tmp_path / "policy" / "model.safetensors").is_file()
    assert main(["score", str(tmp_path / "config.yaml"), "--input", source, "--output", str(tmp_path / "policy")]) == 3
