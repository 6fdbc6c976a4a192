"""Connects to Ray: the running cluster when there is one, else a local one that ends with the run.

Invariant: a cluster that was there before is left as it was found; one that was started here is shut down.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rc_ray.config import ClusterConfig
from rc_ray.errors import ClusterError
from rc_ray.generation.hardware import num_cores

MIN_LOCAL_CPUS = 8


@dataclass(frozen=True)
class ClusterInfo:
    """What the cluster offers."""

    cpus: float
    gpus: float
    num_nodes: int
    gpus_per_node: tuple[float, ...]
    description: str


def local_cpus(config: ClusterConfig) -> tuple[int, str]:
    """(logical CPUs of a local cluster, reason)."""
    if config.num_cpus is not None:
        return config.num_cpus, "set in the configuration"
    cores = num_cores()
    if cores >= MIN_LOCAL_CPUS:
        return cores, f"{cores} cores"
    return MIN_LOCAL_CPUS, f"{cores} cores; Ray's CPUs are tickets, and fewer than {MIN_LOCAL_CPUS} can leave a pool waiting"


def connect(config: ClusterConfig) -> tuple[ClusterInfo, bool]:
    """Joins or starts a cluster; returns it, and whether this call connected (so that the caller can disconnect).

    Raises:
        ClusterError: the address does not answer.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import ray

    connected_here = not ray.is_initialized()
    description = "the cluster this process is connected to"
    if connected_here:
        address = config.address or ("auto" if os.environ.get("RAY_ADDRESS") else "local")
        options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
        if address == "local":
            cpus, reason = local_cpus(config)
            # Tickets are more than cores: a process for each of them, before there is work, would only delay the start. Metrics, which every
            # process sends every few seconds, have no reader without a dashboard, and an idle cluster takes a third less time without them.
            # At Ray's niceness of 15 an engine could not be told from the rewards beside it, which are to take what it leaves (`ScoreGroups`).
            system = {"prestart_worker_first_driver": False, "enable_metrics_collection": False, "worker_niceness": 0}
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this node away; one process less
            options |= {"num_cpus": cpus, "include_dashboard": False, "_system_config": system}
            description = f"a local cluster with {cpus} logical CPUs ({reason})"
        try:
            ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ClusterError(
                f"cluster.address = {address!r}: cannot connect: {error}; is `ray start --head` running?"
            ) from None
        if address != "local":
            description = f"the cluster at {ray.get_runtime_context().gcs_address}"
    resources = ray.cluster_resources()
    _quiet_ray_data()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus_per_node = tuple(node["GPU"] for node in nodes if node.get("GPU"))
    return ClusterInfo(
        resources.get("CPU", 0.0), resources.get("GPU", 0.0), len(nodes), gpus_per_node, description
    ), connected_here


@contextlib.contextmanager
def connected(config: ClusterConfig) -> Iterator[ClusterInfo]:
    """`connect`, and disconnects at the end if it connected."""
    import ray

    info, connected_here = connect(config)
    try:
        yield info
    finally:
        if connected_here:
            ray.shutdown()


def _quiet_ray_data() -> None:
    """Our own progress instead of Ray's bars and messages, for this driver only."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
