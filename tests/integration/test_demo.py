"""The demo's own path at the smallest size: the embedded SmolLM2, reward models trained from the embedded pairs, two workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq


def test_demo_at_the_smallest_size(tmp_path: Path) -> None:
    sizes = [
        "prompts.limit=6",
        "generation.num_candidates=4",
        "generation.max_tokens=48",
        "selection.allow_truncated_winner=true",
    ]
    sizes += ["evaluation.prompts.limit=3", "evaluation.num_samples=1", "training.max_steps=1", "training.global_batch_size=4"]
    overrides = [argument for size in sizes for argument in ("--set", size)]
    command = [sys.executable, "-m", "rc_ray", "run", "embedded:demo", "--set", f"output={tmp_path}/run", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"run directory  {tmp_path}/run" in done.stdout
    assert "6 prompts = " in done.stdout
    pairs, drops = (pq.read_table(tmp_path / "run" / name) for name in ("pairs", "drops"))
    assert pairs.num_rows + drops.num_rows == 6
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["training"]["steps"] == 1
    assert set(metrics["evaluation"]["objectives"]) == {"helpful", "harmless", "concise"}
    assert metrics["sampling"]["candidates"] == 24
