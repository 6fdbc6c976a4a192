"""A run whose sampling ends early: what is there is selected, nothing is lost, and a larger budget gives the undisturbed output."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import rc_ray
from rc_ray.config import load_config
from rc_ray.errors import ClusterError
from rc_ray.ledger import rundir
from rc_ray.pipeline import stages
from rc_ray.pipeline.graph import BLOCKS_PER_ENGINE
from rc_ray.pipeline.run import RunResult, pending

NUM_PROMPTS = 60


@pytest.fixture(scope="module")
def config(small_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("budget")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"hello {i}"}) + "\n" for i in range(NUM_PROMPTS)))
    config = copy.deepcopy(small_config) | {"prompts": {"path": str(folder / "prompts.jsonl")}, "evaluation": {}}
    config["cluster"] |= {"chunk_size": 2}
    config["training"] |= {"max_steps": 1}
    return config | {"output": str(folder / "run")}


def run(config: dict[str, Any], *overrides: str) -> tuple[RunResult, list[str]]:
    lines: list[str] = []
    result = rc_ray.run(config, overrides, emit=lines.append)
    assert result is not None
    identity = result.metrics["identity"]
    assert identity["prompts"] == identity["paired"] + identity["dropped"] + identity["not_sampled"] == NUM_PROMPTS
    return result, lines


def outcome(folder: str) -> Any:
    pairs = pq.read_table(f"{folder}/pairs").sort_by("prompt_id")
    return pairs.select(["prompt_id", "chosen_index", "rejected_index", "chosen", "rejected", "gap"]).to_pylist()


def test_a_budget_ends_the_run_and_a_larger_one_goes_on_to_the_same_output(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, lines = run(config, "budget.target_pairs=5")
    identity = first.metrics["identity"]
    # Beyond the budget: what the engine holds, and what waits for its rewards, however slow these are.
    assert 5 <= identity["paired"] <= 4 + 2 * BLOCKS_PER_ENGINE * 2
    assert identity["not_sampled"] > 0
    assert any("budget.target_pairs = 5 is reached" in line and "rc-ray train" in line for line in lines)
    assert "training" not in first.metrics
    again, lines = run(config, "budget.target_pairs=5")
    assert again.metrics == first.metrics
    assert not any(line.startswith("ray ") for line in lines), "Ray was started for nothing"
    tokens = first.metrics["sampling"]["tokens"]
    second, _ = run(config, f"budget.max_generated_tokens={tokens + 100}")
    assert second.metrics["identity"]["not_sampled"] < identity["not_sampled"]
    run_dir = rundir.open_existing(config["output"])
    assert "max_generated_tokens" in run_dir.manifest()["ended"]

    def dies(*_: Any) -> None:
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "sample_and_score", dies)
        with pytest.raises(SystemExit):
            run(config)
    assert run_dir.manifest()["ended"] is None, "`rc-ray train` would take less than there is for what was to be trained on"
    whole, lines = run(config)
    assert whole.metrics["identity"]["not_sampled"] == 0
    assert whole.metrics["training"]["steps"] == 1
    # A budget that the last chunk uses up has ended nothing.
    tokens = whole.metrics["sampling"]["tokens"]
    undisturbed, lines = run(
        config | {"output": config["output"] + "-whole"}, "training.enabled=false", f"budget.max_generated_tokens={tokens}"
    )
    assert undisturbed.metrics["identity"]["not_sampled"] == 0
    assert not any(line.startswith("budget") for line in lines)
    assert outcome(whole.run_dir) == outcome(undisturbed.run_dir)


def test_pairs_cannot_end_a_run_that_scores_after_sampling(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        ClusterError, match=r"budget\.target_pairs = 5 needs rewards while sampling, but set in the configuration"
    ):
        run(config | {"output": str(tmp_path / "run")}, "budget.target_pairs=5", "cluster.mode=phased")


def test_a_deadline_that_has_passed_samples_nothing(config: dict[str, Any], tmp_path: Path) -> None:
    result, lines = run(config | {"output": str(tmp_path / "late")}, "budget.deadline=2020-01-01T00:00:00Z")
    assert result.metrics["identity"]["not_sampled"] == NUM_PROMPTS
    assert any("budget.deadline = 2020-01-01T00:00:00+00:00 has passed" in line for line in lines)


def test_training_on_what_there_is_settles_the_prompts(
    config: dict[str, Any], small_config: dict[str, Any], tmp_path: Path
) -> None:
    config = config | {"output": str(tmp_path / "run"), "evaluation": small_config["evaluation"]}
    run(config, "budget.target_pairs=5")
    rc_ray.train(config, overrides=["budget.target_pairs=5"])
    assert (tmp_path / "run" / "model" / "config.json").exists()
    # By itself, with the configuration that the run began with, it may still be evaluated; and a run with the budget goes on to that.
    run_dir, limited = rundir.open_existing(config["output"]), ["budget.target_pairs=5"]
    assert pending(load_config(config), run_dir, "evaluate") == ["evaluate"]
    assert pending(load_config(config, limited), run_dir, None) == ["evaluate"]
    with pytest.raises(rc_ray.ResumeError, match="was trained on the pairs of the prompts sampled so far"):
        rc_ray.run(config, emit=lambda _: None)
