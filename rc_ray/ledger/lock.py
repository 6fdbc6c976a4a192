"""One driver per folder: a lock file that its holder renews, on any filesystem.

    with DriverLock(folder, emit):
        ...

A second driver is refused with the name of the first. A holder that is gone is recognised: on the same machine by its process, on
another one by a lock that is not renewed for a while. Should two drivers take a stale lock over in the same instant on a filesystem
without atomic creation, the one that lost it says so at its next renewal; what both write is equal, because ids and seeds come from content.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rc_ray.errors import DataError, ResumeError
from rc_ray.ledger.storage import LOCK_NAME, Folder

LOCAL_RENEWAL_S, REMOTE_RENEWAL_S = 5.0, 20.0
# Renewals that a holder on another machine may miss before it counts as gone.
MISSED = 3


class DriverLock:
    """Held from `__enter__` to `__exit__`; see the module.

    Args:
        folder: what is locked; the lock is the file `driver.json` in it.
        emit: gets a line when a stale lock is taken over or the own one is lost.
        renewal_s: seconds between renewals; None: 5 on local paths, 20 elsewhere.
    """

    def __init__(self, folder: Folder, emit: Callable[[str], None] = print, renewal_s: float | None = None) -> None:
        self._folder, self._emit = folder, emit
        self._renewal_s = renewal_s or (LOCAL_RENEWAL_S if folder.is_local else REMOTE_RENEWAL_S)
        self._mine: dict[str, Any] = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "command": " ".join(sys.argv)[:300],
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "renewals": 0,
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="driver-lock", daemon=True)

    def __enter__(self) -> DriverLock:
        """Takes the lock.

        Raises:
            ResumeError: another driver works in this folder; its host, process and command are named.
        """
        self._made_folder = not self._folder.exists()
        while not self._folder.create(LOCK_NAME, json.dumps(self._mine).encode()):
            other = self._read()
            if other is None:
                continue
            if self._is_alive(other):
                raise ResumeError(
                    f"{self._folder.uri!r} is in use by process {other['pid']} on {other['host']} since {other['since']} "
                    f"({other['command']}); wait for it, stop it, or give another output"
                )
            self._emit(
                f"rc_ray    the driver {other['pid']} on {other['host']} is gone (since {other['since']}); taking over from it"
            )
            if self._read() == other:
                self._folder.remove(LOCK_NAME)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        # Where the lock cannot be removed (a full or read-only disk), that is not the error to show; it counts as stale later.
        with contextlib.suppress(OSError, DataError):
            found = self._read()
            if found is not None and found["token"] == self._mine["token"]:
                self._folder.remove(LOCK_NAME)
            if self._made_folder and self._folder.is_local:  # and nothing was written: bad input, say
                os.rmdir(self._folder.uri)

    def _read(self) -> dict[str, Any] | None:
        try:
            return dict(self._folder.read_json(LOCK_NAME))
        except FileNotFoundError:
            return None
        except ValueError:  # half written on a filesystem without atomic creation, or damaged
            return {
                **self._mine,
                "token": "",
                "host": "an unknown host",
                "boot": "",
                "pid": 0,
                "command": "",
                "since": "",
                "renewals": -1,
            }

    def _is_alive(self, other: dict[str, Any]) -> bool:
        if other["boot"] and other["boot"] == self._mine["boot"]:
            return bool(other["process_start"]) and _process_start(other["pid"]) == other["process_start"]
        deadline = time.monotonic() + MISSED * self._renewal_s
        while time.monotonic() < deadline:
            time.sleep(self._renewal_s / 10)
            now = self._read()
            if now is None:
                return False
            if now != other:
                return True
        return False

    def _renew(self) -> None:
        while not self._stop.wait(self._renewal_s):
            try:
                found = self._read()
                if found is None or found["token"] != self._mine["token"]:
                    by = f"process {found['pid']} on {found['host']}" if found else "something that removed it"
                    self._emit(
                        f"rc_ray    WARNING: the lock on {self._folder.uri!r} was taken by {by}; two drivers repeat each other's work"
                    )
                    return
                self._mine["renewals"] += 1
                self._folder.write_json(LOCK_NAME, self._mine)
            except (OSError, DataError):  # a full disk or a lost connection is the run's to report; the lock is tried again
                continue


def _boot_id() -> str:
    """Different on every machine and container start; empty where the system does not tell, which makes renewals decide."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + namespace
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """When a process of this machine was started, in clock ticks; empty when there is none. A reused pid has another one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]
