"""Live progress of every stage: done / total, tokens/s, ETA, printed by the driver, fed by workers on any node.

Workers report to one small actor (counts only, at most once a second each); the driver's thread prints what changed. Lines go
to standard output, so `ray job logs` shows them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rc_ray.config import BudgetConfig
from rc_ray.generation.load import Load
from rc_ray.pipeline.attempts import AttemptBook
from rc_ray.pipeline.budget import exhausted
from rc_ray.rewards.figures import Scoring, scoring_line

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
    failed: int = 0
    paired: int = 0
    started_s: float = 0.0
    ready_s: float = 0.0
    updated_s: float = 0.0
    load: Load = field(default_factory=Load)
    words: str = ""
    """What else there is to say of it now."""

    def line(self) -> str:
        """`sample  32/96 prompts  33 %  105 tok/s  ETA 1m 20s`."""
        share = 100 * self.done / self.total if self.total else 100
        parts = [f"{self.name:<9} {self.done}/{self.total} {self.unit}", f"{share:3.0f} %"]
        elapsed = max(self.updated_s - self.ready_s, 1e-9)
        fresh = self.done - self.resumed
        if self.tokens:
            parts.append(f"{self.tokens / elapsed:.0f} tok/s")
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self.done >= self.total:
            parts.append(f"done in {duration(self.updated_s - self.started_s)}" if fresh else "nothing left to do")
        elif fresh > 0:
            parts.append(f"ETA {duration((self.total - self.done) * elapsed / fresh)}")
        else:
            parts.append("working" if self.ready_s > self.started_s else "starting")
        if self.words:
            parts.append(self.words)
        return "  ".join(parts)


@dataclass
class ScorerProgress:
    """One objective's actors in a stage. An actor that Ray starts again keeps its name, so the time until then counts as idle."""

    counts: Counter[str] = field(default_factory=Counter)
    busy_s: float = 0.0
    ready_s: dict[str, float] = field(default_factory=dict)


