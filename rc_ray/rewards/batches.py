"""Texts of different lengths through a model: sorted by length, in batches under a budget of padded tokens.

Where lengths differ, a batch ends before too much of it is padding. The budget is halved when memory runs out and grows back. Invariant:
every text gets one score; one that is longer than the model's limit, or does not fit into memory by itself, has none, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from rc_ray.rewards.base import Score

# A batch is also ended by padding: a smaller one is as fast per token, as long as there are some tokens in it. How many was measured on CPUs only.
MAX_PADDING = 0.03
FEW_TOKENS, FEW_TOKENS_ON_GPU = 1024, 8192
# Models whose first position is the one after the padding token's id; the table has so many more.
AFTER_PADDING = frozenset({
    "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text", "xmod", "mpnet", "longformer", "ibert", "esm",
})  # fmt: skip
# PyTorch has no type of error for this.
CPU_IS_FULL = "DefaultCPUAllocator: can't allocate memory"


def num_positions(model_config: Any) -> int | None:
    """Tokens that a model has positions for; None where there is no limit."""
    text_config = model_config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None) or 0
    if positions and text_config.model_type in AFTER_PADDING:
        positions -= text_config.pad_token_id + 1
    return positions if positions > 0 else None


def length_limit(tokenizer: Any, model_config: Any, max_length: int | None = None) -> int | None:
    """Longest input in tokens: the model's positions, the tokenizer's own limit and the given one, whichever is smallest; None if
    there is none."""
    limits = [num_positions(model_config), tokenizer.model_max_length, max_length]
    known = [int(limit) for limit in limits if limit and limit < 1_000_000]
    return min(known) if known else None


def too_long(length: int, limit: int | None) -> str | None:
    """Why a text of so many tokens has no score; None where it fits."""
    return f"{length} tokens exceed the model's limit of {limit}" if limit is not None and length > limit else None


class TokenBatches:
    """The budget of one model, and what it has read.

    Args:
        max_tokens: padded tokens of a batch; a longer text is a batch of its own.
        limit: longest text in tokens, or None.
        on_gpu: where the model is.
    """

    def __init__(self, max_tokens: int, limit: int | None, on_gpu: bool = False) -> None:
        self._few_tokens = FEW_TOKENS_ON_GPU if on_gpu else FEW_TOKENS
        self._max_tokens, self._tokens, self._limit = max_tokens, max_tokens, limit
        self.counts: Counter[str] = Counter()
        """See `CountingReward.figures`."""

    def score(self, lengths: list[int], forward: Callable[[list[int]], list[float]]) -> list[Score]:
        """The scores of texts.

        Args:
            lengths: of the texts, in tokens.
            forward: the values of the texts with these indices; it may run out of memory.
        """
        import torch

        scores: list[Score] = [Score(None)] * len(lengths)
        fitting = []
        for i, length in enumerate(lengths):
            why = too_long(length, self._limit)
            if why:
                scores[i] = Score(None, why)
                self.counts["num_too_long"] += 1
            else:
                fitting.append(i)
        fitting.sort(key=lambda i: lengths[i])
        start, ordered = 0, [lengths[i] for i in fitting]
        while start < len(fitting):
            batch = fitting[start : start + self._size(ordered, start)]
            try:
                values = forward(batch)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not isinstance(error, torch.OutOfMemoryError) and CPU_IS_FULL not in str(error):
                    raise
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                if len(batch) > 1:
                    self._tokens = len(batch) * lengths[batch[-1]] // 2
                    continue
                scores[batch[0]] = Score(None, f"out of memory for {lengths[batch[0]]} tokens by themselves")
            else:
                self._tokens = min(self._max_tokens, self._tokens + 1 + self._tokens // 4)
                self.counts["num_texts"] += len(batch)
                self.counts["num_tokens"] += sum(lengths[i] for i in batch)
                self.counts["num_padded_tokens"] += len(batch) * lengths[batch[-1]]
                for i, value in zip(batch, values, strict=True):
                    scores[i] = Score.checked(value)
            start += len(batch)
        return scores

    def _size(self, lengths: list[int], start: int) -> int:
        """How many texts from `start` on, the shortest first, make a batch; at least one."""
        size, real = 1, lengths[start]
        while start + size < len(lengths):
            padded, real = lengths[start + size] * (size + 1), real + lengths[start + size]
            if padded > self._tokens or (padded > self._few_tokens and padded - real > MAX_PADDING * padded):
                break
            size += 1
        return size
