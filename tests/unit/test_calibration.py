"""Calibration on labelled pairs: against a direct computation, on a known miscalibration, and what the report concludes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rc_ray.config import SelectionConfig
from rc_ray.core import schemas
from rc_ray.core.calibration import MIN_PAIRS, directions, fit_temperature, precision_margins, reliability
from rc_ray.errors import DataError
from rc_ray.evaluation.calibrate import LABELLED_GROUP, calibrate_groups, labelled_groups, other_rule, plot_reliability

finite = st.floats(-50, 50, allow_nan=False)
differences = st.lists(finite, min_size=1, max_size=60)


def direct(values: list[float], num_bins: int) -> tuple[float, float, float]:
    """ECE, ACE and MCE pair by pair, by their definition."""
    ordered = [(value, 1) for value in values] + [(-value, 0) for value in values]
    bins: dict[int, list[tuple[float, int]]] = {}
    for value, outcome in ordered:
        p = 1 / (1 + math.exp(-value))
        bins.setdefault(min(int(p * num_bins), num_bins - 1), []).append((p, outcome))
    errors = {b: abs(math.fsum(p for p, _ in pairs) - sum(y for _, y in pairs)) for b, pairs in bins.items()}
    means = [errors[b] / len(pairs) for b, pairs in bins.items()]
    return math.fsum(errors.values()) / len(ordered), math.fsum(means) / len(means), max(means)


def calibrated(seed: int, number: int = 40_000) -> np.ndarray:
    """Differences of a model whose probabilities are true: chosen is the better one with probability sigma(x)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 2, number)
    return np.where(rng.random(number) < 1 / (1 + np.exp(-x)), x, -x)


@given(differences, st.sampled_from([1, 5, 10, 20]))
def test_the_errors_are_those_of_a_direct_computation(values: list[float], num_bins: int) -> None:
    # So near to the edge between two bins, rounding decides which one it is.
    places = [num_bins / (1 + math.exp(-side * value)) for value in values if value for side in (1, -1)]
    assume(not any(0.5 < x < num_bins - 0.5 and abs(x - round(x)) < 1e-9 for x in places))
    found = reliability(np.array(values), num_bins)
    assert (found.ece, found.ace, found.mce) == pytest.approx(direct(values, num_bins), abs=1e-9)
    assert sum(found.counts) == 2 * len(values)
    assert len(found.predicted) == len(found.observed) == len(found.counts)


@given(differences)
def test_the_curve_is_symmetric_and_order_does_not_matter(values: list[float]) -> None:
    found, turned = reliability(np.array(values), 5), reliability(np.array(values[::-1]), 5)
    assert found.ece == pytest.approx(turned.ece, abs=1e-12)
    assert np.average(found.predicted, weights=found.counts) == pytest.approx(0.5)
    assert np.average(found.observed, weights=found.counts) == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(3))
def test_three_times_too_large_is_recovered(seed: int) -> None:
    d = calibrated(seed)
    assert reliability(d).ece < 0.01
    assert fit_temperature(d) == pytest.approx(1, rel=0.05)
    too_large = reliability(3 * d)
    assert too_large.ece == pytest.approx(direct((3 * d).tolist(), 10)[0], abs=1e-9)
    assert too_large.ece > 0.05
    temperature = fit_temperature(3 * d)
    assert temperature == pytest.approx(3, rel=0.05)
    assert temperature is not None
    assert reliability(3 * d, temperature=temperature).ece < 0.01


@given(st.lists(finite, min_size=2, max_size=40), st.floats(0.01, 100))
def test_the_temperature_has_the_highest_likelihood_and_follows_the_scale(values: list[float], scale: float) -> None:
    d = np.array(values)
    found = fit_temperature(d)
    if found is None:
        return
    assert fit_temperature(scale * d) == pytest.approx(scale * found, rel=1e-6)

    def loss(temperature: float) -> float:
        return float(np.logaddexp(0, -d / temperature).sum())

    assert loss(found) <= min(loss(found * 1.01), loss(found / 1.01)) + 1e-9


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.0, 0.0], [-1.0, 0.5], [0.0, 3.0]])
def test_where_no_temperature_is_best_there_is_none(values: list[float]) -> None:
    assert fit_temperature(np.array(values)) is None


@pytest.mark.parametrize("values", [[], [math.nan], [[1.0]], [math.inf]])
def test_what_is_no_difference_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="finite"):
        reliability(np.array(values))


def test_directions_need_all_objectives_beyond_their_margins() -> None:
    d = np.array([[2, 2], [2, 1], [-2, -2], [2, -2], [math.nan, 2], [0, 0]], dtype=float)
    assert directions(d, np.array([1.0, 1.0])).tolist() == [1, 0, -1, 0, 0, 0]
    assert directions(d, np.array([0.0, 0.0])).tolist() == [1, 1, -1, 0, 0, 0]


