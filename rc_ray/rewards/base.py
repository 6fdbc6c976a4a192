"""The interface of every reward, and how a configuration becomes one.

A reward scores answers; larger is better. Invariant: it returns one `Score` per answer in the given order, and a failed
score is missing with a reason, never a number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from rc_ray.config import ClassifierReward, CustomReward, HttpReward, ImplicitReward, JudgeReward, RewardConfig, RuleReward
from rc_ray.core.ids import Message
from rc_ray.generation.hardware import choose_dtype

# Rewards are stored in single precision; a larger number would become an infinity.
MAX_FLOAT32 = 3.4028234663852886e38
# What `CountingReward.figures` counts.
FIGURES = ("num_texts", "num_too_long", "num_truncated", "num_tokens", "num_padded_tokens", "num_cached_tokens")


@dataclass(frozen=True)
class Score:
    """A finite reward, or None with the reason why it is missing."""

    value: float | None
    missing: str = ""

    @classmethod
    def checked(cls, value: Any) -> Score:
        """A score from what a reward returned; None, what is no number, and what float32 cannot hold become missing."""
        if isinstance(value, Score):
            return value if value.value is None and value.missing else cls.checked(value.value)
        if value is None:
            return cls(None, "no score returned")
        if isinstance(value, str | bytes):
            return cls(None, f"score is {value!r}, not a number"[:100])
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return cls(None, f"score is {value!r}, not a number"[:100])
        if not abs(number) <= MAX_FLOAT32:
            return cls(None, f"score is {number}")
        return cls(number)


def read_scores(returned: Iterable[Any], number: int, whose: str) -> list[Score]:
    """Scores from what the user's code returned.

    Raises:
        ValueError: it returned another number of values.
    """
    values = list(returned)
    if len(values) != number:
        raise ValueError(f"{whose} returned {len(values)} values for {number} answers")
    return [Score.checked(value) for value in values]


def reward_dtype(requested: str, on_gpu: bool) -> str:
    """The dtype of a reward's network. Not bfloat16 on CPUs that have it: it rounds so coarsely that a reward would depend on its batch."""
    return "float32" if requested == "auto" and not on_gpu else choose_dtype(requested, on_gpu)[0]


class Reward(Protocol):
    """Scores a batch of (prompt, answer)."""

    def score(self, prompts: list[list[Message]], answers: list[str]) -> list[Score]:
        """One score per answer; `prompts[i]` are the messages before `answers[i]`. The answers of a group stand together, all of them, and
        share the object `prompts[i]`, which tells them from another group of the same prompt. After an error the caller asks again for one
        group at a time, so that it costs that group only.

        Raises:
            EngineDied: a vLLM engine in this process is gone, and the process must be replaced.
        """


class CountingReward(Reward, Protocol):
    """A reward that also says how much it has read; not all kinds do."""

    def figures(self) -> dict[str, int]:
        """Totals since it was loaded, its self-test apart, under the names in `FIGURES`.

        `num_texts`: texts that a network has read. `num_too_long`: others, which have no score. `num_truncated`: of `num_texts`, those that were cut.
        `num_tokens`: of all these texts. `num_padded_tokens`: the same with padding. `num_cached_tokens`: of `num_tokens`, those that
        a prefix cache knew already. A reward over HTTP and a judge count `num_requests`. It is also asked from another thread while `score` runs:
        what grows is taken as a sign that the work goes on, also where a block takes longer than `cluster.stall_timeout_s`.
        """


def figures_of(reward: Reward) -> dict[str, int]:
    """See `CountingReward.figures`; empty for a reward without them. A copy: a reward may return the counts that it goes on counting with."""
    figures = getattr(reward, "figures", None)
    return dict(figures()) if figures is not None else {}


def build_reward(config: RewardConfig, on_gpu: bool, num_threads: int, content: bytes | None = None) -> Reward:
    """The reward that a configuration names, loaded in this process.

    Args:
        content: of the file with the user's code, see `rc_ray.rewards.code.load_code`.

    Raises:
        ConfigError, ModelError: the function, class or model cannot be loaded.
    """
    if isinstance(config, RuleReward):
        from rc_ray.rewards.rule import RuleRewardFunction

        return RuleRewardFunction(config.function, config.args, content)
    if isinstance(config, CustomReward):
        from rc_ray.rewards.custom import CustomRewardObject

        return CustomRewardObject(config, on_gpu, num_threads, content)
    if isinstance(config, HttpReward):
        from rc_ray.rewards.http import HttpRewardService

        return HttpRewardService(config)
    if isinstance(config, JudgeReward):
        from rc_ray.rewards.judge import JudgeRewardModel

        if config.url is not None:
            from rc_ray.rewards.chat import EndpointChat

            return JudgeRewardModel(config, EndpointChat(config))
        from rc_ray.rewards.chat_engine import EngineChat

        return JudgeRewardModel(config, EngineChat(config, on_gpu=on_gpu, num_threads=num_threads))
    if isinstance(config, ImplicitReward):
        from rc_ray.rewards.implicit import ImplicitRewardModel

        return ImplicitRewardModel(config, on_gpu=on_gpu, num_threads=num_threads)
    assert isinstance(config, ClassifierReward)
    if config.engine == "vllm":
        from rc_ray.rewards.vllm_classifier import VllmClassifier

        return VllmClassifier(config, on_gpu=on_gpu, num_threads=num_threads)
    from rc_ray.rewards.classifier import ClassifierRewardModel

    return ClassifierRewardModel(config, on_gpu=on_gpu, num_threads=num_threads)