def duration(seconds: float) -> str:
    """`1m 20s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


class ProgressBoard(AttemptBook):
    """The counts of all stages, and the book of attempts. Runs as a Ray actor; pure Python, so it is tested without Ray."""

    def __init__(self) -> None:
        super().__init__()
        self._stages: dict[str, StageProgress] = {}
        self._errors: dict[str, str] = {}
        self._bound: tuple[BudgetConfig, str, str, int, int] | None = None
        self._max_loaded: int | None = None
        self._loaded: set[int] = set()
        self._finished = ""
        self._max_unscored: int | None = None
        self._unscored: set[int] = set()
        self._max_scoring: int | None = None
        self._scoring: set[int] = set()
        self._scorers: dict[str, dict[str, ScorerProgress]] = {}
        self._scored_s: dict[str, float] = {}

    def begin(self, name: str, unit: str, total: int, resumed: int = 0) -> None:
        """Opens a stage of which `resumed` units were done before."""
        now = time.monotonic()
        self._stages[name] = StageProgress(name, unit, total, resumed, resumed, started_s=now, ready_s=now, updated_s=now)

    def advance(self, name: str, done: int, tokens: int, failed: int = 0) -> None:
        """Adds finished units, those of them that failed, and tokens."""
        stage = self._stages.get(name)
        if stage is not None:
            # A retried chunk reports again; the total is the most that can be done.
            stage.done = min(stage.done + done, stage.total)
            stage.tokens += tokens
            stage.failed += failed
            stage.updated_s = time.monotonic()

    def say(self, name: str, words: str) -> None:
        """Sets what stands at the end of a stage's line."""
        stage = self._stages.get(name)
        if stage is not None:
            stage.words = words

    def add_load(self, name: str, load: Load) -> None:
        """Adds what a stage's engines did."""
        stage = self._stages.get(name)
        if stage is not None:
            stage.load += load

    def add_scoring(self, name: str, objective: str, actor: str, counts: dict[str, int], busy_s: float) -> None:
        """Adds what an actor's reward did; the actor's time counts from the first call on."""
        self._scored_s[name] = time.monotonic()
        scorer = self._scorers.setdefault(name, {}).setdefault(objective, ScorerProgress())
        scorer.ready_s.setdefault(actor, self._scored_s[name])
        scorer.counts.update(counts)
        scorer.busy_s += busy_s

    def scoring(self, name: str) -> dict[str, Scoring]:
        """What the actors of each objective have done in a stage."""
        end_s = self._scored_s.get(name, 0.0)
        return {
            objective: Scoring(dict(s.counts), s.busy_s, sum(end_s - ready_s for ready_s in s.ready_s.values()), len(s.ready_s))
            for objective, s in self._scorers.get(name, {}).items()
        }

    def ready(self, name: str) -> None:
        """A worker has loaded and waits for work; the first one starts the stage's clock."""
        stage = self._stages.get(name)
        if stage is not None and stage.ready_s == stage.started_s:
            stage.ready_s = time.monotonic()

    def committed(self, name: str, chunk: int, paired: int | None) -> None:
        """A stage has committed a chunk, in which so many prompts have a pair; None: not all rewards are there."""
        self._scoring.discard(chunk)
        if name == self._finished:
            self._loaded.discard(chunk)
        if paired is None:
            return
        self._unscored.discard(chunk)
        stage = self._stages.get(name)
        if stage is not None:
            stage.paired += paired

    def bound(self, budget: BudgetConfig | None, sample_stage: str, score_stage: str, paired: int, tokens: int) -> None:
        """Sets what ends the sampling of a stage, and how much of it was used before; None: nothing does."""
        self._bound = None if budget is None else (budget, sample_stage, score_stage, paired, tokens)

    def hold_loading(self, max_loaded: int, finished: str) -> None:
        """From now on, at most so many chunks may be between their loading and their commit by the stage `finished`: the memory they take does not
        grow with the prompts."""
        self._max_loaded, self._finished = max_loaded, finished
        self._loaded.clear()

    def may_load(self, chunk: int, is_sampled: bool) -> bool | None:
        """Whether a chunk may be loaded; None: not yet, ask again. False: it is to be sampled, and sampling has ended."""
        ended = self.sampling_ended() is not None
        if ended and not is_sampled:
            assert self._bound is not None
            self.advance(self._bound[1], 0, 0)  # that many of them pass takes time, and is no stall
            return False
        waits = self._max_loaded is not None and chunk not in self._loaded and len(self._loaded) >= self._max_loaded
        if waits and not ended:  # after the end, chunks pass without a commit
            return None
        self._loaded.add(chunk)
        return True

    def hold_sampling(self, max_unscored: int | None) -> None:
        """From now on, at most so many chunks may be sampled ahead of their rewards while `target_pairs` counts; None: any number."""
        self._max_unscored = max_unscored
        self._unscored.clear()

    def may_sample(self, chunk: int) -> bool | None:
        """Whether a chunk may be sampled; None: not yet, ask again."""
        if self.sampling_ended() is not None:
            return False
        if self._bound is None or self._bound[0].target_pairs is None or self._max_unscored is None:
            return True
        if chunk not in self._unscored and len(self._unscored) >= self._max_unscored:
            return None
        self._unscored.add(chunk)
        return True

    def hold_scoring(self, max_scoring: int) -> None:
        """From now on, at most so many chunks may have rewards that are not committed, which is what a kill costs."""
        self._max_scoring = max_scoring
        self._scoring.clear()

    def may_score(self, chunk: int) -> bool | None:
        """Whether the first reward model may begin a chunk; None: not yet, ask again."""
        if self._max_scoring is not None and chunk not in self._scoring and len(self._scoring) >= self._max_scoring:
            return None
        self._scoring.add(chunk)
        return True

    def sampling_ended(self) -> str | None:
        """Why no further block is to be sampled, or None."""
        if self._bound is None:
            return None
        budget, sample_stage, score_stage, paired, tokens = self._bound
        sampled, scored = self._stages.get(sample_stage), self._stages.get(score_stage)
        return exhausted(budget, paired + (scored.paired if scored else 0), tokens + (sampled.tokens if sampled else 0))

    def error(self, name: str, text: str) -> None:
        """Keeps the last error of a stage's workers."""
        self._errors[name] = text

    def state(self) -> tuple[dict[str, StageProgress], dict[str, str]]:
        """The counts of every stage, which grow as long as anything moves, and the last error per stage."""
        return dict(self._stages), dict(self._errors)

    def lines(self) -> dict[str, str]:
        """The current line of every stage, and of every objective that has been scored in it."""
        shown = {}
        for name, stage in self._stages.items():
            shown[name] = stage.line()
            for objective, scoring in self.scoring(name).items():
                if scoring.busy_s:
                    shown[f"{name} {objective}"] = f"{name:<9} {scoring_line(objective, scoring.summary())}"
        return shown


