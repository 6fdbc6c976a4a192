"""Rewards from a Hugging Face sequence classifier with one logit, run with plain transformers.

Answers are sorted by length and batched under a budget of padded tokens. Invariant: the score of an answer does not depend
on its batch beyond rounding, and a text longer than the model's limit has no score; it is never cut.
"""

from __future__ import annotations

from typing import Any

from rc_ray.config import ClassifierReward
from rc_ray.core.ids import Message
from rc_ray.errors import ModelError
from rc_ray.generation.hardware import choose_dtype
from rc_ray.models.resolve import local_model
from rc_ray.rewards.base import Score
from rc_ray.rewards.encoding import encode


def length_limit(tokenizer: Any, model_config: Any) -> int | None:
    """Longest input in tokens: the model's positions and the tokenizer's own limit, whichever is smaller; None if neither."""
    limits = [getattr(model_config, "max_position_embeddings", None), tokenizer.model_max_length]
    known = [int(limit) for limit in limits if limit and limit < 1_000_000]
    return min(known) if known else None


class ClassifierRewardModel:
    """One sequence classifier on one device."""

    def __init__(self, config: ClassifierReward, on_gpu: bool, num_threads: int) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if not on_gpu:
            torch.set_num_threads(num_threads)
        self._torch = torch
        self._device = "cuda" if on_gpu else "cpu"
        path = local_model(config.model)
        # Not bfloat16 on CPUs that have it: it rounds so coarsely that a reward would depend on the batch it is in.
        dtype = "float32" if config.dtype == "auto" and not on_gpu else choose_dtype(config.dtype, on_gpu)[0]
        options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        self.tokenizer = AutoTokenizer.from_pretrained(path, **options)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True, **options
        )
        if self.model.config.num_labels != 1:
            raise ModelError(
                f"reward model {config.model!r} has {self.model.config.num_labels} labels, but a reward needs one logit; "
                "use a model saved with num_labels=1"
            )
        self.model.to(self._device).eval()
        self._max_batch_tokens = config.max_batch_tokens
        limits = [limit for limit in (config.max_length, length_limit(self.tokenizer, self.model.config)) if limit]
        self._limit = min(limits) if limits else None
        if self.tokenizer.pad_token_id is None:
            # Padding is masked in attention; the model finds the last real token by this id when it pools the last one.
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id

    def score(self, prompts: list[list[Message]], answers: list[str]) -> list[Score]:
        """See `Reward.score`."""
        encoded = [encode(self.tokenizer, p, a) for p, a in zip(prompts, answers, strict=True)]
        lengths = [len(e["input_ids"]) for e in encoded]
        scores: list[Score] = [Score(None)] * len(answers)
        fitting = []
        for i, length in enumerate(lengths):
            if self._limit is not None and length > self._limit:
                scores[i] = Score(None, f"{length} tokens exceed the reward model's limit of {self._limit}")
            else:
                fitting.append(i)
        fitting.sort(key=lambda i: lengths[i])
        for batch in self._batches(fitting, lengths):
            padded = self.tokenizer.pad([encoded[i] for i in batch], return_tensors="pt").to(self._device)
            with self._torch.inference_mode():
                logits = self.model(**padded).logits[:, 0].float().cpu().tolist()
            for i, logit in zip(batch, logits, strict=True):
                scores[i] = Score.checked(logit)
        return scores

    def _batches(self, order: list[int], lengths: list[int]) -> list[list[int]]:
        """Splits indices sorted by length into batches of at most `max_batch_tokens` padded tokens."""
        batches: list[list[int]] = []
        for i in order:
            if batches and lengths[i] * (len(batches[-1]) + 1) <= self._max_batch_tokens:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches
