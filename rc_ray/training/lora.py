"""LoRAs of policies and of reward models, and the precision that training computes in.

Invariant: the weights that a LoRA leaves as they are have no more precision than they are used in.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rc_ray.config import RewardTrainingConfig, TrainingConfig
from rc_ray.models.resolve import local_model

Options = TrainingConfig | RewardTrainingConfig


def in_bfloat16(options: Options, on_gpu: bool) -> bool:
    """Whether the model computes in bfloat16."""
    return options.dtype == "bfloat16" or (on_gpu and options.dtype == "auto")


def weights_dtype(options: Options, on_gpu: bool) -> Any:
    """The `torch.dtype` that weights are loaded in; those of a LoRA are float32 in any case."""
    import torch

    return torch.bfloat16 if options.lora_rank and in_bfloat16(options, on_gpu) else torch.float32


def lora_of(options: Options, task_type: str) -> Any:
    """The `peft.LoraConfig` for a task by PEFT's name; None: the whole model is trained."""
    if options.lora_rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(task_type=task_type, r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules="all-linear")


def finish_lora(folder: Path, training: TrainingConfig, model: str, **options: Any) -> None:
    """Makes of a folder with a LoRA what was asked for: the policy with the LoRA merged into it, or a LoRA that names its policy.

    Args:
        model: the policy by its name in the configuration.
        options: of `from_pretrained`.
    """
    if training.merge_adapter:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        adapter = folder.rename(folder.with_name("adapter"))
        base = AutoModelForCausalLM.from_pretrained(local_model(model), dtype=torch.float32, use_safetensors=True, **options)
        PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().save_pretrained(folder)
        for file in adapter.iterdir():
            if not file.name.startswith("adapter_") and not (folder / file.name).exists():
                shutil.copy(file, folder)
        shutil.rmtree(adapter)
    else:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": model}, indent=2) + "\n")
