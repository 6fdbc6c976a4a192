"""Every strategy against the definitions in `selection_reference`, and properties of all of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rc_ray.config import SelectionConfig
from rc_ray.config.selection import OPTIONS
from rc_ray.core import selection
from rc_ray.core.measure import Fitted
from rc_ray.core.selection import fit_selection, select_indices, select_pairs
from rc_ray.core.strategies import STRATEGIES
from tests.unit.selection_reference import Answer, Group, group_table, numbered_groups, preference_table, select

COLUMNS = "abcde"
CASES = [
    (strategy, gap)
    for strategy, gaps in {
        "rcs": ("sum", "standardized_sum", "min", "product", "primary:a"),
        "rc_all": ("sum", "standardized_sum", "min", "product", "primary:a"),
        "rc_filter": ("standardized_sum", "min", "product"),
        "pareto": ("sum", "primary:a"),
        "lsc": (None,),
        "map": (None,),
        "mixed": (None,),
    }.items()
    for gap in gaps
] + [(name, gap) for name in ("best_worst", "best_random", "sweet_spot", "rs_dpo") for gap in ("standardized_sum", "primary:a")]

FEW = st.sampled_from([-1.0, 0.0, 0.25, 1.0, 3.0])  # so that ties are frequent
# Neighbours, subnormals, opposite ends of float32: differences and sums of these round in float64.
EXTREME = st.sampled_from([0.0, 1.0, 1 + 2**-23, -1.0, 2.0**-149, 3 * 2.0**-149, 2.0**-126, -(2.0**-126), 2.0**100, 2.0**100 + 2.0**77,
                           -(2.0**100), (2 - 2.0**-23) * 2.0**127, -(2 - 2.0**-23) * 2.0**127, 1e8, 0.0999755859375])  # fmt: skip


def test_every_strategy_is_a_case() -> None:
    assert {strategy for strategy, _ in CASES} == set(STRATEGIES) == set(OPTIONS)


@st.composite
def configs(draw: st.DrawFn, strategy: str, gap: str | None, columns: str) -> SelectionConfig:
    """Any mixture of the options that the strategy has, on the columns; always with an objective `a`."""
    used = OPTIONS[strategy]
    names = list(columns)
    options: dict[str, Any] = {"strategy": strategy}
    if len(columns) > 2 and draw(st.booleans()):
        share = draw(st.sampled_from([0.1, 0.5, 2 / 3, 1.0]))
        options["ensembles"] = {"mean": {"members": names[1:], "share": share}}
        names = draw(st.sampled_from([["a", "mean"], ["mean", "a"]]))
        options["objectives"] = draw(st.sampled_from([None, names]))
        names = ["a", "mean"] if options["objectives"] is None else names
    elif draw(st.booleans()):
        names = options["objectives"] = draw(st.permutations(names[: draw(st.integers(1, len(names)))]))
    if gap is not None:
        options["gap"] = gap
    weighted = "weights" in used and (gap is None or "sum" in gap)
    if weighted and draw(st.booleans()):
        options["weights"] = {"a": 1.5, names[-1]: draw(st.sampled_from([0.0, 0.5, 1.0]))} if names[-1] != "a" else {"a": 2.0}
    if "margins" in used:
        mode = options["consistency"] = draw(st.sampled_from(["strict", "weak", "lexicographic"]))
        options["margins"] = draw(
            st.dictionaries(st.sampled_from(names), st.sampled_from([-1.5, -0.25, 0.0, 0.25, 1.0]), max_size=2)
        )
        options["margin_unit"] = draw(st.sampled_from(["absolute", "scale"]))
        if mode == "lexicographic":
            options["primary"] = draw(st.sampled_from(names))
        else:
            options["min_agreeing"] = draw(st.none() | st.integers(1, len(names)))
    choices: dict[str, st.SearchStrategy[Any]] = {
        "max_pairs": st.sampled_from([None, 1, 2, 4]),
        "seed": st.sampled_from([0, 1, 2**63 - 1]),
        "rejected_at": st.sampled_from([-2.0, -0.5, 0.0, 1.0]),
        "tau": st.sampled_from([0.25, 1.0]),
        "eta": st.sampled_from([0.5, 0.7, 0.85]),
        "reference_quantile": st.sampled_from([0.0, 0.3, 0.5, 0.85, 1.0]),
    }
    options |= {name: draw(choice) for name, choice in choices.items() if name in used}
    if strategy == "lsc" and draw(st.booleans()):
        options["reference"] = {name: draw(st.sampled_from([0.0, 0.5])) for name in names}
        del options["reference_quantile"]
    if strategy == "map":
        options["targets"] = dict.fromkeys(names[:2], 0.0)
    options["allow_truncated_winner"] = draw(st.booleans())
    options["max_length_ratio"] = draw(st.sampled_from([None, None, 1.0, 1.5]))
    if SelectionConfig(**options).uses_scale:
        given = {column: draw(st.sampled_from([1.0, 3.0])) for column in columns}
        # MAP weighs ensembles over all the data, so it has no use for a scale per group.
        options["scale"] = draw(st.sampled_from(["data", given] if options["strategy"] == "map" else ["data", "group", given]))
    return SelectionConfig(**options)


@st.composite
def groups_of(draw: st.DrawFn, width: int, rewards: st.SearchStrategy[float], sizes: tuple[int, int] = (0, 7)) -> list[Group]:
    """A few groups; equal texts with unequal rewards, cut answers, missing rewards and failures among them."""
    text = st.sampled_from(["", "a", "b", "ab", "ba", "üü", "aüb", "abab"])
    finish = st.sampled_from(["stop", "stop", None, "length"])
    answer = st.builds(Answer, text, st.tuples(*[rewards] * width), finish)
    salt = draw(st.integers(0, 9))
    groups = []
    for g in range(draw(st.integers(1, 3))):
        answers = draw(st.lists(answer, min_size=sizes[0], max_size=sizes[1]))
        what = draw(st.integers(0, 19))
        if what < 2 and answers:
            cells = st.tuples(st.integers(0, len(answers) - 1), st.integers(0, width - 1))
            for i, m in draw(st.lists(cells, min_size=1, max_size=4)):
                values = list(answers[i].rewards)
                values[m] = draw(st.sampled_from([None, math.nan, math.inf, -math.inf]))
                answers[i] = Answer(answers[i].text, tuple(values), answers[i].finish)
        failure = "generation_failed" if what == 2 else None
        groups.append(Group(f"{salt}-{g}", tuple(answers), failure))
    return groups


def fitted_for(table: Any, config: SelectionConfig) -> Fitted:
    """The scale of the data whether or not the strategy needs it, and some weights for `map`."""
    scale = fit_selection([table], SelectionConfig(objectives=config.objectives, ensembles=config.ensembles)).scale
    return Fitted(scale, {name: 0.5 + k for k, name in enumerate(config.targets)})


def table_for(groups: list[Group], config: SelectionConfig, columns: str) -> Any:
    return (preference_table if config.strategy == "rc_filter" else group_table)(groups, columns)


def check(groups: list[Group], config: SelectionConfig, columns: str) -> None:
    """`select_pairs` gives what the reference gives: pairs, their order and gaps, reasons, counts."""
    if config.strategy == "rc_filter":  # existing pairs have no finish reason
        groups = [Group(g.prompt_id, tuple(Answer(a.text, a.rewards) for a in g.answers)) for g in groups]
    table = table_for(groups, config, columns)
    fitted = fitted_for(table, config)
    selected = select_pairs(table, config, fitted)
    outcomes = {group.prompt_id: select(group, config, columns, fitted.scale, fitted.weights) for group in groups}
    expected = [(name, p.strategy, p.winner, p.loser, p.gap) for name, outcome in outcomes.items() for p in outcome.pairs]
    keys = ("prompt_id", "strategy", "chosen_index", "rejected_index", "gap")
    rows = selected.pairs.to_pylist()
    assert [tuple(row[key] for key in keys) for row in rows] == expected
    drops = [(name, outcome.reason) for name, outcome in outcomes.items() if outcome.reason]
    assert [(row["prompt_id"], row["reason"]) for row in selected.drops.to_pylist()] == drops
    assert selected.num_paired + selected.drops.num_rows == len(groups)
    assert selected.num_beyond_cap == sum(outcome.beyond_cap for outcome in outcomes.values())
    assert all(row["chosen"][0]["content"] != row["rejected"][0]["content"] for row in rows)


@pytest.mark.parametrize("rewards", [FEW, EXTREME], ids=["ties", "extreme"])
@pytest.mark.parametrize(("strategy", "gap"), CASES)
@settings(max_examples=100)
@given(data=st.data())
def test_selection_equals_the_definition(
    data: st.DataObject, strategy: str, gap: str | None, rewards: st.SearchStrategy[float]
) -> None:
    columns = COLUMNS[: data.draw(st.sampled_from([1, 2, 3, 5]))]
    groups = data.draw(groups_of(len(columns), rewards, (2, 2) if strategy == "rc_filter" else (0, 7)))
    check(groups, data.draw(configs(strategy, gap, columns)), columns)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("rcs", {"scale": "group"}),
        ("rc_all", {"scale": "group", "max_pairs": 50}),
        ("best_random", {"gap": "sum"}),
        ("sweet_spot", {"scale": "group"}),
        ("pareto", {"gap": "primary:b"}),
        ("lsc", {}),
    ],
)
def test_hundreds_of_candidates(strategy: str, options: dict[str, Any]) -> None:
    rewards = np.random.default_rng(0).choice([-1.0, 0.0, 0.25, 1.0, 3.0], (270, 2)).tolist()
    answers = [Answer(str(i % 200), tuple(row), "length" if i % 7 == 0 else "stop") for i, row in enumerate(rewards)]
    check([Group("0", tuple(answers))], SelectionConfig(strategy=strategy, **options), "ab")


def test_more_pairs_than_are_written_at_a_time() -> None:
    # 8 x 280 x 279 / 2 pairs, and a group without one among them
    rewards = np.random.default_rng(0).permuted(np.tile(np.arange(280.0), (9, 1)), axis=1)[:, :, None].astype(np.float32)
    rewards[5] = 1.0
    found = select_indices(rewards, SelectionConfig(strategy="rc_all", gap="sum"))
    assert np.bincount(found.group).tolist() == [39060] * 5 + [0] + [39060] * 3
    assert np.flatnonzero(found.status).tolist() == [5]
    assert (rewards[found.group, found.winner, 0] - rewards[found.group, found.loser, 0] == found.gap).all()
    assert (found.gap > 0).all()
    assert len(set(zip(found.group.tolist(), found.winner.tolist(), found.loser.tolist(), strict=True))) == 8 * 39060


ONE_OF_EACH = [pytest.param(configuration, id=configuration.strategy) for configuration in (
    SelectionConfig(strategy="rcs", min_agreeing=1),
    SelectionConfig(strategy="rc_all", scale="group", consistency="weak"),
    SelectionConfig(strategy="rc_filter", gap="min", margins={"a": -0.5}),
    SelectionConfig(strategy="best_worst"),
    SelectionConfig(strategy="best_random"),
    SelectionConfig(strategy="sweet_spot", rejected_at=-0.5),
    SelectionConfig(strategy="rs_dpo", eta=0.6, max_pairs=3),
    SelectionConfig(strategy="mixed", max_length_ratio=1.5),
    SelectionConfig(strategy="pareto", gap="sum"),
    SelectionConfig(strategy="lsc"),
    SelectionConfig(strategy="map", targets={"a": 0.0, "b": 0.0}),
)]  # fmt: skip


IN_GROUP_SCALE: dict[str, Any] = {"margins": {"a": 0.4, "b": 0.2}, "margin_unit": "scale", "scale": "group"}


@pytest.mark.parametrize(
    "config",
    [
        *ONE_OF_EACH,
        *(pytest.param(SelectionConfig(strategy=s, **IN_GROUP_SCALE), id=f"{s} in group scale") for s in ("rcs", "rc_all")),
    ],
)
def test_many_groups_without_ties(config: SelectionConfig) -> None:
    # Where values hardly tie, scales, margins and targets decide.
    n = 2 if config.strategy == "rc_filter" else 6
    rewards = np.random.default_rng(0).normal(size=(150, n, 2)) * np.random.default_rng(1).exponential(size=(150, 1, 2))
    check(numbered_groups(rewards.astype(np.float32).tolist()), config, "ab")


def outcome(selected: list[Any]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Pairs and drop by prompt."""
    pairs: dict[str, list[Any]] = {}
    for part in selected:
        for row in part.pairs.to_pylist():
            pairs.setdefault(row["prompt_id"], []).append(row)
    return pairs, {row["prompt_id"]: row for part in selected for row in part.drops.to_pylist()}


