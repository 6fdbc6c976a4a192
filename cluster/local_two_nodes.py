"""A two-node Ray cluster on one machine: two raylets with resources, object stores and worker processes of their own.

    python cluster/local_two_nodes.py     # prints what to export in another terminal; Ctrl-C ends both nodes
    rc-ray run embedded:demo              # in that other terminal: runs on the two nodes

For trying out placement and failures; tests use `two_nodes` as a context manager. Only the processes that were started here are
ended: never `ray stop`, which ends every Ray on the machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 90


@dataclass(frozen=True)
class LocalCluster:
    """A running cluster: its address, the head's dashboard (which takes jobs), what clients need in their environment (both nodes
    ask for a token made for this cluster), and the processes of its two nodes."""

    address: str
    dashboard: str
    environment: dict[str, str]
    head: subprocess.Popen[bytes]
    worker: subprocess.Popen[bytes]


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _node(arguments: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *arguments]
    # A session of its own, so that the node's processes can be ended together.
    return subprocess.Popen(
        command, stdout=log.open("wb"), stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **environment}
    )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a node and everything that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)


@contextlib.contextmanager
def two_nodes(num_cpus: int = 4, object_store_gib: float = 0.5) -> Iterator[LocalCluster]:
    """Starts head and worker; each has `num_cpus` logical CPUs.

    Raises:
        RuntimeError: a node did not come up; the message holds the end of its log.
    """
    # Both in /tmp: socket paths below it must stay short.
    folder = Path(tempfile.mkdtemp(prefix="rcray", dir="/tmp"))
    port, dashboard = free_port(), free_port()
    address = f"127.0.0.1:{port}"
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    memory = str(int(object_store_gib * 2**30))
    common = [f"--num-cpus={num_cpus}", f"--object-store-memory={memory}"]
    head = _node(
        [
            "--head",
            f"--port={port}",
            "--node-ip-address=127.0.0.1",
            f"--temp-dir={folder}/ray",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={free_port()}",
            f"--ray-client-server-port={free_port()}",
            "--min-worker-port=20000",
            "--max-worker-port=20999",
            *common,
        ],
        folder / "head.log",
        environment,
    )
    worker = None
    try:
        _wait(head, port, folder / "head.log")
        worker = _node(
            [
                f"--address={address}",
                "--node-ip-address=127.0.0.1",
                "--min-worker-port=21000",
                "--max-worker-port=21999",
                f"--dashboard-agent-listen-port={free_port()}",
                *common,
            ],
            folder / "worker.log",
            environment,
        )
        _wait(head, dashboard, folder / "head.log")
        yield LocalCluster(address, f"http://127.0.0.1:{dashboard}", environment, head, worker)
    finally:
        for process in (worker, head):
            if process is not None:
                stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.5)
    raise RuntimeError(f"the node did not come up on port {port}; its log ends with:\n{log.read_text()[-2000:]}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with two_nodes() as cluster:
        for name, value in {"RAY_ADDRESS": cluster.address, **cluster.environment}.items():
            print(f"export {name}={value}")
        print(f"# dashboard, and RAY_ADDRESS for `ray job submit`: {cluster.dashboard}; Ctrl-C ends the cluster", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
