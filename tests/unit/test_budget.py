"""When a budget is used up, and that the board which the sampling actors ask counts what was used before."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from rc_ray.config import BudgetConfig, fingerprint, load_config, to_yaml
from rc_ray.errors import ConfigError
from rc_ray.pipeline.budget import exhausted
from rc_ray.pipeline.progress import ProgressBoard
from tests.unit.test_config import GOOD


@pytest.mark.parametrize(
    ("budget", "pairs", "tokens", "words"),
    [
        (BudgetConfig(), 10**9, 10**12, None),
        (BudgetConfig(target_pairs=5), 4, 0, None),
        (BudgetConfig(target_pairs=5), 5, 0, "budget.target_pairs = 5 is reached (5 prompts with a pair)"),
        (BudgetConfig(max_generated_tokens=100), 9, 99, None),
        (BudgetConfig(max_generated_tokens=100), 0, 130, "budget.max_generated_tokens = 100 is reached (130 tokens)"),
        (BudgetConfig(target_pairs=5, max_generated_tokens=100), 4, 100, "max_generated_tokens"),
        (BudgetConfig(deadline=datetime(9999, 1, 1, tzinfo=UTC)), 0, 0, None),
        (
            BudgetConfig(deadline=datetime(2020, 1, 1, tzinfo=UTC)),
            0,
            0,
            "budget.deadline = 2020-01-01T00:00:00+00:00 has passed",
        ),
    ],
)
def test_whichever_comes_first(budget: BudgetConfig, pairs: int, tokens: int, words: str | None) -> None:
    why = exhausted(budget, pairs, tokens)
    assert why is None if words is None else words in str(why)


def test_the_board_counts_this_session_and_what_was_before() -> None:
    board = ProgressBoard()
    assert board.sampling_ended() is None
    board.bound(BudgetConfig(target_pairs=10, max_generated_tokens=1000), "sample", "score", 4, 500)
    board.begin("sample", "prompts", 100)
    board.begin("score", "prompts", 100)
    board.advance("sample", 10, 400)
    board.committed("score", 0, 5)
    assert board.sampling_ended() is None
    board.committed("score", 1, 1)
    assert "target_pairs" in str(board.sampling_ended())
    board.bound(BudgetConfig(max_generated_tokens=1000), "sample", "score", 4, 500)
    board.advance("sample", 1, 100)
    assert "1000 tokens" in str(board.sampling_ended())
    board.bound(None, "sample_before", "score_before", 0, 0)
    assert board.sampling_ended() is None


def test_sampling_waits_for_rewards_only_where_pairs_are_counted() -> None:
    board = ProgressBoard()
    board.begin("sample", "prompts", 100)
    board.begin("score", "prompts", 100)
    board.hold_sampling(2)
    assert [board.may_sample(chunk) for chunk in range(4)] == [True] * 4  # no budget
    board.bound(BudgetConfig(target_pairs=3), "sample", "score", 0, 0)
    assert [board.may_sample(chunk) for chunk in (0, 1, 2, 0)] == [True, True, None, True]  # 0 again: its actor died
    board.committed("sample", 0, None)
    board.committed("score", 0, 1)
    assert [board.may_sample(chunk) for chunk in (2, 3)] == [True, None]
    board.committed("score", 1, 2)
    assert board.may_sample(3) is False
    board.bound(BudgetConfig(target_pairs=9), "sample", "score", 0, 0)
    board.hold_sampling(None)
    assert [board.may_sample(chunk) for chunk in range(9)] == [True] * 9


def test_chunks_in_work_are_limited_until_the_last_stage_commits_them() -> None:
    board = ProgressBoard()
    assert [board.may_load(chunk, False) for chunk in range(5)] == [True] * 5
    board.hold_loading(2, "score")
    assert [board.may_load(chunk, False) for chunk in (0, 1, 2, 0)] == [True, True, None, True]  # 0 again: its task was lost
    board.committed("sample", 0, None)
    assert board.may_load(2, False) is None
    board.committed("score", 0, 3)
    assert [board.may_load(chunk, False) for chunk in (2, 3)] == [True, None]
    board.begin("sample", "prompts", 9)
    board.bound(BudgetConfig(max_generated_tokens=1), "sample", "score", 0, 1)
    assert board.may_load(3, True) is True, "nothing is sampled any more, so nothing is committed, and what is left passes"
    assert board.may_load(4, False) is False


def test_scoring_waits_for_commits() -> None:
    board = ProgressBoard()
    board.hold_scoring(2)
    assert [board.may_score(chunk) for chunk in (4, 5, 6, 4)] == [True, True, None, True]  # 4 again: its actor died
    board.committed("score", 4, None)  # one objective of several phases
    assert [board.may_score(chunk) for chunk in (6, 7)] == [True, None]
    board.hold_scoring(1)
    assert [board.may_score(chunk) for chunk in (8, 9)] == [True, None]


def test_the_budget_is_no_part_of_what_a_run_is_and_survives_its_file(tmp_path: Path) -> None:
    config = load_config(GOOD, ["budget.deadline=2027-01-31T08:00:00Z", "budget.target_pairs=3"])
    assert fingerprint(config) == fingerprint(load_config(GOOD))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    with pytest.raises(ConfigError, match=r"budget\.deadline"):
        load_config(GOOD, ["budget.deadline=2027-01-31T08:00:00"])  # which time zone?
