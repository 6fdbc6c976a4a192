"""The interface of every reward, and how a configuration becomes one.

A reward scores answers; larger is better. Invariant: it returns one `Score` per answer in the given order, and a failed
score is missing with a reason, never a number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from rc_ray.config import ClassifierReward, RewardConfig, RuleReward
from rc_ray.core.ids import Message


@dataclass(frozen=True)
class Score:
    """A finite reward, or None with the reason why it is missing."""

    value: float | None
    missing: str = ""

    @classmethod
    def checked(cls, value: float | None) -> Score:
        """A score from a raw number; None, NaN and infinities become missing."""
        if value is None:
            return cls(None, "no score returned")
        if not math.isfinite(value):
            return cls(None, f"score is {value}")
        return cls(float(value))


class Reward(Protocol):
    """Scores a batch of (prompt, answer)."""

    def score(self, prompts: list[list[Message]], answers: list[str]) -> list[Score]:
        """One score per answer; `prompts[i]` are the messages before `answers[i]`."""


def build_reward(config: RewardConfig, on_gpu: bool, num_threads: int) -> Reward:
    """The reward that a configuration names, loaded in this process.

    Raises:
        ConfigError, ModelError: the function or model cannot be loaded.
    """
    if isinstance(config, RuleReward):
        from rc_ray.rewards.rule import RuleRewardFunction

        return RuleRewardFunction(config.function, config.args)
    assert isinstance(config, ClassifierReward)
    from rc_ray.rewards.classifier import ClassifierRewardModel

    return ClassifierRewardModel(config, on_gpu=on_gpu, num_threads=num_threads)
