"""What selection reads and writes: columns of pairs and drops, kinds of tables, wrong input, and the report on the data."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rc_ray.config import SelectionConfig
from rc_ray.core import schemas
from rc_ray.core.ids import prompt_id
from rc_ray.core.selection import select_indices, select_pairs
from rc_ray.core.selection_report import selection_report
from rc_ray.errors import ConfigError, DataError
from tests.conftest import ROOT
from tests.unit.selection_reference import Answer, Group, group_table, numbered_groups, preference_table

RC_FILTER = SelectionConfig(strategy="rc_filter", gap="sum")
ONE = [Group("0", (Answer("no", (1.0, 0.5)), Answer("yes", (3.0, 1.0)), Answer("perhaps", (2.0, 5.0), "length")))]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_columns_of_a_pair() -> None:
    selected = select_pairs(group_table(ONE, "ab"), SelectionConfig(gap="sum"))
    assert selected.pairs.schema.equals(schemas.pair_schema("ab"))
    assert selected.drops.schema.equals(schemas.DROP)
    assert selected.drops.num_rows == 0
    assert selected.pairs.to_pylist() == [
        {
            "prompt": [user("prompt 0")],
            "chosen": [assistant("yes")],
            "rejected": [assistant("no")],
            "prompt_id": "0",
            "chosen_index": 1,
            "rejected_index": 0,
            "gap": 2.5,
            "rewards_chosen": {"a": 3.0, "b": 1.0},
            "rewards_rejected": {"a": 1.0, "b": 0.5},
            "agreeing": ["a", "b"],
            "strategy": "rcs",
        }
    ]


def test_agreeing_names_the_rewards_that_prefer_the_winner() -> None:
    table = group_table([Group("0", (Answer("x", (2.0, 0.0, 5.0)), Answer("y", (1.0, 0.0, 6.0))))], "abc")
    config = SelectionConfig(consistency="weak", min_agreeing=2, gap="primary:a")
    assert select_pairs(table, config).pairs.column("agreeing").to_pylist() == [["a"]]
    # Objectives that are not selected by are neither compared nor written; of an ensemble, the members are.
    config = SelectionConfig(objectives=["e"], ensembles={"e": {"members": ["c", "a"], "share": 0.5}}, gap="primary:e")
    row = select_pairs(table, config).drops.to_pylist()
    assert row[0]["reason"] == "no_consistent_pair"
    config = SelectionConfig(strategy="best_worst", gap="primary:c", objectives=["c", "b"])
    (row,) = select_pairs(table, config).pairs.to_pylist()
    assert (row["rewards_chosen"], row["agreeing"]) == ({"c": 6.0, "b": 0.0}, ["c"])


def test_every_group_without_a_pair_is_a_drop_with_its_reason() -> None:
    good = (Answer("long answer", (1.0, 1.0)), Answer("x", (0.0, 0.0)))
    groups = [
        Group("failed", (), "prompt_too_long"),
        Group("no text", (Answer(None, (1.0, 1.0)), good[0])),
        Group("null", (good[0], Answer("x", (1.0, None)))),
        Group("infinite", (Answer("x", (math.nan, -math.inf)), good[0])),
        Group("none", ()),
        Group("one", good[:1]),
        Group("same", (good[0],) * 3),
        Group("tie", (good[0], Answer("x", (1.0, 1.0)))),
        Group("cut", (Answer("x", (1.0, 1.0), "length"), Answer("y", (0.0, 0.0)))),
        Group("long", good),
    ]
    table = group_table(groups, "ab")
    table = table.append_column("missing.b", pa.array([None, None, "timed out", *[None] * 7], pa.string()))
    table = table.append_column("failure_detail", pa.array(["9 tokens", *[None] * 9], pa.string()))
    selected = select_pairs(table, SelectionConfig(gap="sum", max_length_ratio=2.0))
    assert (selected.num_paired, selected.pairs.num_rows) == (0, 0)
    assert [tuple(row.values()) for row in selected.drops.to_pylist()] == [
        ("failed", "prompt_too_long", "sample", "9 tokens"),
        ("no text", "invalid_candidate", "select", "a candidate has no text"),
        ("null", "reward_missing", "score", "b: 1 of 2 rewards missing: timed out"),
        ("infinite", "reward_missing", "score", "a: 1 of 2 rewards missing: null or not finite"),
        ("none", "too_few_candidates", "select", "0 candidates; a pair needs 2"),
        ("one", "too_few_candidates", "select", "1 candidates; a pair needs 2"),
        ("same", "identical_candidates", "select", "3 candidates, 1 distinct"),
        ("tie", "no_consistent_pair", "select", "no pair among 2 candidates that the strategy takes"),
        ("cut", "winner_truncated", "select", "every winner of 2 candidates was cut at max_tokens"),
        ("long", "winner_too_long", "select", "every winner of 2 candidates is longer than its loser by more than max_length_ratio"),
    ]  # fmt: skip


def test_rewards_that_do_not_line_up_with_the_answers_are_missing() -> None:
    table = group_table(numbered_groups([[(1.0,), (0.0,)]] * 4), "a")
    rewards = pa.array([[1.0, 0.0], [1.0], [1.0, 0.0, 2.0], None], pa.list_(pa.float32()))
    selected = select_pairs(table.set_column(4, "reward.a", rewards), SelectionConfig(gap="sum"))
    assert selected.pairs.column("prompt_id").to_pylist() == ["0"]
    assert selected.drops.column("detail").to_pylist() == [
        f"a: 2 of 2 rewards missing: {n} rewards for 2 candidates" for n in (1, 3, 0)
    ]  # fmt: skip


def test_float64_rewards_are_compared_as_float32() -> None:
    rewards = [[1.0, 1.0 + 1e-9], [0.1, 1e300]]
    table = group_table(numbered_groups([[(1.0,), (0.0,)]] * 2), "a").set_column(4, "reward.a", pa.array(rewards))
    reasons = select_pairs(table, SelectionConfig()).drops.column("reason").to_pylist()
    assert reasons == ["no_consistent_pair", "reward_missing"]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_a_missing_reward_touches_only_its_group_and_those_who_select_by_it(bad: float | None) -> None:
    whole = (Answer("x", (1.0, 0.0, 1.0)), Answer("y", (0.0, 1.0, 0.0)))
    bare = (Answer("x", (1.0, bad, bad)), Answer("y", (0.0, bad, 0.0)))
    table = group_table([Group("0", whole), Group("1", bare), Group("2", whole)], "abc")
    one = SelectionConfig(objectives=["a"])
    assert select_pairs(table, one).pairs.column("prompt_id").to_pylist() == ["0", "1", "2"]
    for scale in ("data", "group"):
        config = SelectionConfig(scale=scale, strategy="best_worst", ensembles={"e": {"members": ["b", "c"]}}, weights={"a": 2})
        selected = select_pairs(table, config)
        assert selected.pairs.column("prompt_id").to_pylist() == ["0", "2"]
        assert selected.drops.column("reason").to_pylist() == ["reward_missing"]


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("finish", ["length", "stop", None])
def test_a_cut_answer_loses_but_wins_only_where_allowed(finish: str | None, allowed: bool) -> None:
    answers = (Answer("best", (3.0,), finish), Answer("middle", (2.0,)), Answer("worst", (1.0,), "length"))
    table, config = group_table([Group("0", answers)], "a"), SelectionConfig(gap="sum", allow_truncated_winner=allowed)
    (row,) = select_pairs(table, config).pairs.to_pylist()
    assert (row["chosen_index"], row["rejected_index"]) == (1 if finish == "length" and not allowed else 0, 2)


def test_ids_are_made_from_the_messages_where_there_are_none() -> None:
    candidates = pa.array([[{"text": "x"}, {"text": "y"}]])  # no finish reasons either
    rewards = pa.array([[1.0, 0.0]], pa.list_(pa.float32()))
    for prompt in ("a question", [user("a question")], [{"content": "a question", "role": "user"}]):
        table = pa.table({"prompt": [prompt], "candidates": candidates, "reward.a": rewards})
        (row,) = select_pairs(table, SelectionConfig()).pairs.to_pylist()
        assert (row["prompt"], row["prompt_id"]) == ([user("a question")], prompt_id([user("a question")]))


def test_no_group_is_no_pair() -> None:
    selected = select_pairs(group_table([], "ab"), SelectionConfig(gap="sum"))
    assert selected.pairs.schema.equals(schemas.pair_schema("ab"))
    assert (selected.pairs.num_rows, selected.drops.num_rows, selected.num_paired) == (0, 0, 0)


EXISTING = numbered_groups([
    [(2.0, 2.0), (1.0, 0.0)],
    [(2.0, 2.0), (1.0, 3.0)],
    [(2.0, 2.0), (2.0, 3.0)],
    [(0.0, 0.0), (1.0, 1.0)],
    [(2.0, None), (1.0, 0.0)],
])  # fmt: skip


def test_existing_pairs_are_kept_or_dropped_but_never_turned_round() -> None:
    table = preference_table(EXISTING, "ab").append_column("source", pa.array([f"file {g}" for g in range(5)]))
    selected = select_pairs(table, RC_FILTER)
    (row,) = selected.pairs.to_pylist()
    assert (row["chosen"], row["rejected"], row["gap"]) == ([assistant("answer 0")], [assistant("answer 1")], 3.0)
    assert (row["chosen_index"], row["rejected_index"], row["strategy"], row["source"]) == (0, 1, "rc_filter", "file 0")
    assert [(row["prompt_id"], row["reason"], row["detail"]) for row in selected.drops.to_pylist()] == [
        ("1", "no_consistent_pair", "agree: a; disagree: b"),
        ("2", "no_consistent_pair", "disagree: b; tie: a"),
        ("3", "no_consistent_pair", "disagree: a, b"),
        ("4", "reward_missing", "b: a reward is null or not finite"),
    ]


@pytest.mark.parametrize("with_prompt", [False, True])
def test_message_lists_are_read_like_strings(with_prompt: bool) -> None:
    plain = preference_table(EXISTING, "ab").drop_columns(["prompt_id"])
    talks: dict[str, list[Any]] = {}
    for side in ("chosen", "rejected"):
        rows = zip(plain.column("prompt").to_pylist(), plain.column(side).to_pylist(), strict=True)
        talks[side] = [[user(prompt), assistant(answer)] for prompt, answer in rows]
    table = plain.drop_columns(["chosen", "rejected", *([] if with_prompt else ["prompt"])])
    for side, talk in talks.items():
        table = table.append_column(side, pa.array(talk, schemas.MESSAGES))
    by_messages, by_strings = select_pairs(table, RC_FILTER), select_pairs(plain, RC_FILTER)
    assert by_messages.pairs.equals(by_strings.pairs)
    assert by_messages.drops.equals(by_strings.drops)


def test_conversations_that_are_no_pair_of_answers_are_dropped_with_the_reason() -> None:
    prompt = [user("question")]
    good, other = [*prompt, assistant("good")], [*prompt, assistant("bad")]
    rows = [
        (prompt, good, other, None),
        (prompt, [assistant("good")], [assistant("bad")], None),
        (None, good, other, None),
        (prompt, good, good, "2 candidates, 1 distinct"),
        (prompt, [], other, "chosen or rejected has no message"),
        (prompt, None, other, "chosen or rejected has no message"),
        (prompt, good, [user("another"), assistant("bad")], "chosen and rejected differ before their last message"),
        (None, [assistant("good")], [assistant("bad")], "there is no prompt: chosen has one message and the row has no prompt"),
        ([user("another")], good, other, "chosen repeats a conversation that is not the prompt"),
        (prompt, [*prompt, assistant(None)], other, "chosen or rejected is null"),  # type: ignore[arg-type]
    ]
    columns = {
        name: pa.array([row[i] for row in rows], schemas.MESSAGES) for i, name in enumerate(("prompt", "chosen", "rejected"))
    }
    rewards = {f"rewards_{side}": [{"a": value}] * len(rows) for side, value in (("chosen", 1.0), ("rejected", 0.0))}
    selected = select_pairs(pa.table({**columns, **rewards}), RC_FILTER)
    assert [row["prompt"] for row in selected.pairs.to_pylist()] == [prompt] * 3
    assert selected.drops.column("detail").to_pylist() == [row[3] for row in rows[3:]]
    assert selected.drops.column("reason").to_pylist() == ["identical_candidates"] + ["invalid_candidate"] * 6


GROUPS, PAIRS = group_table(ONE, "ab"), preference_table(EXISTING, "ab")


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


@pytest.mark.parametrize(
    ("table", "options", "error", "message"),
    [
        (GROUPS.select(["prompt_id", "prompt", "candidates"]), {}, DataError, r"no reward\.\* column; run `rc-ray score`"),
        (GROUPS.drop_columns(["candidates"]), {}, DataError, "no column 'candidates'"),
        (GROUPS.drop_columns(["prompt"]), {}, DataError, "no column 'prompt'"),
        (with_column(GROUPS, "candidates", pa.array([["no", "yes"]])), {}, DataError, "expected a list of structs with a field `text`"),
        (with_column(GROUPS, "reward.b", pa.array([1.0])), {}, DataError, "column 'reward.b' is double; expected a list<float>"),
        (with_column(GROUPS, "reward.b", pa.array([["x", "y", "z"]])), {}, DataError, "column 'reward.b' is list<.*string>"),
        (with_column(GROUPS, "prompt", pa.array([3])), {}, DataError, "a prompt is a string or a list of messages .* not int64"),
        (with_column(GROUPS, "prompt_id", pa.nulls(1, pa.string())), {}, DataError, "prompt_id is null in 1 rows"),
        (GROUPS, {"strategy": "rc_filter"}, ConfigError, "'rc_filter': the data are groups of candidates"),
        (GROUPS, {"objectives": ["a", "z"]}, ConfigError, r"selection.objectives names 'z', which is not among .* \(a, b\)"),
        (GROUPS, {"margins": {"z": 1.0}}, ConfigError, "selection.margins names 'z'"),
        (GROUPS, {"min_agreeing": 3}, ConfigError, "min_agreeing is 3, but there are 2 objectives"),
        (GROUPS, {"scale": {"a": 1.0}}, ConfigError, "selection.scale lacks 'b'"),
        (PAIRS, {}, ConfigError, r"'rcs': the data are existing pairs \(chosen/rejected\)"),
        (PAIRS.drop_columns(["rejected"]), RC_FILTER.model_dump(), DataError, "pairs have no column 'rejected'"),
        (PAIRS.drop_columns(["prompt"]), RC_FILTER.model_dump(), DataError, "pairs have no column 'prompt'"),
        (PAIRS.drop_columns(["rewards_chosen"]), RC_FILTER.model_dump(), DataError, "pairs have no column 'rewards_chosen'"),
        (with_column(PAIRS, "rewards_chosen", pa.array([{"a": 1.0}] * 5)), RC_FILTER.model_dump(), DataError,
         r"rewards_chosen has \['a'\] and rewards_rejected has \['a', 'b'\]"),
        (with_column(PAIRS, "rewards_chosen", pa.array([{"a": "x", "b": "y"}] * 5)), RC_FILTER.model_dump(), DataError,
         "rewards_chosen.a is string; expected a number"),
        (with_column(PAIRS, "chosen", pa.array([[assistant("x")]] * 5)), RC_FILTER.model_dump(), DataError,
         "give both as strings or both as messages"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(table: pa.Table, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        select_pairs(table, SelectionConfig(**options))


def test_wrong_arrays_are_named() -> None:
    with pytest.raises(ValueError, match=r"rewards has shape \(3, 2\); expected \(groups, candidates, objectives\)"):
        select_indices(np.zeros((3, 2)))
    with pytest.raises(ConfigError, match="max_length_ratio needs texts"):
        select_indices(np.zeros((1, 2, 1)), SelectionConfig(max_length_ratio=2.0))
    with pytest.raises(ConfigError, match=r"rc_filter needs groups of two .* not 3"):
        select_indices(np.zeros((1, 3, 1)), RC_FILTER)
    for names in (["a"], ["a", "b", "c"]):
        with pytest.raises((ValueError, ConfigError), match="objectives"):
            select_indices(np.zeros((1, 2, 2)), SelectionConfig(gap="sum"), objectives=names)
    with pytest.raises(ConfigError, match=r"selection\.primary names 'z'"):
        select_indices(np.zeros((1, 2, 1)), SelectionConfig(consistency="lexicographic", primary="z"))


# ---------------------------------------------------------------------------------------------------------------- the report


def report_groups() -> list[Group]:
    rng = np.random.default_rng(0)
    groups = []
    for g in range(40):
        n = int(rng.integers(0, 7))
        rewards = rng.choice([-1.0, 0.0, 0.25, 2.0], (n, 3)).tolist()
        sizes = rng.integers(0, 4, n).tolist()
        groups.append(Group(str(g), tuple(Answer(f"{i}" + "x" * sizes[i], tuple(row)) for i, row in enumerate(rewards))))
    groups[3] = Group("3", (Answer("x", (1.0, None, 0.0)), Answer("y", (1.0, 0.0, 0.0))))
    return groups


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def test_report_equals_a_direct_count() -> None:
    groups, margins = report_groups(), {"a": 0.25, "b": 0.0, "c": 0.0}
    config = SelectionConfig(margins={"a": 0.25})
    table = group_table(groups, "abc")
    report = selection_report([table.slice(0, 11), table.slice(11)], config, sizes=(2, 3, 5))
    usable = [[a.rewards for a in g.answers] for g in groups if len(g.answers) > 1 and g.prompt_id != "3"]
    assert (report.num_groups, report.num_usable, report.objectives) == (40, len(usable), ["a", "b", "c"])

    for size in (1, 2, 3):
        for subset in combinations(range(3), size):
            for n in (2, 3, 5):
                held = [
                    any(
                        all(w[k] - v[k] > margins["abc"[k]] for k in subset) for w in rows[:n] for v in rows[:n]
                    )
                    for rows in usable if len(rows) >= n
                ]  # fmt: skip
                assert report.consistency[" + ".join("abc"[k] for k in subset)][n] == sum(held) / len(held)
    assert len(report.consistency) == 7

    pairs = [(v, w) for rows in usable for v, w in combinations(rows, 2)]
    for i in range(3):
        for j in range(3):
            both = [sign(w[i] - v[i]) * sign(w[j] - v[j]) for v, w in pairs]
            alike, opposite = both.count(1), both.count(-1)
            untied = [sum(v[k] != w[k] for v, w in pairs) for k in (i, j)]
            assert report.agreement[i][j] == pytest.approx(alike / (alike + opposite))
            assert report.conflict[i][j] == pytest.approx(opposite / len(pairs))
            assert report.rank_correlation[i][j] == pytest.approx((alike - opposite) / math.sqrt(untied[0] * untied[1]))

    others = {"rcs": config, "rc_all": config.model_copy(update={"strategy": "rc_all"})}
    others |= {
        name: SelectionConfig(strategy=name)
        for name in ("best_worst", "best_random", "sweet_spot", "rs_dpo", "mixed", "pareto", "lsc")
    }
    others |= {f"best_worst by {name}": SelectionConfig(strategy="best_worst", gap=f"primary:{name}") for name in "abc"}
    assert set(report.strategies) == set(others)
    for name, other in others.items():
        assert report.strategies[name] == tally(table, other, len(usable))
    rows = select_pairs(table, config).pairs.to_pylist()
    for found, values in (
        (report.gap, [row["gap"] for row in rows]),
        (report.length_difference, [longer_by(row) for row in rows]),
    ):
        assert found == {
            f"{100 * q:g} %": sorted(values)[round(q * (len(values) - 1))] for q in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
        }  # fmt: skip
    assert "40 groups" in report.text()


def longer_by(row: dict[str, Any]) -> int:
    return len(row["chosen"][-1]["content"]) - len(row["rejected"][-1]["content"])


def tally(table: pa.Table, config: SelectionConfig, num_usable: int) -> dict[str, float]:
    """The report's numbers about one strategy, from the pairs that it selects."""
    selected = select_pairs(table, config)
    rows = selected.pairs.to_pylist()
    worse = [any(row["rewards_chosen"][k] < row["rewards_rejected"][k] for k in row["rewards_chosen"]) for row in rows]
    predicted = [(sign(longer_by(row)) + 1) / 2 for row in rows]
    return {
        "pairs": len(rows),
        "yield": selected.num_paired / num_usable,
        "conflict": sum(worse) / len(rows),
        "length_only": sum(predicted) / len(rows),
    }


