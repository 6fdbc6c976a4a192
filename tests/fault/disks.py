"""A small disk that can be filled, and made read-only, for real: a tmpfs in a mount namespace of its own.

Root mounts it as it is, others in a user namespace besides, which needs no privilege (`kernel.unprivileged_userns_clone`, and
AppArmor on some systems, can forbid it). It is seen by processes started with `prefix`, and from outside under `seen_at`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fault.drivers import wait_until


@dataclass(frozen=True)
class Disk:
    """A mounted disk.

    Attributes:
        folder: where it is mounted, for processes started with `prefix`.
        seen_at: the same folder for all others.
        prefix: command to run a process under that sees it.
    """

    folder: Path
    seen_at: Path
    prefix: list[str]

    def fill(self) -> None:
        """Writes a file until nothing more goes on the disk."""
        with open(self.seen_at / "fill", "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        """Removes what `fill` wrote."""
        (self.seen_at / "fill").unlink()

    def remount(self, mode: str) -> None:
        """Makes it read-only (`ro`) or writable (`rw`); the kernel refuses `ro` while a file is open for writing, so waits for that."""
        command = [*self.prefix, "mount", "-o", f"remount,{mode}", str(self.folder)]
        wait_until(lambda: subprocess.run(command, capture_output=True, check=False).returncode == 0, f"remount {mode}")


@contextlib.contextmanager
def small_disk(folder: Path, size_mib: int) -> Iterator[Disk]:
    """Mounts an empty disk on a folder; it is gone at the end.

    Raises:
        RuntimeError: the kernel does not allow it to this user; the message says what it answered.
    """
    as_user = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    mount = f"mount -t tmpfs -o size={size_mib}m tmpfs '{folder}' && echo mounted && exec cat"
    holder = subprocess.Popen(
        ["unshare", "--mount", *as_user, "sh", "-c", mount],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stderr is not None
    try:
        if holder.stdout.readline() != "mounted\n":
            raise RuntimeError(f"cannot mount a tmpfs, neither as root nor in a user namespace: {holder.stderr.read()}")
        enter = ["nsenter", f"--target={holder.pid}", "--mount", *(["--user", "--preserve-credentials"] if as_user else [])]
        # Entering the namespace goes to its root.
        back = ["sh", "-c", 'cd "$0" && exec "$@"', os.getcwd()]
        yield Disk(folder, Path(f"/proc/{holder.pid}/root{folder}"), [*enter, *back])
    finally:
        holder.stdin.close()
        holder.wait(timeout=60)
