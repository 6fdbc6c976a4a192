"""Rewards from a Hugging Face sequence classifier: what all engines have in common, and the engine that is plain transformers.

Invariant: the score of an answer does not depend on its batch beyond rounding, and a text longer than the model's limit has no score,
unless the user asks for it to be cut.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any

from rc_ray.config import ClassifierReward
from rc_ray.core.ids import Message
from rc_ray.errors import ModelError
from rc_ray.models.resolve import local_adapter, local_model
from rc_ray.rewards.adapter import labels_of, merged
from rc_ray.rewards.base import FIGURES, Score, reward_dtype
from rc_ray.rewards.batches import TokenBatches, length_limit
from rc_ray.rewards.encoding import encode, set_padding
from rc_ray.rewards.self_test import self_test


class Classifier(ABC):
    """How texts are read, which logit is the reward, and what is counted. An engine runs the network.

    Args:
        model_config: of the model, by transformers.

    Raises:
        ModelError: the label is not clear, or the tokenizer cannot cut.
    """

    dtype: str
    """Of the network."""

    pad_token_id: int | None
    """Of the network."""

    looks_from_the_right = True
    """Whether padding in the middle of a text does not keep it from finding the end."""

    def __init__(self, config: ClassifierReward, tokenizer: Any, model_config: Any) -> None:
        self.tokenizer = tokenizer
        self.limit = length_limit(tokenizer, model_config, config.max_length)
        self._name, self._side = config.model, config.truncate
        self._label = _index_of(config, model_config)
        self._log_odds = config.label is not None and config.label_score != "logit"
        self._counts: Counter[str] = Counter()
        if self._side is not None and not tokenizer.is_fast:
            raise ModelError(
                f"truncate = {self._side!r}: the tokenizer of {self._name!r} does not say which token is where (it has no tokenizer.json); "
                "remove `truncate`, or save a fast tokenizer with the model"
            )

    def score(self, prompts: list[list[Message]], answers: list[str]) -> list[Score]:
        """See `Reward.score`."""
        texts: list[dict[str, list[int]]] = []
        uncut: dict[int, str] = {}
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            texts.append(encode(self.tokenizer, prompt, answer))
            if self._side is not None and self.limit is not None and len(texts[i]["input_ids"]) > self.limit:
                try:
                    texts[i] = encode(self.tokenizer, prompt, answer, self.limit, self._side)
                    self._counts["num_truncated"] += 1
                except ValueError as error:
                    uncut[i] = f"truncate = {self._side}: {error}"
        scores = self._run(texts)
        return [Score(None, uncut[i]) if i in uncut else score for i, score in enumerate(scores)]

    def figures(self) -> dict[str, int]:
        """See `CountingReward.figures`."""
        return {name: self._counts[name] for name in FIGURES}

    @abstractmethod
    def _run(self, texts: list[dict[str, list[int]]]) -> list[Score]:
        """The score of each text; missing where it is over the limit."""

    def _rewards(self, logits: Any) -> list[float]:
        """Of logits [texts, labels]."""
        logits = logits.float()
        values = logits[:, self._label]
        if self._log_odds:
            others = [i for i in range(logits.shape[1]) if i != self._label]
            values = values - logits[:, others].logsumexp(dim=1)
        return list(values.cpu().tolist())

    def _begin(self, config: ClassifierReward) -> None:
        """Ends the loading."""
        if config.self_test:
            self_test(self, config.model)
        self._counts.clear()


class ClassifierRewardModel(Classifier):
    """One sequence classifier on one device, run with plain transformers."""

    def __init__(self, config: ClassifierReward, on_gpu: bool, num_threads: int) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.modeling_layers import GenericForSequenceClassification

        if not on_gpu:
            torch.set_num_threads(num_threads)
        self._torch = torch
        self._device = "cuda" if on_gpu else "cpu"
        self.dtype = reward_dtype(config.dtype, on_gpu)
        path, revision = local_model(config.model), config.revision
        adapter = None if config.adapter is None else local_adapter(config.adapter, config.adapter_revision)
        from_adapter = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(
            adapter if from_adapter else path,
            revision=None if from_adapter else revision,
            trust_remote_code=config.trust_remote_code and not from_adapter,  # the switch is of the model alone
        )
        self.model, loaded = AutoModelForSequenceClassification.from_pretrained(
            path,
            revision=revision,
            trust_remote_code=config.trust_remote_code,
            dtype=getattr(torch, self.dtype),
            use_safetensors=True,
            output_loading_info=True,
            **({} if adapter is None else labels_of(adapter, str(config.adapter))),
        )
        random = set(loaded["missing_keys"])
        if adapter is not None:
            self.model, found = merged(self.model, adapter, str(config.adapter))
            random -= found
        if random:
            raise ModelError(
                f"reward model {config.model!r} has no weights for {', '.join(sorted(random)[:5])}, which would be random, and so would its rewards; "
                "give a model that was trained as a sequence classifier, or the adapter that holds them"
            )
        super().__init__(config, tokenizer, self.model.config)
        self.model.to(self._device).eval()
        self._batches = TokenBatches(config.max_batch_tokens, self.limit, on_gpu)
        self._counts = self._batches.counts
        set_padding(tokenizer, self.model.config)
        self.pad_token_id = self.model.config.pad_token_id
        self.looks_from_the_right = type(self.model).__module__.startswith("transformers.")
        # Transformers' decoders find the last token by its id, and attend to nothing on its right, so there a mask would only keep attention from
        # its fast way. Without the self-test, which would find the ones that attend to both sides, it stays.
        decoder = isinstance(self.model, GenericForSequenceClassification) and tokenizer.padding_side == "right"
        self._needs_mask = not (decoder and config.self_test)
        self._begin(config)

    def _run(self, texts: list[dict[str, list[int]]]) -> list[Score]:
        return self._batches.score(
            [len(text["input_ids"]) for text in texts], lambda batch: self._forward([texts[i] for i in batch])
        )

    def _forward(self, encoded: list[dict[str, list[int]]]) -> list[float]:
        """The scores of one batch."""
        padded = self.tokenizer.pad(encoded, return_tensors="pt").to(self._device)
        if not self._needs_mask:
            del padded["attention_mask"]
        with self._torch.inference_mode():
            return self._rewards(self.model(**padded).logits)


def _index_of(config: ClassifierReward, model_config: Any) -> int:
    """Index of the logit that is the reward.

    Raises:
        ModelError: the model has several labels and none, or one that it does not have, is chosen; or it has one and a label is given.
    """
    number, names = model_config.num_labels, dict(model_config.id2label)
    if number == 1 and config.label is None:
        return 0
    found = [i for i, name in names.items() if config.label in (i, name)]
    if number > 1 and len(found) == 1:
        return int(found[0])
    known = f"has {number} labels ({', '.join(f'{i}: {name}' for i, name in list(names.items())[:20])})"
    if config.label is None:
        raise ModelError(f"reward model {config.model!r} {known}, but a reward is one number; choose one with `label`")
    reason = "`label` has no effect on one logit; remove it" if number == 1 else "give the index or the name of one of these"
    raise ModelError(f"label = {config.label!r}: the reward model {config.model!r} {known}; {reason}")
