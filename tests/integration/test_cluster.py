"""`ray job submit` on a two-node cluster: the job joins it, shows progress in its log, and leaves it as it was."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from cluster.local_two_nodes import LocalCluster, two_nodes
from tests.conftest import ROOT

RAY = str(Path(sys.executable).with_name("ray"))
# Ray Data starts these once per cluster, for all jobs, on its first use; they take no resources. Anything else would be ours.
RAY_DATA_SERVICES = {"_AutoscalingCoordinatorActor", "_StatsActor", "ActorLocationTracker"}
STATE = (
    "import json, ray; from ray.util.state import list_actors\n"
    "ray.init(address='{address}', logging_level='ERROR', log_to_driver=False)\n"
    "alive = [a.class_name for a in list_actors(address='{dashboard}', filters=[('state', '=', 'ALIVE')])]\n"
    "print(json.dumps(dict(nodes=sorted(n['NodeID'] for n in ray.nodes() if n['Alive']), alive=alive, free=ray.available_resources().get('CPU'),"
    " groups=[g for g in ray.util.placement_group_table().values() if g['state'] != 'REMOVED'])))"
)


def state(cluster: LocalCluster) -> dict[str, Any]:
    code = STATE.format(address=cluster.address, dashboard=cluster.dashboard)
    environment = {**os.environ, **cluster.environment}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, cwd="/", env=environment
    )
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def wait_for_two_nodes(cluster: LocalCluster) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = state(cluster)
        if len(found["nodes"]) == 2:
            return found
        time.sleep(1)
    raise AssertionError(f"the second node did not join: {found}")


def test_job_on_a_two_node_cluster(small_config: dict[str, Any], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("question\n" + "".join(f'"hello, number {i}"\n' for i in range(20)))
    config = copy.deepcopy(small_config) | {"output": str(tmp_path / "run"), "evaluation": {}}
    config |= {"prompts": {"path": str(prompts), "column": "question"}}
    config["training"]["num_workers"] = 2
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    # Two CPUs a node: the pools' tickets have to be cut to fit.
    with two_nodes(num_cpus=2) as cluster:
        before = wait_for_two_nodes(cluster)
        environment = {**os.environ, **cluster.environment, "RAY_ADDRESS": cluster.dashboard}
        command = [
            sys.executable,
            "jobs/run_rcs.py",
            "--config",
            str(tmp_path / "config.yaml"),
            "--set",
            "training.max_steps=2",
        ]
        deadline = time.monotonic() + 60
        while True:
            submit = subprocess.run(
                [RAY, "job", "submit", "--submission-id", "rcs", "--", *command],
                cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
            )  # fmt: skip
            # The head's job agent comes up a little after its dashboard.
            if "No available agent" not in submit.stderr or time.monotonic() > deadline:
                break
            time.sleep(2)
        logs = subprocess.run(
            [RAY, "job", "logs", "rcs"], env=environment, capture_output=True, text=True, timeout=60, check=True
        ).stdout
        assert submit.returncode == 0, submit.stdout[-3000:] + submit.stderr[-1000:]
        after = state(cluster)
    assert "2 node(s), 4 CPUs" in logs
    assert "20/20 prompts" in logs
    assert "tok/s" in logs
    assert "20 prompts = " in logs
    assert pq.read_table(tmp_path / "run" / "pairs").num_rows + pq.read_table(tmp_path / "run" / "drops").num_rows == 20
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert after["nodes"] == before["nodes"]
    # The job's own supervisor stays for a moment.
    assert {a for a in after["alive"] if "JobSupervisor" not in a} - RAY_DATA_SERVICES == set(before["alive"])
    assert after["free"] == before["free"] == 4
    assert after["groups"] == []
