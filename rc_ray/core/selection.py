"""Reward Consistency (RC) and Reward Consistency Sampling (RCS): the rule this project is named for.

A pair (winner w, loser l) of one group is reward-consistent when every objective k agrees:

    strict:  r_k(w) - r_k(l) >  margin_k  for every k
    weak:    r_k(w) - r_k(l) >= margin_k  for every k, and > for at least one

RCS keeps the consistent pair with the largest gap, or drops the prompt with the reason. Source: Xu et al., "Reward
Consistency", arXiv 2504.11337 (definition and RCS in words; its gap is not stated in what could be read, so it is an option).

Invariant: every group gives exactly one pair or one drop; winner and loser come from one pair, a tie never makes one, and
the outcome depends neither on row order nor on how rows are split into tables. Differences are taken in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rc_ray.config.schema import SelectionConfig
from rc_ray.core import schemas
from rc_ray.errors import DataError

STAGE = "select"


@dataclass(frozen=True)
class Selected:
    """The outcome of selection over a table of groups.

    Attributes:
        pairs: one row per paired prompt, `schemas.pair_schema`.
        drops: one row per dropped prompt, `schemas.DROP`.
    """

    pairs: pa.Table
    drops: pa.Table


def consistency_matrix(
    rewards: NDArray[np.floating[Any]], consistency: str = "strict", margins: NDArray[np.floating[Any]] | None = None
) -> NDArray[np.bool_]:
    """Which ordered pairs are reward-consistent.

    Args:
        rewards: (N, K), candidates by objectives, all finite.
        consistency: `strict` or `weak`.
        margins: (K,), in each objective's unit; None means 0.

    Returns:
        bool (N, N), entry [w, l] true when w beats l; the diagonal is false.

    Raises:
        ValueError: a reward is missing or infinite, or the shape is not (N, K) with K >= 1.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] < 1:
        raise ValueError(f"rewards has shape {values.shape}; expected (N, K) with K >= 1")
    if not np.isfinite(values).all():
        raise ValueError("rewards holds NaN or infinity; leave out groups with a missing reward first")
    margin = np.zeros(values.shape[1]) if margins is None else np.asarray(margins, dtype=np.float64)
    difference = values[:, None, :] - values[None, :, :]
    matrix: NDArray[np.bool_]
    if consistency == "strict":
        matrix = np.all(difference > margin, axis=2)
    else:
        matrix = np.all(difference >= margin, axis=2) & np.any(difference > margin, axis=2)
    np.fill_diagonal(matrix, False)
    return matrix


