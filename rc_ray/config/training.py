"""How the policy is trained on pairs: DPO with TRL on Ray Train, its recipes, and the reference's log-probs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rc_ray.config.base import Section, deployment

Recipe = Literal["dpo", "mix", "sequential", "modpo", "soup", "raco", "reward_augmented"]
# Options of `training` that only some recipes use.
RECIPE_OPTIONS = {"weights": ("mix", "modpo", "soup", "raco"), "primary": ("modpo",), "conflict": ("raco",)}


class ReferenceConfig(Section):
    """The pass over the pairs before training, which computes the reference model's log-probs."""

    model: str | None = None
    """The reference; it must read the same tokens as the policy. None: the policy that training starts from."""

    revision: str | None = None
    """Git revision of a Hub reference."""

    trust_remote_code: bool = False
    """Run Python code from the repository of a reference of its own. Off unless you trust this one model."""

    num_actors: int | None = deployment(None, ge=1)
    """Actors, each with the resources of a training worker. None: as many as there always are training workers."""

    max_batch_tokens: int = deployment(4096, ge=64)
    """Padded tokens per forward pass; fewer for a while after memory ran out. Each needs the logits of the whole vocabulary."""

    folder: str | None = deployment(None)
    """Where log-probs are kept by content, for other trainings on the same pairs with the same reference. None: with this training."""


