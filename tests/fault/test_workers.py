"""Workers that die, hang or fail: what is lost, what is said, and what a run does next. Real engines, real processes."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rc_ray.errors import ClusterError
from rc_ray.pipeline.run import run
from tests.fault.conftest import StartDriver, write_prompts
from tests.fault.drivers import NUM_CHUNKS, NUM_LONG, NUM_MOMENTS, assert_same_outcome, kill, moments

# An actor, the stage whose commits say when it dies, and the first and last of these: while its pool has work.
ACTORS = (
    ("GenerateGroups", "sample", 1, NUM_CHUNKS // 3),
    ("ScoreGroups_helpful", "sample", NUM_CHUNKS // 3, 2 * NUM_CHUNKS // 3),
    ("ScoreGroups_length", "score", 2 * NUM_CHUNKS // 3, NUM_CHUNKS - 3),
)


@pytest.fixture
def quick_config(config: dict[str, Any]) -> dict[str, Any]:
    """Short answers and no slow rule, for tests that need no middle."""
    config["generation"]["max_tokens"] = 16
    config["rewards"]["length"] = {"kind": "rule", "function": "tests.fault.rules:length"}
    return config


def drops(folder: Path) -> dict[str, tuple[str, str]]:
    """Reason and detail by prompt."""
    by_id = {row["prompt_id"]: (row["reason"], row["detail"]) for row in pq.read_table(folder / "drops").to_pylist()}
    groups = pq.read_table(folder / "candidates", columns=["prompt_id", "prompt"]).to_pylist()
    return {g["prompt"][-1]["content"]: by_id[g["prompt_id"]] for g in groups if g["prompt_id"] in by_id}


@pytest.mark.parametrize("attempt", range(math.ceil(NUM_MOMENTS / len(ACTORS))))
def test_killed_actors_are_replaced_and_the_output_is_that_of_an_undisturbed_run(
    attempt: int, config: dict[str, Any], driver: StartDriver, whole: Path
) -> None:
    config["cluster"]["max_attempts"] = len(ACTORS) + 2  # should all deaths meet one group
    running = driver(config)
    for name, stage, first, last in ACTORS:
        (moment,) = moments(first, last, number=1)
        running.reach(moment, stage)
        kill(running.worker(name))
    running.finished()
    assert_same_outcome(running.folder, whole)


@pytest.mark.parametrize("attempt", range(NUM_LONG))
def test_a_killed_worker_process_of_vllm_ends_its_engine_which_is_replaced(
    attempt: int, config: dict[str, Any], driver: StartDriver, whole: Path
) -> None:
    # On CPUs the engine is inside the actor; this makes vLLM start a process for the model, as it does for several GPUs.
    config["generation"]["engine"] |= {"distributed_executor_backend": "mp"}
    running = driver(config)
    (moment,) = moments(1, NUM_CHUNKS // 2, number=1)
    running.reach(moment, "sample")
    actor = running.worker("GenerateGroups")
    kill(running.worker("VLLM::Worker", root=actor))
    running.finished()
    assert_same_outcome(running.folder, whole)


def test_a_hanging_engine_ends_the_run_with_its_name_and_the_run_resumes(
    config: dict[str, Any], driver: StartDriver, whole: Path
) -> None:
    config["cluster"] |= {"stall_timeout_s": 30}
    hanging = driver(config)
    hanging.wait_for_commits(1, "sample")
    os.kill(hanging.worker("GenerateGroups"), signal.SIGSTOP)
    printed = hanging.ended()
    assert hanging.process.returncode != 0
    for words in ("nothing finished for 3", "GenerateGroups stopped", "are in work", "actors: 1 running", "to resume"):
        assert words in printed
    resumed = driver(config)
    resumed.finished()
    assert_same_outcome(resumed.folder, whole)


def test_a_prompt_that_kills_the_scorer_or_raises_is_dropped_alone(quick_config: dict[str, Any], tmp_path: Path) -> None:
    quick_config["rewards"] = {
        "deadly": {"kind": "rule", "function": "tests.fault.rules:deadly", "args": {"word": "hello 13"}},
        "raising": {"kind": "rule", "function": "tests.fault.rules:raising", "args": {"word": "hello 21"}},
    }
    run(quick_config, emit=lambda _: None)
    found = drops(tmp_path / "run")
    lacking = {prompt: detail for prompt, (reason, detail) in found.items() if reason == "reward_missing"}
    assert set(lacking) == {"hello 13", "hello 21"}
    assert "its process died in 3 attempts" in lacking["hello 13"]
    assert "RuntimeError: no such planet" in lacking["hello 21"]


def test_a_prompt_that_kills_the_engine_is_dropped_alone(quick_config: dict[str, Any], tmp_path: Path) -> None:
    # Prefilling a seeded request in several chunks kills vLLM's CPU engine; the others are short enough for one.
    quick_config["generation"]["engine"] = {"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "max_num_seqs": 32}
    prompts = [f"hello {i}" for i in range(11)] + ["hello " * 60]
    quick_config["prompts"] = {"path": str(write_prompts(tmp_path, prompts))}
    run(quick_config, emit=lambda _: None)
    failed = {prompt: detail for prompt, (reason, detail) in drops(tmp_path / "run").items() if reason == "generation_failed"}
    assert list(failed) == ["hello " * 60]
    assert "its process died in 3 attempts: the vLLM engine died" in failed["hello " * 60]
    sampled = pq.read_table(tmp_path / "run" / "candidates", columns=["candidates"]).column(0).to_pylist()
    assert sum(bool(answers) for answers in sampled) == 11


def test_a_run_that_is_plainly_broken_ends_and_tries_again_what_failed(quick_config: dict[str, Any], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    quick_config["rewards"]["length"] = {
        "kind": "rule",
        "function": "tests.fault.rules:broken_while",
        "args": {"path": str(broken)},
    }
    with pytest.raises(
        ClusterError, match=r"groups failed, more than cluster.max_failed_fraction = 0.5 allows.*length: .*service is down"
    ):
        run(quick_config, emit=lambda _: None)
    broken.unlink()
    result = run(quick_config, emit=lambda _: None)
    assert result is not None
    assert "reward_missing" not in result.metrics["identity"]["drops"]
