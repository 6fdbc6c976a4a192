"""Adaptive N on recorded answers: who gets more candidates, and what it saves; real engines are in tests/integration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rc_ray.config import GenerationConfig, SelectionConfig
from rc_ray.core import schemas
from rc_ray.pipeline.adaptive import AdaptiveGroups, ScorerPool
from rc_ray.pipeline.policies import Member, Policy
from rc_ray.pipeline.progress import Reporter
from tests.conftest import Drawn

Recorded = dict[str, list[tuple[str, float, float]]]


class Replayed(AdaptiveGroups):
    """Takes answers and rewards from a record in the place of engine and scorers."""

    def __init__(self, recorded: Recorded, num_candidates: int, max_candidates: int, **selection: Any) -> None:
        generation = GenerationConfig(
            num_candidates=num_candidates, max_candidates=max_candidates, target_gap=selection.pop("target_gap", None)
        )
        policy = Policy((Member("policy", "recorded"),), generation, num_candidates, max_candidates, 0)
        self._open(policy, 0, None, "sample", 3)
        self._selection = SelectionConfig(**selection)
        self._scorers = {name: ScorerPool([]) for name in ("a", "b")}
        self._scored = Reporter(None, "sample")
        self.recorded, self.rounds, self.given_up_at = recorded, 0, max_candidates + 1

    def _sample(self, rows: list[dict[str, Any]], number: int, block_died: bool) -> None:
        self.rounds += bool(rows)
        for row in rows if number < self.given_up_at else ():
            answers = self.recorded[row["prompt_id"]][:number]
            row["candidates"] = [
                {"text": text, "token_ids": [0] * (len(text) // 4), "finish_reason": "stop", "seed": i, "logprob": -1.0}
                for i, (text, _, _) in enumerate(answers)
            ]

    def _score(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            answers = self.recorded[row["prompt_id"]][: len(row["candidates"])]
            row["rewards"] = {"a": ([a for _, a, _ in answers], None), "b": ([b for _, _, b in answers], None)}

    def outcome(self) -> dict[str, dict[str, Any]]:
        rows = [{"prompt_id": name, "prompt": [], "candidates": None, "failure": None} for name in self.recorded]
        return {row["prompt_id"]: row for row in self(pa.Table.from_pylist(rows, schema=schemas.GROUP)).to_pylist()}


RECORDED: Recorded = {
    "at once": [("x", 1, 1), ("y", 0, 0), *[("z", 9, 9)] * 6],
    "in the second round": [("x", 1, 0), ("y", 0, 1), ("z", 2, 2), ("v", 0, 0), *[("w", 9, 9)] * 4],
    "at the end": [*((f"{i}", float(i), float(-i)) for i in range(7)), ("z", 9, 9)],
    "never": [(f"{i}", float(i), float(-i)) for i in range(8)],
}


def test_a_group_gets_as_many_again_until_it_has_a_pair_or_all() -> None:
    replayed = Replayed(RECORDED, 2, 8)
    found = replayed.outcome()
    assert {name: len(row["candidates"]) for name, row in found.items()} == {
        "at once": 2, "in the second round": 4, "at the end": 8, "never": 8,
    }  # fmt: skip
    assert replayed.rounds == 3
    assert all(len(row["reward.a"]) == len(row["reward.b"]) == len(row["candidates"]) for row in found.values())


def test_the_last_round_ends_at_the_maximum() -> None:
    assert len(Replayed(RECORDED, 3, 7).outcome()["never"]["candidates"]) == 7


def test_a_group_given_up_in_a_later_round_keeps_its_answers_and_is_not_asked_for_more() -> None:
    replayed = Replayed(RECORDED, 2, 8)
    replayed.given_up_at = 4
    assert {len(row["candidates"]) for row in replayed.outcome().values()} == {2}
    assert replayed.rounds == 2


def test_a_pair_below_the_target_gap_is_not_enough() -> None:
    found = Replayed(RECORDED, 2, 8, target_gap=2.5, gap="sum").outcome()
    assert [len(found[name]["candidates"]) for name in ("at once", "in the second round")] == [4, 4]


class Scorer:
    """Stands in for an actor's handle; keeps how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.score = self

    def remote(self, table: str) -> str:
        self.asked += 1
        return table


def test_the_scorer_with_the_fewest_requests_outstanding_is_asked_next_and_equals_take_turns() -> None:
    scorers = [Scorer(), Scorer(), Scorer()]
    pool = ScorerPool(scorers)
    first = [pool.ask("groups") for _ in range(3)]
    assert [number for number, _ in first] == [0, 1, 2]
    assert [answer for _, answer in first] == ["groups"] * 3
    pool.answered(1)
    pool.answered(2)
    # 0 still works on its first request, so it is passed over.
    assert [pool.ask("groups")[0] for _ in range(2)] == [1, 2]
    for number in range(3):
        pool.answered(number)
    assert [pool.ask("groups")[0] for _ in range(4)] == [0, 1, 2, 0]
    assert [scorer.asked for scorer in scorers] == [3, 3, 3]


def test_half_of_the_tokens_is_saved_at_the_yield_of_eight(alpaca_answers: Drawn) -> None:
    rng = np.random.default_rng(0)
    recorded = {str(pid): [pool[i] for i in rng.permutation(len(pool))[:8]] for pid, pool in enumerate(alpaca_answers)}

    def pairs(found: dict[str, dict[str, Any]]) -> int:
        return sum(
            any(a > c and b > d for a, b in zip(row["reward.a"], row["reward.b"], strict=True)
                for c, d in zip(row["reward.a"], row["reward.b"], strict=True))
            for row in found.values()
        )  # fmt: skip

    def tokens(found: dict[str, dict[str, Any]]) -> int:
        return sum(len(c["token_ids"]) for row in found.values() for c in row["candidates"])

    adaptive = Replayed(recorded, 2, 8).outcome()
    fixed = {name: {"candidates": [{"token_ids": [0] * (len(t) // 4)} for t, _, _ in answers],
                    "reward.a": [a for _, a, _ in answers], "reward.b": [b for _, _, b in answers]}
             for name, answers in recorded.items()}  # fmt: skip
    assert pairs(adaptive) == pairs(fixed)
    assert pairs(fixed) > 0.98 * 805
    assert 1 - tokens(adaptive) / tokens(fixed) == pytest.approx(0.457, abs=0.005)
