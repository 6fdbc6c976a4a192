"""Fields of `trl.DPOConfig`, read from the sources: importing TRL takes seconds and needs torch, and a wrong key should be found at once."""

from __future__ import annotations

import ast
import difflib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rc_ray.errors import ConfigError

# Class and file, each with the fields that it adds to those of the next.
SOURCES = (("trl", "trainer/dpo_config.py"), ("trl", "trainer/base_config.py"), ("transformers", "training_args.py"))
# Set from other options, or by what rc_ray does itself.
TAKEN = {
    "output_dir": "output", "per_device_train_batch_size": "training.per_device_batch_size", "gradient_accumulation_steps": "training.global_batch_size",
    "learning_rate": "training.learning_rate", "warmup_steps": "training.warmup_steps", "num_train_epochs": "training.num_epochs",
    "max_steps": "training.max_steps", "beta": "training.beta", "loss_type": "training.loss_type", "max_length": "training.max_length",
    "bf16": "training.dtype", "use_cpu": "the cluster", "gradient_checkpointing": "training.gradient_checkpointing",
    "save_strategy": "training.save_every_steps", "save_steps": "training.save_every_steps", "save_total_limit": "training.save_every_steps",
    "logging_steps": "every step", "disable_tqdm": "rc_ray's own progress", "seed": "seed", "data_seed": "seed",
    "precompute_ref_log_probs": "training.reference", "precompute_ref_batch_size": "training.reference", "truncation_mode": "training.max_length",
    "dataset_num_proc": "training.reference", "resume_from_checkpoint": "resuming by itself", "push_to_hub": "nothing: upload the folder `model`",
}  # fmt: skip
# What reference log-probs that are columns do not allow.
IMPOSSIBLE = {
    "ld_alpha": "weighs the reference's tokens, of which only sums are kept",
    "sync_ref_model": "changes the reference while it trains, whose log-probs are computed beforehand",
}
# accelerate takes no notice of these on CPUs.
SHARDING = frozenset({"fsdp", "fsdp_config", "deepspeed"})


@cache
def dpo_arguments() -> frozenset[str]:
    """Names of the fields of the installed TRL's `DPOConfig`; empty where it is not installed, as on a login node."""
    names: set[str] = set()
    for package, file in SOURCES:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return frozenset()
        source = Path(spec.submodule_search_locations[0]) / file
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                names |= {s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)}
    return frozenset(name for name in names if not name.startswith("_"))


def check_dpo_arguments(given: dict[str, Any], on_gpu: bool = True) -> None:
    """Checks the keys of `training.trl`.

    Args:
        on_gpu: whether workers have GPUs.

    Raises:
        ConfigError: TRL has no such field, it is another option's, or it cannot be.
    """
    known = dpo_arguments()
    for name, value in given.items():
        field = f"training.trl.{name} = {value!r}"
        if name in TAKEN:
            raise ConfigError(f"{field}: is set by {TAKEN[name]}; leave it out here")
        if name in IMPOSSIBLE:
            raise ConfigError(f"{field}: {IMPOSSIBLE[name]}; leave it out")
        if name in SHARDING and not on_gpu:
            raise ConfigError(
                f"{field}: is ignored without a GPU, so that every worker would hold the whole model; leave it out, or train on GPUs"
            )
        if known and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see the documentation of `trl.DPOConfig` for the names"
            raise ConfigError(f"{field}: TRL's DPOConfig has no such field; {hint}")