def noisy(seed: int, number: int) -> np.ndarray:
    """Two objectives that are right more often the larger their difference."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 2, (number, 1))
    return np.where(rng.random((number, 1)) < 1 / (1 + np.exp(-x)), x, -x) * [1, 50] + rng.normal(0, 0.5, (number, 2)) * [1, 50]


def test_margins_are_the_smallest_that_reach_the_precision() -> None:
    d = noisy(0, 2000)

    def precision(share: float) -> float:
        margins = np.zeros(2) if share == 0 else np.quantile(np.abs(d), share, axis=0)
        said = directions(d, margins)
        return float((said == 1).sum() / np.count_nonzero(said))

    found = precision_margins([d], [0, 1], 0.9)
    assert found is not None
    assert found.share > 0
    assert found.margins == pytest.approx(np.quantile(np.abs(d), found.share, axis=0))
    assert precision(found.share) >= 0.9
    assert all(precision(share) < 0.9 for share in np.arange(0, found.share - 0.001, 0.01))
    only_first = precision_margins([d], [0], 0.9)
    assert only_first is not None
    assert only_first.margins[1] == 0
    assert precision_margins([d], [0, 1], 0.51) is not None
    assert precision_margins([d], [0, 1], 0.51).share == 0  # type: ignore[union-attr]


def test_out_of_reach_is_said() -> None:
    rng = np.random.default_rng(0)
    assert precision_margins([rng.normal(0, 1, (2000, 1))], [0], 0.9) is None
    assert precision_margins([np.ones((MIN_PAIRS - 1, 1))], [0], 0.9) is None
    assert precision_margins([np.ones((MIN_PAIRS, 1))], [0], 0.9) is not None


def scored(d: dict[str, np.ndarray], label: str) -> pa.Table:
    """Labelled groups whose rewards differ by the given amounts; NaN: the second answer has none."""
    number = len(next(iter(d.values())))
    pairs = [([{"role": "user", "content": f"question {i}"}], f"the better one {i}", f"worse {i}") for i in range(number)]
    table = labelled_groups(label, pairs)
    for name, values in d.items():
        rewards = [[v + 7, 7.0] if math.isfinite(v) else [7.0, None] for v in values.tolist()]
        missing = [None if math.isfinite(v) else "no score returned" for v in values.tolist()]
        for field, column in zip(schemas.reward_fields([name]), (rewards, missing), strict=True):
            table = table.append_column(field, pa.array(column, field.type))
    return table


def test_margins_are_not_offered_to_another_rule() -> None:
    names = ["good", "brief"]
    found = calibrate_groups(scored({"good": noisy(1, 3000)[:, 0], "brief": np.ones(3000)}, "good"), names, 0.8)
    for options, differs in (
        ({}, ()),
        ({"objectives": ["brief", "good"], "transforms": {"good": {"kind": "identity"}}}, ()),
        ({"transforms": {"good": {"kind": "zscore"}}, "margin_unit": "scale"}, ("transforms", "margin_unit")),
        ({"objectives": ["good"], "consistency": "weak"}, ("objectives", "consistency")),
    ):
        rule = other_rule(SelectionConfig(**options), names)
        assert rule == differs
        text = "\n".join(replace(found, other_rule=rule).lines())
        assert ("--set 'selection.margins" in text) == (not differs)
        assert all(f"selection.{name}" in text for name in differs)


def test_the_report_says_what_each_objective_is_worth() -> None:
    d = noisy(1, 3000)
    good, brief = d[:, 0], np.random.default_rng(2).normal(0, 1, 3000)
    good[:5] = math.nan
    found = calibrate_groups(scored({"good": good, "brief": brief}, "good"), ["good", "brief"], 0.8)
    trust = found.trust["good"]
    assert list(found.trust) == ["good"]
    assert (trust.num_pairs, trust.num_missing) == (2995, 5)
    assert trust.accuracy.mean == pytest.approx((good[5:] > 0).mean())
    assert trust.length_accuracy == 1
    assert "longer answer" in trust.verdict
    assert found.agreement["good, brief"] == pytest.approx((good[5:] * brief[5:] > 0).mean(), abs=1e-6)
    assert found.margins is not None
    assert found.margins["brief"] == 0
    before, after = found.without_margins["good"], found.with_margins["good"]
    assert before.precision is not None
    assert after.precision is not None
    assert after.num_kept < before.num_kept
    assert after.precision.mean > 0.75  # on the half that did not choose the margins
    json.dumps(found.as_dict(), allow_nan=False)
    text = "\n".join(found.lines())
    assert "5 pairs without a reward left out" in text
    assert "--set 'selection.margins={good: " in text
    assert len(plot_reliability(found).axes) == 1


def test_a_coin_and_a_rule_of_length_are_not_fit() -> None:
    rng = np.random.default_rng(0)
    coin = calibrate_groups(scored({"coin": rng.normal(0, 1, 400)}, "coin"), ["coin"], 0.9)
    assert "coin" in coin.trust["coin"].verdict.removeprefix("not fit for RC")
    assert "no margins reach it" in "\n".join(coin.lines())


@pytest.mark.parametrize("number", [400, 280, 200, 120, 0])
def test_a_reward_is_fit_where_it_is_better_than_both_rules_of_length(number: int) -> None:
    """Right in 380 of 400 pairs, of which so many have the shorter answer as the better one."""
    answers = [("good", "a longer one") if i < number else ("a longer one", "good") for i in range(400)]
    table = labelled_groups("x", [([{"role": "user", "content": f"q{i}"}], *pair) for i, pair in enumerate(answers)])
    rewards = [pa.array([[1.0, 0.0]] * 380 + [[0.0, 1.0]] * 20, pa.list_(pa.float32())), pa.nulls(400, pa.string())]
    for field, column in zip(schemas.reward_fields(["x"]), rewards, strict=True):
        table = table.append_column(field, column)
    rule = {400: "the shorter answer", 0: "the longer answer"}.get(number)
    verdict = calibrate_groups(table, ["x"], 0.9).trust["x"].verdict
    assert verdict == (
        "fit for RC" if rule is None else f"doubtful for RC: it cannot be told from the rule that {rule} is better"
    )


def test_too_few_pairs_and_an_impossible_precision_are_errors() -> None:
    one = scored({"x": np.array([1.0])}, "x")
    with pytest.raises(DataError, match="pairs of 'x': 1 of 1"):
        calibrate_groups(one, ["x"], 0.9)
    with pytest.raises(DataError, match=r"precision = 0\.5"):
        calibrate_groups(one, ["x"], 0.5)
    assert one.select(LABELLED_GROUP.names).schema == LABELLED_GROUP
