"""Implicit rewards: what a policy aligned on one objective prefers over its reference.

    r(x, y) = beta * (log pi(y | x) - log pi_ref(y | x))        (DPO, arXiv 2305.18290, eq. 5, without the term of the prompt alone)

Both log-probs are summed over the answer's tokens and what the chat template writes after it, each model with its own tokenizer and
template. Invariant: an answer that one of them cannot read in full has no reward.
"""

from __future__ import annotations

from rc_ray.config import ImplicitReward
from rc_ray.core.ids import Message
from rc_ray.rewards.base import FIGURES, Score, reward_dtype
from rc_ray.rewards.language_model import LanguageModel
from rc_ray.rewards.self_test import self_test_implicit


class ImplicitRewardModel:
    """A policy and its reference on one device."""

    def __init__(self, config: ImplicitReward, on_gpu: bool, num_threads: int) -> None:
        import torch

        if not on_gpu:
            torch.set_num_threads(num_threads)
        self._beta = config.beta
        named = {
            "policy": (config.policy, config.policy_revision, config.policy_trust_remote_code),
            "reference": (config.reference, config.reference_revision, config.reference_trust_remote_code),
        }
        dtype = reward_dtype(config.dtype, on_gpu)
        self._models = {
            side: LanguageModel(*model, dtype, on_gpu, config.max_batch_tokens, config.max_length)
            for side, model in named.items()
        }
        if config.self_test:
            self_test_implicit(self._models, dtype, config.policy)
            for each in self._models.values():
                each.batches.counts.clear()

    def score(self, prompts: list[list[Message]], answers: list[str]) -> list[Score]:
        """See `Reward.score`."""
        found = {side: model.logprobs(prompts, answers) for side, model in self._models.items()}
        return [self._difference(*pair) for pair in zip(found["policy"], found["reference"], strict=True)]

    def figures(self) -> dict[str, int]:
        """See `CountingReward.figures`; of both models together."""
        found = {name: [model.batches.counts[name] for model in self._models.values()] for name in FIGURES}
        return {name: max(counts) if name == "num_too_long" else sum(counts) for name, counts in found.items()}

    def _difference(self, policy: Score, reference: Score) -> Score:
        for side, score in (("policy", policy), ("reference", reference)):
            if score.value is None:
                return Score(None, f"{side}: {score.missing}")
        assert policy.value is not None
        assert reference.value is not None
        return Score.checked(self._beta * (policy.value - reference.value))
