"""Progress lines, the board that counts, and the reporter that feeds it; all without Ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rc_ray.config import ClassifierReward
from rc_ray.core import schemas
from rc_ray.pipeline import progress
from rc_ray.pipeline.actors import ScoreGroups
from rc_ray.pipeline.progress import ProgressBoard, Reporter, StageProgress, duration
from rc_ray.rewards.figures import Scoring, remarks, scoring_line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (80, "1m 20s"),
        (3599.6, "1h 00m"),
        (3600, "1h 00m"),
        (7384, "2h 03m"),
        (100 * 3600, "100h 00m"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        # No worker is ready, then one is, then half the work is done after 10 s of it.
        (StageProgress("sample", "prompts", 96), "sample    0/96 prompts    0 %  starting"),
        (StageProgress("sample", "prompts", 96, started_s=5, ready_s=9, updated_s=9), "sample    0/96 prompts    0 %  working"),
        (
            StageProgress("sample", "prompts", 96, 48, 0, 2000, started_s=5, ready_s=9, updated_s=19),
            "sample    48/96 prompts   50 %  200 tok/s  ETA 10s",
        ),
        # Resumed units count as done and not for the rate: 16 took 8 s, so 32 more take 16 s.
        (
            StageProgress("sample", "prompts", 96, 64, 48, started_s=0, ready_s=2, updated_s=10),
            "sample    64/96 prompts   67 %  ETA 16s",
        ),
        (
            StageProgress("score", "prompts", 96, 96, 48, 500, started_s=0, ready_s=50, updated_s=100),
            "score     96/96 prompts  100 %  10 tok/s  done in 1m 40s",
        ),
        (StageProgress("select", "chunks", 12, 12, 12), "select    12/12 chunks  100 %  nothing left to do"),
        (StageProgress("select", "chunks", 0), "select    0/0 chunks  100 %  nothing left to do"),
    ],
)
def test_the_line_of_a_stage(stage: StageProgress, line: str) -> None:
    assert stage.line() == line


class Clock:
    """A monotonic clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_the_board_follows_a_stage_from_start_to_end(clock: Clock) -> None:
    board = ProgressBoard()
    board.begin("sample", "prompts", 40, resumed=10)
    assert board.lines()["sample"].endswith("25 %  starting")
    clock.now += 60
    board.ready("sample")
    assert board.lines()["sample"].endswith("working")
    clock.now += 5
    board.ready("sample")  # a second worker does not restart the clock
    clock.now += 5
    board.advance("sample", 15, 1000)
    assert board.lines()["sample"].endswith("25/40 prompts   62 %  100 tok/s  ETA 10s")
    clock.now += 10
    board.advance("sample", 15, 1000)
    assert board.lines()["sample"].endswith("40/40 prompts  100 %  100 tok/s  done in 1m 20s")


def test_the_board_never_exceeds_the_total() -> None:
    board = ProgressBoard()
    board.begin("sample", "prompts", 10, resumed=4)
    for _ in range(5):
        board.advance("sample", 3, 0)
    assert "10/10 prompts  100 %" in board.lines()["sample"]


def test_the_board_keeps_stages_apart_and_ignores_unknown_ones() -> None:
    board = ProgressBoard()
    board.begin("sample", "prompts", 10)
    board.begin("score", "prompts", 10)
    board.advance("score", 5, 0)
    board.advance("nobody", 5, 5)
    board.ready("nobody")
    assert list(board.lines()) == ["sample", "score"]
    assert "0/10" in board.lines()["sample"]
    assert "5/10" in board.lines()["score"]


def test_the_board_says_what_each_objectives_actors_do(clock: Clock) -> None:
    board = ProgressBoard()
    board.begin("score", "prompts", 40)
    board.add_scoring("score", "helpful", "first", {}, 0.0)
    assert list(board.lines()) == ["score"]  # ready, and nothing scored yet
    clock.now += 10
    board.add_scoring("score", "helpful", "second", {}, 0.0)
    board.add_scoring("score", "length", "third", {}, 0.0)
    clock.now += 10
    board.add_scoring("score", "helpful", "first", {"num_texts": 8, "num_tokens": 900, "num_padded_tokens": 1000}, 4.0)
    board.add_scoring("score", "helpful", "second", {"num_texts": 8, "num_tokens": 900, "num_padded_tokens": 1000}, 5.0)
    clock.now += 10
    board.add_scoring("score", "length", "third", {}, 0.1)
    # Two actors, ready for 30 and 20 s, of which they scored for 9.
    assert board.scoring("score")["helpful"] == Scoring(
        {"num_texts": 16, "num_tokens": 1800, "num_padded_tokens": 2000}, 9.0, 50.0, 2
    )
    assert board.lines()["score helpful"] == "score     helpful: 200 tok/s while scoring, 10.0 % padding, 2 actor(s) 18 % busy"
    assert board.lines()["score length"] == "score     length: 1 actor(s) 0 % busy"
    assert board.scoring("score_before") == {}
    # An actor that Ray starts again is the same one.
    board.add_scoring("score", "length", "third", {}, 0.0)
    assert board.scoring("score")["length"].num_actors == 1
    board.add_scoring("no such stage", "helpful", "first", {}, 1.0)
    assert "no such stage helpful" not in board.lines()


