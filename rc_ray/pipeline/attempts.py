"""Retries of work whose process died: which group did it, and when to give it up.

Ray runs a block again when its actor dies, for ever if the block is what kills it. So every block, and in a block that
died before every part of it, is entered in a book before it is worked on and struck out after. What is in the book already has
killed somebody. A block that died is worked on in eighths, one at a time, and an eighth that died group by group, so that the next
death can be blamed on one group; after `max_attempts` it is given up with the last error, and the others go on. Most deaths are
nobody's fault, and an actor holds several blocks: group by group, all of these would take as long as their groups together.

The book lives with the driver's session: a driver that was killed blames nobody.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

NUM_PARTS = 8
Row = TypeVar("Row")


def parts(rows: Sequence[Row], block_died: bool) -> list[Sequence[Row]]:
    """What of a block is worked on together: all of it, or one part after the other."""
    size = math.ceil(len(rows) / (NUM_PARTS if block_died else 1))
    return [rows[first : first + size] for first in range(0, len(rows), size or 1)]


class AttemptBook:
    """Work begun and not ended. Part of the progress board's actor; pure Python."""

    def __init__(self) -> None:
        self._begun: dict[tuple[str, str], int] = {}

    def begin_work(self, stage: str, key: str) -> int:
        """Enters work; returns how often it was begun before without an end."""
        earlier = self._begun.get((stage, key), 0)
        self._begun[stage, key] = earlier + 1
        return earlier

    def end_work(self, stage: str, key: str) -> None:
        """Strikes work out."""
        self._begun.pop((stage, key), None)


class Attempts:
    """A worker's end of the book. Without a board nothing is known to have failed.

    Args:
        board: handle of the actor, or None.
        stage: name under which to book.
        max_attempts: of one group, the one with its whole block included, the one with its part not.
        whose: put before the keys of work that several pools of a stage do one after the other.
    """

    def __init__(self, board: Any | None, stage: str, max_attempts: int, whose: str = "") -> None:
        self._board, self._stage, self._max_attempts, self._whose = board, stage, max_attempts, whose
        self._alone = threading.RLock()

    @contextlib.contextmanager
    def block(self, key: str) -> Iterator[bool]:
        """Around the work on a block; gives whether an earlier attempt died, so that it must be taken in `parts`."""
        earlier = self._begin(f"block {key}")
        yield earlier > 0
        self._end(f"block {key}")

    @contextlib.contextmanager
    def part(self, key: str, size: int, block_died: bool) -> Iterator[bool]:
        """Around the work on a part of a block, alone in this process if the block died; gives whether to take its groups one by one.

        Args:
            key: of its first group.
            size: groups in it.
        """
        if not block_died:
            yield False
        elif size == 1 or self._max_attempts == 1:
            yield True
        else:
            with self._alone:
                yield self._begin(f"part {key}") > 0
                self._end(f"part {key}")

    @contextlib.contextmanager
    def group(self, key: str, block_died: bool = True) -> Iterator[str | None]:
        """Around the work on one group of such a block, alone in this process; gives why it must be given up, or None.

        Args:
            block_died: an attempt at its whole block, which counts as one of this group's.
        """
        with self._alone:
            deaths = block_died + self._begin(key)
            if deaths >= self._max_attempts:  # stays in the book, since another group may still kill the block
                yield f"its process died in {self._max_attempts} attempts{self._last_error()}"
                return
            yield None
            self._end(key)

    def _begin(self, key: str) -> int:
        if self._board is None:
            return 0
        import ray

        return int(ray.get(self._board.begin_work.remote(self._stage, self._whose + key)))

    def _end(self, key: str) -> None:
        if self._board is not None:
            self._board.end_work.remote(self._stage, self._whose + key)

    def _last_error(self) -> str:
        if self._board is None:
            return ""
        import ray

        _, errors = ray.get(self._board.state.remote())
        return f": {errors[self._stage]}" if self._stage in errors else " without a word (killed, or out of memory)"
