"""The cluster files: accepted by Ray's own checks, and consistent with the project."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from rc_ray.config import load_config
from rc_ray.pipeline.plan import make_plan
from tests.conftest import ROOT
from tests.unit.test_plan import BASE


@pytest.fixture
def aws() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text()))


@pytest.fixture
def rayjob() -> dict[str, Any]:
    (document,) = yaml.safe_load_all((ROOT / "cluster" / "kuberay.yaml").read_text())
    return dict(document)


def test_ray_accepts_the_aws_file(aws: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(aws)))
    # The check above does find mistakes.
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config({**copy.deepcopy(aws), "max_worker": 3}))


def test_the_aws_limit_covers_all_worker_types(aws: dict[str, Any]) -> None:
    workers = {name: kind for name, kind in aws["available_node_types"].items() if name != aws["head_node_type"]}
    assert workers
    assert aws["max_workers"] >= sum(kind["max_workers"] for kind in workers.values())
    assert all(kind["max_workers"] >= max(1, kind["min_workers"]) for kind in workers.values())


def test_the_aws_head_takes_no_work(aws: dict[str, Any]) -> None:
    head = aws["available_node_types"][aws["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert head["max_workers"] == 0


def test_only_sampling_runs_on_spot_machines(aws: dict[str, Any]) -> None:
    kinds = aws["available_node_types"]
    spot = [name for name, kind in kinds.items() if "InstanceMarketOptions" in kind["node_config"]]
    assert spot == ["sampling"]
    assert all(kind["resources"]["GPU"] >= 1 for name, kind in kinds.items() if name != aws["head_node_type"])


def test_the_aws_dashboard_is_closed_and_asks_for_a_token(aws: dict[str, Any]) -> None:
    (start,) = [command for command in aws["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start
    assert "0.0.0.0" not in yaml.safe_dump(aws)
    for commands in (aws["head_start_ray_commands"], aws["worker_start_ray_commands"]):
        assert any("ray start" in command and "RAY_AUTH_MODE=token" in command for command in commands)


def test_images_and_files_name_the_installed_version_of_ray(aws: dict[str, Any], rayjob: dict[str, Any]) -> None:
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__
    assert aws["docker"]["image"].startswith(f"rayproject/ray:{ray.__version__}-py311")


def test_the_rayjob_makes_a_cluster_runs_the_job_and_removes_it(rayjob: dict[str, Any]) -> None:
    assert (rayjob["apiVersion"], rayjob["kind"]) == ("ray.io/v1", "RayJob")
    spec = rayjob["spec"]
    script = spec["entrypoint"].split()[1]
    assert (ROOT / script.removeprefix("/app/")).is_file()
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] >= 1
    assert spec["activeDeadlineSeconds"] > spec["ttlSecondsAfterFinished"] > 0


def test_the_kubernetes_head_takes_no_work_and_calls_need_a_token(rayjob: dict[str, Any]) -> None:
    cluster = rayjob["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True


def test_a_run_with_two_reward_models_finds_room(aws: dict[str, Any], rayjob: dict[str, Any]) -> None:
    workers = [(kind["min_workers"], kind["resources"]) for kind in aws["available_node_types"].values()]
    on_aws = [resources for number, resources in workers for _ in range(number)]
    group = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    on_kubernetes = [{"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}] * group["minReplicas"]
    config = load_config(BASE)
    for nodes in (on_aws, on_kubernetes):
        gpus = [node["GPU"] for node in nodes]
        plan = make_plan(config, sum(node["CPU"] for node in nodes), sum(gpus), len(nodes), gpus)
        assert plan.mode == "streaming"
        assert sum(pool.total_gpus for pool in (*plan.engines.values(), *plan.rewards.values())) == len(nodes)


def test_kubernetes_workers_scale_and_get_what_they_ask_for(rayjob: dict[str, Any]) -> None:
    groups = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert groups
    for group in groups:
        assert 1 <= group["minReplicas"] <= group["replicas"] < group["maxReplicas"]
        for container in group["template"]["spec"]["containers"]:
            assert container["resources"]["limits"] == container["resources"]["requests"]


def test_the_configuration_is_mounted_where_the_job_reads_it(rayjob: dict[str, Any]) -> None:
    _, _, _, path = rayjob["spec"]["entrypoint"].split()
    pod = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (mount,) = pod["containers"][0]["volumeMounts"]
    assert path == f"{mount['mountPath']}/run.yaml"
    assert [volume["name"] for volume in pod["volumes"]] == [mount["name"]]
