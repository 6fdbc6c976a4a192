"""Drivers as processes of their own: started, watched, killed at random moments, and compared by what they leave behind.

`RC_RAY_FAULT_MOMENTS` sets how many random moments a test tries (default 3), `RC_RAY_FAULT_SEED` repeats those of a failed one.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from tests.conftest import ROOT

NUM_MOMENTS = int(os.environ.get("RC_RAY_FAULT_MOMENTS", "3"))
# What takes long is tried once, unless more is asked for.
NUM_LONG = NUM_MOMENTS if "RC_RAY_FAULT_MOMENTS" in os.environ else 1
NUM_PROMPTS, CHUNK_SIZE = 72, 3
NUM_CHUNKS = NUM_PROMPTS // CHUNK_SIZE
# Twenty times what anything here takes on a quiet machine.
TIMEOUT_S = 400.0
TITLE = re.compile("ray::|VLLM::")


@dataclass(frozen=True)
class Moment:
    """So many commits, and then a little later."""

    commits: int
    delay_s: float


def moments(first: int, last: int, number: int = NUM_MOMENTS) -> list[Moment]:
    """Random moments, one in each of `number` equal parts of the stretch from the `first` to before the `last` commit, in order.

    The seed goes to standard output, which pytest shows for a failed test.
    """
    seed = int(os.environ.get("RC_RAY_FAULT_SEED", random.SystemRandom().randrange(2**32)))
    draw = random.Random(seed)
    part = (last - first) / number
    drawn = [Moment(int(first + part * (i + draw.random())), draw.uniform(0.0, 0.3)) for i in range(number)]
    print(f"RC_RAY_FAULT_SEED={seed} RC_RAY_FAULT_MOMENTS={NUM_MOMENTS} repeats {drawn}")
    return drawn


class Driver:
    """`rc-ray run` on a configuration.

    Args:
        config: the configuration; the run directory is its `output`.
        scratch: folder for the configuration file and what the driver prints.
        prefix: command to run it under.
        environment: added to this process's.
        seen_at: where this process finds the run directory, if not at its own path.
    """

    def __init__(
        self, config: dict[str, Any], scratch: Path, prefix: Iterable[str] = (), environment: dict[str, str] | None = None,
        seen_at: Path | None = None,
    ) -> None:  # fmt: skip
        self.folder = seen_at or Path(config["output"])
        path = scratch / f"{self.folder.name}.yaml"
        path.write_text(yaml.safe_dump(config))
        self._log = scratch / f"{self.folder.name}-{len(list(scratch.glob('*.log')))}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "rc_ray", "run", str(path)],
                stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, **(environment or {})},
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.process.pid

    def printed(self) -> str:
        return self._log.read_text()

    def progress(self, stage: str) -> list[int]:
        """Prompts that a stage has finished, by the progress lines printed so far."""
        return [int(number) for number in re.findall(rf"^{stage} +(\d+)/", self.printed(), re.MULTILINE)]

    def ended(self) -> str:
        """Waits for the end; returns what was printed."""
        self.process.wait(timeout=TIMEOUT_S)
        return self.printed()

    def finished(self) -> str:
        """Waits for an end without error; returns what was printed."""
        printed = self.ended()
        assert self.process.returncode == 0, printed[-5000:]
        return printed

    def kill(self) -> None:
        """SIGKILL; returns when the processes that it started have noticed and ended, too. Nothing happens after its end."""
        started = {pid: title(pid) for pid in descendants(self.pid)}
        self.process.kill()
        self.process.wait()
        # Those that do work; Ray's own agents would stay for minutes.
        workers = [pid for pid, name in started.items() if TITLE.match(name) and "Agent" not in name]
        wait_until(lambda: not any(is_alive(pid) for pid in workers), "the end of a killed driver's workers")
        for pid in filter(is_alive, started):
            os.kill(pid, signal.SIGKILL)

    def wait_until(self, condition: Callable[[], Any], what: str) -> Any:
        """Waits for something that happens while the driver runs."""

        def found() -> Any:
            assert self.process.poll() is None, f"the driver ended before this: {what}\n{self.printed()[-5000:]}"
            return condition()

        return wait_until(found, what)

    def wait_for_commits(self, number: int, *stages: str) -> None:
        self.wait_until(lambda: len(commits(self.folder, *stages)) >= number, f"{number} commits of {stages}")

    def reach(self, moment: Moment, *stages: str) -> None:
        """Waits for a moment, counted in commits of some stages."""
        self.wait_for_commits(moment.commits, *stages)
        time.sleep(moment.delay_s)

    def worker(self, name: str, root: int | None = None) -> int:
        """The process of an actor, or one that it started, by the title that Ray or vLLM gives it, once there is one.

        Args:
            root: the process that it descends from: of a node, say. None: the driver, which started its cluster.
        """

        def found() -> int | None:
            return next((pid for pid in descendants(root or self.pid) if TITLE.match(title(pid)) and name in title(pid)), None)

        return int(self.wait_until(found, f"a worker {name}"))


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Waits until a condition gives something true, and returns that."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"did not happen: {what}"
        time.sleep(0.03)
    return found


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that they started, and so on; none when it is gone."""
    try:
        children = [int(p) for task in Path(f"/proc/{pid}/task").glob("*/children") for p in task.read_text().split()]
    except OSError:
        return []
    return [*children, *(d for child in children for d in descendants(child))]


def title(pid: int) -> str:
    """Command line of a process; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def kill(pid: int) -> None:
    """SIGKILL; returns when the process is gone."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), f"the end of {pid}")


def commits(folder: Path, *stages: str) -> dict[tuple[str, str], int]:
    """When each commit record of some stages was written, by stage and chunk."""
    return {
        (stage, file.stem): file.stat().st_mtime_ns
        for stage in stages
        for file in (folder / "ledger" / stage).glob("chunk-*.json")
    }


@dataclass(frozen=True)
class Outcome:
    """What a run leaves. Rewards and log-probabilities depend on what else was in the batch, in their last digits."""

    groups: list[Any]
    pairs: list[Any]
    drops: list[Any]
    numbers: list[float]


def outcome(folder: Path) -> Outcome:
    """Reads and checks a finished run: every prompt is in candidates/ once, and in pairs/ or drops/ once."""
    groups = pq.read_table(folder / "candidates").sort_by("prompt_id").to_pylist()
    pairs = pq.read_table(folder / "pairs").sort_by("prompt_id").to_pylist()
    drops = pq.read_table(folder / "drops").sort_by("prompt_id").to_pylist()
    sampled = [group["prompt_id"] for group in groups]
    assert len(set(sampled)) == len(sampled), "a prompt is in candidates/ twice"
    assert sorted(row["prompt_id"] for row in pairs + drops) == sampled, "a prompt is lost, or in pairs/ and drops/ twice"
    numbers = [c.pop("logprob") for group in groups for c in group["candidates"] or []]
    for name in [n for n in (groups[0] if groups else {}) if n.startswith("reward.")]:
        numbers += [value for group in groups for value in group.pop(name)]
    return Outcome(groups, [(p["prompt_id"], p["chosen_index"], p["rejected_index"]) for p in pairs], drops, numbers)


def assert_same_outcome(found: Path, expected: Path) -> None:
    """The same seeds, tokens, texts, pairs and drops, group by group; nothing twice, nothing missing."""
    one, other = outcome(found), outcome(expected)
    assert one.groups == other.groups
    assert one.numbers == pytest.approx(other.numbers, abs=1e-3)
    assert (one.pairs, one.drops) == (other.pairs, other.drops)
    assert len(one.groups) == NUM_PROMPTS
