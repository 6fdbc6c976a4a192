"""Fields of `trl.DPOConfig`, read from the sources: importing TRL takes seconds and needs torch, and a wrong key should be found at once."""

from __future__ import annotations

import ast
import builtins
import difflib
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from rc_ray.config import TrainingConfig
from rc_ray.errors import ConfigError
from rc_ray.training import sharding

# Class and file, each with the fields that it adds to those of the next.
SOURCES = (("trl", "trainer/dpo_config.py"), ("trl", "trainer/base_config.py"), ("transformers", "training_args.py"))
# Set from other options, or by what rc_ray does itself.
TAKEN = {
    "output_dir": "output", "report_to": "training.report_to", "run_name": "output", "per_device_train_batch_size": "training.per_device_batch_size", "gradient_accumulation_steps": "training.global_batch_size",
    "learning_rate": "training.learning_rate", "warmup_steps": "training.warmup_steps", "num_train_epochs": "training.num_epochs",
    "max_steps": "training.max_steps", "beta": "training.beta", "loss_type": "training.loss_type", "max_length": "training.max_length",
    "bf16": "training.dtype", "use_cpu": "the cluster", "gradient_checkpointing": "training.gradient_checkpointing",
    "save_strategy": "training.save_every_steps", "save_steps": "training.save_every_steps", "save_total_limit": "training.save_every_steps",
    "logging_steps": "every step", "logging_strategy": "every step", "logging_first_step": "every step", "logging_nan_inf_filter": "nothing: a loss that is no number ends the training", "disable_tqdm": "rc_ray's own progress", "seed": "seed", "data_seed": "seed",
    "precompute_ref_log_probs": "training.reference", "precompute_ref_batch_size": "training.reference", "truncation_mode": "training.max_length",
    "dataset_num_proc": "training.reference", "resume_from_checkpoint": "resuming by itself", "push_to_hub": "nothing: upload the folder `model`",
}  # fmt: skip
# What reference log-probs that are columns do not allow.
IMPOSSIBLE = {
    "ld_alpha": "weighs the reference's tokens, of which only sums are kept",
    "sync_ref_model": "changes the reference while it trains, whose log-probs are computed beforehand",
    "model_init_kwargs": "is ignored for a model that is loaded already",
    "auto_find_batch_size": "would make steps of fewer pairs than training.global_batch_size",
    "dataloader_drop_last": "would leave pairs out",
    "ignore_data_skip": "would train twice on pairs after a restart, and not on others",
    "eval_strategy": "needs pairs that are not trained on, of which a training here has none",
    "load_best_model_at_end": "needs pairs that are not trained on, of which a training here has none",
    "save_only_model": "leaves the optimizer out of checkpoints, so that a killed training could not go on as it was",
}
# Of TRL's own loss, in whose place these recipes have theirs.
OWN_LOSS = ("mix", "modpo", "raco")
OF_THE_LOSS = (
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "use_weighting",
    "loss_weights",
    "discopop_tau",
)
# Losses that take what others leave without effect.
TAKERS = {
    "label_smoothing": ("robust", "exo_pair", "aot", "aot_unpaired"),
    "discopop_tau": ("discopop",),
}
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
OF_DIVERGENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
LOSSES = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
    "discopop", "sft",
)  # fmt: skip


@cache
def dpo_arguments() -> dict[str, str]:
    """Fields of the installed TRL's `DPOConfig` and their types; empty where it is not installed, as on a login node."""
    fields: dict[str, str] = {}
    for package, file in SOURCES:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return {}
        source = Path(spec.submodule_search_locations[0]) / file
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            for field in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.target.id[0] != "_":
                    fields.setdefault(field.target.id, ast.unparse(field.annotation))
    return fields


