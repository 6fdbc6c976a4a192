"""SIGKILL of the raylet of a node on which all pools run, in the middle of sampling and of scoring: the run goes on on the other node."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.local_two_nodes import LocalCluster, two_nodes
from tests.fault.conftest import StartDriver
from tests.fault.drivers import (
    NUM_CHUNKS,
    NUM_LONG,
    assert_same_outcome,
    descendants,
    is_alive,
    kill,
    moments,
    title,
    wait_until,
)

# Enough on each node for all pools, a CPU each, and the small tasks beside them.
NODE_CPUS = 5
# Keeps all of the head's CPUs but for small tasks, so that the pools start on the other node, until its input is closed.
BALLAST = f"""
import sys, time, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
ray.init(address="{{address}}", logging_level="ERROR", log_to_driver=False)
while len([n for n in ray.nodes() if n["Alive"]]) < 2:
    time.sleep(0.2)
(head,) = [n["NodeID"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"]]
@ray.remote(num_cpus={NODE_CPUS - 0.8}, scheduling_strategy=NodeAffinitySchedulingStrategy(head, soft=False))
class Ballast:
    def held(self):
        return True
ballast = Ballast.remote()
ray.get(ballast.held.remote())
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with two_nodes(num_cpus=NODE_CPUS) as started:
        yield started


@pytest.fixture
def ballast(cluster: LocalCluster) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", BALLAST.format(address=cluster.address)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **cluster.environment},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def release(ballast: subprocess.Popen[str]) -> None:
    assert ballast.stdin is not None
    ballast.stdin.close()
    ballast.wait(timeout=60)


@pytest.mark.parametrize("attempt", range(NUM_LONG))
@pytest.mark.parametrize(("stage", "actor"), [("sample", "GenerateGroups"), ("score", "ScoreGroups_length")])
def test_a_run_whose_node_is_killed_goes_on_on_the_other_one(
    stage: str, actor: str, attempt: int, config: dict[str, Any], cluster: LocalCluster, ballast: subprocess.Popen[str], driver: StartDriver,
    whole: Path,
) -> None:  # fmt: skip
    config["cluster"] |= {"address": cluster.address, "mode": "streaming" if stage == "sample" else "phased"}
    for section in (config["generation"], *config["rewards"].values()):
        section["pool"] = {"num_cpus": 1}
    running = driver(config, environment=cluster.environment)
    running.worker(actor, root=cluster.worker.pid)
    release(ballast)
    (moment,) = moments(2, NUM_CHUNKS * 2 // 3, number=1)
    running.reach(moment, stage)
    node = descendants(cluster.worker.pid)
    running.worker(actor, root=cluster.worker.pid)
    (raylet,) = (pid for pid in node if Path(title(pid).split("\0")[0]).name == "raylet")
    kill(raylet)
    wait_until(lambda: not any(is_alive(pid) for pid in node), "a node's processes outlive its raylet")
    printed = running.finished()
    assert "2 node(s), 10 CPUs" in printed
    assert_same_outcome(running.folder, whole)