@pytest.mark.parametrize("config", ONE_OF_EACH)
def test_order_and_split_of_rows_do_not_matter(config: SelectionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    groups = []
    for g in range(60):
        n = 2 if config.strategy == "rc_filter" else int(rng.integers(0, 7))
        texts, rewards = rng.choice(["a", "b", "ab", "abc"], n), rng.choice([-1.0, 0.0, 0.5, 2.0], (n, 2))
        rewards[rng.random((n, 2)) < 0.02] = np.nan
        answers = zip(texts.tolist(), rewards.tolist(), rng.choice(["stop", "length"], n, p=[0.8, 0.2]).tolist(), strict=True)
        groups.append(Group(str(g), tuple(Answer(text, tuple(row), finish) for text, row, finish in answers)))
    table = table_for(groups, config, "ab")
    fitted = fitted_for(table, config)
    whole = outcome([select_pairs(table, config, fitted)])
    assert min(map(len, whole)) > 5
    turned = table.take(list(reversed(range(60))))
    monkeypatch.setattr(selection, "BLOCK", 7)
    assert outcome([select_pairs(turned, config, fitted)]) == whole
    assert (
        outcome([select_pairs(part, config, fitted) for part in (table.slice(0, 13), table.slice(13, 1), table.slice(14))])
        == whole
    )
    assert outcome([select_pairs(pa.concat_tables([turned.slice(20), turned.slice(0, 20)]), config, fitted)]) == whole


@pytest.mark.parametrize("config", [config for config in ONE_OF_EACH if config.id != "rc_filter"])
def test_order_of_candidates_does_not_matter_without_ties(config: SelectionConfig) -> None:
    rng = np.random.default_rng(0)
    groups, turned = [], []
    for g in range(40):
        answers = [
            Answer("x" * (i + 10), tuple(row), "length" if i % 4 == 3 else "stop")
            for i, row in enumerate(rng.normal(size=(9, 2)).astype(np.float32).tolist())
        ]
        groups.append(Group(str(g), tuple(answers)))
        turned.append(Group(str(g), tuple(answers[i] for i in rng.permutation(9))))
    fitted = fitted_for(group_table(groups, "ab"), config)
    found = []
    for each in (groups, turned):
        rows = select_pairs(group_table(each, "ab"), config, fitted).pairs.to_pylist()
        found.append([(r["prompt_id"], r["strategy"], r["chosen"], r["rejected"], r["gap"]) for r in rows])
    assert len(found[0]) > 20
    assert found[0] == found[1]


@settings(max_examples=80)
@given(groups_of(1, FEW), st.sampled_from(["strict", "weak", "lexicographic"]), st.booleans())
def test_rcs_on_equal_objectives_is_best_worst(groups: list[Group], consistency: str, guarded: bool) -> None:
    table = group_table(
        [Group(g.prompt_id, tuple(Answer(a.text, a.rewards * 3, a.finish) for a in g.answers)) for g in groups], "abc"
    )
    guards = {"max_length_ratio": 1.5} if guarded else {}
    rule = {"consistency": consistency, "primary": "b" if consistency == "lexicographic" else None}
    rcs, best_worst = (
        select_pairs(table, SelectionConfig(strategy=name, **guards, **options))
        for name, options in (("rcs", rule), ("best_worst", {}))
    )
    assert rcs.pairs.drop_columns(["strategy"]).equals(best_worst.pairs.drop_columns(["strategy"]))
    assert rcs.drops.equals(best_worst.drops)


@pytest.mark.parametrize(("strategy", "gap"), CASES)
@settings(max_examples=20)
@given(data=st.data())
def test_answers_with_equal_rewards_make_no_pair(data: st.DataObject, strategy: str, gap: str | None) -> None:
    rewards = tuple(data.draw(st.lists(FEW | EXTREME, min_size=3, max_size=3)))
    answers = tuple(Answer("x" * (10 + i), rewards) for i in range(2 if strategy == "rc_filter" else 4))
    config = data.draw(configs(strategy, gap, "abc"))
    table = table_for([Group("0", answers)], config, "abc")
    selected = select_pairs(table, config, fitted_for(table, config))
    assert selected.drops.column("reason").to_pylist() == ["no_consistent_pair"]


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.tuples(FEW, FEW), max_size=6), min_size=1, max_size=2),
    st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 4),
)
def test_a_larger_margin_only_removes_pairs(rewards: list[Any], margins: tuple[float, ...]) -> None:
    table = group_table(numbered_groups(rewards), "ab")
    found = []
    for a, b in (margins[:2], (margins[0] + margins[2], margins[1] + margins[3])):
        config = SelectionConfig(strategy="rc_all", margins={"a": a, "b": b})
        rows = select_pairs(table, config).pairs.to_pylist()
        found.append({(r["prompt_id"], r["chosen_index"], r["rejected_index"]) for r in rows})
    assert found[0] >= found[1]


