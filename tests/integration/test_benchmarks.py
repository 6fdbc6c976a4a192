"""The benchmarks run, on small data, and their competitors return what rc_ray returns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# What these run is tested elsewhere, too.
on_demand = pytest.mark.skipif("RC_RAY_BENCHMARKS" not in os.environ, reason="takes minutes; set RC_RAY_BENCHMARKS")


def test_the_selection_benchmark_finds_equal_results(tmp_path: Path) -> None:
    command = [sys.executable, "tests/benchmarks/bench_selection.py", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    numbers = json.loads((tmp_path / "bench_selection.json").read_text())
    assert len(numbers["bars"]) == 7
    assert (tmp_path / "selection_cost.png").stat().st_size > 10_000
    assert len((tmp_path / "selection_cost.csv").read_text().splitlines()) == 1 + 3 * 16


def test_the_reward_benchmark_finds_equal_rewards(tmp_path: Path) -> None:
    command = [sys.executable, "tests/benchmarks/bench_rewards.py", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    numbers = json.loads((tmp_path / "bench_rewards.json").read_text())
    assert len(numbers["bars"]) == 2 * 3 * 4 + 2 * 2
    assert all(met for text, met in numbers["bars"].items() if "rewards equal those" in text)


@on_demand
def test_the_training_benchmark_finds_equal_losses(shared_data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "tests/benchmarks/bench_training.py", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    numbers = json.loads((tmp_path / "bench_training.json").read_text())
    assert len(numbers["bars"]) == 6
    assert all(met for text, met in numbers["bars"].items() if "losses" in text)
    assert len(numbers["curves"][0]) == 20


@on_demand
def test_the_sampling_benchmark_runs_on_small_data(shared_data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "tests/benchmarks/bench_sampling.py", "--quick", "--output", str(tmp_path)]
    parts = ["--only", "overhead", "volume", "ledger", "adaptive"]
    done = subprocess.run([*command, *parts], cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    numbers = json.loads((tmp_path / "bench_sampling.json").read_text())
    assert len(numbers["bars"]) == 8
    # These do not depend on the speed of the machine.
    assert all(met for text, met in numbers["bars"].items() if text.startswith(("adaptive", "what is done", "a half-finished")))
    assert {run[0]["groups"] for run in numbers["overhead"].values()} == {40}
    assert 0 < numbers["restart"]["groups"] <= 2000
    assert (tmp_path / "sampling_volume.png").stat().st_size > 10_000
