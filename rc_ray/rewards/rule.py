"""Rewards from a Python function over a batch: length, format, exact answer, anything that needs no model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from rc_ray.core.ids import Message
from rc_ray.errors import ConfigError
from rc_ray.rewards.base import Score, read_scores
from rc_ray.rewards.code import load_code


def load_function(
    path: str, args: dict[str, Any], field: str = "function", content: bytes | None = None
) -> Callable[..., list[float | None]]:
    """The function behind `module:name`, checked to take `(prompts, answers, **args)`.

    Args:
        content: see `load_code`.

    Raises:
        ConfigError: module or name absent, or the arguments do not fit.
    """
    function = load_code(field, path, content)
    try:
        inspect.signature(function).bind([], [], **args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{field} = {path!r} with args {args!r}: {error}; expected f(prompts, answers, **args)") from None
    return function  # type: ignore[no-any-return]


class RuleRewardFunction:
    """Scores by calling the function once per batch."""

    def __init__(self, path: str, args: dict[str, Any], content: bytes | None = None) -> None:
        self._path, self._args = path, args
        self._function = load_function(path, args, content=content)

    def score(self, prompts: list[list[Message]], answers: list[str]) -> list[Score]:
        """See `Reward.score`.

        Raises:
            Exception: whatever the function raises. ValueError: it returned another number of values.
        """
        return read_scores(self._function(prompts, answers, **self._args), len(answers), self._path)
