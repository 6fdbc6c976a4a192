"""Rewards from a class of the user's own, in a file of theirs.

    class Brief:
        def __init__(self, target_words, device="cpu"):
            self.target_words = target_words

        def score(self, prompts, answers):
            return [-abs(len(answer.split()) - self.target_words) for answer in answers]

The class gets the `args` of the configuration and, where its `__init__` has parameters of these names and `args` does not give them, `device`
("cuda" or "cpu") and `num_threads` (of a reward on CPUs). `score` gives, for each answer, a number, None, or a
`rc_ray.rewards.base.Score` with the reason why there is none. It may have `figures`, see `Reward`.
"""

from __future__ import annotations

import inspect
from typing import Any

from rc_ray.config import CustomReward
from rc_ray.core.ids import Message
from rc_ray.errors import ConfigError
from rc_ray.rewards.base import Score, figures_of, read_scores
from rc_ray.rewards.code import load_code


def load_class(path: str, args: dict[str, Any], field: str = "class", content: bytes | None = None) -> Any:
    """The class behind `path/to/file.py:Name` or `module:Name`, checked to take `args` and to have `score(prompts, answers)`.

    Args:
        content: see `load_code`.

    Raises:
        ConfigError: it is not there or no such class, or the arguments do not fit.
    """
    found = load_code(field, path, content)
    if not inspect.isclass(found):
        raise ConfigError(f"{field} = {path!r}: this is no class; name a class with score(prompts, answers)")
    score = getattr(found, "score", None)
    if not callable(score):
        raise ConfigError(f"{field} = {path!r}: the class has no method `score`; give it score(self, prompts, answers)")
    static = isinstance(inspect.getattr_static(found, "score"), classmethod | staticmethod)
    try:
        inspect.signature(score).bind(*([] if static else [None]), [], [])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{field} = {path!r}: its `score`: {error}; expected score(self, prompts, answers)") from None
    try:
        inspect.signature(found).bind(**_arguments(found, args, "cpu", 1))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{field} = {path!r} with args {args!r}: {error}; they are the arguments of its `__init__`") from None
    return found


def _arguments(found: Any, args: dict[str, Any], device: str, num_threads: int) -> dict[str, Any]:
    offered = {"device": device, "num_threads": num_threads}
    return {name: value for name, value in offered.items() if name in inspect.signature(found).parameters} | args


class CustomRewardObject:
    """One object of the class.

    Raises:
        ConfigError: see `load_class`. Exception: whatever the class raises when it is made.
    """

    def __init__(self, config: CustomReward, on_gpu: bool, num_threads: int, content: bytes | None = None) -> None:
        self._path = config.class_path
        found = load_class(config.class_path, config.args, content=content)
        self._reward = found(**_arguments(found, config.args, "cuda" if on_gpu else "cpu", num_threads))

    def score(self, prompts: list[list[Message]], answers: list[str]) -> list[Score]:
        """See `Reward.score`.

        Raises:
            Exception: whatever the class raises. ValueError: it returned another number of values.
        """
        return read_scores(self._reward.score(prompts, answers), len(answers), self._path)

    def figures(self) -> dict[str, int]:
        """See `Reward`; what the class counts, if it does."""
        return figures_of(self._reward)
