"""The RC rule and RCS against a direct reading of their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rc_ray.config import SelectionConfig
from rc_ray.core import schemas
from rc_ray.core.selection import RewardMoments, consistency_matrix, gap_matrix, select_pairs
from rc_ray.errors import DataError

# Few distinct values, so that ties are frequent.
REWARD = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0, 3.0])


@st.composite
def reward_matrices(draw: st.DrawFn) -> np.ndarray:
    n, k = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    return np.asarray(draw(st.lists(st.lists(REWARD, min_size=k, max_size=k), min_size=n, max_size=n)))


def groups(rewards: dict[str, list[list[float | None]]], **columns: list[Any]) -> pa.Table:
    """Scored groups with the given rewards; answers are all different and complete unless `texts`/`finish` say otherwise."""
    count = len(next(iter(rewards.values())))
    sizes = [len(next(iter(rewards.values()))[g]) for g in range(count)]
    texts = columns.get("texts") or [[f"answer {g} {i}" for i in range(n)] for g, n in enumerate(sizes)]
    finish = columns.get("finish") or [["stop"] * n for n in sizes]
    rows = [
        {
            "prompt_id": f"{g:032x}",
            "prompt": [{"role": "user", "content": f"prompt {g}"}],
            "candidates": [
                {"text": t, "token_ids": [1], "finish_reason": f, "seed": i, "logprob": -1.0}
                for i, (t, f) in enumerate(zip(texts[g], finish[g], strict=True))
            ],
            "failure": (columns.get("failure") or [None] * count)[g],
            "failure_detail": None,
            **{schemas.reward_column(name): values[g] for name, values in rewards.items()},
            **{schemas.missing_column(name): None for name in rewards},
        }
        for g in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema([*schemas.GROUP, *schemas.reward_fields(rewards)]))


@given(reward_matrices(), st.sampled_from(["strict", "weak"]), st.sampled_from([0.0, 0.3, -0.3]))
def test_matrix_equals_the_definition(rewards: np.ndarray, rule: str, margin: float) -> None:
    n, k = rewards.shape
    matrix = consistency_matrix(rewards, rule, np.full(k, margin))
    for w in range(n):
        for loser in range(n):
            differences = [rewards[w, o] - rewards[loser, o] for o in range(k)]
            if rule == "strict":
                expected = all(d > margin for d in differences)
            else:
                expected = all(d >= margin for d in differences) and any(d > margin for d in differences)
            assert matrix[w, loser] == (expected and w != loser)


@given(reward_matrices(), st.sampled_from(["strict", "weak"]))
def test_matrix_is_antisymmetric_and_shrinks_with_the_margin(rewards: np.ndarray, rule: str) -> None:
    k = rewards.shape[1]
    matrix = consistency_matrix(rewards, rule)
    assert not (matrix & matrix.T).any()
    assert not (consistency_matrix(rewards, rule, np.full(k, 0.4)) & ~matrix).any()


@settings(max_examples=60)
@given(
    st.lists(reward_matrices().filter(lambda m: m.shape[1] == 2), min_size=1, max_size=5),
    st.sampled_from(["sum", "standardized_sum", "min"]),
)
def test_rcs_takes_the_largest_gap_of_a_brute_force_search(matrices: list[np.ndarray], gap: str) -> None:
    table = groups({"a": [m[:, 0].tolist() for m in matrices], "b": [m[:, 1].tolist() for m in matrices]})
    scale = {"a": 2.0, "b": 0.5}
    selected = select_pairs(table, SelectionConfig(gap=gap), scale)
    found = {row["prompt_id"]: row for row in selected.pairs.to_pylist()}
    assert len(found) + selected.drops.num_rows == len(matrices)
    for g, m in enumerate(matrices):
        best, best_gap = None, -math.inf
        for w in range(len(m)):
            for loser in range(len(m)):
                difference = m[w] - m[loser]
                if (difference > 0).all():
                    z = difference / np.array([2.0, 0.5])
                    value = {"sum": difference.sum(), "standardized_sum": z.sum(), "min": z.min()}[gap]
                    if value > best_gap:
                        best, best_gap = (w, loser), value
        row = found.get(f"{g:032x}")
        assert (row is None) == (best is None)
        if row is not None:
            assert (row["chosen_index"], row["rejected_index"]) == best
            assert row["gap"] == pytest.approx(best_gap)
            assert row["chosen"][0]["content"] == f"answer {g} {best[0]}"
            assert row["rewards_chosen"] == {"a": m[best[0], 0], "b": m[best[0], 1]}


def test_order_and_split_of_rows_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(40, 5)).astype(np.float32).tolist() for name in "abc"}
    table, config = groups(values), SelectionConfig()
    scale = dict(zip("abc", RewardMoments.of(table, list("abc")).scale().tolist(), strict=True))

    def outcome(*tables: pa.Table) -> tuple[list, list]:
        parts = [select_pairs(t, config, scale) for t in tables]
        key = lambda row: row["prompt_id"]  # noqa: E731
        return (
            sorted((r for p in parts for r in p.pairs.to_pylist()), key=key),
            sorted((r for p in parts for r in p.drops.to_pylist()), key=key),
        )

    whole = outcome(table)
    assert whole[0]
    assert whole[1]
    assert outcome(table.take(list(reversed(range(40))))) == whole
    assert outcome(table.slice(0, 13), table.slice(13)) == whole


def test_a_tie_never_makes_a_pair_and_weak_accepts_one_tied_objective() -> None:
    tied = groups({"a": [[1.0, 1.0]], "b": [[2.0, 1.0]]})
    assert select_pairs(tied, SelectionConfig()).drops.to_pylist()[0]["reason"] == "no_consistent_pair"
    assert select_pairs(tied, SelectionConfig(consistency="weak")).pairs.num_rows == 1
    equal = groups({"a": [[1.0, 1.0]], "b": [[1.0, 1.0]]})
    assert select_pairs(equal, SelectionConfig(consistency="weak")).pairs.num_rows == 0


def test_margins_are_per_objective() -> None:
    table = groups({"a": [[1.0, 0.8]], "b": [[1.0, 0.0]]})
    assert select_pairs(table, SelectionConfig(margins={"a": 0.1})).pairs.num_rows == 1
    assert select_pairs(table, SelectionConfig(margins={"a": 0.5})).pairs.num_rows == 0
    assert select_pairs(table, SelectionConfig(margins={"b": 0.5})).pairs.num_rows == 1


def test_a_truncated_answer_loses_but_does_not_win() -> None:
    table = groups({"a": [[3.0, 2.0, 1.0]], "b": [[3.0, 2.0, 1.0]]}, finish=[["length", "stop", "length"]])
    pair = select_pairs(table, SelectionConfig()).pairs.to_pylist()[0]
    assert (pair["chosen_index"], pair["rejected_index"]) == (1, 2)
    allowed = select_pairs(table, SelectionConfig(allow_truncated_winner=True)).pairs.to_pylist()[0]
    assert allowed["chosen_index"] == 0
    cut = groups({"a": [[3.0, 2.0]], "b": [[3.0, 2.0]]}, finish=[["length", "stop"]])
    assert select_pairs(cut, SelectionConfig()).drops.to_pylist()[0]["reason"] == "winner_truncated"


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_a_missing_reward_keeps_the_group_from_selection(bad: float | None) -> None:
    drop = select_pairs(groups({"a": [[1.0, 2.0, 0.0]], "b": [[1.0, bad, 0.0]]}), SelectionConfig()).drops.to_pylist()[0]
    assert (drop["reason"], drop["stage"]) == ("reward_missing", "score")
    assert drop["detail"].startswith("b: 1 of 3")


def test_identical_answers_failures_and_small_groups() -> None:
    table = groups(
        {"a": [[1.0, 2.0], [], [1.0]], "b": [[1.0, 2.0], [], [1.0]]},
        texts=[["same", "same"], [], ["only"]],
        failure=[None, "prompt_too_long", None],
    )
    reasons = [row["reason"] for row in select_pairs(table, SelectionConfig()).drops.to_pylist()]
    assert reasons == ["identical_candidates", "prompt_too_long", "identical_candidates"]


def test_a_negative_margin_never_pairs_an_answer_with_its_copy() -> None:
    table = groups({"a": [[1.0, 1.0, 1.2]], "b": [[1.0, 1.0, 0.9]]}, texts=[["same", "same", "other"]])
    pair = select_pairs(table, SelectionConfig(margins={"a": -1.0, "b": -1.0})).pairs.to_pylist()[0]
    assert pair["chosen"] != pair["rejected"]


def test_equal_gaps_go_to_the_lowest_indices() -> None:
    pair = select_pairs(
        groups({"a": [[2.0, 2.0, 0.0, 0.0]], "b": [[2.0, 2.0, 0.0, 0.0]]}), SelectionConfig()
    ).pairs.to_pylist()[0]
    assert (pair["chosen_index"], pair["rejected_index"]) == (0, 2)


def test_scale_is_the_standard_deviation_and_adds_up_over_tables() -> None:
    values = {"a": [[1.0, 2.0], [4.0, 9.0]], "b": [[5.0, 5.0], [5.0, None]]}
    table = groups(values)
    whole = RewardMoments.of(table, ["a", "b"])
    parts = RewardMoments.of(table.slice(0, 1), ["a", "b"]) + RewardMoments.of(table.slice(1), ["a", "b"])
    assert whole.scale()[0] == pytest.approx(np.std([1.0, 2.0, 4.0, 9.0]))
    assert whole.scale()[1] == 1.0
    np.testing.assert_array_equal(whole.scale(), parts.scale())


def test_gap_names() -> None:
    rewards = np.array([[3.0, 1.0], [1.0, 0.0]])
    scale = np.array([4.0, 0.5])
    assert gap_matrix(rewards, "sum", scale)[0, 1] == 3.0
    assert gap_matrix(rewards, "standardized_sum", scale)[0, 1] == 2.5
    assert gap_matrix(rewards, "min", scale)[0, 1] == 0.5


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        consistency_matrix(np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        consistency_matrix(np.zeros(3))
    table = groups({"a": [[1.0, 2.0]], "b": [[1.0, 2.0]]})
    with pytest.raises(DataError, match="rc-ray score"):
        select_pairs(table.select(["prompt_id", "prompt", "candidates"]), SelectionConfig())
    with pytest.raises(DataError, match="'candidates'"):
        select_pairs(table.drop_columns(["candidates"]), SelectionConfig())
