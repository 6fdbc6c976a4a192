"""LoRA adapters of classifiers, in PEFT's format: merged into the model, so that a reward with one is as fast as one without.

Invariant: every tensor of the adapter finds its place and none of its matrices is left random; weights come from safetensors only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rc_ray.errors import ModelError
from rc_ray.models.resolve import ADAPTER_WEIGHTS, adapter_rank

PREFIX = "base_model.model."
# Where the classifiers of transformers have the matrix whose rows are the labels.
HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


def labels_of(folder: str, name: str) -> dict[str, int]:
    """`num_labels` of the head that is saved in an adapter, to load the model with; empty where none is.

    Raises:
        ModelError: there are no safetensors weights.
    """
    from safetensors import safe_open

    file = Path(folder) / ADAPTER_WEIGHTS
    if not file.is_file():
        raise ModelError(
            f"adapter {name!r} has no {ADAPTER_WEIGHTS} (pickled weights are not read, they can run code); save it with PEFT's `save_pretrained`"
        )
    with safe_open(file, "pt") as tensors:
        heads = [key for key in tensors.keys() if key.removeprefix(PREFIX) in HEADS]  # noqa: SIM118
        return {"num_labels": tensors.get_slice(heads[0]).get_shape()[0]} if len(heads) == 1 else {}


def merged(model: Any, folder: str, name: str) -> tuple[Any, set[str]]:
    """The model with an adapter merged in, and the names of the tensors that came whole from the adapter.

    Raises:
        ModelError: it is no LoRA, or does not fit the model.
    """
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    adapter_rank("adapter", Path(folder))
    config = LoraConfig.from_pretrained(folder)
    # Whatever it was trained as: nothing but its weights is needed.
    config.task_type, config.inference_mode = None, True
    tensors, dtype = load_file(Path(folder) / ADAPTER_WEIGHTS), model.dtype
    try:
        wrapped = PeftModel(model, config)
        result = set_peft_model_state_dict(wrapped, tensors)
        lost = list(result.unexpected_keys)
        lacking = [key for key in result.missing_keys if "lora_" in key or ".modules_to_save." in key]
        if lost or lacking:
            raise ValueError(f"it has {lost[:3] or 'nothing'} beyond the model, and lacks {lacking[:3] or 'nothing'}")
        whole = wrapped.merge_and_unload(safe_merge=True)
    except (KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise ModelError(f"adapter {name!r} does not fit its model: {reason}; give the model that it was trained on") from None
    return whole.to(dtype), {key.removeprefix(PREFIX) for key in tensors}
