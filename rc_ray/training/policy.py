"""The policy in a training process, perhaps in 4 bits, and the folder that it becomes.

Invariant: what is written is a Hugging Face folder with safetensors weights and nothing pickled.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rc_ray.config import TrainingConfig
from rc_ray.errors import ClusterError
from rc_ray.training.lora import weights_dtype


def load_policy(path: str, training: TrainingConfig, on_gpu: bool, **options: Any) -> Any:
    """The policy that training starts from; a LoRA is put on it by TRL.

    Args:
        path: local folder, or Hub id.
        options: of `from_pretrained`.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if training.quantization == "4bit":
        quantized = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            # FSDP shards no whole numbers, and leaves them on every GPU.
            bnb_4bit_quant_storage=torch.bfloat16 if training.trl.get("fsdp") else None,
        )
        options |= {"quantization_config": quantized, "device_map": {"": torch.cuda.current_device()}}
    return AutoModelForCausalLM.from_pretrained(path, dtype=weights_dtype(training, on_gpu), use_safetensors=True, **options)


class LoadsByFileNames:
    """Of a Hugging Face trainer: whole weights of a checkpoint are loaded by the names that they have in files.

    Those of some models (mixtures of experts, say) are others than in memory, and the trainer itself, which takes them as they are, would
    leave such weights as they were, with a warning (transformers 5.19).
    """

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        from transformers import PreTrainedModel

        model = self.model if model is None else model
        if isinstance(model, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            _load_whole(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]


def _load_whole(model: Any, checkpoint: str) -> None:
    """
    Raises:
        ClusterError: the checkpoint lacks weights.
    """
    loaded, found = type(model).from_pretrained(checkpoint, dtype=model.dtype, use_safetensors=True, output_loading_info=True)
    if found["missing_keys"]:
        raise ClusterError(f"the checkpoint {checkpoint!r} lacks weights: {', '.join(sorted(found['missing_keys'])[:5])}")
    model.load_state_dict(loaded.state_dict())


def copy_policy(checkpoint: Path, folder: Path) -> None:
    """Writes the policy of a checkpoint, without what going on needs beside it: weights, or a LoRA's, their configuration and the tokenizer.

    Raises:
        ClusterError: the checkpoint has no whole weights.
    """
    files = [
        file
        for pattern in ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
        for file in checkpoint.glob(pattern)
    ]
    if not any(file.suffix == ".safetensors" for file in files):
        raise ClusterError(
            "training was killed between its last checkpoint and the written model, and the checkpoint has only parts of the weights "
            "(training.trl.fsdp_config.state_dict_type = SHARDED_STATE_DICT): they cannot be put together here; remove the folder `ledger/training` to train again"
        )
    folder.mkdir(parents=True)
    for file in files:
        if file.name != "trainer_state.json":
            shutil.copy2(file, folder)


def write_policy(trainer: Any, folder: Path) -> None:
    """Writes what was trained, and the tokenizer; called on every rank, since a sharded policy is put together from all."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))
    if trainer.args.should_save:
        (folder / "training_args.bin").unlink(missing_ok=True)  # pickled