@pytest.mark.parametrize(("strategy", "gap"), CASES)
@settings(max_examples=25)
@given(data=st.data())
def test_arrays_give_what_tables_give(data: st.DataObject, strategy: str, gap: str | None) -> None:
    n = 2 if strategy == "rc_filter" else data.draw(st.integers(0, 5))
    one = st.lists(st.tuples(*[FEW | st.just(math.nan)] * 3), min_size=n, max_size=n)
    rewards = data.draw(st.lists(one, min_size=1, max_size=3))
    config = data.draw(configs(strategy, gap, "abc")).model_copy(update={"max_length_ratio": None})
    table = table_for(numbered_groups(rewards), config, "abc")
    fitted = fitted_for(table, config)
    selected = select_pairs(table, config, fitted)
    array = np.asarray(rewards, dtype=np.float32).reshape(len(rewards), n, 3)
    # Measured on the array itself, or given for MAP, whose pilots are not the point here.
    found = select_indices(array, config, fitted if config.targets else None, objectives=list("abc"))
    rows = selected.pairs.to_pylist()
    assert [str(g) for g in found.group] == [row["prompt_id"] for row in rows]
    assert [found.winner.tolist(), found.loser.tolist(), found.gap.tolist()] == [
        [row[key] for row in rows] for key in ("chosen_index", "rejected_index", "gap")
    ]
    assert np.flatnonzero(found.status).tolist() == [int(row["prompt_id"]) for row in selected.drops.to_pylist()]
    assert found.num_beyond_cap == selected.num_beyond_cap