def gap_matrix(rewards: NDArray[np.floating[Any]], gap: str, scale: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """How far apart every ordered pair is: (N, K) rewards and (K,) scales to float64 (N, N), entry [w, l]."""
    values = np.asarray(rewards, dtype=np.float64)
    difference = values[:, None, :] - values[None, :, :]
    if gap == "sum":
        return np.asarray(difference.sum(axis=2))
    standardized = difference / np.asarray(scale, dtype=np.float64)
    return np.asarray(standardized.sum(axis=2) if gap == "standardized_sum" else standardized.min(axis=2))


@dataclass(frozen=True)
class RewardMoments:
    """Count, sum and sum of squares per objective over candidates; adds up over tables, so a scale needs one pass.

    Attributes:
        count, total, total_squared: (K,) float64, in the order of the objectives.
    """

    count: NDArray[np.float64]
    total: NDArray[np.float64]
    total_squared: NDArray[np.float64]

    @classmethod
    def of(cls, groups: pa.Table, objectives: list[str]) -> RewardMoments:
        """Moments of one table of groups; missing and non-finite rewards do not count."""
        columns = []
        for name in objectives:
            values = groups.column(schemas.reward_column(name)).combine_chunks().flatten()
            array = np.asarray(values.drop_null(), dtype=np.float64)
            array = array[np.isfinite(array)]
            columns.append((array.size, array.sum(), (array * array).sum()))
        count, total, squared = np.asarray(columns, dtype=np.float64).T
        return cls(count, total, squared)

    def __add__(self, other: RewardMoments) -> RewardMoments:
        return RewardMoments(self.count + other.count, self.total + other.total, self.total_squared + other.total_squared)

    def scale(self) -> NDArray[np.float64]:
        """Standard deviation per objective, (K,); 1 where an objective never varies, which then adds nothing anyway."""
        count = np.maximum(self.count, 1)
        variance = np.maximum(self.total_squared / count - (self.total / count) ** 2, 0)
        deviation = np.sqrt(variance)
        return np.where(deviation > 0, deviation, 1.0)


def select_pairs(groups: pa.Table, config: SelectionConfig, scale: dict[str, float] | None = None) -> Selected:
    """Applies the selection rule to scored groups.

    Args:
        groups: `schemas.GROUP` plus `reward.<objective>` columns.
        config: the rule.
        scale: scale per objective for standardised gaps; `config.scale` wins over it; without both, measured on `groups`.

    Returns:
        `Selected`; every group is in exactly one of its two tables. Equal gaps: lowest winner index, then lowest loser index.

    Raises:
        DataError: a needed column is absent.
    """
    objectives = schemas.scored_objectives(groups.schema)
    for needed in ("prompt_id", "prompt", "candidates"):
        if needed not in groups.column_names:
            raise DataError(
                f"groups have no column {needed!r} (columns: {', '.join(groups.column_names)}); run `rc-ray sample`"
            )
    if not objectives:
        raise DataError(f"groups have no {schemas.REWARD_PREFIX}* column; run `rc-ray score` on them first")
    known = config.scale or scale
    if known is None:
        known = dict(zip(objectives, RewardMoments.of(groups, objectives).scale().tolist(), strict=True))
    scales = np.asarray([known[name] for name in objectives])
    margins = np.asarray([config.margins.get(name, 0.0) for name in objectives])

    pairs: list[dict[str, Any]] = []
    drops: list[dict[str, Any]] = []
    for group in groups.to_pylist():
        outcome = _select_one(group, objectives, config, scales, margins)
        if isinstance(outcome, tuple):
            reason, stage, detail = outcome
            drops.append({"prompt_id": group["prompt_id"], "reason": reason, "stage": stage, "detail": detail})
        else:
            pairs.append(outcome)
    return Selected(
        pa.Table.from_pylist(pairs, schema=schemas.pair_schema(objectives)),
        pa.Table.from_pylist(drops, schema=schemas.DROP),
    )


def _select_one(
    group: dict[str, Any],
    objectives: list[str],
    config: SelectionConfig,
    scales: NDArray[np.float64],
    margins: NDArray[np.float64],
) -> dict[str, Any] | tuple[str, str, str]:
    """The pair of one group, or (reason, stage, detail) of its drop."""
    if group.get("failure"):
        return group["failure"], "sample", group.get("failure_detail") or ""
    candidates = group["candidates"] or []
    columns = []
    for name in objectives:
        rewards = group[schemas.reward_column(name)] or []
        missing = sum(1 for r in rewards if r is None or not np.isfinite(r)) + len(candidates) - len(rewards)
        if missing:
            why = group.get(schemas.missing_column(name)) or "null or not finite"
            return "reward_missing", "score", f"{name}: {missing} of {len(candidates)} rewards missing: {why}"
        columns.append(rewards)
    texts = [candidate["text"] for candidate in candidates]
    if len(set(texts)) < 2:
        return "identical_candidates", STAGE, f"{len(texts)} candidates, {len(set(texts))} distinct"
    rewards = np.asarray(columns, dtype=np.float64).T
    consistent = consistency_matrix(rewards, config.consistency, margins)
    # A negative margin can call two equal answers consistent; the same text is never both chosen and rejected.
    first_with_text: dict[str, int] = {}
    codes = np.asarray([first_with_text.setdefault(text, i) for i, text in enumerate(texts)])
    consistent &= codes[:, None] != codes[None, :]
    if not consistent.any():
        return "no_consistent_pair", STAGE, f"no pair of {len(texts)} candidates on which all objectives agree"
    if not config.allow_truncated_winner:
        truncated = np.asarray([candidate["finish_reason"] == "length" for candidate in candidates])
        consistent &= ~truncated[:, None]
        if not consistent.any():
            return (
                "winner_truncated",
                STAGE,
                f"every consistent winner was cut at max_tokens ({truncated.sum()} of {len(texts)} answers)",
            )
    gaps = np.where(consistent, gap_matrix(rewards, config.gap, scales), -np.inf)
    # argmax takes the first of equal gaps in row-major order: lowest winner, then lowest loser.
    winner, loser = (int(i) for i in np.unravel_index(np.argmax(gaps), gaps.shape))
    return {
        "prompt": group["prompt"],
        "chosen": [{"role": "assistant", "content": texts[winner]}],
        "rejected": [{"role": "assistant", "content": texts[loser]}],
        "prompt_id": group["prompt_id"],
        "chosen_index": winner,
        "rejected_index": loser,
        "gap": float(gaps[winner, loser]),
        "rewards_chosen": dict(zip(objectives, rewards[winner].tolist(), strict=True)),
        "rewards_rejected": dict(zip(objectives, rewards[loser].tolist(), strict=True)),
        "strategy": config.strategy,
    }
