"""Rewards from a service of one's own: conversations and answers out, scores in.

Invariant: no score is invented; where a request fails, the scores of its answers are missing with the reason.
"""

from __future__ import annotations

from typing import Any

from rc_ray.config import HttpReward
from rc_ray.core.ids import Message
from rc_ray.rewards.base import Score
from rc_ray.rewards.service import FIRST_WAIT_S, Service, ServiceError


class HttpRewardService:
    """One service. See `Service` for the arguments and errors."""

    def __init__(self, config: HttpReward, first_wait_s: float = FIRST_WAIT_S) -> None:
        self._config, self._service = config, Service(config, first_wait_s)

    def score(self, prompts: list[list[Message]], answers: list[str]) -> list[Score]:
        """See `Reward.score`."""
        size = self._config.batch_size
        items = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        return [score for scores in self._service.map(self._ask, batches) for score in scores]

    def figures(self) -> dict[str, int]:
        """Since it was made: requests that have ended."""
        return {"num_requests": self._service.num_requests}

    def _ask(self, items: list[dict[str, Any]]) -> list[Score]:
        """The scores of one request."""
        try:
            answer = self._service.ask({"items": items})
        except ServiceError as error:
            return [Score(None, str(error))] * len(items)
        values = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(values, list):
            return [Score(None, f"{self._service.url}: the answer is no JSON object with a list `scores`")] * len(items)
        if len(values) != len(items):
            return [Score(None, f"{self._service.url}: {len(values)} scores for {len(items)} answers")] * len(items)
        return [Score.checked(None if isinstance(value, bool) else value) for value in values]