class TrainingConfig(Section):
    """DPO with TRL on Ray Train. Source: DPO, arXiv 2305.18290."""

    enabled: bool = True
    """False ends the run after selection: pairs are the product."""

    num_workers: int = Field(2, ge=1)
    """Ray Train workers (data parallel)."""

    min_workers: int | None = deployment(None, ge=1)
    """For clusters that shrink and grow: training starts with as many workers as there are, from so many to num_workers, and again from the last
    checkpoint with another number when nodes come or go. The batches stay the same. None: always num_workers."""

    num_cpus_per_worker: float | None = deployment(None, gt=0)
    """Ray CPUs per worker. None: chosen by the planner."""

    num_gpus_per_worker: float | None = deployment(None, ge=0)
    """Ray GPUs per worker. None: 1 when the cluster has GPUs, otherwise 0."""

    recipe: Recipe = "dpo"
    """How pairs become a policy. `dpo`: as selected. The others are for comparison and need pairs with rewards; see `rc-ray train --list-recipes`."""

    weights: dict[str, float] = {}
    """Weight of each objective in `mix`, `modpo`, `soup` and `raco`, brought to the sum 1. Empty: all rewards of the pairs, equally."""

    primary: str | None = None
    """`modpo`: the objective whose order of the pairs is learned, with the others as margins."""

    conflict: float = Field(0.4, ge=0, lt=1)
    """`raco`: how far a step may turn away from the weighted gradient (c in the paper), relative to it."""

    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference model."""

    loss_type: str | list[str] = "sigmoid"
    """Loss, by TRL's name; several are added up with the weights `trl: {loss_weights: [...]}`, e.g. `[sigmoid, sft]` for a term of supervised learning."""

    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate (AdamW, linear decay)."""

    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""

    num_epochs: float = Field(1.0, gt=0)
    """Passes over the pairs."""

    max_steps: int | None = Field(None, ge=1)
    """Stop after so many optimizer steps; None: as many as num_epochs makes."""

    global_batch_size: int = Field(32, ge=1)
    """Pairs per optimizer step over all workers. Must be a multiple of num_workers x per_device_batch_size."""

    per_device_batch_size: int = deployment(2, ge=1)
    """Pairs per forward pass on one worker."""

    max_length: int | None = Field(None, ge=16)
    """Most tokens of prompt and answer. None: as long as the longest pair. Longer pairs are never cut; see max_too_long_fraction."""

    max_too_long_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of pairs longer than max_length that may be left out (counted); more of them are an error before training."""

    reference: ReferenceConfig = ReferenceConfig()
    """Log-probs of the reference, computed beforehand."""

    trl: dict[str, Any] = {}
    """Further fields of `trl.DPOConfig`, e.g. `lr_scheduler_type: cosine`; checked against TRL's own list. Those that this section has are set here."""

    lora_rank: int | None = Field(None, ge=1)
    """Train a LoRA of this rank on all linear layers but the last, instead of the whole policy."""

    lora_alpha: int = Field(16, ge=1)
    """The LoRA is scaled by lora_alpha / lora_rank."""

    quantization: Literal["none", "4bit"] = "none"
    """`4bit`: the LoRA is trained on the policy in 4-bit NormalFloat (QLoRA, arXiv 2305.14314); needs GPUs and bitsandbytes."""

    merge_adapter: bool = True
    """The result is a plain model with the LoRA merged into the unquantized policy. False: only the LoRA is saved, in PEFT's format."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 mixed precision on GPUs, float32 on CPUs."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    save_every_steps: int = deployment(50, ge=1)
    """Steps between checkpoints; at most so much work is lost when a worker or the driver dies."""

    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = deployment(["tensorboard"])
    """Where curves go besides the report. TensorBoard's files are in `runs/` of the trained model; W&B and MLflow must be installed on
    the nodes and take their settings from their environment variables."""

    allow_other_template: bool = deployment(False)
    """Train on pairs that were sampled with another tokenizer or chat template than the policy's; otherwise they are refused."""

    max_failures: int = deployment(3, ge=0)
    """Worker failures after which training gives up; each restarts from the last checkpoint."""

    @property
    def least_workers(self) -> int:
        """Workers that there always are."""
        return self.num_workers if self.min_workers is None else self.min_workers

    @property
    def losses(self) -> list[str]:
        """The terms of the loss."""
        return [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type

    @model_validator(mode="after")
    def _batch(self) -> TrainingConfig:
        for name, recipes in RECIPE_OPTIONS.items():
            if self.recipe not in recipes and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect on recipe {self.recipe}; it is for {', '.join(recipes)}")
        if self.recipe == "modpo" and self.primary is None:
            raise ValueError("recipe modpo needs primary, the objective whose order of the pairs is learned")
        if any(weight < 0 for weight in self.weights.values()) or (self.weights and not sum(self.weights.values())):
            raise ValueError("weights must not be negative, and not all 0")
        if self.primary is not None and self.weights and not self.weights.get(self.primary):
            raise ValueError(
                f"weights: modpo divides by the weight of its primary objective {self.primary!r}; give it one above 0"
            )
        if self.recipe in ("mix", "modpo", "raco") and self.losses != ["sigmoid"]:
            raise ValueError(f"recipe {self.recipe} has a loss of its own; loss_type has no effect on it, leave it out")
        if self.reference.model is not None and self.recipe == "sequential":
            raise ValueError(
                "reference.model has no effect on recipe sequential, where each policy is the next one's reference; leave it out"
            )
        if self.reference.revision is not None and self.reference.model is None:
            raise ValueError("reference.revision has no effect without reference.model; set it, or leave the revision out")
        if self.reference.trust_remote_code and self.reference.model is None:
            raise ValueError("reference.trust_remote_code has no effect without reference.model; set that, or leave this out")
        if self.max_too_long_fraction and self.max_length is None:
            raise ValueError(
                "max_too_long_fraction has no effect without max_length, which then fits the longest pair; set it, or leave it out"
            )
        for name in ("lora_alpha", "quantization", "merge_adapter"):
            if self.lora_rank is None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect without lora_rank; set it, or leave {name} out")
        if self.lora_rank is not None and not self.merge_adapter and self.recipe in ("sequential", "soup"):
            raise ValueError(
                f"merge_adapter must be true for recipe {self.recipe}, which goes on with, or averages, whole policies"
            )
        least = self.least_workers
        if least > self.num_workers:
            raise ValueError(f"min_workers ({least}) is above num_workers ({self.num_workers}); lower it, or leave it out")
        for number in range(least, self.num_workers):
            if self.global_batch_size % (number * self.per_device_batch_size):
                raise ValueError(
                    f"min_workers ({least}): with {number} workers the global_batch_size ({self.global_batch_size}) is not a multiple of "
                    f"{number} x per_device_batch_size ({self.per_device_batch_size}); choose one that is for {least} to {self.num_workers} workers"
                )
        unit = self.num_workers * self.per_device_batch_size
        if self.recipe == "raco" and (self.global_batch_size != unit or least != self.num_workers):
            raise ValueError(
                "recipe raco compares the objectives' gradients of a whole step, so that a step must be one pass of every worker: set "
                f"per_device_batch_size to global_batch_size / num_workers ({self.global_batch_size} / {self.num_workers}), and leave min_workers out"
            )
        if self.global_batch_size % unit:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) is not a multiple of num_workers x per_device_batch_size "
                f"({self.num_workers} x {self.per_device_batch_size}); set it to {max(unit, self.global_batch_size // unit * unit)}"
            )
        return self
