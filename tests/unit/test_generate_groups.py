"""What the sampling actor does around the engine, which a stand-in replaces; real engines are in tests/integration."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pyarrow as pa

from rc_ray.config import GenerationConfig
from rc_ray.core import schemas
from rc_ray.generation.engine import Candidate, GroupTimedOut
from rc_ray.generation.load import Load
from rc_ray.pipeline.actors import GenerateGroups
from rc_ray.pipeline.attempts import AttemptBook, Attempts
from rc_ray.pipeline.policies import ONLY, Member, Policy
from rc_ray.pipeline.progress import ProgressBoard
from tests.unit.test_attempts import BookedAttempts, Died


class Engine:
    """Answers at once, but for prompts of three tokens, which take too long."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def submit(self, ids: list[int], seed: int, number: int, adapter: str | None) -> Future[list[Candidate]]:
        self.asked.append(len(ids))
        future: Future[list[Candidate]] = Future()
        if len(ids) == 3:
            future.set_exception(GroupTimedOut("not finished within generation.group_timeout_s = 5"))
        else:
            future.set_result([Candidate(f"{len(ids)}", [1, 2], "stop", seed + i, -1.0) for i in range(number)])
        return future

    def take_load(self) -> Load:
        return Load({0: len(self.asked)}, 1.0, 2.0, 0.5)


class Inline:
    """An actor's handle of an object in this process."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return type("Method", (), {"remote": staticmethod(getattr(self._target, name))})


def sampler(board: Any = None) -> Any:
    groups: Any = object.__new__(GenerateGroups)
    generation = GenerationConfig(max_tokens=4, max_model_len=14, num_candidates=2)
    groups._open(Policy((Member(ONLY, "stand-in"),), generation, 2, None, 0), 0, board, "sample", 3)
    groups._engine = Engine()
    groups._attempts = Attempts(None, "sample", 3)
    groups._renderers = {ONLY: lambda prompt: [0] * int(prompt[0]["content"])}
    return groups


def block(lengths: list[int]) -> pa.Table:
    rows = [{"prompt_id": f"{i:032x}", "prompt": [{"role": "user", "content": str(n)}]} for i, n in enumerate(lengths)]
    return pa.Table.from_pylist(rows, schema=schemas.GROUP)


def test_the_longest_prompts_go_first_and_the_rows_stay_where_they_are() -> None:
    groups = sampler()
    found = groups(block([1, 7, 99, 2, 7, 10])).to_pylist()
    assert groups._engine.asked == [10, 7, 7, 2, 1]
    assert [row["prompt_id"] for row in found] == [f"{i:032x}" for i in range(6)]
    assert [row["failure"] for row in found] == [None, None, "prompt_too_long", None, None, None]
    assert [row["candidates"][0]["text"] for row in found if row["candidates"]] == ["1", "7", "2", "7", "10"]


def test_a_group_that_took_too_long_is_a_failure_with_the_limit_and_is_counted() -> None:
    board = ProgressBoard()
    board.begin("sample", "prompts", 3)
    found = sampler(Inline(board))(block([1, 3, 2])).to_pylist()
    assert [row["failure"] for row in found] == [None, "generation_failed", None]
    assert found[1]["failure_detail"] == "not finished within generation.group_timeout_s = 5"
    stages, errors = board.state()
    assert (stages["sample"].done, stages["sample"].failed) == (3, 1)
    assert errors["sample"] == found[1]["failure_detail"]
    assert stages["sample"].load == Load({0: 3}, 1.0, 2.0, 0.5)


def test_a_group_that_kills_in_a_later_round_is_given_up() -> None:
    class Deadly(Engine):
        def submit(self, ids: list[int], seed: int, number: int, adapter: str | None) -> Future[list[Candidate]]:
            if len(ids) == 7 and number == 4:
                raise Died
            return super().submit(ids, seed, number, adapter)

    book, deaths = AttemptBook(), 0
    while True:
        groups = sampler()
        groups._engine, groups._attempts, groups._in_rounds = Deadly(), BookedAttempts(book, 3), True
        rows = block([1, 7, 2]).to_pylist()
        try:
            with groups._attempts.block("0") as block_died:
                groups._sample(rows, 2, block_died)
                for row in rows:
                    row["candidates"] = []  # as if the next round were to give as many anew
                groups._sample(rows, 4, block_died)
            break
        except Died:
            deaths += 1
            assert deaths < 10
    assert deaths == 3
    assert [row["failure"] for row in rows] == [None, "generation_failed", None]
    assert "its process died in 3 attempts" in rows[1]["failure_detail"]
