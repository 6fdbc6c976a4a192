"""Live progress of every stage: done / total, tokens/s, ETA, printed by the driver, fed by workers on any node.

Workers report to one small actor (counts only, at most once a second each); the driver's thread prints what changed. Lines go
to standard output, so `ray job logs` shows them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

FLUSH_INTERVAL_S = 1.0


@dataclass
class StageProgress:
    """One stage's counts. Rates count from `ready_s`, when a worker was first ready, so that loading a model does not spoil them."""

    name: str
    unit: str
    total: int
    done: int = 0
    resumed: int = 0
    tokens: int = 0
    started_s: float = 0.0
    ready_s: float = 0.0
    updated_s: float = 0.0

    def line(self) -> str:
        """`sample  32/96 prompts  33 %  105 tok/s  ETA 1m 20s`."""
        share = 100 * self.done / self.total if self.total else 100
        parts = [f"{self.name:<9} {self.done}/{self.total} {self.unit}", f"{share:3.0f} %"]
        elapsed = max(self.updated_s - self.ready_s, 1e-9)
        fresh = self.done - self.resumed
        if self.tokens:
            parts.append(f"{self.tokens / elapsed:.0f} tok/s")
        if self.done >= self.total:
            parts.append(f"done in {duration(self.updated_s - self.started_s)}" if fresh else "nothing left to do")
        elif fresh > 0:
            parts.append(f"ETA {duration((self.total - self.done) * elapsed / fresh)}")
        else:
            parts.append("working" if self.ready_s > self.started_s else "starting")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """`1m 20s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


class ProgressBoard:
    """The counts of all stages. Runs as a Ray actor; pure Python, so it is tested without Ray."""

    def __init__(self) -> None:
        self._stages: dict[str, StageProgress] = {}

    def begin(self, name: str, unit: str, total: int, resumed: int = 0) -> None:
        """Opens a stage of which `resumed` units were done before."""
        now = time.monotonic()
        self._stages[name] = StageProgress(name, unit, total, resumed, resumed, 0, now, now, now)

    def advance(self, name: str, done: int, tokens: int) -> None:
        """Adds finished units and tokens."""
        stage = self._stages.get(name)
        if stage is not None:
            # A retried chunk reports again; the total is the most that can be done.
            stage.done = min(stage.done + done, stage.total)
            stage.tokens += tokens
            stage.updated_s = time.monotonic()

    def ready(self, name: str) -> None:
        """A worker has loaded and waits for work; the first one starts the stage's clock."""
        stage = self._stages.get(name)
        if stage is not None and stage.ready_s == stage.started_s:
            stage.ready_s = time.monotonic()

    def lines(self) -> dict[str, str]:
        """The current line of every stage."""
        return {name: stage.line() for name, stage in self._stages.items()}


class Reporter:
    """A worker's end of the board; adds up and sends at most once a second. Without a board it does nothing."""

    def __init__(self, board: Any | None, stage: str) -> None:
        self._board, self._stage = board, stage
        self._lock = threading.Lock()
        self._done = self._tokens = 0
        self._sent_s = 0.0

    def ready(self) -> None:
        """Says that this worker can start."""
        if self._board is not None:
            self._board.ready.remote(self._stage)

    def add(self, done: int = 0, tokens: int = 0) -> None:
        """Counts work."""
        with self._lock:
            self._done += done
            self._tokens += tokens
            if time.monotonic() - self._sent_s >= FLUSH_INTERVAL_S:
                self._send()

    def flush(self) -> None:
        """Sends what has been counted."""
        with self._lock:
            self._send()

    def _send(self) -> None:
        if self._board is not None and (self._done or self._tokens):
            self._board.advance.remote(self._stage, self._done, self._tokens)
            self._done = self._tokens = 0
            self._sent_s = time.monotonic()


@contextlib.contextmanager
def live_progress(interval_s: float, emit: Callable[[str], None]) -> Iterator[Any]:
    """Starts the board on the connected cluster and a thread that prints it; yields the board's actor handle."""
    import ray

    board = ray.remote(num_cpus=0)(ProgressBoard).remote()  # type: ignore[attr-defined]
    stop = threading.Event()
    shown: dict[str, str] = {}

    def show() -> None:
        for name, line in ray.get(board.lines.remote()).items():
            if shown.get(name) != line:
                shown[name] = line
                emit(line)

    def loop() -> None:
        while not stop.wait(interval_s):
            try:
                show()
            except Exception as error:  # the cluster is going away; the run itself reports why
                emit(f"progress stopped: {type(error).__name__}")
                return

    thread = threading.Thread(target=loop, name="progress", daemon=True)
    thread.start()
    try:
        yield board
        stop.set()
        thread.join()
        show()
    finally:
        stop.set()
        ray.kill(board)
