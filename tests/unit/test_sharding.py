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
from rc_ray.training.policy import LoadsByFileNames, copy_policy
from rc_ray.training.sharding import deepspeed_config

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
        check_training(TrainingConfig(recipe="raco", per_device_batch_size=16, trl={"fsdp": True}), on_gpu=True)
    checkpointing = {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}
    check_training(TrainingConfig(trl=checkpointing), on_gpu=True)
    with pytest.raises(ConfigError, match=r"training\.gradient_checkpointing does the same"):
        check_training(TrainingConfig(trl=checkpointing, gradient_checkpointing=True), on_gpu=True)


def test_what_deepspeed_cannot_do() -> None:
    zero = {"deepspeed": {"zero_optimization": {"stage": 3, GATHER: True}}}
    with pytest.raises(ConfigError, match=r"min_workers = 1: DeepSpeed goes on .* with as many workers"):
        check_training(TrainingConfig(trl=zero, num_workers=2, min_workers=1), on_gpu=True)
    with pytest.raises(ConfigError, match="quantization = '4bit': cannot be sharded by DeepSpeed's stage 3"):
        sharding.check_sharding(TrainingConfig(trl=zero, quantization="4bit", lora_rank=4), on_gpu=True)
    with pytest.raises(ConfigError, match=r"fp16 = True: .*set training\.dtype: float32"):
        check_training(TrainingConfig(trl={"fp16": True}), on_gpu=True)


def test_what_deepspeed_would_choose_by_itself_is_what_other_options_say() -> None:
    zero = {"zero_optimization": {"stage": 2}}
    filled = deepspeed_config(zero)
    assert filled.pop("zero_optimization") == zero["zero_optimization"]
    assert set(filled.values()) == {"auto"}
    assert {"gradient_clipping", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu"} <= filled.keys()
    with pytest.raises(ConfigError, match=r"gradient_clipping = 0\.5: is set by training\.trl\.max_grad_norm"):
        check_training(TrainingConfig(trl={"deepspeed": {**zero, "gradient_clipping": 0.5}}), on_gpu=True)


def test_weights_that_files_name_otherwise_come_back(tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open
    from transformers import OlmoeConfig, OlmoeForCausalLM, Trainer, TrainingArguments

    class Resuming(LoadsByFileNames, Trainer):
        pass

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    model = OlmoeForCausalLM(OlmoeConfig(**sizes, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, pad_token_id=0))
    model.save_pretrained(tmp_path)
    saved = {name: weights.clone() for name, weights in model.state_dict().items()}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) != set(saved), "the trainer's own way would do, too"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    Resuming(model, TrainingArguments(str(tmp_path / "out"), use_cpu=True))._load_from_checkpoint(str(tmp_path))
    assert all(torch.equal(weights, saved[name]) for name, weights in model.state_dict().items())


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
