"""Intervals of means and of proportions.

Invariant: the bootstrap resamples prompts, the independent unit, and is seeded, so the same data give the same interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Interval:
    """A mean, or a share, with the ends of its interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: NDArray[np.floating[Any]], confidence: float, num_bootstrap: int, seed: int) -> Interval:
    """Percentile bootstrap of a mean (Efron 1979).

    Args:
        values: (P,), one value per prompt, finite.
        confidence: level, e.g. 0.95.
        num_bootstrap: resamples.
        seed: of the resampling.

    Raises:
        ValueError: no value.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("no value to take a mean of")
    rng = np.random.default_rng(seed)
    means = np.array([data[rng.integers(0, data.size, data.size)].mean() for _ in range(num_bootstrap)])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(data.mean()), float(low), float(high))


def wilson_interval(successes: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Ends of the Wilson score interval of a proportion (Wilson 1927), 95 % by default."""
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return centre - half, centre + half


def proportion(successes: int, count: int) -> Interval:
    """A share with its 95 % Wilson interval."""
    return Interval(successes / count, *wilson_interval(successes, count))
