"""Rewards from a Hugging Face sequence classifier, run with plain transformers.

Invariant: the score of an answer does not depend on its batch beyond rounding, and a text longer than the model's limit has no score; it is
never cut.
"""

from __future__ import annotations

from typing import Any

from rc_ray.config import ClassifierReward
from rc_ray.core.ids import Message
from rc_ray.errors import ModelError
from rc_ray.models.resolve import local_model
from rc_ray.rewards.base import Score, reward_dtype
from rc_ray.rewards.batches import TokenBatches, length_limit
from rc_ray.rewards.encoding import encode
from rc_ray.rewards.self_test import self_test


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
        options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        self.tokenizer = AutoTokenizer.from_pretrained(path, **options)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=getattr(torch, reward_dtype(config.dtype, on_gpu)), use_safetensors=True, **options
        )
        self._label = self._index_of(config)
        self._log_odds = config.label is not None and config.label_score != "logit"
        self.model.to(self._device).eval()
        limit = length_limit(self.tokenizer, self.model.config, config.max_length)
        self._batches = TokenBatches(config.max_batch_tokens, limit)
        if self.tokenizer.pad_token_id is None:
            # Padding is masked in attention, but a model that takes the last token finds it as the last one that is no padding, so the token
            # must not be one that ends a text.
            names = self.tokenizer.unk_token, self.tokenizer.bos_token, self.tokenizer.eos_token
            known = [name for name in names if name is not None]
            self.tokenizer.pad_token = next(
                (name for name in known if name != self.tokenizer.eos_token), self.tokenizer.eos_token
            )
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        if config.self_test:
            self_test(self, config.model)

    def score(self, prompts: list[list[Message]], answers: list[str]) -> list[Score]:
        """See `Reward.score`."""
        encoded = [encode(self.tokenizer, p, a) for p, a in zip(prompts, answers, strict=True)]
        return self._batches.score(
            [len(e["input_ids"]) for e in encoded], lambda batch: self._forward([encoded[i] for i in batch])
        )

    def figures(self) -> dict[str, int]:
        """See `Reward.figures`."""
        return self._batches.figures()

    def _forward(self, encoded: list[dict[str, list[int]]]) -> list[float]:
        """The scores of one batch."""
        padded = self.tokenizer.pad(encoded, return_tensors="pt").to(self._device)
        with self._torch.inference_mode():
            logits = self.model(**padded).logits.float()
            values = logits[:, self._label]
            if self._log_odds:
                others = [i for i in range(logits.shape[1]) if i != self._label]
                values = values - logits[:, others].logsumexp(dim=1)
        return list(values.cpu().tolist())

    def _index_of(self, config: ClassifierReward) -> int:
        """Index of the logit that is the reward.

        Raises:
            ModelError: the model has several labels and none, or one that it does not have, is chosen; or it has one and a label is given.
        """
        number, names = self.model.config.num_labels, dict(self.model.config.id2label)
        if number == 1 and config.label is None:
            return 0
        found = [i for i, name in names.items() if config.label in (i, name)]
        if number > 1 and len(found) == 1:
            return int(found[0])
        known = f"has {number} labels ({', '.join(f'{i}: {name}' for i, name in list(names.items())[:20])})"
        if config.label is None:
            raise ModelError(f"reward model {config.model!r} {known}, but a reward is one number; choose one with `label`")
        reason = (
            "`label` has no effect on one logit; remove it" if number == 1 else "give the index or the name of one of these"
        )
        raise ModelError(f"label = {config.label!r}: the reward model {config.model!r} {known}; {reason}")
