"""SIGKILL of the driver in the middle of DPO: training goes on from its last checkpoint and ends with the same weights."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.conftest import FinishedRun


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())


def test_a_killed_training_resumes_to_the_same_weights(finished_run: FinishedRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    later = ("model", "train", "evaluate", "sample_after", "score_after", "report", "metrics.json")
    shutil.copytree(finished_run.folder, run, ignore=shutil.ignore_patterns(*later))
    command = [
        sys.executable,
        "-m",
        "rc_ray",
        "train",
        str(run),
        "--set",
        f"output={run}",
        "--set",
        "training.save_every_steps=1",
    ]
    victim = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    # Ray Train's record of the checkpoints that count.
    record = run / "ledger" / "training" / "dpo" / "checkpoint_manager_snapshot.json"
    deadline = time.monotonic() + 240
    while not (record.exists() and "step-000002" in record.read_text()):
        assert victim.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.05)
    victim.kill()
    victim.wait()
    time.sleep(5)  # Ray's processes notice that their driver is gone
    assert not (run / "model").exists()

    resumed = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    # The first line after the start shows the two steps of four pairs that were there already.
    steps = [
        int(line.split()[1].split("/")[0]) for line in resumed.stdout.splitlines() if line.startswith("train ") and "/" in line
    ]
    assert next(done for done in steps if done) >= 8
    before, after = weights(finished_run.folder / "model"), weights(run / "model")
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-6) for name in before)
