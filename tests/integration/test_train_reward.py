"""`rc-ray train-reward`: several preference sets on two workers, one head per objective, a LoRA, and the same numbers when the model is used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rc_ray.config import ClassifierReward, load_reward_training
from rc_ray.errors import DataError, ResumeError
from rc_ray.rewards.classifier import ClassifierRewardModel
from rc_ray.training.preferences import read_preferences
from rc_ray.training.reward_model import RewardTrainingResult, prepare, train_here
from tests.conftest import make_llama

# What each set prefers; the words are unrelated, so one logit can learn both.
SETS = {"kind": ("hello", "are", 60), "brief": ("you", "today you are", 45)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and a file of pairs per set."""
    folder = tmp_path_factory.mktemp("train_reward")
    make_llama(folder / "base", seed=5)
    for name, (chosen, rejected, count) in SETS.items():
        rows = [{"prompt": f"question {name} {i}", "chosen": chosen, "rejected": rejected} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(folder: Path, **given: Any) -> dict[str, Any]:
    return {"base": str(folder / "base"), "learning_rate": 2e-3, "num_epochs": 3, "batch_size": 8, "num_test": 15, **given}


def files(folder: Path) -> dict[str, str]:
    return {name: str(folder / f"{name}.jsonl") for name in SETS}


def train(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> tuple[RewardTrainingResult, Path]:
    """In this process, as embedded models are."""
    monkeypatch.setenv("RC_RAY_CACHE", str(cache))
    result = train_here(files(folder), "embedded:reward-test", load_reward_training(options(folder, **given)), lambda *_: None)
    return result, Path(result.output)


def scored(model: ClassifierRewardModel, name: str, answers: list[str]) -> list[float]:
    found = model.score([[{"role": "user", "content": f"question {name} 1"}]] * len(answers), answers)
    assert all(score.value is not None for score in found)
    return [score.value or 0.0 for score in found]


def test_two_workers_learn_two_sets_at_once_and_a_second_call_trains_nothing(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rc_ray", "train-reward", "--output", str(tmp_path / "model"), "--method", "more"]
    for name, path in files(folder).items():
        command += ["--pairs", f"{name}={path}"]
    for name, value in options(folder, num_workers=2).items():
        command += [f"--{name.replace('num_epochs', 'epochs').replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "model" / "reward_training.json").read_text())["result"]
    assert record["method"] == "more"
    assert {name: (s["num_train"], s["num_test"], s["num_repeated"]) for name, s in record["sets"].items()} == {
        "kind": (45, 15, 0),
        "brief": (30, 15, 15),
    }
    assert all(s["accuracy"] == 1.0 for s in record["sets"].values()), record
    assert sum(s["mean_weight"] for s in record["sets"].values()) == pytest.approx(1)
    assert 0 <= record["conflicts"] <= 1
    assert not (tmp_path / "model.training").exists(), "checkpoints are removed at the end"

    # The saved model gives the held-out differences that the record rests on.
    model = ClassifierRewardModel(
        ClassifierReward(kind="classifier", model=str(tmp_path / "model")), on_gpu=False, num_threads=1
    )
    held_out = pq.read_table(tmp_path / "model" / "held_out.parquet").to_pylist()
    assert len(held_out) == 30
    by_id = {}
    for name, path in files(folder).items():
        for p in read_preferences(path)[0]:
            chosen, rejected = (score.value for score in model.score([p.messages] * 2, [p.chosen, p.rejected]))
            by_id[(name, p.messages[0]["content"])] = (chosen or 0.0) - (rejected or 0.0)
    assert sorted(row["difference"] for row in held_out) == pytest.approx(
        sorted(by_id[(name, content)] for name, content in by_id if content in _held_out_prompts(folder, name)), abs=1e-4
    )

    again = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert again.returncode == 0
    assert "trained nothing" in again.stdout
    other = subprocess.run([*command, "--seed", "1"], capture_output=True, text=True, timeout=100, check=False)
    assert other.returncode == 3
    assert "holds something else" in other.stderr


def _held_out_prompts(folder: Path, name: str) -> set[str]:
    from rc_ray.training.reward_data import split_by_prompt

    sets = {each: read_preferences(path)[0] for each, path in files(folder).items()}
    _, test = split_by_prompt(sets, None, 15, 0)
    return {p.messages[0]["content"] for p in test[name]}


def test_a_head_per_objective_is_used_by_its_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, output = train(folder, tmp_path, monkeypatch, heads="per_objective")
    assert all(s.accuracy == 1.0 for s in result.sets.values())
    heads = {
        name: ClassifierRewardModel(
            ClassifierReward(kind="classifier", model=str(output), label=name, label_score="logit"), on_gpu=False, num_threads=1
        )
        for name in SETS
    }
    for name, (chosen, rejected, _) in SETS.items():
        better, worse = scored(heads[name], name, [chosen, rejected])
        assert better > worse
    both = [scored(head, "kind", ["hello"])[0] for head in heads.values()]
    assert abs(both[0] - both[1]) > 1e-3, "the heads are two"


def test_a_lora_is_merged_and_changes_no_layer_by_more_than_its_rank(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, output = train(folder, tmp_path, monkeypatch, lora_rank=2, lora_alpha=8, learning_rate=5e-3)
    assert all(s.accuracy > 0.9 for s in result.sets.values())
    base, tuned = (
        AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32).state_dict()
        for path in (folder / "base", output)
    )
    assert set(base) == set(tuned)
    changed = {name for name in base if not name.startswith("score") and not torch.equal(base[name], tuned[name])}
    linear = {name for name in base if name.endswith("_proj.weight")}
    assert changed == linear
    assert all(int(torch.linalg.matrix_rank(tuned[name] - base[name], atol=1e-4)) <= 2 for name in linear)


def test_a_lora_that_was_trained_in_bfloat16_is_merged_without_rounding(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, output = train(folder, tmp_path, monkeypatch, lora_rank=2, lora_alpha=8, learning_rate=5e-3, dtype="bfloat16")
    assert all(s.accuracy > 0.9 for s in result.sets.values())
    tuned = AutoModelForSequenceClassification.from_pretrained(output, dtype="auto").state_dict()
    assert {weights.dtype for weights in tuned.values()} == {torch.float32}
    assert any(not torch.equal(weights, weights.bfloat16().float()) for name, weights in tuned.items() if "q_proj" in name)


def test_another_training_in_the_same_place_is_refused_with_the_difference(folder: Path, tmp_path: Path) -> None:
    given = load_reward_training(options(folder))
    output = tmp_path / "model"
    begun = prepare(files(folder), str(output), given)
    begun.work.write_json("begun.json", begun.recipe)
    assert prepare(files(folder), str(output), given).recipe == begun.recipe
    smaller = load_reward_training(options(folder, batch_size=4))
    assert prepare(files(folder), str(output), smaller).result is None, "no checkpoint would be lost"
    (begun.work / "reward" / "step-000001").write_json("trainer_state.json", {})
    with pytest.raises(ResumeError, match=r"model\.training. holds checkpoints of another training .batch_size: 8 -> 4"):
        prepare(files(folder), str(output), smaller)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="holds something else"):
        prepare(files(folder), str(tmp_path / "other"), given)
