"""Rewards from a Python function over a batch: length, format, exact answer, anything that needs no model."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from rc_ray.core.ids import Message
from rc_ray.errors import ConfigError
from rc_ray.rewards.base import Score


def load_function(path: str, args: dict[str, Any], field: str = "function") -> Callable[..., list[float | None]]:
    """The function behind `module:name`, checked to take `(prompts, answers, **args)`.

    Raises:
        ConfigError: module or name absent, or the arguments do not fit.
    """
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{field} = {path!r}: {error}; the module must be importable on every node") from None
    except AttributeError:
        raise ConfigError(f"{field} = {path!r}: module {module_name!r} has no {name!r}; check the name") from None
    except Exception as error:  # the user's module: whatever it raises on import
        raise ConfigError(f"{field} = {path!r}: importing {module_name!r} raised {type(error).__name__}: {error}") from None
    try:
        inspect.signature(function).bind([], [], **args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{field} = {path!r} with args {args!r}: {error}; expected f(prompts, answers, **args)") from None
    return function  # type: ignore[no-any-return]


class RuleRewardFunction:
    """Scores by calling the function once per batch."""

    def __init__(self, path: str, args: dict[str, Any]) -> None:
        self._path, self._args = path, args
        self._function = load_function(path, args)

    def score(self, prompts: list[list[Message]], answers: list[str]) -> list[Score]:
        """See `Reward.score`.

        Raises:
            Exception: whatever the function raises. ValueError: it returned another number of values.
        """
        values = list(self._function(prompts, answers, **self._args))
        if len(values) != len(answers):
            raise ValueError(f"{self._path} returned {len(values)} values for {len(answers)} answers")
        return [Score.checked(value) for value in values]