def test_report_on_existing_pairs_shows_them_before_and_after() -> None:
    table = preference_table(EXISTING, "ab")
    report = selection_report(table, RC_FILTER)
    assert report.strategies["rc_filter"] == {"pairs": 1, "yield": 0.25, "conflict": 0.0, "length_only": 0.5}
    assert report.strategies["as given"] == {"pairs": 4, "yield": 1.0, "conflict": 0.75, "length_only": 0.5}
    assert report.gap["50 %"] == 3.0


def test_report_goes_up_to_the_largest_group_by_itself() -> None:
    table = group_table(numbered_groups(np.random.default_rng(0).normal(size=(5, 6, 2)).tolist()), "ab")
    assert list(selection_report(table).consistency["a + b"]) == [2, 4, 6]
    assert list(selection_report(table.slice(0, 0), SelectionConfig(gap="sum")).consistency) == []


@pytest.mark.parametrize("scale", ["data", "group", {"a": 1.0, "b": 1.0, "c": 2.0}])
def test_report_runs_the_other_strategies_with_what_they_use(scale: Any) -> None:
    config = SelectionConfig(ensembles={"e": {"members": ["b", "c"]}}, scale=scale, gap="min")
    report = selection_report(group_table(report_groups(), "abc"), config)
    assert {"best_worst by a", "best_worst by e", "rc_all", "lsc"} < set(report.strategies)


