"""Implicit rewards: what a policy aligned on one objective prefers over its reference.

    r(x, y) = beta * (log pi(y | x) - log pi_ref(y | x))        (DPO, arXiv 2305.18290, eq. 5, without the term of the prompt alone)

Both log-probs are summed over the answer's tokens and what the chat template writes after it, each model with its own tokenizer and
template. Invariant: an answer that one of them cannot read in full has no reward.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from rc_ray.config import ImplicitReward
from rc_ray.core.ids import Message
from rc_ray.errors import ModelError
from rc_ray.models.resolve import local_model
from rc_ray.rewards.base import Score, reward_dtype
from rc_ray.rewards.batches import TokenBatches, length_limit


class ImplicitRewardModel:
    """A policy and its reference on one device."""

    def __init__(self, config: ImplicitReward, on_gpu: bool, num_threads: int) -> None:
        import torch

        if not on_gpu:
            torch.set_num_threads(num_threads)
        self._beta = config.beta
        self._models = {
            "policy": LanguageModel(config.policy, config.policy_revision, config.policy_trust_remote_code, config, on_gpu),
            "reference": LanguageModel(
                config.reference, config.reference_revision, config.reference_trust_remote_code, config, on_gpu
            ),
        }

    def score(self, prompts: list[list[Message]], answers: list[str]) -> list[Score]:
        """See `Reward.score`."""
        found = {side: model.logprobs(prompts, answers) for side, model in self._models.items()}
        return [self._difference(*pair) for pair in zip(found["policy"], found["reference"], strict=True)]

    def figures(self) -> dict[str, int]:
        """See `Reward.figures`; of both models together."""
        return dict(sum((Counter(model.figures()) for model in self._models.values()), Counter()))

    def _difference(self, policy: Score, reference: Score) -> Score:
        for side, score in (("policy", policy), ("reference", reference)):
            if score.value is None:
                return Score(None, f"{side}: {score.missing}")
        assert policy.value is not None
        assert reference.value is not None
        return Score.checked(self._beta * (policy.value - reference.value))


class LanguageModel:
    """Log-probs of answers under one causal language model.

    Raises:
        ModelError: it has no chat template.
    """

    def __init__(self, name: str, revision: str | None, trust_remote_code: bool, config: ImplicitReward, on_gpu: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self._device = "cuda" if on_gpu else "cpu"
        path = local_model(name)
        dtype = getattr(torch, reward_dtype(config.dtype, on_gpu))
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._tokenizer = AutoTokenizer.from_pretrained(path, **options)
        if not self._tokenizer.chat_template:
            raise ModelError(
                f"model {name!r} has no chat template, so there is no telling how it reads an answer; save one with its tokenizer"
            )
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **options)
        self._model.to(self._device).eval()
        limit = length_limit(self._tokenizer, self._model.config, config.max_length)
        self._batches = TokenBatches(config.max_batch_tokens, limit)

    def logprobs(self, prompts: list[list[Message]], answers: list[str]) -> list[Score]:
        """log p(answer | prompt) of each, in nats."""
        texts, starts = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            texts.append(self._ids([*prompt, {"role": "assistant", "content": answer}], False))
            before = self._ids(prompt, True)
            starts.append(len(before) if texts[-1][: len(before)] == before else None)
        known = [i for i, start in enumerate(starts) if start is not None]
        values = self._batches.score(
            [len(texts[i]) for i in known],
            lambda batch: self._forward([texts[known[b]] for b in batch], [starts[known[b]] or 0 for b in batch]),
        )
        scores = [Score(None, "its chat template renders the conversation differently with and without an answer")] * len(texts)
        for i, score in zip(known, values, strict=True):
            scores[i] = score
        return scores

    def figures(self) -> dict[str, int]:
        """See `Reward.figures`."""
        return self._batches.figures()

    def _ids(self, messages: list[Message], add_generation_prompt: bool) -> list[int]:
        found = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
        )
        return list(found)

    def _forward(self, texts: list[list[int]], starts: list[int]) -> list[float]:
        """Sum of the log-probs from `starts[i]` to the end of each text."""
        torch = self._torch
        # To the right of a text a causal model's padding touches nothing.
        shape = len(texts), max(map(len, texts))
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        with torch.inference_mode():
            logits = self._model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            tokens = logits.gather(2, ids[:, 1:, None])[:, :, 0] - logits.logsumexp(dim=2)
            position = torch.arange(1, shape[1], device=self._device)[None]
            counted = (position >= torch.tensor(starts, device=self._device)[:, None]) & (mask[:, 1:] == 1)
            return list((tokens * counted).sum(dim=1).cpu().tolist())
