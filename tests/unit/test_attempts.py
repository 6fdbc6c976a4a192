"""The book of attempts: who is blamed for a dead process, and when work is given up; the processes die in tests/fault."""

from __future__ import annotations

from typing import Any

import pytest

from rc_ray.errors import ClusterError
from rc_ray.pipeline.attempts import NUM_PARTS, AttemptBook, Attempts, parts
from rc_ray.pipeline.progress import StageProgress
from rc_ray.pipeline.watchdog import Recent, TooManyFailedError, check_failed, session_counts, stall_message


class Died(Exception):
    """Stands for the end of a process."""


class BookedAttempts(Attempts):
    """Attempts on a book in this process."""

    def __init__(self, book: AttemptBook, max_attempts: int) -> None:
        super().__init__(None, "sample", max_attempts)
        self._book = book

    def _begin(self, key: str) -> int:
        return self._book.begin_work("sample", key)

    def _end(self, key: str) -> None:
        self._book.end_work("sample", key)


def work(
    book: AttemptBook, groups: list[str], deadly: set[str], max_attempts: int, alone: list[str] | None = None
) -> dict[str, str | None]:
    """A block in a new process: why each group was given up, or None; `alone` gets the groups that were worked on by themselves."""
    attempts, outcome = BookedAttempts(book, max_attempts), {}
    with attempts.block(groups[0]) as block_died:
        for part in parts(groups, block_died):
            with attempts.part(part[0], len(part), block_died) as one_by_one:
                if not one_by_one:
                    if deadly.intersection(part):
                        raise Died
                    outcome |= dict.fromkeys(part)
                    continue
                for group in part:
                    with attempts.group(group) as given_up:
                        if alone is not None:
                            alone.append(group)
                        if given_up is None and group in deadly:
                            raise Died
                        outcome[group] = given_up
    return outcome


@pytest.mark.parametrize("max_attempts", [1, 2, 3])
def test_only_the_groups_that_kill_are_given_up_after_their_attempts(max_attempts: int) -> None:
    book, deaths = AttemptBook(), 0
    while True:
        try:
            outcome = work(book, ["a", "b", "c", "d"], {"b", "d"}, max_attempts)
            break
        except Died:
            deaths += 1
            assert deaths < 20
    if max_attempts == 1:  # the one attempt is the block's, so the whole block is given up
        assert all(why is not None for why in outcome.values())
        assert deaths == 1
        return
    assert {group for group, why in outcome.items() if why is not None} == {"b", "d"}
    assert outcome["b"] is not None
    assert f"died in {max_attempts} attempts" in outcome["b"]
    assert deaths == 1 + 2 * (max_attempts - 1)


def test_of_a_large_block_only_the_part_that_dies_again_is_taken_group_by_group() -> None:
    groups = [f"{i}" for i in range(5 * NUM_PARTS)]
    book, alone, deaths = AttemptBook(), list[str](), 0
    while True:
        try:
            outcome = work(book, groups, {"17"}, 3, alone)
            break
        except Died:
            deaths += 1
            assert deaths < 20
    assert [group for group in groups if outcome[group] is not None] == ["17"]
    assert list(outcome) == groups
    assert deaths == 4, "with the whole block, with its part, and twice alone"
    assert set(alone) == set(groups[15:20])

    book, alone = AttemptBook(), []
    with pytest.raises(Died):  # nobody's fault
        work(book, groups, {"17"}, 3)
    assert work(book, groups, set(), 3, alone) == dict.fromkeys(groups)
    assert alone == []


def test_work_that_ended_is_forgotten() -> None:
    book = AttemptBook()
    for _ in range(5):
        assert work(book, ["a", "b"], set(), 2) == {"a": None, "b": None}


def stage(done: int, failed: int, resumed: int = 0) -> dict[str, StageProgress]:
    return {"score": StageProgress("score", "prompts", 1000, done, resumed, failed=failed)}


def test_a_run_is_plainly_broken_from_32_groups_on() -> None:
    for fine in (stage(31, 31), stage(32, 16), stage(1000, 31, resumed=970), {}):
        check_failed(session_counts(fine), {}, 0.5)
    with pytest.raises(TooManyFailedError, match=r"17 of the last 32 groups failed.*= 0.5 allows. Last error: out of luck"):
        check_failed(session_counts(stage(32, 17)), {"score": "out of luck"}, 0.5)
    assert issubclass(TooManyFailedError, ClusterError)


def test_an_outage_late_in_a_long_run_is_seen_in_its_latest_groups() -> None:
    recent = Recent()
    assert recent.counts(stage(1_000, 900, resumed=100)) == {"score": (900, 900)}, "all since the session began"
    for done in range(1_100, 100_000, 100):
        counts = recent.counts(stage(done, 900, resumed=100))
    assert counts == {"score": (1_100, 0)}, "at least 1,024, and no more looks than that takes"
    counts = recent.counts(stage(100_600, 1_600, resumed=100))
    assert counts == {"score": (1_100, 700)}
    with pytest.raises(TooManyFailedError, match=r"700 of the last 1100 groups"):
        check_failed(counts, {}, 0.5)


def operator(name: str, waiting: int = 0, running: int = 0, **actors: int) -> dict[str, Any]:
    return {
        "name": name,
        "waiting": waiting,
        "running": running,
        "actors": {"running": 0, "restarting": 0, "pending": 0} | actors,
    }


def test_the_message_names_the_last_stage_with_work_its_queue_its_actors_and_the_errors() -> None:
    found = [
        operator("load_chunk", waiting=9),
        operator("GenerateGroups", waiting=3, running=4),
        operator("ScoreGroups_helpful", waiting=7, pending=1),
        operator("commit_groups"),
    ]
    message = stall_message(61.0, found, {"sample": "engine died"}, {"CPU": 0.5})
    for words in (
        "nothing finished for 61 s",
        "ScoreGroups_helpful stopped: 7 blocks wait for it, 0 are in work",
        "1 pending",
        "0.5 CPUs, 0 GPUs",
        "sample: engine died",
        "to resume",
    ):
        assert words in message
    assert "GenerateGroups stopped: 3 blocks" in stall_message(61.0, found[:2], {}, {})
    assert "no operator holds work" in stall_message(61.0, found[3:], {}, {})