def test_report_counts_no_pair_that_selection_does_not_take() -> None:
    equal = Group("equal texts", (Answer("x", (2.0, 2.0)), Answer("x", (1.0, 1.0)), Answer("y", (1.5, 3.0))))
    tied = Group("tied", (Answer("x", (1.0, 1.0)), Answer("y", (1.0, 1.0))))
    yields = selection_report(group_table([equal], "ab")).consistency["a + b"]
    assert yields == {2: 0.0, 3: 1.0}
    config = SelectionConfig(margins={"a": -1.0, "b": -1.0})
    assert selection_report(group_table([tied], "ab"), config).consistency["a + b"] == {2: 0.0}
    assert select_pairs(group_table([tied], "ab"), config).pairs.num_rows == 0
    half = Group("half tied", (Answer("x", (1.0, 1.0)), Answer("y", (1.0, 1.5))))
    report = selection_report(group_table([half], "ab"), config).consistency
    assert {name: by_n[2] for name, by_n in report.items()} == {"a": 0.0, "b": 1.0, "a + b": 1.0}


STALE = """
import numpy as np
from rc_ray.config import SelectionConfig
from rc_ray.core.selection import select_indices
rewards = np.asarray([[[1.0, 1.0], [1.0, 0.0]]], dtype=np.float32)
print(select_indices(rewards, SelectionConfig(consistency="weak", gap="sum")).group.size)
"""


def test_compiled_code_that_is_kept_is_not_used_after_a_change_of_what_it_calls(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "rc_ray", tmp_path / "rc_ray", ignore=shutil.ignore_patterns("__pycache__"))
    rule = tmp_path / "rc_ray" / "core" / "rule.py"

    def pairs() -> str:
        command = [sys.executable, "-c", STALE]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
        return done.stdout.strip()

    assert pairs() == "1"
    assert any(rule.parent.glob("__pycache__/pick._largest*.nbi"))
    source = rule.read_text()
    changed = source.replace("return bool(better or rule.mode == LEXICOGRAPHIC)", "return False")
    assert changed != source
    rule.write_text(changed)
    assert pairs() == "0"
