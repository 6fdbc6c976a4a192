"""How far a reward model's differences are probabilities, and which margins make RC as precise as wanted.

A labelled pair has a difference d = r(chosen) - r(rejected). The Bradley-Terry model says that chosen is the better one with probability
p = sigma(d), so p can be compared with how often it is true. As in the published metric of MORE (arXiv 2312.07401) both orders of
every pair count: (sigma(d), 1) and (sigma(-d), 0), which makes the curve symmetric about 1/2. Temperature scaling is that of Guo et al.
(arXiv 1706.04599) with one parameter.

Invariant: the order of the pairs does not matter beyond rounding, and a constant added to all rewards changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# Fewest RC pairs of a labelled set whose precision is trusted.
MIN_PAIRS = 30
STEPS = 200


@dataclass(frozen=True)
class Reliability:
    """Predicted and observed frequencies in uniform bins on [0, 1]; bins without a pair are left out."""

    num_bins: int
    ece: float
    """Expected calibration error: sum over bins of |sum of p - sum of outcomes|, divided by the number of ordered pairs."""
    ace: float
    """Average calibration error: mean over bins of |mean p - mean outcome|."""
    mce: float
    """Maximum calibration error: the largest of these."""
    predicted: list[float]
    """Mean p of each bin that has a pair."""
    observed: list[float]
    """Share of outcomes 1 in each such bin."""
    counts: list[int]
    """Ordered pairs in each such bin."""


def reliability(differences: Floats, num_bins: int = 10, temperature: float = 1.0) -> Reliability:
    """Calibration of labelled pairs.

    Args:
        differences: (n,), r(chosen) - r(rejected), finite.
        num_bins: of [0, 1].
        temperature: every difference is divided by it.

    Raises:
        ValueError: no pair, one that is not finite, or a temperature or number of bins that is not positive.
    """
    d = _checked(differences) / temperature
    if temperature <= 0 or num_bins < 1:
        raise ValueError(f"temperature = {temperature}, num_bins = {num_bins}: both must be positive")
    p = sigmoid(np.concatenate([d, -d]))
    outcome = np.repeat([1.0, 0.0], d.size)
    of = np.minimum((p * num_bins).astype(np.int64), num_bins - 1)
    counts = np.bincount(of, minlength=num_bins)
    sums = np.bincount(of, p, num_bins), np.bincount(of, outcome, num_bins)
    used = counts > 0
    predicted, observed = (total[used] / counts[used] for total in sums)
    errors = np.abs(predicted - observed)
    return Reliability(
        num_bins=num_bins,
        ece=float(np.abs(sums[0] - sums[1]).sum() / p.size),
        ace=float(errors.mean()),
        mce=float(errors.max()),
        predicted=predicted.tolist(),
        observed=observed.tolist(),
        counts=counts[used].tolist(),
    )


def fit_temperature(differences: Floats) -> float | None:
    """The temperature of highest likelihood, by bisection of the derivative, which falls as 1 / T grows.

    Args:
        differences: (n,), r(chosen) - r(rejected), finite.

    Returns:
        T > 0, or None where none is best: the pairs are all right (any smaller one is better), or the model is so wrong that it should be
        turned round (any larger one is better).
    """
    d = _checked(differences)
    scale = np.abs(d).max()
    if scale == 0 or d.sum() <= 0 or d.min() >= 0:
        return None
    d = d / scale

    def slope(inverse: float) -> float:
        return float((d * sigmoid(-inverse * d)).sum())

    low, high = 0.0, 1.0
    while slope(high) > 0:
        low, high = high, 2 * high
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return float(scale / high)


def directions(differences: Floats, margins: Floats) -> NDArray[np.int8]:
    """What strict RC says of each pair: 1 chosen is the better one, -1 rejected is, 0 the objectives do not agree by their margins.

    Args:
        differences: (n, K). NaN, a missing reward, agrees with nothing.
        margins: (K,).
    """
    chosen, rejected = (differences > margins).all(axis=1), (-differences > margins).all(axis=1)
    return np.asarray(chosen.astype(np.int8) - rejected.astype(np.int8), dtype=np.int8)


@dataclass(frozen=True)
class Margins:
    """Margins for a wanted precision."""

    share: float
    """Of its labelled pairs, how many each objective gives up by its margin."""
    margins: list[float]
    """(K,), one per objective."""


def precision_margins(sets: Sequence[Floats], labelled: Sequence[int], precision: float) -> Margins | None:
    """The smallest margins at which the RC pairs of every labelled set agree with its labels as often as wanted.

    There are many such margins; taken are those where each labelled objective gives up the same share of all pairs (a quantile of its
    absolute differences), so that no objective's scale matters. Objectives without labels keep margin 0.

    Args:
        sets: per labelled set (n_s, K) differences r(chosen) - r(rejected) under all K objectives; NaN where one is missing.
        labelled: column of the objective that each set's labels are about.
        precision: wanted share of RC pairs whose better answer is the labelled one, in (0.5, 1).

    Returns:
        None when no share reaches it with `MIN_PAIRS` RC pairs left in every set.
    """
    everything = np.abs(np.concatenate(list(sets)))
    for share in np.arange(0, 1, 0.01):
        margins = np.zeros(everything.shape[1])
        if share > 0:
            for column in set(labelled):
                margins[column] = np.nanquantile(everything[:, column], share)
        found = [directions(each, margins) for each in sets]
        kept = [int(np.count_nonzero(each)) for each in found]
        if min(kept) < MIN_PAIRS:
            return None
        if all(np.count_nonzero(each == 1) >= precision * number for each, number in zip(found, kept, strict=True)):
            return Margins(float(share), margins.tolist())
    return None


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)) without overflow."""
    small = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, small) / (1 + small), dtype=np.float64)


def _checked(differences: Floats) -> Floats:
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or d.size == 0 or not np.isfinite(d).all():
        raise ValueError(f"differences have shape {d.shape}; expected (n,) finite numbers with n > 0")
    return d
