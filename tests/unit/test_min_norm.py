"""The point of smallest norm: against enumeration of all supports, the closed form for two vectors, and its optimality conditions."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rc_ray.core.min_norm import Floats, min_norm_weights


def brute_force(vectors: Floats) -> float:
    """The smallest norm, exactly: for every support, the stationary point of ||sum w v||^2 on the plane sum w = 1, where it is feasible."""
    best, unit = np.inf, np.abs(vectors).max()
    for size in range(1, len(vectors) + 1):
        for support in combinations(range(len(vectors)), size):
            v = vectors[list(support)] / unit
            # KKT system of the equality-constrained problem.
            system = np.block([[2 * v @ v.T, np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]])
            w = np.linalg.lstsq(system, np.append(np.zeros(size), 1.0), rcond=1e-12)[0][:size]
            if (w >= -1e-9).all() and abs(w.sum() - 1) < 1e-6:
                w = np.clip(w, 0, None) / np.clip(w, 0, None).sum()
                best = min(best, unit * float(np.linalg.norm(w @ v)))
    return best


vectors_of = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1.0, 1e6]))


@given(vectors_of, st.lists(st.floats(-3, 3), min_size=5, max_size=5))
def test_it_equals_enumeration_of_all_supports(shape: tuple[int, int, int, float], scales: list[float]) -> None:
    count, size, seed, unit = shape
    vectors = np.random.default_rng(seed).normal(size=(count, size)) * np.exp(scales[:count])[:, None] * unit
    weights = min_norm_weights(vectors)
    assert weights.shape == (count,)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    largest = np.linalg.norm(vectors, axis=1).max()
    assert np.linalg.norm(weights @ vectors) == pytest.approx(brute_force(vectors), abs=1e-7 * largest)


@given(vectors_of)
def test_no_vector_points_further_back_than_the_point_itself(shape: tuple[int, int, int, float]) -> None:
    count, size, seed, unit = shape
    vectors = np.random.default_rng(seed).normal(size=(count, size)) * unit
    point = min_norm_weights(vectors) @ vectors
    assert (vectors @ point >= point @ point - 1e-9 * unit**2 * size).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 50), st.floats(-5, 5))
def test_two_vectors_have_a_closed_form(seed: int, size: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=size), rng.normal(size=size) * np.exp(scale)
    share = float(np.clip(b @ (b - a) / ((a - b) @ (a - b)), 0, 1))
    assert min_norm_weights(np.stack([a, b])) == pytest.approx([share, 1 - share], abs=1e-6)


@given(vectors_of)
def test_a_common_scale_and_the_order_do_not_matter(shape: tuple[int, int, int, float]) -> None:
    count, size, seed, _ = shape
    vectors = np.random.default_rng(seed).normal(size=(count, size))
    point = min_norm_weights(vectors) @ vectors
    assert min_norm_weights(1e-30 * vectors) @ vectors == pytest.approx(point, abs=1e-7)
    assert min_norm_weights(vectors[::-1]) @ vectors[::-1] == pytest.approx(point, abs=1e-7)


def test_known_points() -> None:
    assert min_norm_weights(np.array([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx([0.5, 0.5])
    assert min_norm_weights(np.array([[1.0, 0.0], [0.0, 2.0]])) == pytest.approx([0.8, 0.2])
    assert min_norm_weights(np.array([[1.0, 0.0], [3.0, 0.5]])) == pytest.approx([1.0, 0.0])
    assert min_norm_weights(np.array([[2.0, 1.0]])) == pytest.approx([1.0])
    assert min_norm_weights(np.zeros((4, 3))) == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("bad", [np.zeros((0, 3)), np.zeros(3), np.array([[1.0, np.nan]]), np.array([[np.inf, 1.0]])])
def test_what_has_no_such_point_is_refused(bad: Floats) -> None:
    with pytest.raises(ValueError, match="expected"):
        min_norm_weights(bad)
