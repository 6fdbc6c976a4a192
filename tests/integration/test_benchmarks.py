"""The benchmarks run, on small data, and their competitors return what rc_ray returns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_the_selection_benchmark_finds_equal_results(tmp_path: Path) -> None:
    command = [sys.executable, "tests/benchmarks/bench_selection.py", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    numbers = json.loads((tmp_path / "bench_selection.json").read_text())
    assert len(numbers["bars"]) == 7
    assert (tmp_path / "selection_cost.png").stat().st_size > 10_000
    assert len((tmp_path / "selection_cost.csv").read_text().splitlines()) == 1 + 3 * 16
