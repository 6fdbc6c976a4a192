"""One driver per folder, with real processes as the other driver."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rc_ray.errors import ResumeError
from rc_ray.ledger import lock
from rc_ray.ledger.lock import DriverLock
from rc_ray.ledger.storage import LOCK_NAME, Folder

HOLD = """
import sys, time
from rc_ray.ledger.lock import DriverLock
from rc_ray.ledger.storage import Folder
with DriverLock(Folder(sys.argv[1]), renewal_s=0.2):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold() -> Iterator[Callable[[Folder], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(folder: Folder) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", HOLD, folder.uri], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("uri", ["{}", "file://{}"])
def test_a_second_driver_is_refused_with_the_name_of_the_first(
    uri: str, tmp_path: Path, hold: Callable[[Folder], subprocess.Popen[str]]
) -> None:
    folder = Folder(uri.format(tmp_path / "run"))
    first = hold(folder)
    with (
        pytest.raises(ResumeError, match=rf"in use by process {first.pid} on .* since .*; wait for it") as refused,
        DriverLock(folder),
    ):
        pass
    assert "-c" in str(refused.value)
    assert folder.read_json(LOCK_NAME)["pid"] == first.pid


def test_the_lock_of_a_killed_driver_is_taken_over_at_once(
    tmp_path: Path, hold: Callable[[Folder], subprocess.Popen[str]]
) -> None:
    folder = Folder(str(tmp_path / "run"))
    first = hold(folder)
    first.send_signal(signal.SIGKILL)
    first.wait()
    lines: list[str] = []
    started = time.monotonic()
    with DriverLock(folder, lines.append):
        assert folder.read_json(LOCK_NAME)["pid"] != first.pid
    assert time.monotonic() - started < lock.LOCAL_RENEWAL_S
    assert len(lines) == 1
    assert f"the driver {first.pid}" in lines[0]
    assert not folder.exists(LOCK_NAME)


def test_a_process_that_got_the_number_of_a_dead_driver_does_not_hold_its_lock(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with DriverLock(folder):
        held = folder.read_json(LOCK_NAME)
    folder.write_json(LOCK_NAME, {**held, "token": "another", "process_start": "1"})
    with DriverLock(folder, lambda _: None):
        assert folder.read_json(LOCK_NAME)["process_start"] == held["process_start"]


def test_a_driver_on_another_machine_counts_as_gone_when_it_stops_renewing(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with DriverLock(folder):
        other = {**folder.read_json(LOCK_NAME), "token": "another", "host": "elsewhere", "boot": "another"}
    folder.write_json(LOCK_NAME, other)
    stop = threading.Event()

    def renew() -> None:
        number = 0
        while not stop.wait(0.05):
            number += 1
            folder.write_json(LOCK_NAME, {**other, "renewals": number})

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        with pytest.raises(ResumeError, match="on elsewhere"), DriverLock(folder, renewal_s=0.2):
            pass
    finally:
        stop.set()
        renewing.join()
    lines: list[str] = []
    with DriverLock(folder, lines.append, renewal_s=0.2):
        assert "on elsewhere is gone" in lines[0]


def test_losing_the_lock_is_said_and_the_new_holder_keeps_it(tmp_path: Path) -> None:
    folder, lines = Folder(str(tmp_path)), []
    with DriverLock(folder, lines.append, renewal_s=0.05):
        held = folder.read_json(LOCK_NAME)
        assert _eventually(lambda: folder.read_json(LOCK_NAME)["renewals"] > held["renewals"])
        folder.write_json(LOCK_NAME, {**held, "token": "another", "pid": 4711})
        assert _eventually(lambda: bool(lines))
    assert "taken by process 4711" in lines[0]
    assert folder.read_json(LOCK_NAME)["token"] == "another"


def test_a_damaged_lock_does_not_lock_for_ever(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("{")
    lines: list[str] = []
    with DriverLock(Folder(str(tmp_path)), lines.append, renewal_s=0.05):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"]
    assert "is gone" in lines[0]


def _eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False
