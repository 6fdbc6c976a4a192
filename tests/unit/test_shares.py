"""Candidates shared out among policies: whole, fair, and the same every time."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from rc_ray.core.ids import candidate_seed
from rc_ray.core.shares import candidate_ranges, share_offset

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)
OFFSETS = st.floats(0, 1, exclude_max=True)


@given(WEIGHTS, st.integers(1, 64), OFFSETS)
def test_ranges_are_contiguous_and_hold_every_candidate_once(weights: list[float], number: int, offset: float) -> None:
    ranges = candidate_ranges(weights, number, offset)
    assert len(ranges) == len(weights)
    assert [i for first, end in ranges for i in range(first, end)] == list(range(number))
    assert all(first <= end for first, end in ranges)


@given(WEIGHTS, st.integers(1, 64), OFFSETS)
def test_each_share_is_within_one_of_its_weight(weights: list[float], number: int, offset: float) -> None:
    for weight, (first, end) in zip(weights, candidate_ranges(weights, number, offset), strict=True):
        assert abs(end - first - number * weight / sum(weights)) < 1 + 1e-9


@given(WEIGHTS, st.integers(1, 64), OFFSETS)
def test_candidate_i_belongs_to_the_policy_whose_interval_holds_it(weights: list[float], number: int, offset: float) -> None:
    inner = np.cumsum(weights)[:-1] / sum(weights)
    for policy, (first, end) in enumerate(candidate_ranges(weights, number, offset)):
        for i in range(first, end):
            place = (i + offset) / number
            if np.abs(inner - place).min(initial=1) > 1e-9:
                assert np.searchsorted(inner, place, side="right") == policy


@given(st.integers(0, 1 << 63), st.sampled_from([[1.0, 1.0], [3.0, 1.0], [0.7, 0.2, 0.1], [1.0] * 5]), st.integers(1, 9))
def test_over_many_prompts_the_shares_are_the_weights(seed: int, weights: list[float], number: int) -> None:
    prompts = 1000
    sizes = [[e - f for f, e in candidate_ranges(weights, number, share_offset(seed, f"p{i}"))] for i in range(prompts)]
    mean = np.mean(sizes, axis=0)
    expected = number * np.asarray(weights) / sum(weights)
    # A share takes one of two neighbouring numbers, or of three around a whole one: its deviation is 0.5 at the most.
    assert np.abs(mean - expected).max() < 6 * 0.5 / prompts**0.5


def test_offsets_are_those_of_their_prompt_and_seed() -> None:
    assert share_offset(0, "a") == share_offset(0, "a")
    assert len({share_offset(0, "a"), share_offset(1, "a"), share_offset(0, "b")}) == 3
    assert 0 <= share_offset(0, "a") < 1
    # Not the hash that seeds are made of, so shares and answers are independent.
    assert share_offset(0, "a") != candidate_seed(0, "a") / 2**48


def test_rounding_loses_no_candidate() -> None:
    ranges = candidate_ranges([0.1] * 10, 64, 1 - 2**-48)
    assert ranges[-1][1] == 64


@pytest.mark.parametrize(("offset", "sizes"), [(0.0, [6, 2]), (0.999, [6, 2])])
def test_whole_shares_are_met_exactly(offset: float, sizes: list[int]) -> None:
    assert [end - first for first, end in candidate_ranges([3, 1], 8, offset)] == sizes