class _Types(dict[str, Any]):
    """Types by the names that annotations use; what is not built in can be anything."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, Any)


def is_a(value: Any, annotation: str) -> bool:
    """Whether a value read from YAML or JSON is of an annotated type; 0 and 1 are truth values, too."""
    if "bool" in annotation and value in (0, 1):
        return True
    expected = eval(annotation, {}, _Types(Literal=Literal))
    try:
        TypeAdapter(expected, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError:
        return False
    return True


def check_training(training: TrainingConfig, on_gpu: bool | None = None) -> None:
    """Checks what other libraries must know or have: losses, `training.trl`, trackers, quantization.

    Args:
        on_gpu: whether workers have GPUs; None: not known yet.

    Raises:
        ConfigError: TRL has no such loss or field, an option is another one's, or it cannot be here.
    """
    for loss in training.losses:
        if loss not in LOSSES:
            raise ConfigError(f"training.loss_type = {loss!r}: TRL has no such loss{_hint(loss, LOSSES)}")
    weights = training.trl.get("loss_weights")
    if weights is not None and (not isinstance(weights, list) or len(weights) != len(training.losses)):
        raise ConfigError(
            f"training.trl.loss_weights = {weights!r}: must be a list with a number for each of training.loss_type = {training.losses}"
        )
    for tracker in training.report_to:
        if find_spec(tracker) is None:
            raise ConfigError(
                f"training.report_to = {tracker!r}: the package is not installed; `pip install {tracker}` here and on all nodes, or leave it out"
            )
    if training.quantization != "none" and on_gpu is False:
        raise ConfigError(
            f"training.quantization = {training.quantization!r}: needs GPUs, and training workers have none; leave it out, or train on GPUs"
        )
    if training.quantization != "none" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"training.quantization = {training.quantization!r}: needs the package bitsandbytes; `pip install bitsandbytes` here and on all nodes"
        )
    ignored = [name for name in OF_THE_LOSS if name in training.trl]
    if training.recipe in OWN_LOSS and ignored:
        raise ConfigError(
            f"training.trl.{ignored[0]} = {training.trl[ignored[0]]!r}: has no effect on training.recipe = {training.recipe}, which has a loss of its own; "
            "leave it out"
        )
    _check_trl(training.trl)
    if training.trl.get("fp16") and training.dtype != "float32":
        raise ConfigError(
            f"training.trl.fp16 = True: with training.dtype = {training.dtype} it would compute in bfloat16, too; set training.dtype: float32"
        )
    _check_loss(training.losses, training.trl)
    sharding.check_sharding(training, on_gpu)


def _check_trl(given: dict[str, Any]) -> None:
    known = dpo_arguments()
    for name, value in given.items():
        field = f"training.trl.{name} = {value!r}"
        if name in TAKEN:
            raise ConfigError(f"{field}: is set by {TAKEN[name]}; leave it out here")
        if name in IMPOSSIBLE:
            raise ConfigError(f"{field}: {IMPOSSIBLE[name]}; leave it out")
        if known and name not in known:
            raise ConfigError(f"{field}: TRL's DPOConfig has no such field{_hint(name, known)}")
        if known and name not in sharding.FIELDS and not is_a(value, known[name]):
            more = "; YAML reads numbers such as 1e-8 as text, write 1.0e-8" if isinstance(value, str) else ""
            raise ConfigError(f"{field}: must be {known[name]}, as TRL's DPOConfig has it{more}")


def _check_loss(losses: list[str], given: dict[str, Any]) -> None:
    """What TRL would leave without effect, or refuse when its trainer is made, after everything else was done."""
    for name, takers in TAKERS.items():
        if given.get(name) and not set(losses) & set(takers):
            more = "; robust (arXiv 2403.00409) is DPO for labels that are wrong so often" if name == "label_smoothing" else ""
            raise ConfigError(
                f"training.trl.{name} = {given[name]!r}: has no effect on training.loss_type = {losses}; choose one of {', '.join(takers)}, or leave it "
                f"out{more}"
            )
    divergence = given.get("f_divergence_type", "reverse_kl")
    if divergence not in DIVERGENCES:
        raise ConfigError(f"training.trl.f_divergence_type = {divergence!r}: TRL has {', '.join(DIVERGENCES)}")
    if divergence != "reverse_kl" and not set(losses) <= set(OF_DIVERGENCES):
        raise ConfigError(
            f"training.trl.f_divergence_type = {divergence!r}: is for training.loss_type {', '.join(OF_DIVERGENCES)}, not {losses}; leave it out"
        )
    if "f_alpha_divergence_coef" in given and divergence != "alpha_divergence":
        raise ConfigError(
            f"training.trl.f_alpha_divergence_coef = {given['f_alpha_divergence_coef']!r}: has no effect without f_divergence_type: alpha_divergence"
        )
    if "exo_pair" in losses and not given.get("label_smoothing"):
        raise ConfigError(
            "training.loss_type = exo_pair: needs training.trl.label_smoothing above 0; its paper (arXiv 2402.00856) takes 0.001"
        )
    if given.get("use_weighting") and set(losses) & {"aot", "aot_unpaired"}:
        raise ConfigError(
            "training.trl.use_weighting = True: is not for the losses aot and aot_unpaired, which sort the pairs; leave it out"
        )


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; see the documentation of `trl.DPOConfig` for the names"
