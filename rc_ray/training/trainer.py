"""TRL's DPO trainer on rows that are tokens and log-probs of the reference already, and the losses of the recipes. For Ray Train's workers."""

from __future__ import annotations

from typing import Any

import torch
from trl import DPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from rc_ray.config import TrainingConfig
from rc_ray.training.arguments import OWN_LOSS
from rc_ray.training.policy import LoadsByFileNames
from rc_ray.training.recipes import mix_loss, modpo_loss, objective_losses, objective_weights, raco_coefficients

# Of all weights, for the name of a cache of log-probs that is not used here.
dpo_trainer.hash_module = lambda module: ""


class Collator(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's batch, with the differences of the rewards, (B, K)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """See `DataCollatorForPreference`."""
        differences = torch.tensor([example["differences"] for example in examples], dtype=torch.float32)
        return {**super().torch_call(examples), "differences": differences}


class ReferenceDPOTrainer(LoadsByFileNames, DPOTrainer):  # type: ignore[misc]
    """TRL has no door for rows that are ready. Its own loss is taken unless the recipe has another.

    Args:
        training: with the recipe.
        objectives: names of the columns of `differences`.
    """

    def __init__(self, training: TrainingConfig, objectives: list[str], **kwargs: Any) -> None:
        self._training, self._objectives = training, objectives
        self._own_loss = training.recipe in OWN_LOSS
        # With FSDP, TRL loads a reference model even where there is nothing to compute.
        load, dpo_trainer.create_model_from_path = dpo_trainer.create_model_from_path, lambda *_, **__: None
        try:
            super().__init__(**kwargs)
        finally:
            dpo_trainer.create_model_from_path = load
        if self._own_loss:
            differences = torch.tensor(kwargs["train_dataset"]["differences"][:]).reshape(-1, len(objectives))
            self._shares = (differences != 0).float().mean(dim=0)
            given: Any = self.data_collator  # type: ignore[has-type]
            self.data_collator = Collator(pad_token_id=given.pad_token_id, max_length=given.max_length)

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _prepare_input(self, data: Any) -> Any:
        # With DeepSpeed transformers would round log-probs to the precision that the policy computes in.
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "differences" not in self._signature_columns:
            self._signature_columns.append("differences")

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if not self._own_loss:
            return super()._compute_loss(model, inputs, return_outputs)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            labels=labels,
            fused_lm_head=True,
            **({"output_router_logits": True} if self.aux_loss_enabled else {}),
        )
        logps = outputs.log_probs.sum(dim=1)
        chosen, rejected = logps.chunk(2)
        of_chosen, of_rejected = chosen - inputs["ref_chosen_logps"], rejected - inputs["ref_rejected_logps"]
        delta, differences = of_chosen - of_rejected, inputs["differences"]
        loss = self._recipe_loss(model, delta, differences)
        if self.aux_loss_enabled:  # of a mixture of experts, as TRL adds it
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        self._note("rewards/chosen", self.beta * of_chosen)
        self._note("rewards/rejected", self.beta * of_rejected)
        self._note("rewards/margins", self.beta * delta)
        self._note("rewards/accuracies", (delta > 0).float())
        for k, name in enumerate(self._objectives):
            self._note(f"accuracies/{name}", (delta * differences[:, k] > 0).float())
        self._note("logps/chosen", chosen)
        self._note("logps/rejected", rejected)
        if self.model.training:
            tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += tokens
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return (loss, outputs) if return_outputs else loss

    def _recipe_loss(self, model: Any, delta: torch.Tensor, differences: torch.Tensor) -> torch.Tensor:
        training = self._training
        weights = torch.tensor(objective_weights(training, self._objectives), device=delta.device)
        if training.recipe == "modpo":
            assert training.primary is not None
            return modpo_loss(delta, differences, weights, self._objectives.index(training.primary), training.beta)
        losses = objective_losses(delta, differences, training.beta, self._shares.to(delta.device))
        for name, loss in zip(self._objectives, losses, strict=True):
            self._note(f"loss/{name}", loss[None])
        if training.recipe == "raco" and model.training:
            gram = self._gram(model, losses).double().cpu().numpy()
            weights = torch.as_tensor(raco_coefficients(gram, weights.double().cpu().numpy(), training.conflict)).to(losses)
        return mix_loss(losses, weights)

    def _gram(self, model: Any, losses: torch.Tensor) -> torch.Tensor:
        """Products of the objectives' gradients, of the batch over all workers, (K, K)."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
        gram = torch.zeros(len(losses), len(losses), device=losses.device, dtype=torch.float64)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        for of_parameter in zip(*gradients, strict=True):
            if of_parameter[0] is None:
                continue
            flat = torch.stack([gradient.flatten() for gradient in of_parameter]).double()
            if distributed:
                torch.distributed.all_reduce(flat)
            gram += flat @ flat.T
        return gram

    def _note(self, name: str, values: torch.Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][name].append(self.accelerator.gather_for_metrics(values.detach().float()).mean().item())
