"""Ends an execution in which nothing moves any more, and says where it stopped. A run never waits for ever.

Ray Data calls `on_execution_step` of its callbacks from its own scheduling loop, several times a second, also when no task ends;
an error raised there ends the execution and reaches whoever reads the Dataset. What counts as progress is a finished group
(or pair, …) on the progress board, so a slow block whose groups do finish is no stall, and one that is stuck is.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from rc_ray.config import ClusterConfig
from rc_ray.errors import ClusterError

if TYPE_CHECKING:
    from ray.data import Dataset

    from rc_ray.pipeline.progress import StageProgress

CHECK_INTERVAL_S = 5.0
# Fewer finished groups say nothing about a run, and what came before the latest of these nothing about now.
FEWEST_GROUPS, RECENT_GROUPS = 32, 1024


class TooManyFailedError(ClusterError):
    """More groups failed than the configuration allows."""


def guard(dataset: Dataset, board: Any, config: ClusterConfig) -> Dataset:
    """Puts the watchdog on a Dataset's execution; iterating it raises `ClusterError` when nothing finishes or too much fails."""
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Watchdog(ExecutionCallback):  # Ray makes the instance itself, without arguments
        def __init__(self) -> None:
            self._state = _State(board, config)

        def on_execution_step(self, executor: Any) -> None:
            self._state.check(executor)

    context = dataset.context
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, Watchdog]
    context.execution_no_progress_timeout_s = -1  # Ray's own guard knows blocks only, and neither stages nor errors
    return dataset


class _State:
    def __init__(self, board: Any, config: ClusterConfig) -> None:
        self._board, self._timeout_s = board, config.stall_timeout_s
        self._max_failed_fraction = config.max_failed_fraction
        self._recent = Recent()
        self._interval_s = min(CHECK_INTERVAL_S, self._timeout_s / 4)
        self._moved_s = self._checked_s = time.monotonic()
        self._seen: Any = None

    def check(self, executor: Any) -> None:
        now = time.monotonic()
        if now - self._checked_s < self._interval_s:
            return
        self._checked_s = now
        import ray

        try:
            stages, errors = ray.get(self._board.state.remote(), timeout=self._interval_s)
        except ray.exceptions.GetTimeoutError:
            stages, errors = self._seen, {}
        if stages != self._seen:
            self._seen, self._moved_s = stages, now
            check_failed(self._recent.counts(stages), errors, self._max_failed_fraction)
        elif now - self._moved_s >= self._timeout_s:
            raise ClusterError(stall_message(now - self._moved_s, operators(executor), errors, ray.available_resources()))


class Recent:
    """Counts of the groups that each stage finished lately."""

    def __init__(self) -> None:
        self._earlier: dict[str, deque[tuple[int, int]]] = {}

    def counts(self, stages: dict[str, StageProgress]) -> dict[str, tuple[int, int]]:
        """Per stage the groups finished, and those of them that failed, since the latest call that is 1,024 groups ago, or since the session began."""
        found = {}
        for name, (done, failed) in session_counts(stages).items():
            earlier = self._earlier.setdefault(name, deque([(0, 0)]))
            while len(earlier) > 1 and done - earlier[1][0] >= RECENT_GROUPS:
                earlier.popleft()
            found[name] = done - earlier[0][0], failed - earlier[0][1]
            earlier.append((done, failed))
        return found


def session_counts(stages: dict[str, StageProgress]) -> dict[str, tuple[int, int]]:
    """Per stage the groups finished in this session, and those of them that failed."""
    return {name: (stage.done - stage.resumed, stage.failed) for name, stage in stages.items()}


def check_failed(counts: dict[str, tuple[int, int]], errors: dict[str, str], max_failed_fraction: float) -> None:
    """Ends a run that is plainly broken.

    Args:
        counts: per stage the groups finished, and those of them that failed.
        errors: per stage the last one.
        max_failed_fraction: the allowed share.

    Raises:
        TooManyFailedError: of at least 32 groups that a stage finished more than the allowed share failed.
    """
    for name, (done, failed) in counts.items():
        if done >= FEWEST_GROUPS and failed > max_failed_fraction * done:
            raise TooManyFailedError(
                f"stage {name}: {failed} of the last {done} groups failed, more than cluster.max_failed_fraction = "
                f"{max_failed_fraction:g} allows. Last error: {errors.get(name, 'none')}.\n"
                "Mend the cause and run the same command again; what failed is tried again."
            )


def operators(executor: Any) -> list[dict[str, Any]]:
    """Name, waiting blocks, running tasks and actors of each operator, in the order of the data."""
    found = []
    for operator, state in executor._topology.items():
        actors = operator.get_actor_info()
        found.append(
            {
                "name": operator.name.removeprefix("MapBatches(").removesuffix(")"),
                "waiting": state.total_enqueued_input_blocks(),
                "running": operator.num_active_tasks(),
                "actors": {"running": actors.running, "restarting": actors.restarting, "pending": actors.pending},
            }
        )
    return found


def stall_message(idle_s: float, found: list[dict[str, Any]], errors: dict[str, str], free: dict[str, float]) -> str:
    """Names the stage that stopped: the last one that holds work, since what follows it waits for it."""
    holding = [o for o in found if o["waiting"] or o["running"] or o["actors"]["pending"] or o["actors"]["restarting"]]
    if holding:
        last = holding[-1]
        actors = ", ".join(f"{n} {state}" for state, n in last["actors"].items() if n)
        where = f"{last['name']} stopped: {last['waiting']} blocks wait for it, {last['running']} are in work"
        where += f"; actors: {actors}" if actors else ""
        if last["actors"]["pending"]:
            where += (
                f" (pending ones find no room; free in the cluster: {free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs)"
            )
    else:
        where = "no operator holds work"
    said = "; ".join(f"{stage}: {error}" for stage, error in errors.items()) or "none"
    return (
        f"nothing finished for {idle_s:.0f} s (cluster.stall_timeout_s). {where}. Last errors: {said}.\n"
        "What was committed is kept; mend the cause and run the same command again to resume."
    )
