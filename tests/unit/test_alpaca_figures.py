"""The figures that the README gives on conflict and yield, from 55 models' answers to the 805 prompts of AlpacaEval.

Objectives: GPT-4's preference over a fixed reference, and brevity (fewer characters).
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from rc_ray.config import SelectionConfig
from rc_ray.core.selection import select_indices
from rc_ray.core.selection_report import SelectionReport, selection_report
from tests.conftest import Drawn

NUM_DRAWS = 20
NAMES = ["preference", "brevity"]


@pytest.fixture(scope="module")
def draws(alpaca_answers: Drawn) -> Drawn:
    """16 answers to each prompt in random order, several times."""
    rng = np.random.default_rng(0)
    return [[pool[i] for i in rng.permutation(len(pool))[:16]] for _ in range(NUM_DRAWS) for pool in alpaca_answers]


def as_table(groups: Drawn) -> pa.Table:
    return pa.table(
        {
            "prompt_id": [f"{g:032x}" for g in range(len(groups))],
            "prompt": ["a prompt"] * len(groups),
            "candidates": [[{"text": text} for text, _, _ in group] for group in groups],
            "reward.preference": [[preference for _, preference, _ in group] for group in groups],
            "reward.brevity": [[brevity for _, _, brevity in group] for group in groups],
        }
    )


def as_array(groups: Drawn) -> NDArray[np.float32]:
    return np.asarray([[(preference, brevity) for _, preference, brevity in group] for group in groups], dtype=np.float32)


@pytest.fixture(scope="module")
def report(draws: Drawn) -> SelectionReport:
    return selection_report(as_table(draws), SelectionConfig(), sizes=(2, 4, 8, 16))


def test_preference_and_brevity_order_most_pairs_of_answers_oppositely(alpaca_answers: Drawn) -> None:
    whole = selection_report(as_table(alpaca_answers), SelectionConfig())
    agreement = whole.agreement[0][1]
    assert whole.num_groups == 805
    assert agreement is not None
    assert 1 - agreement == pytest.approx(0.709, abs=0.002)


@pytest.mark.parametrize(("n", "share"), [(2, 0.29), (4, 0.80), (8, 0.995), (16, 1.0)])
def test_prompts_with_a_consistent_pair(report: SelectionReport, n: int, share: float) -> None:
    assert report.consistency["preference + brevity"][n] == pytest.approx(share, abs=0.01)


def test_yield_equals_that_of_the_selection_itself(draws: Drawn, report: SelectionReport) -> None:
    rewards = as_array(draws)
    for n, share in report.consistency["preference + brevity"].items():
        found = select_indices(np.ascontiguousarray(rewards[:, :n]), SelectionConfig(gap="sum"), objectives=NAMES)
        assert found.group.size / len(draws) == share


@pytest.mark.parametrize(("n", "share"), [(2, 0.71), (4, 0.82), (8, 0.88), (16, 0.915)])
def test_best_worst_by_preference_conflicts_with_brevity(draws: Drawn, n: int, share: float) -> None:
    rewards = np.ascontiguousarray(as_array(draws)[:, :n])
    config = SelectionConfig(strategy="best_worst", gap="primary:preference")
    found = select_indices(rewards, config, objectives=NAMES)
    winner, loser = rewards[found.group, found.winner], rewards[found.group, found.loser]
    assert (winner[:, 0] > loser[:, 0]).all()
    assert np.mean(winner[:, 1] < loser[:, 1]) == pytest.approx(share, abs=0.01)


def test_rc_pairs_never_conflict_and_are_never_longer(report: SelectionReport) -> None:
    assert [report.strategies[name]["conflict"] for name in ("rcs", "rc_all", "pareto")] == [0, 0, 0]
    assert [report.strategies[name]["length_only"] for name in ("rcs", "rc_all")] == [0, 0]
