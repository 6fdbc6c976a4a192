"""Numbers about all the data: exact sums, their standard deviation, the pilot sample, and MAP's weights."""

from __future__ import annotations

import hashlib
import math
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rc_ray.config import SelectionConfig
from rc_ray.core.measure import Summary, fit, map_weights
from rc_ray.core.selection import fit_selection, summarize
from rc_ray.errors import DataError
from tests.unit.selection_reference import Answer, Group, group_table, numbered_groups, preference_table

FLOAT32 = st.floats(width=32) | st.sampled_from([0.0, 1.0, 1 + 2**-23, 2.0**-149, (2 - 2.0**-23) * 2.0**127])
LISTS = st.lists(st.lists(st.none() | FLOAT32, max_size=5) | st.none(), min_size=1, max_size=6)
MAP = SelectionConfig(strategy="map", targets={"a": 0.5})


def lists(values: Any) -> pa.Array:
    return pa.array(values, pa.list_(pa.float32()))


def exact_deviation(values: list[float]) -> float:
    """The float64 nearest to the population standard deviation, the even one of two as near; 1 where nothing varies."""
    exact = [Fraction(value) for value in values]
    variance = sum((value - sum(exact) / len(exact)) ** 2 for value in exact) / max(len(exact), 1)
    if not variance:
        return 1.0
    with localcontext(prec=2000):  # more digits than a root that lies between two float64 can have
        return float((Decimal(variance.numerator) / Decimal(variance.denominator)).sqrt())


@given(LISTS)
@example([[2.0, 2.547620840158003e16]])  # the root is a tie
def test_scale_is_the_standard_deviation_correctly_rounded(values: list[list[float | None] | None]) -> None:
    finite = [v for each in values for v in each or () if v is not None and math.isfinite(v)]
    assert Summary.of({"a": lists(values)}).scale() == {"a": exact_deviation(finite)}


@given(LISTS, st.data())
def test_order_and_split_do_not_matter_and_bytes_keep_everything(values: Any, data: st.DataObject) -> None:
    other = [each and each[::-1] for each in values]
    order = data.draw(st.permutations(range(len(values))))
    cut = data.draw(st.integers(0, len(values)))

    def summary(rows: list[int]) -> Summary:
        columns = {name: lists([source[i] for i in rows]) for name, source in (("a", values), ("b", other))}
        return Summary.of(columns, 2, pa.array([f"prompt {i}" for i in rows], pa.string()))

    whole = summary(list(range(len(values))))
    parts = summary(order[:cut]) + Summary.from_bytes(summary(order[cut:]).to_bytes())
    assert parts.to_bytes() == whole.to_bytes()
    again = Summary.from_bytes(whole.to_bytes())
    assert (again.columns, again.pilot, again.num_pilot_groups) == (whole.columns, whole.pilot, whole.num_pilot_groups)
    assert (again.count == whole.count).all()
    assert (again.sums == whole.sums).all()
    assert again.scale() == whole.scale() == parts.scale()


def test_the_order_of_columns_does_not_matter() -> None:
    def summary(*named: tuple[str, list[float]]) -> Summary:
        columns = {name: lists([values]) for name, values in named}
        return Summary.of(columns, 2, pa.array([f"prompt {named[0][1]}"], pa.string()))

    straight = summary(("a", [1, 2]), ("b", [10, 70])) + summary(("a", [3, 9]), ("b", [20, 30]))
    crossed = summary(("a", [1, 2]), ("b", [10, 70])) + summary(("b", [20, 30]), ("a", [3, 9]))
    assert crossed.scale() == straight.scale() == {"a": exact_deviation([1, 2, 3, 9]), "b": exact_deviation([10, 70, 20, 30])}
    assert crossed.ends == straight.ends == ((1, 9), (10, 70))
    assert sorted(crossed.sample("b")) == sorted(straight.sample("b")) == [10, 20, 30, 70]
    with pytest.raises(DataError, match="some have the rewards a, b and some a;"):
        straight + summary(("a", [1, 2]))


def test_summaries_read_groups_existing_pairs_and_other_types_alike() -> None:
    groups = numbered_groups([[(1.0, 5.0), (2.0, 5.0)], [(4.0, 5.0), (9.0, 5.0)]])
    expected = {"a": exact_deviation([1, 2, 4, 9]), "b": 1.0}
    table = group_table(groups, "ab")
    double = table.set_column(4, "reward.a", table.column("reward.a").cast(pa.large_list(pa.float64())))
    for each in (table, double, preference_table(groups, "ab")):
        strategy = "rcs" if "candidates" in each.column_names else "rc_filter"
        assert fit_selection([each.slice(0, 1), each.slice(1)], SelectionConfig(strategy=strategy)).scale == expected
    assert fit_selection([table], SelectionConfig(objectives=["b"])).scale == {"b": 1.0}
    assert fit_selection([], SelectionConfig(gap="sum")).as_dict() == {"scale": None, "weights": None}
    with pytest.raises(DataError, match="no group"):
        fit_selection([], SelectionConfig())


