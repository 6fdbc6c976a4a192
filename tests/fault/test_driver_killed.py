"""SIGKILL of the driver at random moments of sampling and scoring: the run resumes to the output of an undisturbed one."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rc_ray.pipeline.graph import BLOCKS_PER_ENGINE
from tests.fault.conftest import StartDriver
from tests.fault.drivers import CHUNK_SIZE, NUM_CHUNKS, NUM_LONG, NUM_MOMENTS, assert_same_outcome, commits, moments, outcome

# Chunks that are sampled and whose commit has begun.
AWAITING_COMMIT = BLOCKS_PER_ENGINE


@pytest.mark.timeout(300 * (NUM_MOMENTS + 2))
def test_a_run_killed_at_random_moments_resumes_and_repeats_nothing(
    config: dict[str, Any], driver: StartDriver, whole: Path
) -> None:
    kept: dict[tuple[str, str], int] = {}
    for moment in moments(1, 2 * NUM_CHUNKS - 6):
        victim = driver(config)
        # Commits of the one before may be enough for the moment: it is to be one of this driver's work.
        victim.wait_until(partial(victim.progress, "score"), "a line of progress")
        victim.reach(moment, "sample", "score")
        victim.kill()
        assert victim.process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
        found = commits(victim.folder, "sample", "score")
        assert kept.items() <= found.items(), "a committed chunk was written again"
        kept = found
        # The promise of the README.
        sampled = victim.progress("sample") or [0]  # none where all are
        lost = sampled[-1] - CHUNK_SIZE * len(commits(victim.folder, "sample"))
        assert lost <= CHUNK_SIZE * (BLOCKS_PER_ENGINE + AWAITING_COMMIT)
        print(
            f"killed at {len(kept)} commits ({len(commits(victim.folder, 'sample'))} of sampling); {max(lost, 0)} groups lost"
        )
    resumed = driver(config)
    printed = resumed.finished()
    assert f"the driver {victim.pid}" in printed, "the stale lock was not named"
    found = commits(resumed.folder, "sample", "score")
    assert kept.items() <= found.items(), "a committed chunk was written again"
    assert len(found) == 2 * NUM_CHUNKS
    assert 0 < len(kept) < 2 * NUM_CHUNKS
    assert_same_outcome(resumed.folder, whole)


@pytest.mark.skipif("RC_RAY_FAULT_MOMENTS" not in os.environ, reason="two minutes more than CI has; set RC_RAY_FAULT_MOMENTS")
@pytest.mark.timeout(300 * (NUM_LONG + 2))
def test_prompts_that_were_to_get_more_answers_get_them_after_a_kill(
    config: dict[str, Any], driver: StartDriver, tmp_path: Path
) -> None:
    config["generation"] |= {"num_candidates": 2, "max_candidates": 4, "max_tokens": 24}
    undisturbed = driver({**config, "output": str(tmp_path / "undisturbed")})
    undisturbed.finished()
    assert len({len(group["candidates"]) for group in outcome(undisturbed.folder).groups}) > 1
    for moment in moments(1, NUM_CHUNKS - 2, NUM_LONG):
        victim = driver(config)
        victim.reach(moment, "sample")
        victim.kill()
        assert 0 < len(commits(victim.folder, "sample")) < NUM_CHUNKS
    resumed = driver(config)
    resumed.finished()
    assert_same_outcome(resumed.folder, undisturbed.folder)


def test_a_second_driver_is_refused_and_names_the_first(config: dict[str, Any], driver: StartDriver) -> None:
    first = driver(config)
    first.wait_until((first.folder / "driver.json").exists, "a lock")
    second = driver(config)
    printed = second.ended()
    assert second.process.returncode == 6
    assert f"in use by process {first.pid}" in printed
