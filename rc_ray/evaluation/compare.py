"""Rewards of two policies on the same held-out prompts, per objective, with paired bootstrap intervals.

Invariant: only prompts that both policies answered with a full set of rewards are compared, and how many were not is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rc_ray.config import EvaluationConfig
from rc_ray.core import schemas
from rc_ray.core.statistics import Interval, bootstrap_mean
from rc_ray.errors import DataError


@dataclass(frozen=True)
class ObjectiveComparison:
    """One objective: mean reward before and after, their paired difference, and how often a prompt got better."""

    before: Interval
    after: Interval
    difference: Interval
    win_rate: Interval
    """Share of prompts whose mean reward rose; a tie counts a half."""


@dataclass(frozen=True)
class Comparison:
    """All objectives over the same prompts."""

    num_prompts: int
    num_left_out: int
    confidence: float
    objectives: dict[str, ObjectiveComparison]
    mean_tokens_before: float
    mean_tokens_after: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def lines(self) -> list[str]:
        """A table, one line per objective."""
        rows = [("objective", "before", "after", "difference", "win rate")]
        for name, c in self.objectives.items():
            rows.append((name, cell(c.before), cell(c.after), cell(c.difference, "+"), cell(c.win_rate)))
        shown = aligned(rows)
        left_out = f", {self.num_left_out} left out" if self.num_left_out else ""
        shown.append(
            f"{self.num_prompts} held-out prompts{left_out}, {self.confidence:.0%} paired bootstrap intervals, mean answer "
            f"{self.mean_tokens_before:.0f} -> {self.mean_tokens_after:.0f} tokens"
        )
        return shown


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in rows
    ]


def cell(interval: Interval, sign: str = "") -> str:
    """`0.431 [0.199, 0.662]`."""
    return f"{interval.mean:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def prompt_means(groups: pa.Table, objectives: list[str]) -> dict[str, np.ndarray]:
    """Mean reward per prompt, (K,) each; prompts without candidates or with a missing reward are absent."""
    means = {}
    for group in groups.to_pylist():
        rewards = [group[schemas.reward_column(name)] or [] for name in objectives]
        if group["candidates"] and all(r and all(v is not None and math.isfinite(v) for v in r) for r in rewards):
            means[group["prompt_id"]] = np.asarray(rewards, dtype=np.float64).mean(axis=1)
    return means


def compare(before: pa.Table, after: pa.Table, objectives: list[str], config: EvaluationConfig, seed: int) -> Comparison:
    """Compares two sets of scored groups over the same prompts.

    Raises:
        DataError: no prompt has rewards from both.
    """
    first, second = prompt_means(before, objectives), prompt_means(after, objectives)
    ids = sorted(first.keys() & second.keys())
    if not ids:
        raise DataError(
            "no held-out prompt has all rewards from both policies; see `missing.*` in report/before and report/after"
        )
    a, b = np.stack([first[i] for i in ids]), np.stack([second[i] for i in ids])

    def interval(values: np.ndarray) -> Interval:
        return bootstrap_mean(values, config.confidence, config.num_bootstrap, seed)

    return Comparison(
        num_prompts=len(ids),
        num_left_out=before.num_rows - len(ids),
        confidence=config.confidence,
        objectives={
            name: ObjectiveComparison(
                interval(a[:, k]),
                interval(b[:, k]),
                interval(b[:, k] - a[:, k]),
                interval((b[:, k] > a[:, k]) + 0.5 * (b[:, k] == a[:, k])),
            )
            for k, name in enumerate(objectives)
        },
        mean_tokens_before=_mean_tokens(before, set(ids)),
        mean_tokens_after=_mean_tokens(after, set(ids)),
    )


def _mean_tokens(groups: pa.Table, ids: set[str]) -> float:
    lengths = [
        len(c["token_ids"])
        for g in groups.select(["prompt_id", "candidates"]).to_pylist()
        if g["prompt_id"] in ids
        for c in g["candidates"]
    ]
    return float(np.mean(lengths))
