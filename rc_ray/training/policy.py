"""The policy in a training process: whole, or with a LoRA on it, perhaps in 4 bits; and the folder that it becomes.

Invariant: what is written is a plain Hugging Face folder with safetensors weights, unless only the LoRA is asked for.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rc_ray.config import TrainingConfig
from rc_ray.models.resolve import local_model


def in_bfloat16(training: TrainingConfig, on_gpu: bool) -> bool:
    """Whether the policy computes in bfloat16."""
    return training.dtype == "bfloat16" or (on_gpu and training.dtype == "auto")


def load_policy(path: str, training: TrainingConfig, on_gpu: bool, **options: Any) -> Any:
    """The policy that training starts from; a LoRA is put on it by TRL.

    Args:
        path: local folder, or Hub id.
        options: of `from_pretrained`.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # The weights that a LoRA leaves as they are need no more precision than they are used in.
    small = training.lora_rank is not None and in_bfloat16(training, on_gpu)
    if training.quantization == "4bit":
        quantized = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
        options |= {"quantization_config": quantized, "device_map": {"": torch.cuda.current_device()}}
    dtype = torch.bfloat16 if small else torch.float32
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **options)


def lora_of(training: TrainingConfig) -> Any:
    """The `peft.LoraConfig`; None: the whole policy is trained."""
    if training.lora_rank is None:
        return None
    from peft import LoraConfig, TaskType

    return LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=training.lora_rank, lora_alpha=training.lora_alpha, target_modules="all-linear"
    )


def write_policy(trainer: Any, folder: Path) -> None:
    """Writes what was trained, and the tokenizer; called on every rank, since a sharded policy is put together from all."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))
    if trainer.args.should_save:
        (folder / "training_args.bin").unlink(missing_ok=True)  # pickled


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
