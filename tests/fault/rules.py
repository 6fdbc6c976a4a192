"""Reward functions that go wrong on purpose."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def length(prompts: list[list[dict[str, Any]]], answers: list[str]) -> list[float | None]:
    return [float(len(answer)) for answer in answers]


def slow_length(prompts: list[list[dict[str, Any]]], answers: list[str], pause_s: float) -> list[float | None]:
    time.sleep(pause_s)
    return length(prompts, answers)


def deadly(prompts: list[list[dict[str, Any]]], answers: list[str], word: str) -> list[float | None]:
    """Takes its process down with it when it sees a prompt with this word."""
    if any(word in prompt[-1]["content"] for prompt in prompts):
        os._exit(9)
    return length(prompts, answers)


def raising(prompts: list[list[dict[str, Any]]], answers: list[str], word: str) -> list[float | None]:
    if any(word in prompt[-1]["content"] for prompt in prompts):
        raise RuntimeError("no such planet")
    return length(prompts, answers)


def broken_while(prompts: list[list[dict[str, Any]]], answers: list[str], path: str) -> list[float | None]:
    if Path(path).exists():
        raise RuntimeError("the service is down")
    return length(prompts, answers)
