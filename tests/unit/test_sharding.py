"""What is asked of FSDP2 and DeepSpeed is checked before any worker begins; that they train is in tests/integration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rc_ray.config import TrainingConfig
from rc_ray.errors import ClusterError, ConfigError
from rc_ray.training import sharding
from rc_ray.training.arguments import check_training
from rc_ray.training.policy import copy_policy

GATHER = "stage3_gather_16bit_weights_on_model_save"


@pytest.fixture(autouse=True)
def _deepspeed_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "find_spec", lambda _: True)


@pytest.mark.parametrize(
    "given",
    [
        {"fsdp": True},
        {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": False}},
        {"deepspeed": {"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}},
        {"deepspeed": {"zero_optimization": {"stage": 3, GATHER: True}}},
    ],
)
def test_what_can_be_is_taken_on_gpus_and_refused_without_since_it_would_be_ignored(given: dict[str, Any]) -> None:
    for on_gpu in (None, True):
        check_training(TrainingConfig(trl=given), on_gpu)
    with pytest.raises(ConfigError, match="is ignored without a GPU"):
        check_training(TrainingConfig(trl=given), on_gpu=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fsdp_config": {"version": 2}}, "is ignored without `fsdp: true`"),
        ({"fsdp": "full_shard auto_wrap"}, "must be true"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "FSDP 1"),
        ({"fsdp": True, "fsdp_config": {"reshard_after_fowrard": False}}, "would be ignored; the keys are"),
        ({"fsdp": True, "fsdp_config": [1]}, "must be a mapping"),
        ({"fsdp": True, "deepspeed": {"zero_optimization": {"stage": 2}}}, "only one of them"),
        ({"deepspeed": "no/such/file.json"}, "no JSON file that can be read"),
        ({"deepspeed": {"zero_optimization": {"stage": 4}}}, "stage = 4: must be one of 0, 1, 2, 3"),
        ({"deepspeed": {"zero_optimization": 3}}, "must be a mapping"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, GATHER),
        ({"deepspeed": {"train_batch_size": 8}}, "train_batch_size = 8: is set by training.global_batch_size"),
        ({"deepspeed": {"optimizer": {"params": {"lr": 1}}}}, "optimizer.params.lr = 1: is set by training.learning_rate"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_training(TrainingConfig(trl=given), on_gpu=True)


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(ConfigError, match=GATHER):
        check_training(TrainingConfig(trl={"deepspeed": str(file)}))


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="recipe = raco: compares gradients of whole weights"):
        check_training(TrainingConfig(recipe="raco", trl={"fsdp": True}), on_gpu=True)
    checkpointing = {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}
    check_training(TrainingConfig(trl=checkpointing), on_gpu=True)
    with pytest.raises(ConfigError, match=r"training\.gradient_checkpointing does the same"):
        check_training(TrainingConfig(trl=checkpointing, gradient_checkpointing=True), on_gpu=True)


def test_deepspeed_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install deepspeed"):
        check_training(TrainingConfig(trl={"deepspeed": {"zero_optimization": {"stage": 2}}}), on_gpu=True)


def test_a_checkpoint_becomes_a_policy_if_it_has_whole_weights(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-6"
    (checkpoint / "pytorch_model_fsdp_0").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "trainer_state.json", "optimizer.bin", "rng_state_0.pth"):
        (checkpoint / name).write_text("{}")
    with pytest.raises(ClusterError, match="only parts of the weights"):
        copy_policy(checkpoint, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    (checkpoint / "model.safetensors").touch()
    copy_policy(checkpoint, tmp_path / "model")
    assert {file.name for file in (tmp_path / "model").iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