@pytest.mark.parametrize("config", ONE_OF_EACH)
def test_arrays_may_be_of_any_length(config: SelectionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 2 if config.strategy == "rc_filter" else 5
    rewards = np.random.default_rng(0).normal(size=(20, n, 2)).astype(np.float32)
    config, fitted = config.model_copy(update={"max_length_ratio": None}), Fitted({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 0.5})
    whole = select_indices(rewards, config, fitted, objectives=["a", "b"])
    monkeypatch.setattr(selection, "BLOCK", 7)
    for one, other in zip(whole, select_indices(rewards, config, fitted, objectives=["a", "b"]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_random_losers_are_uniform_and_follow_seed_and_prompt() -> None:
    rewards = np.tile(np.arange(5.0)[:, None], (4000, 1, 1))
    draws = [select_indices(rewards, SelectionConfig(strategy="best_random", seed=seed)).loser for seed in (0, 1)]
    for losers in draws:
        counts = np.bincount(losers, minlength=5)
        assert counts[4] == 0
        assert ((counts[:4] - 1000) ** 2 / 1000).sum() < 16.3  # chi-square, 3 degrees of freedom, 1 in 1000
    assert 0.2 < np.mean(draws[0] == draws[1]) < 0.3


@pytest.mark.parametrize("weights", [{}, {"b": 0.3}])
@pytest.mark.parametrize("reference", [None, {"a": 0.5, "b": -1.0}])
def test_lsc_is_the_log_probability_that_all_objectives_are_good(
    weights: dict[str, float], reference: dict[str, float] | None
) -> None:
    rewards = (np.random.default_rng(0).normal(size=(30, 6, 2)) * [1, 8]).astype(np.float32)
    config = SelectionConfig(strategy="lsc", weights=weights, reference=reference)
    found = select_indices(rewards, config, objectives=["a", "b"])
    assert found.group.size == 30
    for g, gap in enumerate(found.gap):
        base = [0.5, -1.0] if reference else np.quantile(rewards[g].astype(np.float64), 0.85, axis=0)
        terms = np.log(1 / (1 + np.exp(-(rewards[g] - base)))) * [1, weights.get("b", 1.0)]
        assert gap == pytest.approx(np.ptp(terms.sum(axis=1)), rel=1e-12)
