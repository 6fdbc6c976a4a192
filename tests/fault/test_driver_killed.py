"""SIGKILL of the driver in the middle of sampling: the run resumes, and its output equals that of an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml


def groups(folder: Path) -> list[dict[str, Any]]:
    table = pq.read_table(folder / "candidates").sort_by("prompt_id")
    return list(table.select(["prompt_id", "candidates", "reward.helpful", "reward.length"]).to_pylist())


def test_a_killed_run_resumes_and_repeats_nothing(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"hello {i}"}) + "\n" for i in range(160)))
    base = {**tiny_config, "prompts": {"path": str(prompts)}, "training": {"enabled": False}, "evaluation": {}}
    base["generation"] = {**base["generation"], "max_tokens": 96}
    base["cluster"] = {"chunk_size": 4, "progress_interval_s": 1}

    def command(name: str) -> list[str]:
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**base, "output": str(tmp_path / name)}))
        return [sys.executable, "-m", "rc_ray", "run", str(tmp_path / f"{name}.yaml")]

    victim = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    records = tmp_path / "killed" / "ledger" / "sample"
    deadline = time.monotonic() + 240
    while len(list(records.glob("*.json"))) < 5:
        assert victim.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no chunk was committed"
        time.sleep(0.05)
    second = subprocess.run(command("killed"), capture_output=True, text=True, timeout=120, check=False)
    assert second.returncode != 0
    assert f"in use by process {victim.pid}" in second.stderr
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    time.sleep(5)  # Ray's processes notice that their driver is gone
    committed = {f.name: f.stat().st_mtime_ns for f in records.glob("*.json")}
    assert 5 <= len(committed) < 40

    resumed = subprocess.run(command("killed"), capture_output=True, text=True, timeout=400, check=False)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f"the driver {victim.pid}" in resumed.stdout, "the stale lock was not named"
    assert all((records / name).stat().st_mtime_ns == when for name, when in committed.items()), (
        "a committed chunk was sampled again"
    )
    undisturbed = subprocess.run(command("whole"), capture_output=True, text=True, timeout=400, check=False)
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    killed, whole = groups(tmp_path / "killed"), groups(tmp_path / "whole")
    # Tokens, texts and rewards are equal; a log-probability depends on what else was in the batch in its last digits.
    logprobs = [[c.pop("logprob") for g in run for c in g["candidates"]] for run in (killed, whole)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-3)
    assert killed == whole
    assert len(whole) == 160
