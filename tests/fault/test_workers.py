"""Workers that die, hang or fail: what is lost, what is said, and what a run does next. Real engines, real processes."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from rc_ray.errors import ClusterError
from rc_ray.pipeline.run import run

NUM_PROMPTS = 48


@pytest.fixture
def config(tiny_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Sampling and two rewards on 48 prompts in chunks of 4, without training."""
    config = copy.deepcopy(tiny_config) | {"training": {"enabled": False}, "evaluation": {}, "output": str(tmp_path / "run")}
    config["rewards"] = {
        "helpful": config["rewards"]["helpful"],
        "length": {"kind": "rule", "function": "tests.fault.rules:length"},
    }
    config["cluster"] = {"chunk_size": 4, "progress_interval_s": 1}
    return config | {"prompts": {"path": str(write_prompts(tmp_path, [f"hello {i}" for i in range(NUM_PROMPTS)]))}}


def write_prompts(folder: Path, prompts: list[str]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def drops(folder: Path) -> dict[str, tuple[str, str]]:
    """Reason and detail by prompt."""
    by_id = {row["prompt_id"]: (row["reason"], row["detail"]) for row in pq.read_table(folder / "drops").to_pylist()}
    groups = pq.read_table(folder / "candidates", columns=["prompt_id", "prompt"]).to_pylist()
    return {g["prompt"][-1]["content"]: by_id[g["prompt_id"]] for g in groups if g["prompt_id"] in by_id}


def outcome(folder: Path) -> Any:
    groups = pq.read_table(folder / "candidates").sort_by("prompt_id").to_pylist()
    answers = [(g["prompt_id"], [(c["text"], c["token_ids"]) for c in g["candidates"]], g["reward.helpful"]) for g in groups]
    pairs = pq.read_table(folder / "pairs").sort_by("prompt_id").select(["prompt_id", "chosen_index", "rejected_index"])
    return answers, pairs.to_pylist()


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(config: dict[str, Any]) -> subprocess.Popen[str]:
        path = tmp_path / f"{Path(config['output']).name}.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "rc_ray", "run", str(path)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def descendants(pid: int) -> list[int]:
    children = [int(p) for task in Path(f"/proc/{pid}/task").glob("*/children") for p in task.read_text().split()]
    return [*children, *(d for child in children for d in descendants(child))]


def worker(driver: subprocess.Popen[str], name: str, deadline_s: float = 120) -> int:
    """The process of an actor of this driver's cluster, by the title that Ray gives it."""
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        assert driver.poll() is None, driver.communicate()[0]
        for pid in descendants(driver.pid):
            try:
                title = Path(f"/proc/{pid}/cmdline").read_text()
            except OSError:
                continue
            if title.startswith("ray::") and name in title:
                return pid
        time.sleep(0.1)
    raise AssertionError(f"no worker {name}")


def wait_for_commits(folder: Path, stage: str, number: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while len(list((folder / "ledger" / stage).glob("*.json"))) < number:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no {number} commits of {stage}"
        time.sleep(0.05)


def test_a_killed_engine_is_replaced_and_the_output_is_that_of_an_undisturbed_run(
    config: dict[str, Any], driver: Callable[[dict[str, Any]], subprocess.Popen[str]], tmp_path: Path
) -> None:
    config["generation"] |= {"max_tokens": 96}
    killed = driver(config)
    wait_for_commits(tmp_path / "run", "sample", 2, killed)
    os.kill(worker(killed, "GenerateGroups"), signal.SIGKILL)
    printed, _ = killed.communicate(timeout=400)
    assert killed.returncode == 0, printed
    whole = driver(config | {"output": str(tmp_path / "whole")})
    printed, _ = whole.communicate(timeout=400)
    assert whole.returncode == 0, printed
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert len(outcome(tmp_path / "run")[0]) == NUM_PROMPTS


def test_a_hanging_engine_ends_the_run_with_its_name_and_the_run_resumes(
    config: dict[str, Any], driver: Callable[[dict[str, Any]], subprocess.Popen[str]], tmp_path: Path
) -> None:
    config["generation"] |= {"max_tokens": 96}
    config["cluster"] |= {"stall_timeout_s": 30}
    hanging = driver(config)
    wait_for_commits(tmp_path / "run", "sample", 1, hanging)
    os.kill(worker(hanging, "GenerateGroups"), signal.SIGSTOP)
    printed, _ = hanging.communicate(timeout=240)
    assert hanging.returncode != 0
    for words in ("nothing finished for 3", "GenerateGroups stopped", "are in work", "actors: 1 running", "to resume"):
        assert words in printed
    resumed = driver(config)
    printed, _ = resumed.communicate(timeout=400)
    assert resumed.returncode == 0, printed
    assert len(outcome(tmp_path / "run")[0]) == NUM_PROMPTS


def test_a_prompt_that_kills_the_scorer_or_raises_is_dropped_alone(config: dict[str, Any], tmp_path: Path) -> None:
    config["rewards"] = {
        "deadly": {"kind": "rule", "function": "tests.fault.rules:deadly", "args": {"word": "hello 13"}},
        "raising": {"kind": "rule", "function": "tests.fault.rules:raising", "args": {"word": "hello 21"}},
    }
    run(config, emit=lambda _: None)
    found = drops(tmp_path / "run")
    lacking = {prompt: detail for prompt, (reason, detail) in found.items() if reason == "reward_missing"}
    assert set(lacking) == {"hello 13", "hello 21"}
    assert "its process died in 3 attempts" in lacking["hello 13"]
    assert "RuntimeError: no such planet" in lacking["hello 21"]


def test_a_prompt_that_kills_the_engine_is_dropped_alone(config: dict[str, Any], tmp_path: Path) -> None:
    # Prefilling a seeded request in several chunks kills vLLM's CPU engine; the others are short enough for one.
    config["generation"]["engine"] = {"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "max_num_seqs": 32}
    prompts = [f"hello {i}" for i in range(11)] + ["hello " * 60]
    config["prompts"] = {"path": str(write_prompts(tmp_path, prompts))}
    run(config, emit=lambda _: None)
    failed = {prompt: detail for prompt, (reason, detail) in drops(tmp_path / "run").items() if reason == "generation_failed"}
    assert list(failed) == ["hello " * 60]
    assert "its process died in 3 attempts: the vLLM engine died" in failed["hello " * 60]
    assert sum(bool(answers) for _, answers, _ in outcome(tmp_path / "run")[0]) == 11


def test_a_run_that_is_plainly_broken_ends_and_tries_again_what_failed(config: dict[str, Any], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    config["rewards"]["length"] = {"kind": "rule", "function": "tests.fault.rules:broken_while", "args": {"path": str(broken)}}
    with pytest.raises(
        ClusterError, match=r"groups failed, more than cluster.max_failed_fraction = 0.5 allows.*length: .*service is down"
    ):
        run(config, emit=lambda _: None)
    broken.unlink()
    result = run(config, emit=lambda _: None)
    assert result is not None
    assert "reward_missing" not in result.metrics["identity"]["drops"]