def ask_board(method: Any, chunk: int, *more: Any) -> bool:
    """The board's answer about a chunk; waits while it has none, and asks less often the longer it has waited: engines on CPUs lose their cores to it."""
    import ray

    pause_s = 0.05
    while (answer := ray.get(method.remote(chunk, *more))) is None:
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 2.0)
    return bool(answer)


class Reporter:
    """A worker's end of the board; adds up and sends at most once a second. Without a board it does nothing."""

    def __init__(self, board: Any | None, stage: str) -> None:
        self._board, self._stage = board, stage
        self._lock = threading.Lock()
        self._done = self._tokens = self._failed = 0
        self._sent_s = 0.0

    def ready(self) -> None:
        """Says that this worker can start."""
        if self._board is not None:
            self._board.ready.remote(self._stage)

    def add(self, done: int = 0, tokens: int = 0, failed: int = 0) -> None:
        """Counts work."""
        with self._lock:
            self._done += done
            self._tokens += tokens
            self._failed += failed
            if time.monotonic() - self._sent_s >= FLUSH_INTERVAL_S:
                self._send()

    def moved(self) -> None:
        """Says that work goes on, though nothing has finished."""
        if self._board is not None:
            self._board.advance.remote(self._stage, 0, 0)

    def add_load(self, load: Load) -> None:
        """Sends what the engine did."""
        if self._board is not None and load.engine_s:
            self._board.add_load.remote(self._stage, load)

    def scored(self, objective: str, counts: dict[str, int], busy_s: float) -> None:
        """Sends what this actor's reward has done since the last call; the first one, with nothing, says that it is ready."""
        if self._board is not None:
            import ray

            actor = ray.get_runtime_context().get_actor_id()
            self._board.add_scoring.remote(self._stage, objective, actor, counts, busy_s)

    def may_sample(self, chunk: int) -> bool:
        """Whether the budget has room for a chunk; waits while that depends on chunks whose rewards are still to come."""
        return self._board is None or ask_board(self._board.may_sample, chunk)

    def may_score(self, chunk: int) -> None:
        """Waits until few enough chunks are between their first reward and their commit."""
        if self._board is not None:
            ask_board(self._board.may_score, chunk)

    def error(self, text: str, leaving: bool = False) -> None:
        """Sends an error at once; waits until it is there when this process is about to end."""
        if self._board is not None:
            sent = self._board.error.remote(self._stage, text)
            if leaving:
                import ray

                ray.wait([sent], timeout=5)

    def flush(self) -> None:
        """Sends what has been counted."""
        with self._lock:
            self._send()

    def _send(self) -> None:
        if self._board is not None and (self._done or self._tokens):
            self._board.advance.remote(self._stage, self._done, self._tokens, self._failed)
            self._done = self._tokens = self._failed = 0
            self._sent_s = time.monotonic()


def start_board() -> Any:
    """The board's actor on the connected cluster; it lives as long as a handle of it.

    On this process's node: anywhere else, the end of another node would be the end of the run.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(ProgressBoard).remote()  # type: ignore[attr-defined]


@contextlib.contextmanager
def live_progress(interval_s: float, emit: Callable[[str], None]) -> Iterator[Any]:
    """Starts the board on the connected cluster and a thread that prints it; yields the board's actor handle."""
    import ray

    board = start_board()
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
