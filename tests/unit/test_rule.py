"""The RC rule: `consistency_matrix` against the definition in `selection_reference`, and the properties that the rule has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rc_ray.core.rule import consistency_matrix
from tests.unit.selection_reference import consistent

FEW = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0, 3.0])  # so that ties, and differences equal to a margin, are frequent
MARGINS = [-0.75, -0.25, 0.0, 0.25, 1.0]
MODES = st.sampled_from(["strict", "weak", "lexicographic"])


def matrices(width: st.SearchStrategy[int], values: st.SearchStrategy[float] = FEW) -> st.SearchStrategy[NDArray[np.float64]]:
    return width.flatmap(lambda m: st.lists(st.tuples(*[values] * m), min_size=1, max_size=6)).map(np.asarray)


@st.composite
def rules(draw: st.DrawFn, width: int, margins: list[float] = MARGINS, relaxed: bool = True) -> dict[str, Any]:
    """Any arguments of `consistency_matrix`; not relaxed means one column per objective, all of which must agree."""
    objectives = draw(st.integers(1, width)) if relaxed else width
    mode = draw(MODES)
    rule: dict[str, Any] = {"consistency": mode, "margins": np.asarray(draw(st.tuples(*[st.sampled_from(margins)] * width)))}
    if relaxed:
        rule["members"] = draw(st.permutations([m % objectives for m in range(width)]))
        rule["shares"] = draw(st.tuples(*[st.sampled_from([0.3, 0.5, 1 / 3, 2 / 3, 1.0])] * objectives))
    if mode == "lexicographic":
        rule["primary"] = draw(st.integers(0, objectives - 1))
    elif relaxed:
        rule["min_agreeing"] = draw(st.none() | st.integers(1, objectives))
    return rule


@given(st.data(), matrices(st.integers(1, 5)))
def test_equals_the_definition(data: st.DataObject, rewards: NDArray[np.float64]) -> None:
    rule = data.draw(rules(rewards.shape[1]))
    rows = rewards.tolist()
    expected = [[w != v and consistent(winner, loser, **rule) for v, loser in enumerate(rows)] for w, winner in enumerate(rows)]
    assert consistency_matrix(rewards, **rule).tolist() == expected


@pytest.mark.parametrize(("agreeing", "members"), [(1, 3), (2, 3), (7, 25), (29, 35)])  # 7 / 25 * 25 is a little more than 7
def test_a_share_is_a_number_of_members(agreeing: int, members: int) -> None:
    options = {"members": [0] * members, "shares": [agreeing / members]}
    for votes, expected in ((agreeing - 1, False), (agreeing, True)):
        rewards = np.stack([np.arange(members) < votes, np.zeros(members)]).astype(np.float64)
        assert consistency_matrix(rewards, **options)[0, 1] == expected


@given(st.data(), matrices(st.integers(1, 4)))
def test_never_in_both_directions_without_relaxations(data: st.DataObject, rewards: NDArray[np.float64]) -> None:
    matrix = consistency_matrix(rewards, **data.draw(rules(rewards.shape[1], [0.0, 0.25, 1.0], relaxed=False)))
    assert not (matrix & matrix.T).any()


@given(st.data(), matrices(st.integers(1, 4)))
def test_a_larger_margin_never_adds_a_pair(data: st.DataObject, rewards: NDArray[np.float64]) -> None:
    rule = data.draw(rules(rewards.shape[1]))
    more = rule["margins"] + np.asarray(data.draw(st.tuples(*[st.sampled_from([0.0, 0.25, 1.0])] * rewards.shape[1])))
    assert (consistency_matrix(rewards, **rule) >= consistency_matrix(rewards, **{**rule, "margins": more})).all()


@given(st.data(), matrices(st.integers(1, 4)))
def test_strict_implies_lexicographic_implies_weak(data: st.DataObject, rewards: NDArray[np.float64]) -> None:
    rule = {key: value for key, value in data.draw(rules(rewards.shape[1])).items() if key not in ("primary", "min_agreeing")}
    primary = data.draw(st.integers(0, max(rule["members"])))
    strict, lexicographic, weak = (
        consistency_matrix(rewards, **{**rule, "consistency": mode, "primary": primary if mode == "lexicographic" else None})
        for mode in ("strict", "lexicographic", "weak")
    )
    assert (strict <= lexicographic).all()
    assert (lexicographic <= weak).all()


@given(matrices(st.integers(2, 5)))
def test_another_objective_never_adds_a_strict_pair(rewards: NDArray[np.float64]) -> None:
    assert (consistency_matrix(rewards) <= consistency_matrix(rewards[:, 1:])).all()


def test_another_objective_may_add_a_weak_pair() -> None:
    rewards = np.array([[1.0, 1.0], [1.0, 0.0]])
    assert not consistency_matrix(rewards[:, :1], "weak").any()
    assert consistency_matrix(rewards, "weak").tolist() == [[False, True], [False, False]]


@given(st.data(), matrices(st.integers(1, 3)))
def test_order_of_candidates_does_not_matter(data: st.DataObject, rewards: NDArray[np.float64]) -> None:
    rule = data.draw(rules(rewards.shape[1]))
    order = data.draw(st.permutations(range(len(rewards))))
    expected = consistency_matrix(rewards, **rule)[np.ix_(order, order)]
    assert (consistency_matrix(rewards[order], **rule) == expected).all()


@given(matrices(st.integers(1, 3), FEW | st.sampled_from([np.nan, np.inf, -np.inf])))
def test_candidates_that_are_not_finite_are_in_no_pair(rewards: NDArray[np.float64]) -> None:
    whole = np.isfinite(rewards).all(axis=1)
    matrix = consistency_matrix(rewards, margins=np.full(rewards.shape[1], -5.0))  # that all others meet
    assert (matrix == (whole[:, None] & whole & ~np.eye(len(rewards), dtype=bool))).all()


@given(matrices(st.integers(1, 3), st.floats(width=32, allow_nan=False, allow_infinity=False) | FEW))
def test_no_difference_is_too_small_or_too_large_to_see_its_sign(rewards: NDArray[np.float64]) -> None:
    expected = [[all(a > b for a, b in zip(winner, loser, strict=True)) for loser in rewards] for winner in rewards]
    assert consistency_matrix(rewards.astype(np.float32)).tolist() == expected


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        (np.zeros(3), {}, r"rewards has shape \(3,\)"),
        (np.zeros((3, 0)), {}, r"rewards has shape \(3, 0\)"),
        (np.zeros((3, 2)), {"margins": np.zeros(3)}, r"margins has shape \(3,\); expected \(2,\)"),
        (np.zeros((3, 2)), {"consistency": "loose"}, "consistency 'loose' is not one of strict, weak, lexicographic"),
        (np.zeros((3, 2)), {"consistency": "lexicographic"}, "primary and consistency 'lexicographic' go together"),
        (np.zeros((3, 2)), {"primary": 0}, "primary and consistency 'lexicographic' go together"),
        (np.zeros((3, 2)), {"consistency": "lexicographic", "primary": 2}, r"primary 2 is not an objective 0\.\.1"),
        (np.zeros((3, 2)), {"min_agreeing": 0}, r"min_agreeing 0 is not in 1\.\.2"),
        (np.zeros((3, 2)), {"min_agreeing": 3}, r"min_agreeing 3 is not in 1\.\.2"),
        (np.zeros((3, 2)), {"members": [0]}, r"members .* must name an objective 0\.\.K-1 for each of 2 columns"),
        (np.zeros((3, 2)), {"members": [0, 2]}, r"members .* must name an objective"),
        (np.zeros((3, 2)), {"members": [-1, 0]}, r"members .* must name an objective"),
        (np.zeros((3, 2)), {"members": [0, 0], "shares": [0.0]}, r"shares \[0\.0\] must be one number in \(0, 1\]"),
        (np.zeros((3, 2)), {"members": [0, 0], "shares": [1.0, 1.0]}, r"shares .* for each of 1 objectives"),
    ],
)
def test_wrong_arguments_are_named(rewards: NDArray[np.float64], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        consistency_matrix(rewards, **options)


def test_a_margin_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"margins .* hold NaN"):
        consistency_matrix(np.zeros((2, 2)), margins=np.array([0.0, np.nan]))
