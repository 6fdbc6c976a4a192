"""`rc-ray calibrate` as a user calls it: a known miscalibration is found, and a report is written."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import make_llama

RULE = """
def logit(prompts, answers, *, scale):
    return [scale * float(answer.split()[-1]) for answer in answers]
"""


def test_rewards_three_times_too_large_are_recovered(tmp_path: Path, tiny_policy: Path) -> None:
    (tmp_path / "logits.py").write_text(RULE)
    with (tmp_path / "pairs.jsonl").open("w") as file:
        # Calibrated: of 100 pairs with the same difference x, 100 sigma(x) prefer the answer of the higher logit.
        for step in range(60):
            x = 0.05 + 0.1 * step
            right = round(100 / (1 + math.exp(-x)))
            for i in range(100):
                chosen, rejected = (x, 0.0) if i < right else (0.0, x)
                row = {"prompt": f"question {step}.{i}", "chosen": f"answer {chosen}", "rejected": f"answer {rejected}"}
                file.write(json.dumps(row) + "\n")
        file.write(json.dumps({"prompt": "same", "chosen": "answer 1", "rejected": "answer 1"}) + "\n")
    config = {
        "model": str(tiny_policy),
        "output": "run",
        "prompts": {"path": "pairs.jsonl"},
        "rewards": {
            name: {"kind": "rule", "function": "logits:logit", "args": {"scale": scale}}
            for name, scale in (("plain", 1.0), ("loud", 3.0))
        },
        "cluster": {"chunk_size": 500},
    }
    (tmp_path / "my.yaml").write_text(json.dumps(config))
    command = [
        sys.executable,
        "-m",
        "rc_ray",
        "calibrate",
        "my.yaml",
        "--pairs",
        "plain=pairs.jsonl",
        "--pairs",
        "loud=pairs.jsonl",
    ]
    done = subprocess.run(
        [*command, "--precision", "0.95", "--output", "found"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "found" / "calibration.json").read_text())
    plain, loud = found["trust"]["plain"], found["trust"]["loud"]
    assert plain["temperature"] == pytest.approx(1, rel=0.05)
    assert loud["temperature"] == pytest.approx(3, rel=0.05)
    assert loud["temperature"] == pytest.approx(3 * plain["temperature"], rel=1e-3)
    assert plain["ece_held_out"] < 0.02 < 0.03 < loud["ece_held_out"]
    assert loud["ece_scaled"] == pytest.approx(plain["ece_scaled"], abs=1e-3)
    assert plain["num_pairs"] == 6000
    assert found["agreement"] == {"plain, loud": 1.0}
    assert found["margins"]["loud"] == pytest.approx(3 * found["margins"]["plain"], rel=1e-3)
    assert found["with_margins"]["loud"]["precision"]["mean"] > 0.93
    assert (tmp_path / "found" / "reliability.png").stat().st_size > 5_000
    assert "1 rows of pairs.jsonl left out: equal answers" in done.stdout
    assert not (tmp_path / "run").exists()
    again = subprocess.run(
        [*command, "--output", "found"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert again.returncode == 3
    assert "not empty" in again.stderr


def test_a_reward_model_that_fails_its_self_test_ends_the_command_with_the_reason(tmp_path: Path, tiny_policy: Path) -> None:
    from transformers import AutoTokenizer

    folder = make_llama(tmp_path / "reward", seed=1, labels=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    config = {
        "model": str(tiny_policy),
        "output": "run",
        "prompts": {"path": "pairs.jsonl"},
        "rewards": {
            "twice": {"kind": "classifier", "model": str(folder)},
            "brief": {"kind": "rule", "function": "rc_ray.rewards.rules:length_near", "args": {"target_words": 5}},
        },
    }
    (tmp_path / "my.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "rc_ray", "calibrate", "my.yaml", "--pairs", "twice=pairs.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 5, done.stdout[-2000:] + done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("rc-ray: ClusterError: scoring the labelled pairs failed: ")
    assert "failed its self-test: its texts begin with 2 tokens '<s>'" in last