def test_a_scorer_says_what_its_reward_did_since_the_last_time(
    tiny_rewards: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(Reporter, "scored", lambda _, *what: said.append(what))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delattr(os, "sched_setscheduler", raising=False)
    config = ClassifierReward(kind="classifier", model=str(tiny_rewards["helpful"]))
    scorer = ScoreGroups("helpful", config, None, False, 1, None, "score", 3, first=True, last=True, keep_scored=False)
    assert said == [("helpful", {}, 0.0)]  # what its self-test read does not count
    candidate = {"text": "fine", "token_ids": [1], "finish_reason": "stop", "seed": 0, "logprob": -1.0}
    row = {"prompt_id": "0", "prompt": [{"role": "user", "content": "hello"}], "candidates": [candidate] * 3}
    table = pa.Table.from_pylist([row], schema=schemas.GROUP)
    for _ in range(2):
        scorer.score(table)
    (name, first, busy_s), (_, second, _) = said[1:]
    assert name == "helpful"
    assert first == second
    assert first["num_texts"] == 3
    assert first["num_tokens"] == first["num_padded_tokens"] > 3
    assert busy_s > 0


class RecordedMethod:
    """A method of an actor handle that keeps the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def remote(self, *arguments: Any) -> None:
        self.calls.append(arguments)


class FakeBoard:
    def __init__(self) -> None:
        self.advance, self.ready = RecordedMethod(), RecordedMethod()


def test_the_reporter_adds_up_and_sends_once_a_second(clock: Clock) -> None:
    board = FakeBoard()
    reporter = Reporter(board, "sample")
    reporter.ready()
    assert board.ready.calls == [("sample",)]
    reporter.add(1, 10)
    assert board.advance.calls == [("sample", 1, 10, 0)]
    for _ in range(4):
        clock.now += 0.2
        reporter.add(1, 10)
    assert len(board.advance.calls) == 1
    clock.now += 0.3
    reporter.add(tokens=5)
    assert board.advance.calls[1:] == [("sample", 4, 45, 0)]


def test_flush_sends_the_rest_once(clock: Clock) -> None:
    board = FakeBoard()
    reporter = Reporter(board, "score")
    reporter.add(done=2)
    reporter.add(done=3, tokens=7)
    reporter.flush()
    reporter.flush()
    assert board.advance.calls == [("score", 2, 0, 0), ("score", 3, 7, 0)]


def test_an_idle_reporter_sends_nothing() -> None:
    board = FakeBoard()
    reporter = Reporter(board, "score")
    reporter.add()
    reporter.flush()
    assert board.advance.calls == []


def test_without_a_board_nothing_happens() -> None:
    reporter = Reporter(None, "sample")
    reporter.ready()
    reporter.add(3, 30)
    reporter.flush()
    assert reporter._board is None


def test_what_actors_did_adds_up_over_sessions_and_is_summed_up() -> None:
    first = Scoring({"num_texts": 10, "num_tokens": 300, "num_padded_tokens": 400, "num_cached_tokens": 0}, 2.0, 4.0, 2)
    second = Scoring({"num_texts": 5, "num_tokens": 100, "num_padded_tokens": 100, "num_truncated": 3}, 2.0, 6.0, 1)
    both = first + second
    assert both.summary() == {
        "num_texts": 15, "num_tokens": 400, "num_padded_tokens": 500, "num_cached_tokens": 0, "num_truncated": 3, "num_actors": 2,
        "tokens_per_s": 100.0, "padding_share": 0.2, "busy_share": 0.4,
    }  # fmt: skip
    assert remarks("helpful", first.summary()) == []
    assert remarks("helpful", both.summary()) == ["helpful: 3 of 15 texts were truncated before they were scored"]
    assert Scoring(**vars(both)) == both
    judge = Scoring(
        {"num_comparisons": 8, "num_order_disagreements": 2, "num_tokens": 100, "num_cached_tokens": 25}, 1.0, 1.0, 1
    )
    assert judge.summary()["disagreement_share"] == judge.summary()["cached_share"] == 0.25
    assert scoring_line("true", judge.summary()) == (
        "true: 100 tok/s while scoring, 25 % of tokens from the prefix cache, 1 actor(s) 100 % busy"
    )
    assert remarks("true", judge.summary()) == ["true: 2 of 8 comparisons turned with the order of the answers"]
    assert Scoring().summary() == {"num_actors": 0}
    assert remarks("mine", {"num_too_long": 2}) == ["mine: 2 texts were too long for the model and have no reward"]
    assert remarks("mine", {"num_truncated": 1}) == ["mine: 1 texts were truncated before they were scored"]
