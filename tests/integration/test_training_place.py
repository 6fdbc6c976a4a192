"""A training that was broken off goes on where it was, and no other one takes its place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import rc_ray
from rc_ray.errors import ClusterError, ResumeError

RULE = {"kind": "rule", "function": "rc_ray.rewards.rules:length_near", "args": {"target_words": 3}}


def test_a_training_goes_on_with_its_own_pairs_and_options_alone(
    tiny_policy: Path, objective_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from rc_ray.training import dpo

    config = {
        "model": tiny_policy.name,  # from where the command is given, in training as everywhere
        "output": "unused",
        "prompts": {"path": "unused"},
        "rewards": {"kind": RULE, "brief": RULE},
        "training": {"num_workers": 1, "global_batch_size": 4, "per_device_batch_size": 2, "max_steps": 2},
    }
    output, work = tmp_path / "model", tmp_path / "model.training"
    monkeypatch.chdir(tiny_policy.parent)

    def train(rows: list[dict[str, Any]], *overrides: str) -> str:
        return rc_ray.train(config, ray.data.from_items(rows), str(output), overrides=overrides)

    def broken_at(checkpoint: str | None) -> Any:
        def fit(*_: Any, **__: Any) -> None:
            output.mkdir(exist_ok=True)
            (output / "half.safetensors").touch()
            if checkpoint is not None:
                (work / checkpoint).mkdir(parents=True, exist_ok=True)
                (work / checkpoint / "trainer_state.json").touch()
            raise ClusterError("broken off")

        return fit

    rows = pq.read_table(objective_pairs).to_pylist()
    try:
        # The first one reaches no checkpoint, so one with other options takes its place.
        for reached, overrides in ((None, ["training.beta=0.5"]), ("dpo/step-000001", [])):
            with monkeypatch.context() as patched:
                patched.setattr(dpo, "fit", broken_at(reached))
                with pytest.raises(ClusterError, match="broken off"):
                    train(rows, *overrides)
            written = pq.read_table(work / "pairs")
            assert written.num_rows == len(rows), "as many as were given, however often they are"
        with pytest.raises(
            ResumeError, match=r"model\.training' holds checkpoints of another training \(training\.beta: 0\.1 -> 0\.5\)"
        ):
            train(rows, "training.beta=0.5")
        with pytest.raises(ResumeError, match=r"another training \(pairs: "):
            train(rows[1:])
        assert train(rows) == str(output)
        assert (output / "model.safetensors").exists()
        assert not work.exists()
        with pytest.raises(rc_ray.errors.DataError, match="is not empty"):
            train(rows)
    finally:
        ray.shutdown()


def test_a_training_on_other_storage_with_less_usual_options(tiny_policy: Path, objective_pairs: Path, tmp_path: Path) -> None:
    """The folders are given by URIs, as object storage is; checkpoints go there, and the policy and its curves come from there."""
    from rc_ray.config import load_config
    from rc_ray.ledger.storage import Folder
    from rc_ray.pipeline.cluster import connected
    from rc_ray.pipeline.progress import start_board
    from rc_ray.training.dpo import train_dpo

    steps, rate = 6, 1e-3
    config = load_config({
        "model": str(tiny_policy),
        "output": "unused",
        "prompts": {"path": "unused"},
        "rewards": {"kind": RULE, "brief": RULE},
        "training": {
            "num_workers": 2, "global_batch_size": 4, "per_device_batch_size": 1, "max_steps": steps, "learning_rate": rate, "save_every_steps": 2,
            "gradient_checkpointing": True, "loss_type": ["sigmoid_norm", "sft"],
            "trl": {"loss_weights": [1.0, 0.5], "lr_scheduler_type": "cosine"},
        },
    })  # fmt: skip
    output, work, cache = (Folder(f"file://{tmp_path}/{name}") for name in ("model", "work", "cache"))
    assert not output.is_local
    with connected(config.cluster):
        facts = train_dpo(config, Folder.at(objective_pairs), output, work, 1.0, 0.0, start_board(), cache)
    logs = [entry for entry in facts["log_history"] if "loss" in entry]
    assert [entry["learning_rate"] for entry in logs] == pytest.approx(
        [rate * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    )
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert logs[0]["loss"] > math.log(2) + 0.1, "no term of supervised learning"
    assert {"model.safetensors", "README.md", "tokenizer.json"} <= set(output.names())
    assert (output / "runs").listing()
    assert not work.exists()
