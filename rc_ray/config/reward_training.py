"""How a reward model is trained: the options of `rc-ray train-reward`. The defaults suit a small encoder and a few hundred pairs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rc_ray.config.base import Section, deployment


class RewardTrainingConfig(Section):
    """A sequence classifier trained on preference pairs by the Bradley-Terry likelihood."""

    base: str = "embedded:minilm-l6"
    """Model to start from: anything `AutoModelForSequenceClassification` loads."""

    revision: str | None = None
    """Git revision of a Hub model."""

    trust_remote_code: bool = False
    """Run Python code from the base's repository. Off unless you trust this one model."""

    method: Literal["single", "multitask", "more"] | None = None
    """`single`: one preference set. Several at once: `multitask` weighs them equally, `more` by the min-norm point of their gradients in
    the reward head (arXiv 2312.07401). None: `single` for one set, `multitask` for several."""

    heads: Literal["shared", "per_objective"] = "shared"
    """`shared`: one logit for all sets. `per_objective`: one for each, named after its set, to be used as a classifier reward with
    `label: NAME` and `label_score: logit`."""

    num_epochs: float = Field(2.0, gt=0)
    """Passes over the training pairs of the largest set."""

    learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate of the pretrained layers, or of the LoRA (AdamW, linear decay after 10 % warm-up)."""

    head_learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of the layers above the encoder, which start untrained."""

    batch_size: int = Field(16, ge=1)
    """Pairs of each set per step, over all workers. Must be a multiple of num_workers x per_device_batch_size."""

    per_device_batch_size: int | None = Field(None, ge=1)
    """Pairs of each set per forward pass on one worker; None: all of its share. With `more`, each pass has weights of its own."""

    max_length: int = Field(256, ge=8)
    """Most tokens of prompt and answer in training; the oldest part of a longer prompt is left out (counted), and the pair where that is not
    enough (counted)."""

    num_train: int | None = Field(None, ge=1)
    """Most training pairs of a set; None takes all that are not held out."""

    num_test: int | None = Field(None, ge=1)
    """Held-out pairs of a set; None holds out a tenth."""

    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of labels taken to be wrong; at a half, labels would say nothing."""

    momentum: float = Field(0.0, ge=0, lt=1)
    """`more`: weight of earlier steps in the gradients that are compared. The authors' code has 0.01 (its alpha is 1 - momentum)."""

    normalize: Literal["none", "l2", "loss", "loss+"] = "none"
    """`more`: what gradients are divided by before they are compared: nothing, their norm, the set's share of the losses (each plus 1), or norm
    times loss."""

    lora_rank: int | None = Field(None, ge=1)
    """Train a LoRA of this rank on all linear layers instead of the whole network; it is merged into the result."""

    lora_alpha: int = Field(16, ge=1)
    """The LoRA is scaled by lora_alpha / lora_rank."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 mixed precision on GPUs, float32 on CPUs."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    num_workers: int = Field(1, ge=1)
    """Ray Train workers (data parallel), each with a GPU where the cluster has some."""

    save_every_steps: int = deployment(100, ge=1)
    """Steps between checkpoints; at most so much work is lost when a worker or the driver dies."""

    max_failures: int = deployment(3, ge=0)
    """Worker failures after which training gives up; each restarts from the last checkpoint."""

    seed: int = Field(0, ge=0, lt=1 << 32)
    """Seed of the split, the order and the first weights of the logits."""

    @model_validator(mode="after")
    def _fits_together(self) -> RewardTrainingConfig:
        needs = {"momentum": ("method more", self.method == "more"), "normalize": ("method more", self.method == "more")}
        needs["lora_alpha"] = ("lora_rank", self.lora_rank is not None)
        for name, (needed, there) in needs.items():
            if name in self.model_fields_set and not there and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect without {needed}; choose that, or leave it out")
        if self.method == "more" and self.heads == "per_objective":
            raise ValueError(
                "with heads per_objective, gradients are in rows of their own and can never conflict, so that `more` would only weigh them by "
                "length; use method multitask, or heads shared"
            )
        unit = self.num_workers * (self.per_device_batch_size or 1)
        if self.batch_size % unit:
            raise ValueError(
                f"batch_size ({self.batch_size}) is not a multiple of num_workers x per_device_batch_size "
                f"({self.num_workers} x {self.per_device_batch_size or 1}); set it to {max(unit, self.batch_size // unit * unit)}"
            )
        return self
