"""The output disk fills up, or becomes read-only, half way: the run says so and where, and resumes to the output of an undisturbed one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.fault.conftest import StartDriver
from tests.fault.disks import Disk, small_disk
from tests.fault.drivers import CHUNK_SIZE, NUM_CHUNKS, NUM_LONG, assert_same_outcome, commits, moments


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    with small_disk(folder, size_mib=32) as mounted:
        yield mounted


def assert_what_counts_is_whole(folder: Path) -> None:
    """Every committed chunk can be read, and no other file passes for one."""
    for stage, chunk in commits(folder, "sample", "score"):
        assert json.loads((folder / "ledger" / stage / f"{chunk}.json").read_text())["groups"] == CHUNK_SIZE
        assert pq.read_table(folder / "candidates" / f"{chunk}.parquet").num_rows == CHUNK_SIZE
    for file in folder.rglob("*"):
        if file.suffix == ".parquet":
            pq.read_table(file)
        elif file.suffix == ".json":
            json.loads(file.read_text())


@pytest.mark.parametrize("attempt", range(NUM_LONG))
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_takes_no_more_half_way_ends_the_run_which_resumes(
    fault: str, attempt: int, config: dict[str, Any], driver: StartDriver, whole: Path, disk: Disk
) -> None:
    config["output"] = str(disk.folder / "run")
    place: dict[str, Any] = {"prefix": disk.prefix, "seen_at": disk.seen_at / "run"}
    running = driver(config, **place)
    (moment,) = moments(1, 2 * NUM_CHUNKS - 6, number=1)
    running.reach(moment, "sample", "score")
    if fault == "full":
        disk.fill()
        reason = "No space left on device"
    else:
        disk.remount("ro")
        reason = "Read-only file system"

    printed = running.ended()
    assert running.process.returncode == 5, printed[-3000:]
    told = printed[printed.index("rc-ray: ClusterError") :]
    assert reason in told
    assert config["output"] in told, "the error does not say where"
    assert "run the same command again to resume" in told
    assert "Traceback" not in printed
    kept = commits(running.folder, "sample", "score")
    assert moment.commits <= len(kept) < 2 * NUM_CHUNKS
    assert_what_counts_is_whole(running.folder)

    # While nothing has changed, nothing is harmed and the same is said.
    if fault == "full":
        disk.fill()  # what the lock of the first took
    again = driver(config, **place)
    printed = again.ended()
    assert again.process.returncode == 5, printed[-3000:]
    assert reason in printed
    assert "Traceback" not in printed

    if fault == "full":
        disk.free()
    else:
        disk.remount("rw")
    resumed = driver(config, **place)
    resumed.finished()
    assert kept.items() <= commits(resumed.folder, "sample", "score").items(), "a committed chunk was written again"
    assert_same_outcome(resumed.folder, whole)
    assert not [f for f in resumed.folder.rglob("*") if f.name.endswith(".tmp")], "half a file was left behind"
