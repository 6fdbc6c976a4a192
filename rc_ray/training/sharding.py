"""FSDP2 and DeepSpeed, asked for by TRL's own fields in `training.trl`: what accelerate, transformers or DeepSpeed would take no notice of, or find
only when workers have begun, is found before.

Sources: `TrainingArguments._process_fsdp_args` and `HfTrainerDeepSpeedConfig` of transformers 5.19.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rc_ray.config import TrainingConfig
from rc_ray.errors import ConfigError

FIELDS = ("fsdp", "fsdp_config", "deepspeed")
# Keys of `fsdp_config`; transformers drops any other one without a word. Those of FSDP 1 and of XLA are not among them.
FSDP_KEYS = frozenset({
    "version", "reshard_after_forward", "cpu_offload", "auto_wrap_policy", "min_num_params", "transformer_layer_cls_to_wrap", "cpu_ram_efficient_loading",
    "state_dict_type", "activation_checkpointing",
})  # fmt: skip
ZERO_STAGES = (0, 1, 2, 3)
# Of DeepSpeed's configuration, with the option that sets it. "auto" takes that option's value.
SET_ELSEWHERE = {
    "train_batch_size": "training.global_batch_size", "train_micro_batch_size_per_gpu": "training.per_device_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size", "optimizer.params.lr": "training.learning_rate",
    "scheduler.params.warmup_num_steps": "training.warmup_steps", "scheduler.params.warmup_max_lr": "training.learning_rate",
    "optimizer.params.betas": "training.trl.adam_beta1 and adam_beta2", "optimizer.params.eps": "training.trl.adam_epsilon",
    "optimizer.params.weight_decay": "training.trl.weight_decay", "gradient_clipping": "training.trl.max_grad_norm",
    "scheduler.params.total_num_steps": "training.num_epochs", "bf16.enabled": "training.dtype", "fp16.enabled": "training.dtype",
}  # fmt: skip


def is_sharded(training: TrainingConfig) -> bool:
    """Whether no worker holds the whole policy."""
    return bool(training.trl.get("fsdp") or training.trl.get("deepspeed"))


def check_sharding(training: TrainingConfig, on_gpu: bool | None) -> None:
    """Checks `training.trl.fsdp`, `fsdp_config` and `deepspeed`.

    Args:
        on_gpu: whether workers have GPUs; None: not known yet.

    Raises:
        ConfigError: a value that would be ignored, that cannot be, or that another option sets.
    """
    given = {field: training.trl[field] for field in FIELDS if training.trl.get(field)}
    for field, value in given.items():
        if on_gpu is False:
            raise ConfigError(
                f"training.trl.{field} = {value!r}: is ignored without a GPU, so that every worker would hold the whole model; leave it out, or train on GPUs"
            )
    if "fsdp" in given and "deepspeed" in given:
        raise ConfigError("training.trl.fsdp and training.trl.deepspeed: only one of them can shard the policy; leave one out")
    if "fsdp_config" in given and "fsdp" not in given:
        raise ConfigError(f"training.trl.fsdp_config = {given['fsdp_config']!r}: is ignored without `fsdp: true`; set it, too")
    if given and training.recipe == "raco":
        raise ConfigError(
            f"training.recipe = raco: compares gradients of whole weights, which workers do not hold with training.trl.{next(iter(given))}; leave that out"
        )
    if "fsdp" in given:
        _check_fsdp(given["fsdp"], _read("fsdp_config", given.get("fsdp_config", {})), training.gradient_checkpointing)
    if "deepspeed" in given:
        if find_spec("deepspeed") is None:
            raise ConfigError(
                "training.trl.deepspeed: needs the package deepspeed; `pip install deepspeed` here and on all nodes"
            )
        stage = _check_deepspeed(_read("deepspeed", given["deepspeed"]))
        if stage == 3 and training.quantization != "none":
            raise ConfigError(
                f"training.quantization = {training.quantization!r}: cannot be sharded by DeepSpeed's stage 3; leave one of them out, or take fsdp"
            )
        if training.min_workers not in (None, training.num_workers):
            raise ConfigError(
                f"training.min_workers = {training.min_workers}: DeepSpeed goes on from a checkpoint with as many workers as wrote it; leave it out"
            )


def deepspeed_config(given: Any) -> dict[str, Any]:
    """DeepSpeed's configuration, in which what other options set, and it would take its own values for, is filled in by transformers."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {**dict.fromkeys(names, "auto"), **_read("deepspeed", given)}


def _read(field: str, value: Any) -> dict[str, Any]:
    """A mapping, or a file with one."""
    if isinstance(value, str):
        try:
            value = json.loads(Path(value).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"training.trl.{field} = {value!r}: is no JSON file that can be read: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"training.trl.{field} = {value!r}: must be a mapping, or the path of a JSON file with one")
    return value


def _check_fsdp(switch: Any, given: dict[str, Any], gradient_checkpointing: bool) -> None:
    if switch is not True:
        raise ConfigError(f"training.trl.fsdp = {switch!r}: must be true; all else is in training.trl.fsdp_config")
    for key, value in given.items():
        field = f"training.trl.fsdp_config.{key} = {value!r}"
        name = key.removeprefix("fsdp_")
        if name not in FSDP_KEYS:
            raise ConfigError(f"{field}: would be ignored; the keys are {', '.join(sorted(FSDP_KEYS))}")
        if name == "version" and value != 2:
            raise ConfigError(f"{field}: transformers takes FSDP 1 away in its next version; leave it out, which means 2")
        if name == "activation_checkpointing" and value and gradient_checkpointing:
            raise ConfigError(f"{field}: training.gradient_checkpointing does the same; set one of them")


def _check_deepspeed(given: dict[str, Any]) -> int:
    """Returns the stage of ZeRO."""
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"training.trl.deepspeed.zero_optimization = {zero!r}: must be a mapping")
    stage = zero.get("stage", 0)
    if stage not in ZERO_STAGES:
        raise ConfigError(
            f"training.trl.deepspeed.zero_optimization.stage = {stage!r}: must be one of {', '.join(map(str, ZERO_STAGES))}"
        )
    if stage == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise ConfigError(
            "training.trl.deepspeed.zero_optimization.stage3_gather_16bit_weights_on_model_save: must be true with stage 3, or no worker could write the policy"
        )
    for path, option in SET_ELSEWHERE.items():
        value: Any = given
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value not in (None, "auto"):
            raise ConfigError(f'training.trl.deepspeed.{path} = {value!r}: is set by {option}; leave it out, or write "auto"')
    return int(stage)
