"""The point of smallest norm in the convex hull of some vectors: where a step helps every objective, or none can be helped further.

For gradients g_1 ... g_T the weights solve min ||sum_t w_t g_t||^2 over w >= 0 with sum 1; against that point every g_t falls (MGDA, Desideri
2012; arXiv 1810.04650). MORE (arXiv 2312.07401) finds it by Frank-Wolfe steps; here it is found exactly, by non-negative least squares.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def min_norm_weights(vectors: Floats) -> Floats:
    """Weights of the point of smallest norm.

    With x = s w, the smallest ||sum_t x_t g_t||^2 + (sum_t x_t - 1)^2 over x >= 0 is q / (1 + q) at s = 1 / (1 + q), q = ||sum_t w_t g_t||^2.
    It grows with q, so the w are the wanted ones (least distance programming, Lawson & Hanson 1974, ch. 23).

    Args:
        vectors: (T, D), finite, one per objective. All zero gives equal weights.

    Returns:
        (T,), not negative, sum 1.

    Raises:
        ValueError: no vector, or one that is not finite.
    """
    from scipy.optimize import nnls

    v = np.asarray(vectors, dtype=np.float64)
    if v.ndim != 2 or v.size == 0 or not np.isfinite(v).all():
        raise ValueError(f"vectors have shape {v.shape}; expected (T, D) finite numbers with T, D > 0")
    largest = float(np.abs(v).max())
    if largest == 0:
        return np.full(len(v), 1 / len(v))
    # Lengths and angles alone matter: a triangle of T rows instead of D, which may be many thousands.
    triangle = np.linalg.qr(v.T / largest, mode="r")
    weights, _ = nnls(np.vstack([triangle, np.ones(len(v))]), np.append(np.zeros(len(triangle)), 1.0))
    return np.asarray(weights / weights.sum(), dtype=np.float64)
