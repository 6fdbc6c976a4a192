"""Transforms of rewards and objectives made of several rewards: against NumPy and the slow definition, and what they must not change."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rc_ray.config import SelectionConfig, TransformConfig, fingerprint, load_config, to_yaml
from rc_ray.core import measure, schemas, transforms
from rc_ray.core.measure import Fitted, Summary, fit, map_weights
from rc_ray.core.selection import fit_selection, select_indices, select_pairs, summarize, without_fit
from rc_ray.core.selection_report import scale_only, selection_report
from rc_ray.errors import ConfigError, ResumeError
from rc_ray.pipeline import select_files as files
from rc_ray.pipeline.select_files import select_files
from tests.unit.selection_reference import Answer, Group, group_table, numbered_groups, preference_table, select, transformed
from tests.unit.test_adaptive import RECORDED, Replayed
from tests.unit.test_config import GOOD
from tests.unit.test_select_files import read, scored_rows, write_jsonl
from tests.unit.test_strategies import CASES, FEW, configs, groups_of, outcome, table_for

EVERY_KIND: dict[str, Any] = {
    "a": {"kind": "zscore", "clip": [-1.5, None]},
    "b": {"kind": "lsc"},
    "c": {"kind": "quantile"},
    "d": {"kind": "lsc", "reference": 0.25},
    "e": {"clip": [-0.5, 0.75]},
}
JOINT = {"mean": {"members": ["a", "b"], "combine": "mean"}, "least": {"members": ["c", "d"], "combine": "minimum"}}


def normal_groups(count: int, width: int, size: int = 5, seed: int = 0) -> tuple[np.ndarray, pa.Table]:
    """Rewards (count, size, width) with ties, and their table."""
    rng = np.random.default_rng(seed)
    rewards = (rng.normal(size=(count, size, width)) * np.exp(rng.normal(size=width))).round(1).astype(np.float32)
    return rewards, group_table(numbered_groups(rewards.tolist()), "abcdefgh"[:width])


def by_numpy(rewards: np.ndarray) -> dict[str, np.ndarray]:
    """`EVERY_KIND` of a flat (T, 5) array."""
    a, b, c, d, e = rewards.astype(np.float64).T
    return {
        "a": np.maximum((a - a.mean()) / a.std(), -1.5),
        "b": -np.logaddexp(0, np.quantile(b, 0.85) - b),
        "c": np.mean((c[None, :] < c[:, None]) + (c[None, :] == c[:, None]) / 2, axis=1),
        "d": -np.logaddexp(0, 0.25 - d),
        "e": np.clip(e, -0.5, 0.75),
    }


# ------------------------------------------------------------------------------------------------------- what comes of a reward


@pytest.mark.parametrize("ensembles", [{}, JOINT])
def test_values_and_their_scale_are_those_of_numpy(ensembles: dict[str, Any]) -> None:
    rewards, table = normal_groups(60, 5)
    config = SelectionConfig(transforms=EVERY_KIND, ensembles=ensembles)
    fitted = fit_selection([table.slice(0, 7), table.slice(7)], config)
    flat = rewards.reshape(-1, 5)
    expected = by_numpy(flat)
    if ensembles:
        joint = {"mean": (expected["a"] + expected["b"]) / 2, "least": np.minimum(expected["c"], expected["d"])}
        expected = {"e": expected["e"], **joint}
    judges = config.judges_of(config.objective_names("abcde"))
    assert judges == list(expected)
    found = transforms.derive(dict(zip("abcde", flat.T, strict=True)), config, judges, fitted.transforms)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-12, atol=1e-15)
    assert fitted.scale == pytest.approx({name: values.std() for name, values in expected.items()}, rel=1e-6)
    # The same from an array.
    of_array = select_indices(rewards, config, objectives=list("abcde"))
    rows = select_pairs(table, config).pairs.to_pylist()
    assert len(rows) > 5
    assert [(str(g), w) for g, w in zip(of_array.group, of_array.winner, strict=True)] == [
        (row["prompt_id"], row["chosen_index"]) for row in rows
    ]


def test_pairs_keep_their_rewards_and_the_gap_is_of_values() -> None:
    table = group_table(numbered_groups([[(4.0, 1.0), (0.0, 0.0), (2.0, 3.0)]]), "ab")
    config = SelectionConfig(
        gap="sum", transforms={"a": {"kind": "lsc", "reference": 1.0}, "b": {"clip": [None, 2.0]}}, weights={"b": 3.0}
    )
    (row,) = select_pairs(table, config).pairs.to_pylist()
    assert (row["chosen_index"], row["rejected_index"]) == (2, 1)
    assert (row["rewards_chosen"], row["rewards_rejected"]) == ({"a": 2.0, "b": 3.0}, {"a": 0.0, "b": 0.0})
    assert row["gap"] == pytest.approx(math.log(1 / (1 + math.exp(-1))) - math.log(1 / (1 + math.exp(1))) + 3 * 2.0, rel=1e-12)
    # A margin is in the unit of the values, which differ by 1.26 where the rewards differ by 4.
    for margin, pairs in ((1.2, 1), (1.3, 0)):
        less = SelectionConfig(
            gap="sum", transforms={"a": {"kind": "lsc", "reference": 1.0}}, margins={"a": margin}, objectives=["a"]
        )
        assert select_pairs(table.slice(0, 1), less).num_paired == pairs


@pytest.mark.parametrize(("combine", "winner", "gap"), [("mean", 2, 2.0), ("minimum", 1, 2.0)])
def test_one_value_of_several_rewards_is_judged_like_a_reward(combine: str, winner: int, gap: float) -> None:
    table = group_table(numbered_groups([[(0.0, 1.0), (2.0, 2.0), (5.0, 0.0)]]), "ab")
    ensemble = {"e": {"members": ["a", "b"], "combine": combine}}
    (row,) = select_pairs(table, SelectionConfig(ensembles=ensemble, gap="sum")).pairs.to_pylist()
    assert (row["chosen_index"], row["rejected_index"], row["gap"]) == (winner, 0, gap)
    assert list(row["rewards_chosen"]) == ["a", "b"]
    # Kept apart, the members disagree on (5, 0) and (0, 1).
    (row,) = select_pairs(table, SelectionConfig(ensembles={"e": {"members": ["a", "b"]}})).pairs.to_pylist()
    assert (row["chosen_index"], row["rejected_index"]) == (1, 0)
    for margin, pairs in ((gap - 0.25, 1), (gap + 0.25, 0)):
        config = SelectionConfig(ensembles=ensemble, gap="sum", margins={"e": margin})
        assert select_pairs(table, config).num_paired == pairs
    lacking = group_table([Group("0", (Answer("x", (1.0, None)), Answer("y", (0.0, 0.0))))], "ab")
    assert select_pairs(lacking, SelectionConfig(ensembles=ensemble)).drops.column("reason").to_pylist() == ["reward_missing"]


def test_scale_of_an_ensemble_of_one_value_goes_by_its_name() -> None:
    table = group_table(numbered_groups([[(0.0, 1.0, 0.0), (2.0, 2.0, 8.0)]]), "abc")
    ensembles = {"e": {"members": ["a", "b"], "combine": "mean"}}
    config = SelectionConfig(ensembles=ensembles, scale={"e": 0.5, "c": 4.0})
    assert select_pairs(table, config).pairs.column("gap").to_pylist() == [8 / 4 + 1.5 / 0.5]
    for scale, words in (({"a": 1.0, "b": 1.0, "c": 1.0}, "scale names 'a'"), ({"c": 1.0}, "scale lacks 'e'")):
        with pytest.raises(ConfigError, match=words):
            select_pairs(table, SelectionConfig(ensembles=ensembles, scale=scale))


def test_identity_is_as_if_nothing_were_said() -> None:
    _, table = normal_groups(50, 2)
    config = SelectionConfig(transforms={"a": {"kind": "identity"}})
    assert not config.derives
    assert select_pairs(table, config).pairs.equals(select_pairs(table, SelectionConfig()).pairs)


@st.composite
def drawn_transforms(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["identity", "zscore", "lsc", "quantile"]))
    options: dict[str, Any] = {"kind": kind}
    if kind == "lsc":
        options |= draw(st.sampled_from([{}, {"reference": -0.75}, {"reference_quantile": 0.3}]))
    limits = {"quantile": [[0.2, 0.9], [0.5, None]], "lsc": [[-1.0, -0.1], [-2.0, None]]}.get(kind, [[-0.5, 0.5], [None, 1.0]])
    return options | draw(st.sampled_from([{}, {}, *({"clip": clip} for clip in limits)]))


@st.composite
def derived_configs(draw: st.DrawFn, strategy: str, gap: str | None, columns: str) -> SelectionConfig:
    """Any mixture of options, with transforms and objectives made of several rewards."""
    base = draw(configs(strategy, gap, columns))
    options = base.model_dump()
    if base.ensembles and draw(st.booleans()):
        options["ensembles"] = {"mean": {"members": list(columns[1:]), "combine": draw(st.sampled_from(["mean", "minimum"]))}}
    used = base.columns_of(base.objective_names(columns))
    options["transforms"] = draw(st.dictionaries(st.sampled_from(used), drawn_transforms()))
    probe = SelectionConfig(**{**options, "scale": "data"})
    if isinstance(base.scale, dict):
        judges = probe.judges_of(probe.objective_names(columns))
        options["scale"] = {name: base.scale.get(name, 2.0) for name in judges} if probe.uses_scale else "data"
    return SelectionConfig(**options)


@pytest.mark.parametrize(("strategy", "gap"), CASES)
@settings(max_examples=40)
@given(data=st.data())
def test_selection_equals_the_definition(data: st.DataObject, strategy: str, gap: str | None) -> None:
    columns = "abcde"[: data.draw(st.sampled_from([1, 2, 3, 5]))]
    groups = data.draw(groups_of(len(columns), FEW, (2, 2) if strategy == "rc_filter" else (0, 6)))
    if strategy == "rc_filter":  # existing pairs have neither finish reasons nor failures
        groups = [Group(g.prompt_id, tuple(Answer(a.text, a.rewards) for a in g.answers)) for g in groups]
    config = data.draw(derived_configs(strategy, gap, columns))
    table = table_for(groups, config, columns)
    weights = {name: 0.5 + k for k, name in enumerate(config.targets)}
    fitted = replace(fit_selection([table], scale_only(config)), weights=weights)
    made, plain, names = transformed(groups, config, columns)
    outcomes = {g.prompt_id: select(g, plain, names, fitted.scale, weights, config.derives) for g in made}
    selected = select_pairs(table, config, fitted)
    keys = ("prompt_id", "strategy", "chosen_index", "rejected_index", "gap")
    assert [tuple(row[key] for key in keys) for row in selected.pairs.to_pylist()] == [
        (name, p.strategy, p.winner, p.loser, p.gap) for name, found in outcomes.items() for p in found.pairs
    ]
    drops = [(row["prompt_id"], row["reason"]) for row in selected.drops.to_pylist()]
    assert drops == [(name, found.reason) for name, found in outcomes.items() if found.reason]
    assert selected.num_beyond_cap == sum(found.beyond_cap for found in outcomes.values())


# ------------------------------------------------------------------------------------------------------------ what stays the same

SIXTEENTHS = st.integers(-400, 400).map(lambda i: i / 16) | st.sampled_from([0.0, 1.0])
RISING = [{"kind": "identity"}, {"kind": "zscore"}, {"kind": "lsc"}, {"kind": "lsc", "reference": 3.0}, {"kind": "quantile"}]


@settings(max_examples=150)
@given(
    st.lists(st.lists(st.tuples(SIXTEENTHS, SIXTEENTHS), max_size=6), min_size=1, max_size=3),
    st.tuples(*[st.sampled_from(RISING)] * 2),
    st.sampled_from([{}, {"consistency": "weak"}, {"min_agreeing": 1}, {"consistency": "lexicographic", "primary": "b"}]),
)
def test_rising_transforms_leave_rc_pairs_without_margins(rewards: list[Any], rising: Any, rule: dict[str, Any]) -> None:
    table = group_table(numbered_groups(rewards), "ab")
    # The gap, which decides where a rule holds in both directions, is of a reward that is not transformed.
    table = table.append_column("reward.z", table.column("reward.a"))
    options: dict[str, Any] = {"strategy": "rc_all", "gap": "primary:z", **rule}
    if "min_agreeing" not in rule:
        options |= {"gap": "primary:a", "objectives": ["a", "b"]}
    found = []
    for given_transforms in ({}, dict(zip("ab", rising, strict=True))):
        selected = select_pairs(table, SelectionConfig(**options, transforms=given_transforms))
        rows = selected.pairs.to_pylist()
        found.append(({(r["prompt_id"], r["chosen_index"], r["rejected_index"]) for r in rows}, selected.drops))
    assert found[0][0] == found[1][0]
    assert found[0][1].equals(found[1][1])


NORMAL = st.floats(width=32, allow_nan=False, allow_infinity=False).filter(lambda x: x == 0 or abs(x) > 1e-6)


@settings(max_examples=200)
@given(st.lists(NORMAL, min_size=1, max_size=40), st.sampled_from(RISING), st.integers(2, 8))
def test_no_transform_turns_two_rewards_round(values: list[float], rising: dict[str, Any], knots: int) -> None:
    table = group_table([Group(str(i), (Answer("x", (value,)),)) for i, value in enumerate(values)], "a")
    config = SelectionConfig(transforms={"a": rising}, gap="sum")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "SAMPLE_GROUPS", len(values) // 2 + 1)
        patch.setattr(transforms, "NUM_KNOTS", knots)
        fitted = fit_selection([table], config)
    ordered = np.sort(np.asarray(values, dtype=np.float32))
    (found,) = transforms.derive({"a": ordered}, config, ["a"], fitted.transforms).values()
    assert (np.diff(found) >= 0).all()
    if rising["kind"] == "quantile":
        assert 0 <= found[0] <= found[-1] <= 1


def parts_of(table: pa.Table, cuts: list[int]) -> Iterator[pa.Table]:
    for start, end in zip([0, *cuts], [*cuts, table.num_rows], strict=True):
        yield table.slice(start, end - start)


@settings(max_examples=25)
@given(st.permutations(range(30)), st.lists(st.integers(0, 30), max_size=4).map(sorted))
def test_neither_order_nor_split_of_the_data_matters(order: list[int], cuts: list[int]) -> None:
    rng = np.random.default_rng(1)
    groups = numbered_groups(rng.normal(size=(30, 4, 5)).round(1).tolist())
    groups[3] = Group("3", (Answer("x", (1.0, None, 0.0, 2.0, math.nan)), Answer("y", (9.0, 1.0, -7.0, 0.0, 0.0))))
    groups[4] = Group("4", ())
    table = group_table(groups, "abcde")
    config = SelectionConfig(transforms=EVERY_KIND, ensembles=JOINT, margins={"e": 0.1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "SAMPLE_GROUPS", 12)
        patch.setattr(transforms, "NUM_KNOTS", 7)
        whole = fit_selection([table], config)
        turned = table.take(order)

        def pass_over(fitted: Fitted | None = None) -> Summary:
            first, *others = (Summary.from_bytes(summarize(part, config, fitted).to_bytes()) for part in parts_of(turned, cuts))
            return sum(others, first)

        assert fit(pass_over(), config, pass_over) == whole
        assert Fitted(**json.loads(json.dumps(whole.as_dict()))) == whole
    expected = outcome([select_pairs(table, config, whole)])
    assert min(map(len, expected)) > 1
    assert outcome([select_pairs(part, config, whole) for part in parts_of(turned, cuts)]) == expected


def test_knots_come_from_the_prompts_that_hash_lowest_and_reach_to_the_ends_of_the_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rewards, _ = normal_groups(200, 1)
    config = SelectionConfig(transforms={"a": {"kind": "quantile"}}, gap="sum")
    monkeypatch.setattr(measure, "SAMPLE_GROUPS", 80)
    lowest = sorted(range(200), key=lambda g: hashlib.blake2b(str(g).encode(), digest_size=8).digest())[:80]
    outside = sorted(set(range(200)) - set(lowest))
    rewards[outside[0], 0], rewards[outside[-1], 2] = -50.0, 60.0
    table = group_table(numbered_groups(rewards.tolist()), "a")
    sample = np.sort(rewards[lowest].ravel().astype(np.float64))
    fitted = fit_selection([table], config).transforms
    assert fitted is not None
    distinct = np.unique(sample)
    assert fitted["a"]["knots"] == [-50.0, *distinct.tolist(), 60.0]
    shares = [(sample < x).mean() + (sample == x).mean() / 2 for x in distinct]
    assert fitted["a"]["shares"] == pytest.approx([0.0, *shares, 1.0])
    monkeypatch.setattr(transforms, "NUM_KNOTS", 17)
    coarse = fit_selection([table], config).transforms
    assert coarse is not None
    assert len(coarse["a"]["knots"]) <= 19
    values = rewards.reshape(-1)
    fine, rough = (transforms.derive({"a": values}, config, ["a"], each)["a"] for each in (fitted, coarse))
    # Between two knots lies 1/16 of the sample, and what ties with them.
    assert np.abs(fine - rough).max() < 1 / 16
    whole = np.mean((values[None, :] < values[:, None]) + (values[None, :] == values[:, None]) / 2, axis=1)
    # The band of Dvoretzky, Kiefer and Wolfowitz at 1 in 1000, for 400 candidates.
    assert np.abs(fine - whole).max() < math.sqrt(math.log(2000) / 800)


def test_map_weighs_values_after_their_transforms() -> None:
    rewards, table = normal_groups(40, 3)
    options: dict[str, Any] = {"transforms": {"a": {"kind": "zscore"}, "b": {"kind": "zscore"}, "c": {"clip": [-1.0, 1.0]}}}
    options["ensembles"] = {"e": {"members": ["a", "b"], "combine": "mean"}}
    config = SelectionConfig(strategy="map", targets={"e": 0.2, "c": 0.3}, num_pilot_groups=25, **options)
    lowest = sorted(range(40), key=lambda g: hashlib.blake2b(str(g).encode(), digest_size=8).digest())[:25]
    z = ((rewards - rewards.mean(axis=(0, 1))) / rewards.std(axis=(0, 1)))[lowest].reshape(-1, 3)
    values = np.stack([z[:, :2].mean(axis=1), np.clip(rewards[lowest, :, 2].ravel(), -1, 1)], axis=1).astype(np.float64)
    fitted = fit_selection([table], config)
    expected = map_weights(values, np.array([0.2, 0.3]), ["e", "c"])
    assert fitted.weights == pytest.approx(dict(zip("ec", expected, strict=True)), rel=1e-4)
    assert select_pairs(table, config, fitted).num_paired > 30


def test_report_is_of_values() -> None:
    _, table = normal_groups(80, 3)
    config = SelectionConfig(
        transforms={"a": {"kind": "zscore", "clip": [-0.3, 0.3]}, "b": {"kind": "quantile"}},
        ensembles={"e": {"members": ["b", "c"], "combine": "minimum"}}, gap="sum",
    )  # fmt: skip
    report = selection_report(table, config)
    selected = select_pairs(table, config)
    assert report.objectives == ["a", "e"]
    assert report.strategies["rcs"]["pairs"] == selected.num_paired
    assert report.consistency["a + e"][5] == selected.num_paired / 80
    assert report.gap["100 %"] == max(selected.pairs.column("gap").to_pylist())
    # The strategies beside one that does without a scale are given the scale of values.
    lsc = SelectionConfig(**{**config.model_dump(), "gap": "standardized_sum", "strategy": "lsc"})
    assert fit_selection([table], lsc).scale is None
    beside = SelectionConfig(**{**lsc.model_dump(), "strategy": "rs_dpo"})
    assert selection_report(table, lsc).strategies["rs_dpo"]["pairs"] == select_pairs(table, beside).pairs.num_rows


# ------------------------------------------------------------------------------------------------------------- where nothing is known


def test_where_all_groups_lack_a_reward_nothing_is_fitted_and_all_are_drops() -> None:
    table = group_table([Group("0", (Answer("x", (None, 1.0)), Answer("y", (None, 0.0))))], "ab")
    for kind in ("zscore", "lsc", "quantile"):
        config = SelectionConfig(transforms={"a": {"kind": kind}})
        assert fit_selection([table], config).transforms == {"a": {}}
        assert select_pairs(table, config).drops.column("reason").to_pylist() == ["reward_missing"]


def test_rewards_stay_as_they_are_until_their_transform_is_fitted() -> None:
    _, table = normal_groups(30, 3)
    config = SelectionConfig(
        gap="sum", objectives=["a", "b"], transforms={"a": {"kind": "quantile", "clip": [0.4, 0.6]}, "b": {"clip": [0.0, None]}}
    )
    partly = SelectionConfig(gap="sum", objectives=["a", "b"], transforms={"b": {"clip": [0.0, None]}})
    assert select_pairs(table, config, without_fit(config, "abc")).pairs.equals(select_pairs(table, partly).pairs)
    with pytest.raises(KeyError):
        select_pairs(table, config, Fitted())
    # Whatever is compared has a scale then.
    joint = SelectionConfig(ensembles={"e": {"members": ["a", "b"], "combine": "mean"}})
    units = SelectionConfig(**{**joint.model_dump(), "scale": {"e": 1.0, "c": 1.0}})
    assert select_pairs(table, joint, without_fit(joint, "abc")).pairs.equals(select_pairs(table, units).pairs)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("{helpful: {kind: zscore}}", r"selection\.transforms\.helpful \(zscore\) is fitted to are not there"),
        ("{helpful: {kind: quantile}}", r"\(quantile\)"),
        ("{length: {kind: lsc}}", r"selection\.transforms\.length \(lsc\)"),
    ],
)
def test_adaptive_sampling_refuses_what_all_the_data_are_needed_for(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(GOOD, ["generation.max_candidates=16", f"selection.transforms={override}"])


def test_adaptive_sampling_uses_what_needs_no_pass() -> None:
    known = "{helpful: {kind: lsc, reference: 1, clip: [-2, null]}, length: {clip: [-3, 3]}}"
    load_config(GOOD, ["generation.max_candidates=16", f"selection.transforms={known}"])
    plain = Replayed(RECORDED, 2, 8, target_gap=1.5, gap="sum").outcome()
    assert len(plain["at once"]["candidates"]) == 2
    clipped = Replayed(RECORDED, 2, 8, target_gap=1.5, gap="sum", transforms={"a": {"clip": [None, 0.25]}}).outcome()
    assert len(clipped["at once"]["candidates"]) == 4
    joint = Replayed(RECORDED, 2, 8, ensembles={"e": {"members": ["a", "b"], "combine": "mean"}}).outcome()
    assert len(joint["at once"]["candidates"]) == 2


# ------------------------------------------------------------------------------------------------------------------- wrong options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "log"}, "'identity', 'zscore', 'lsc' or 'quantile'"),
        ({"kind": "zscore", "reference": 1.0}, "reference has no effect with kind zscore; remove it, or use kind: lsc"),
        ({"kind": "quantile", "reference_quantile": 0.5}, "reference_quantile has no effect with kind quantile"),
        ({"kind": "lsc", "reference": 1.0, "reference_quantile": 0.5}, "no effect when reference is given"),
        ({"kind": "lsc", "reference_quantile": 1.5}, "less than or equal to 1"),
        ({"kind": "lsc", "reference": math.inf}, "finite"),
        ({"kind": "lsc", "reference": 1e300}, "less than or equal to"),
        ({"clip": [3.0, -3.0]}, r"clip \[3.0, -3.0\]: the lowest value must be below the highest"),
        ({"clip": [1.0, 1.0]}, "below the highest"),
        ({"clip": [None, None]}, "has no effect on kind identity"),
        ({"clip": [1.0]}, "clip"),
        ({"kind": "quantile", "clip": [0.0, 1.0]}, "has no effect on kind quantile"),
        ({"kind": "quantile", "clip": [1.0, 3.0]}, "makes all values of kind quantile equal"),
        ({"kind": "lsc", "clip": [None, 0.0]}, "has no effect on kind lsc"),
        ({"kind": "lsc", "clip": [0.0, 2.0]}, "makes all values of kind lsc equal"),
        ({"kind": "zscore", "clamp": [0, 1]}, "Extra inputs"),
    ],
)  # fmt: skip
def test_a_transform_without_effect_or_sense_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TransformConfig(**options)


def test_clips_that_have_an_effect_on_one_side_are_taken() -> None:
    for options in ({"kind": "quantile", "clip": [0.5, 3.0]}, {"kind": "lsc", "clip": [-4.0, 0.0]}, {"clip": [None, 1.0]}):
        assert not TransformConfig(**options).is_identity


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("selection.transforms={helpfull: {kind: zscore}}", ["selection.transforms names 'helpfull'", "helpful, length"]),
        ("selection.transforms.helpful.kind=log", ["selection.transforms.helpful.kind = 'log'", "'quantile'"]),
        ("selection.transforms.helpful.klip=1", ["selection.transforms.helpful.klip = 1", "Did you mean selection.transforms.<name>.clip?"]),
        ("selection={strategy: best_worst, gap: 'primary:length', objectives: [length], transforms: {helpful: {kind: zscore}}}",
         ["selection.transforms names 'helpful'", "selected by (length)"]),
        ("selection.ensembles={e: {members: [helpful, length], combine: mean, share: 0.5}}",
         ["share has no effect with combine mean", "use combine: agree"]),
        ("selection.ensembles={e: {members: [helpful, style], combine: minimum}}", ["ensembles.e.members names 'style'"]),
        ("selection.ensembles={helpful: {members: [length], combine: mean}}", ["has the name of a reward"]),
        ("selection={strategy: best_worst, gap: sum, scale: {e: 1}, ensembles: {e: {members: [helpful, length], combine: mean}}}",
         ["a given scale has no effect"]),
    ],
)  # fmt: skip
def test_wrong_options_of_a_run_are_named(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(GOOD, [override])
    for word in words:
        assert word in str(caught.value)


def test_transforms_are_part_of_what_a_run_is(tmp_path: Path) -> None:
    base = fingerprint(load_config(GOOD))
    given = ["selection.transforms={helpful: {kind: zscore, clip: [null, 2]}, length: {kind: lsc, reference: 1}}"]
    config = load_config(GOOD, given)
    other = load_config(GOOD, [*given, "selection.transforms.helpful.clip=[null, 3]"])
    joint = load_config(GOOD, ["selection={strategy: best_worst, ensembles: {e: {members: [helpful, length], combine: mean}}}"])
    assert len({base, *(fingerprint(each) for each in (config, other, joint))}) == 4
    for each in (config, joint):
        (tmp_path / "resolved.yaml").write_text(to_yaml(each))
        assert load_config(tmp_path / "resolved.yaml") == each


# --------------------------------------------------------------------------------------------------------------------------- files

FILES = SelectionConfig(transforms={"helpful": {"kind": "zscore", "clip": [-2.0, 2.0]}, "brief": {"kind": "quantile"}})


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_what_is_fitted_is_kept_and_used_when_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr("rc_ray.pipeline.scored_files.TARGET_BYTES", 1)  # chunks of 16 rows
    rows = scored_rows(100)
    source, output = tmp_path / f"in.{form}", tmp_path / "out"
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, source) if form == "parquet" else write_jsonl(source, rows)
    first = select_files(str(source), str(output), FILES, lambda _: None, report=True)
    expected = select_pairs(table, FILES)
    assert read(output)[0] == expected.pairs.to_pylist()
    fitted = json.loads((output / "manifest.json").read_text())["fitted"]
    assert Fitted(**fitted) == fit_selection([table], FILES)
    assert set(fitted["transforms"]["helpful"]) == {"mean", "deviation"}
    before = (output / "pairs" / "chunk-000002.parquet").read_bytes()
    (output / "ledger" / "select" / "chunk-000002.json").unlink()
    (output / "pairs" / "chunk-000002.parquet").unlink()
    monkeypatch.setattr(files, "_measure", lambda *_: pytest.fail("measured again"))
    assert select_files(str(source), str(output), FILES, lambda _: None) == first
    assert (output / "pairs" / "chunk-000002.parquet").read_bytes() == before
    other = SelectionConfig(transforms={"helpful": FILES.transforms["helpful"], "brief": {"kind": "identity"}})
    with pytest.raises(ResumeError, match=r"selection\.transforms\.brief\.kind: 'quantile' -> 'identity'"):
        select_files(str(source), str(output), other, lambda _: None)


def test_output_of_before_an_option_was_added_is_resumed(tmp_path: Path) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", scored_rows(20)), tmp_path / "out"
    config = SelectionConfig(ensembles={"e": {"members": ["helpful", "brief"]}})
    first = select_files(str(source), str(output), config, lambda _: None)
    manifest = json.loads((output / "manifest.json").read_text())
    del manifest["selection"]["transforms"], manifest["selection"]["ensembles"]["e"]["combine"]
    (output / "manifest.json").write_text(json.dumps(manifest))
    assert select_files(str(source), str(output), config, lambda _: None) == first
    other = SelectionConfig(**{**config.model_dump(), "transforms": {"brief": {"kind": "zscore"}}})
    with pytest.raises(ResumeError, match=r"selection\.transforms\.brief: '\(absent\)' ->"):
        select_files(str(source), str(output), other, lambda _: None)


@pytest.mark.parametrize("form", ["text", "messages", "messages without prompt"])
def test_existing_pairs_are_filtered_by_values(tmp_path: Path, form: str) -> None:
    rewards, _ = normal_groups(40, 2, size=2)
    table = preference_table(numbered_groups(rewards.tolist()), "ab").drop_columns(["prompt_id"])
    if form != "text":
        prompts = table.column("prompt").to_pylist()
        for side in ("chosen", "rejected"):
            talks = [
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                for prompt, answer in zip(prompts, table.column(side).to_pylist(), strict=True)
            ]
            table = table.set_column(table.column_names.index(side), side, pa.array(talks, schemas.MESSAGES))
        table = table.drop_columns(["prompt"]) if form == "messages without prompt" else table
    pq.write_table(table, tmp_path / "in.parquet")
    config = SelectionConfig(
        strategy="rc_filter", transforms={"a": {"kind": "quantile"}, "b": {"kind": "zscore"}}, margins={"a": 0.3}
    )
    select_files(str(tmp_path / "in.parquet"), str(tmp_path / "out"), config, lambda _: None)
    a, b = rewards[:, :, 0], rewards[:, :, 1]
    share = np.mean((a.reshape(-1, 1) > a.ravel()) + (a.reshape(-1, 1) == a.ravel()) / 2, axis=1).reshape(-1, 2)
    kept = (share[:, 0] - share[:, 1] > 0.3) & (b[:, 0] > b[:, 1])
    assert 3 < kept.sum() < 20
    assert [pair["rewards_chosen"]["a"] for pair in read(tmp_path / "out")[0]] == a[kept, 0].tolist()
