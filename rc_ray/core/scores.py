"""One number per candidate: weighted sums, LSC, and the scales they need.

Invariant: a score depends on its own group alone (and on scales, weights and targets that are given), and within the group not
on the order of the candidates. Sums over objectives are taken in the order of the objectives, in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rc_ray.core.compiled import compiled

Array = NDArray[np.float64]


@compiled
def weighted(values: Any, offsets: Any, weights: Any) -> Any:
    """Sum over objectives of weight x value: (T, K) values, (1, K) or (G, K) weights to float64 (T,)."""
    scores = np.empty(values.shape[0])
    if weights.shape[0] == 1:
        weight = weights[0]
        for i in range(values.shape[0]):
            score = 0.0
            for k in range(weight.size):
                score += weight[k] * np.float64(values[i, k])
            scores[i] = score
        return scores
    for g in range(offsets.size - 1):
        for i in range(offsets[g], offsets[g + 1]):
            score = 0.0
            for k in range(values.shape[1]):
                score += weights[g, k] * np.float64(values[i, k])
            scores[i] = score
    return scores


@compiled
def ranks(values: Any, rank: Any) -> None:
    """Fills rank[:n] with the position of each of n values in ascending order, equal values by index.

    Counting takes N^2 comparisons but no branch; compilers turn it into vector code that beats a sort up to some hundreds.
    """
    n = values.size
    if n > 256:
        rank[:n][np.argsort(values, kind="mergesort")] = np.arange(n)
        return
    for i in range(n):
        rank[i] = 0
    for i in range(n):
        value = values[i]
        for j in range(n):
            rank[j] += np.int64((values[j] > value) | ((values[j] == value) & (j > i)))


@compiled
def _sorted(values: Any, low: int, high: int, k: int, work: Any, rank: Any) -> Any:
    """Column k of a group in ascending order, float64; `work` has room for two columns, `rank` for one."""
    n = high - low
    column, result = work[:n], work[n : 2 * n]
    for i in range(n):
        column[i] = values[low + i, k]
    ranks(column, rank)
    for i in range(n):
        result[rank[i]] = column[i]
    return result


@compiled
def group_scale(rewards: Any, offsets: Any) -> Any:
    """Standard deviation (of the population) of each reward column within each group: (T, M) to float64 (G, M); 1 where it does not vary."""
    num_groups, width = offsets.size - 1, rewards.shape[1]
    scale = np.ones((num_groups, width))
    buffer, rank = np.empty(2 * rewards.shape[0]), np.empty(rewards.shape[0], dtype=np.int64)
    for g in range(num_groups):
        low, high = offsets[g], offsets[g + 1]
        for m in range(width):
            total = np.float32(0.0)  # x * 0 is NaN for NaN and infinity alone
            for i in range(low, high):
                total += rewards[i, m] * np.float32(0.0)
            if total != 0:  # not selected from
                continue
            # Sorted first, so that the sums do not depend on the order of the candidates.
            column = _sorted(rewards, low, high, m, buffer, rank)
            if column.size and column[0] < column[-1]:
                mean = column.sum() / column.size
                scale[g, m] = np.sqrt(((column - mean) ** 2).sum() / column.size)
    return scale


@compiled
def _quantile(values: Any, low: int, high: int, k: int, quantile: float, top: Any) -> float:
    """Quantile of column k of a group, linear between two values; keeps the values from there up, sorted, in `top`."""
    position = quantile * (high - low - 1)
    below = int(position)
    size = high - low - below
    top[:size] = -np.inf
    for i in range(low, high):
        carried = values[i, k]
        for j in range(size - 1, -1, -1):  # without a branch: it would be guessed wrongly half of the time
            held = top[j]
            top[j] = held if held > carried else carried
            carried = carried if held > carried else held
    first = np.float64(top[0])
    return first if size == 1 else first + (position - below) * (np.float64(top[1]) - first)


@compiled
def log_sigmoid(values: Any, offsets: Any, weights: Any, reference: Any, quantile: float) -> Any:
    """LSC: sum over objectives of weight x log sigmoid(value - reference): (T, K) values to float64 (T,).

    `reference` is (K,), or empty for the `quantile` of the group's values, linear between two of them.
    """
    scores = np.zeros(values.shape[0])
    odds, top = np.zeros(values.shape[0]), np.empty(values.shape[0], dtype=values.dtype)
    equal = bool((weights == 1.0).all())
    for g in range(offsets.size - 1):
        low, high = offsets[g], offsets[g + 1]
        if low == high:
            continue
        for k in range(values.shape[1]):
            base = reference[k] if reference.size else _quantile(values, low, high, k, quantile, top)
            # log sigmoid(x) = min(x, 0) - log1p(exp(-|x|)). With equal weights the logarithms are taken at once:
            # odds = product of (1 + exp(-|x_k|)), less 1.
            if equal:
                for i in range(low, high):
                    x = np.float64(values[i, k]) - base
                    e = np.exp(-abs(x))
                    odds[i] += e + odds[i] * e
                    scores[i] += min(x, 0.0)
            else:
                for i in range(low, high):
                    x = np.float64(values[i, k]) - base
                    scores[i] += weights[k] * (min(x, 0.0) - np.log1p(np.exp(-abs(x))))
        if equal:
            for i in range(low, high):
                scores[i] -= np.log1p(odds[i])
    return scores


@compiled
def ensemble_means(rewards: Any, offsets: Any, objective: Any, scale: Any, ensemble: Any) -> Any:
    """Value of each objective: its reward, or for an ensemble the mean of its members' rewards over their scales.

    (T, M) rewards, (M,) objective of each column, (1, M) or (G, M) scale, (K,) whether an objective is an ensemble; (T, K) of their type.
    """
    size = np.bincount(objective)
    values = np.zeros((rewards.shape[0], ensemble.size), dtype=rewards.dtype)
    for g in range(offsets.size - 1):
        row = g if scale.shape[0] > 1 else 0
        for i in range(offsets[g], offsets[g + 1]):
            for k in range(ensemble.size):
                total = 0.0
                for m in range(rewards.shape[1]):
                    if objective[m] == k:
                        reward = np.float64(rewards[i, m])
                        total += reward / scale[row, m] if ensemble[k] else reward
                values[i, k] = total / size[k]
    return values