def test_pilots_are_the_complete_groups_whose_prompts_hash_lowest() -> None:
    rng = np.random.default_rng(0)
    groups = numbered_groups(rng.normal(size=(50, 3, 2)).astype(np.float32).tolist())
    groups[7] = Group("7", (Answer("x", (None, 1.0)), Answer("y", (2.0, 1.0))))
    groups[8] = Group("8", ())
    config = MAP.model_copy(update={"num_pilot_groups": 45})
    usable = sorted(set(range(50)) - {7, 8}, key=lambda g: hashlib.blake2b(str(g).encode(), digest_size=8).digest())
    shuffled = [groups[g] for g in rng.permutation(50)]
    parts = [summarize(group_table(part, "ab"), config) for part in (shuffled[:10], shuffled[10:12], shuffled[12:])]
    total = parts[0] + parts[1] + parts[2]
    assert [prompt for _, prompt, _ in total.pilot] == [str(g) for g in usable[:45]]
    assert [rewards for *_, rewards in total.pilot] == [tuple(a.rewards for a in groups[g].answers) for g in usable[:45]]


def tilted_means(rewards: NDArray[np.float64], weights: NDArray[np.float64]) -> list[float]:
    """Mean rewards when sample j has the probability exp(weights . r_j) / sum."""
    exponents = [math.fsum(w * r for w, r in zip(weights, row, strict=True)) for row in rewards.tolist()]
    odds = [math.exp(exponent - max(exponents)) for exponent in exponents]
    return [math.fsum(o * r for o, r in zip(odds, column, strict=True)) / math.fsum(odds) for column in rewards.T.tolist()]


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1), st.lists(st.booleans(), min_size=1, max_size=4).filter(any), st.sampled_from([1e-6, 1.0, 1e4])
)
def test_map_finds_the_weights_that_its_targets_were_made_with(seed: int, binding: list[bool], unit: float) -> None:
    rng = np.random.default_rng(seed)
    width = len(binding)
    rewards = (rng.normal(size=(80, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)) * unit
    spread = rewards.std(axis=0)
    true = np.where(binding, rng.uniform(0.1, 1.5, width), 0.0) / spread
    # A weight is 0 where the tilted mean is beyond its target (complementary slackness).
    targets = np.asarray(tilted_means(rewards, true)) - np.where(binding, 0.0, 0.3) * spread
    weights = map_weights(rewards, targets, list("abcd"[:width]))
    excess = (np.asarray(tilted_means(rewards, weights)) - targets) / spread
    assert (weights >= 0).all()
    assert (excess > -1e-6).all()
    assert np.abs(excess * weights * spread).max() < 1e-6
    # How far a mean that is off by 1e-6 may move the weights depends on how alike the objectives are.
    z = rewards / spread
    odds = np.exp(z @ (true * spread) - (z @ (true * spread)).max())
    covariance = np.cov(z[:, binding].T, aweights=odds / odds.sum(), ddof=0).reshape(sum(binding), sum(binding))
    assert np.abs((weights - true) * spread).max() < 1e-5 / np.linalg.eigvalsh(covariance)[0]


def test_map_on_two_outcomes_gives_the_log_odds() -> None:
    rewards = np.array([[0.0], [1.0]])
    assert map_weights(rewards, np.array([0.9]), ["a"]) == pytest.approx([math.log(9)], rel=1e-9)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([1.0, -5.0], r"targets\.a = 1: no sample is above it \(highest 1, mean 0.5\)"),
        ([0.9, 0.9], r"cannot be reached together .*stays below"),
        ([0.5, 0.2], r"reach every target already \(means \{'a': 0.5, 'b': 0.5\}\)"),
    ],
)
def test_targets_that_make_no_sense_are_named(targets: list[float], message: str) -> None:
    rewards = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    with pytest.raises(DataError, match=message):
        map_weights(rewards, np.asarray(targets), ["a", "b"])


def test_map_is_fitted_to_all_candidates_of_the_pilots_and_to_ensembles_over_their_scales() -> None:
    rewards = np.random.default_rng(0).normal(size=(20, 4, 3)).astype(np.float32) * np.float32([1, 1, 5])
    table = group_table(numbered_groups(rewards.tolist()), "abc")
    flat = rewards.reshape(-1, 3).astype(np.float64)
    plain = fit_selection([table.slice(0, 9), table.slice(9)], MAP.model_copy(update={"targets": {"c": 2.0, "a": 0.3}}))
    expected = map_weights(flat[:, [2, 0]], np.array([2.0, 0.3]), ["c", "a"])
    assert plain.scale is None
    assert plain.weights == pytest.approx(dict(zip("ca", expected, strict=True)), rel=1e-6)
    joint = SelectionConfig(strategy="map", targets={"e": 0.2}, ensembles={"e": {"members": ["b", "c"]}})
    scale = {name: exact_deviation(flat[:, m].tolist()) for m, name in enumerate("abc")}
    mean = (flat[:, 1] / scale["b"] + flat[:, 2] / scale["c"]) / 2
    fitted = fit_selection([table], joint)
    assert fitted.scale == pytest.approx(scale)
    assert fitted.weights == pytest.approx({"e": map_weights(mean[:, None], np.array([0.2]), ["e"])[0]}, rel=1e-6)
    with pytest.raises(DataError, match="no group has all its rewards"):
        fit(summarize(group_table([Group("0", (Answer("x", (None, None, None)),))], "abc"), MAP), MAP)
