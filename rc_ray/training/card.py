"""The model card of a trained policy: README.md in its folder, with all that is needed to train it again."""

from __future__ import annotations

from typing import Any

from rc_ray.config import Config
from rc_ray.ledger.rundir import versions
from rc_ray.training.curves import SHOWN
from rc_ray.training.recipes import RECIPES

# Where and how fast, not what.
FIELDS = (
    "loss_type", "beta", "learning_rate", "warmup_steps", "num_epochs", "max_steps", "global_batch_size", "max_length", "dtype", "lora_rank", "lora_alpha",
    "quantization", "weights", "primary", "conflict", "trl",
)  # fmt: skip


def model_card(config: Config, facts: dict[str, Any]) -> str:
    """Markdown with the metadata that the Hub reads.

    Args:
        facts: as `train_dpo` returns them.
    """
    training = config.training
    fields = type(training).model_fields
    options = {
        name: value for name in FIELDS if (value := getattr(training, name)) not in (None, {}) and _counts(name, training)
    }
    rows = "\n".join(
        f"| {name} | `{value}`{'' if value == fields[name].default else ' (set)'} |" for name, value in options.items()
    )
    last: dict[str, Any] = next((entry for entry in reversed(facts["log_history"]) if "loss" in entry), {})
    metrics = "\n".join(f"| {name} in the last step | {last[key]:.4g} |" for name, key in SHOWN.items() if key in last)
    changes = "\n".join(
        f"| log-prob of {side} answers against the reference, nats | {value:+.3f} |"
        for side, value in (facts.get("logp_changes") or {}).items()
    )
    remarks = "".join(f"\n{line}\n" for line in facts["remarks"])
    installed = ", ".join(f"{name} {version}" for name, version in versions().items())
    library = "transformers" if training.lora_rank is None or training.merge_adapter else "peft"
    revision = f" at revision `{config.revision}`" if config.revision else ""
    return f"""---
library_name: {library}
tags: [dpo, trl, rc_ray]
---
# Policy trained by {training.recipe}

{RECIPES[training.recipe]}, from `{config.model}`{revision}. Reference: {f"`{training.reference.model}`" if training.reference.model else "the policy that it started from"}.

| | |
|---|---|
| pairs | {facts["num_pairs"]}, of which {facts["repeated"]} twice per epoch to fill the last batch |
| data fingerprint | `{facts["data_fingerprint"]}` |
| reference | `{facts["reference"]}` |
| steps | {facts["steps"]} |
| seed | {config.seed} |
{metrics}
{changes}
{remarks}
| option | value |
|---|---|
{rows}

Made with {installed}. The licences of the policy that it was trained from and of the pairs apply.
"""


def _counts(name: str, training: Any) -> bool:
    """Whether an option has an effect here."""
    if name in ("lora_alpha", "quantization"):
        return training.lora_rank is not None
    return name != "conflict" or training.recipe == "raco"
