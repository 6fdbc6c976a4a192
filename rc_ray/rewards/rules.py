"""Rule rewards that come with the package: `f(prompts, answers, **args) -> list[float | None]`, larger is better."""

from __future__ import annotations

import re

from rc_ray.core.ids import Message


def length_near(prompts: list[list[Message]], answers: list[str], *, target_words: int) -> list[float | None]:
    """Minus the distance, in words, of each answer's length from `target_words`."""
    return [-float(abs(len(answer.split()) - target_words)) for answer in answers]


def matches(prompts: list[list[Message]], answers: list[str], *, pattern: str) -> list[float | None]:
    """1 where the regular expression is found in the answer, else 0."""
    expression = re.compile(pattern)
    return [1.0 if expression.search(answer) else 0.0 for answer in answers]
