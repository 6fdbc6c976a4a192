"""SIGKILL in the middle of training, of a worker or of the driver: it goes on from its last checkpoint and ends with the same weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import FinishedRun, make_llama


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def kill_at(command: list[str], record: Path, checkpoint: str, worker_at: str | None = None) -> None:
    """Starts a training and kills its driver when Ray Train's record of the checkpoints that count names this one; one of two workers before, at
    `worker_at`."""
    victim = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def wait_for(name: str) -> None:
        deadline = time.monotonic() + 240
        while not (record.exists() and name in record.read_text()):
            assert victim.poll() is None, "training ended before it could be killed"
            assert time.monotonic() < deadline, f"no checkpoint {name} was written"
            time.sleep(0.05)

    if worker_at is not None:
        wait_for(worker_at)
        children = psutil.Process(victim.pid).children(recursive=True)
        workers = [each for each in children if "TrainWorker" in " ".join(each.cmdline())]
        assert len(workers) == 2, [" ".join(each.cmdline())[:80] for each in children]
        workers[1].kill()
    wait_for(checkpoint)
    victim.kill()
    victim.wait()
    time.sleep(5)  # Ray's processes notice that their driver is gone


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
    record = run / "ledger" / "training" / "dpo" / "checkpoint_manager_snapshot.json"
    kill_at(command, record, "step-000003", worker_at="step-000001")
    assert not (run / "model").exists()
    record.write_text("")  # as where the kill meets Ray in its writing

    resumed = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    # The first line after the start shows the three steps of four pairs that were there already.
    steps = [
        int(line.split()[1].split("/")[0]) for line in resumed.stdout.splitlines() if line.startswith("train ") and "/" in line
    ]
    assert next(done for done in steps if done) >= 12
    before, after = weights(finished_run.folder / "model"), weights(run / "model")
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-6) for name in before)


def test_a_killed_reward_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    make_llama(tmp_path / "base", seed=3)
    for name, chosen, rejected in (("a", "hello", "are"), ("b", "you", "today")):
        rows = [
            {"prompt": f"question {name} {i}", "chosen": f"{chosen} {i}" * (1 + i % 3), "rejected": rejected} for i in range(70)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(output: str) -> list[str]:
        pairs = [argument for name in "ab" for argument in ("--pairs", f"{name}={tmp_path}/{name}.jsonl")]
        options = [
            "--method",
            "more",
            "--momentum",
            "0.5",
            "--base",
            str(tmp_path / "base"),
            "--num-workers",
            "2",
            "--batch-size",
            "4",
        ]
        program = [sys.executable, "-m", "rc_ray", "train-reward", *pairs, *options]
        return [*program, "--epochs", "2", "--save-every-steps", "5", "--output", str(tmp_path / output)]

    undisturbed = subprocess.run(command("whole"), capture_output=True, text=True, timeout=300, check=False)
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    kill_at(command("killed"), tmp_path / "killed.training" / "reward" / "checkpoint_manager_snapshot.json", "step-000020")
    assert not (tmp_path / "killed" / "reward_training.json").exists()
    resumed = subprocess.run(command("killed"), capture_output=True, text=True, timeout=300, check=False)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert set(before) == set(after)
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-6) for name in before)
    # The weights of the sets, and the steps they are averages of, went on, too.
    records = [json.loads((tmp_path / each / "reward_training.json").read_text())["result"] for each in ("whole", "killed")]
    first, second = ({name: s["mean_weight"] for name, s in record["sets"].items()} for record in records)
    assert first == pytest.approx(second, abs=1e-6)
