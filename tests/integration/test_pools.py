"""Pools as Ray really runs them: one that grows with its work, engines over several nodes in their placement groups, and one pool after the
other where there is no room for more.

Except for the last, a stand-in takes the place of the engine, which here has neither GPUs nor time to spare; the graph around it is the real one.
"""

from __future__ import annotations

import copy
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rc_ray
from rc_ray.config import Config, load_config
from rc_ray.core import schemas
from rc_ray.pipeline import actors
from rc_ray.pipeline.graph import attach_generation
from rc_ray.pipeline.plan import Plan, make_plan
from rc_ray.pipeline.policies import policy_of
from rc_ray.pipeline.watchdog import operators
from rc_ray.rewards.base import build_reward


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def two_gpu_nodes() -> Iterator[Any]:
    """Two nodes with two logical GPUs each; no device is behind them."""
    import ray
    from ray.cluster_utils import Cluster

    ports = free_ports(2)
    node = {"num_cpus": 4, "num_gpus": 2, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "dashboard_agent_listen_port": ports[0]})
    try:
        cluster.add_node(**node, dashboard_agent_listen_port=ports[1])
        ray.init(address=cluster.address, log_to_driver=False)
        yield ray
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def local_ray() -> Iterator[Any]:
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def prompts(number: int) -> list[pa.Table]:
    """Blocks of one prompt each."""
    rows = [{"prompt_id": f"{i:032x}", "prompt": [{"role": "user", "content": str(i)}]} for i in range(number)]
    return [pa.Table.from_pylist([row], schema=schemas.GROUP) for row in rows]


def answered(dataset: Any, config: Config, plan: Plan) -> dict[str, str]:
    """The text of the first candidate of every group."""
    rows = attach_generation(dataset, policy_of(config), config, plan).take_all()
    return {row["prompt_id"]: row["candidates"][0]["text"] for row in rows}


def candidate(text: str) -> dict[str, Any]:
    return {"text": text, "token_ids": [1], "finish_reason": "stop", "seed": 0, "logprob": -1.0}


def test_a_pool_grows_while_blocks_wait_and_no_group_is_lost(
    tiny_config: dict[str, Any], local_ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.data import DataContext
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Slow:
        def __init__(self, **_: Any) -> None:
            pass

        def __call__(self, block: pa.Table) -> pa.Table:
            import os
            import time

            time.sleep(0.3)
            rows = [{**row, "candidates": [candidate(str(os.getpid()))]} for row in block.to_pylist()]
            return pa.Table.from_pylist(rows, schema=schemas.GROUP)

    most: list[int] = []

    class Watch(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            most.extend(found["actors"]["running"] for found in operators(executor) if found["name"] == "Slow")

    monkeypatch.setattr(actors, "GenerateGroups", Slow)
    monkeypatch.setattr(DataContext.get_current(), "custom_execution_callback_classes", [Watch])
    monkeypatch.setattr(DataContext.get_current(), "enable_progress_bars", False)
    for overrides, size in ([], 1), (["generation.pool.max_size=2"], 2):
        config = load_config(copy.deepcopy(tiny_config), overrides)
        most.clear()
        found = answered(local_ray.data.from_arrow(prompts(200)), config, make_plan(config, cpus=8, gpus=0))
        assert sorted(found) == [f"{i:032x}" for i in range(200)]
        assert max(most) == size
        assert len(set(found.values())) == size


def test_an_engine_over_two_nodes_has_a_placement_group_that_is_given_back(
    tiny_config: dict[str, Any], two_gpu_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = two_gpu_nodes

    class Reports:
        def __init__(self, across_nodes: bool, on_gpu: bool, **_: Any) -> None:
            import ray
            from ray.util import get_current_placement_group, placement_group_table
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

            class Worker:
                def node(self) -> str:
                    return str(ray.get_runtime_context().get_node_id())

            group = get_current_placement_group()
            table = placement_group_table(group)
            # As vLLM's Ray executor starts its workers.
            workers = [
                ray.remote(num_cpus=0, num_gpus=1)(Worker)
                .options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i))
                .remote()
                for i in range(4)
            ]
            self.text = json.dumps(
                {
                    "bundles": group.bundle_specs,
                    "nodes": sorted(set(table["bundles_to_node_id"].values())),
                    "own": ray.get_runtime_context().get_node_id(),
                    "first": table["bundles_to_node_id"][0],
                    "workers": sorted(ray.get([worker.node.remote() for worker in workers])),
                    "arguments": [across_nodes, on_gpu],
                }
            )

        def __call__(self, block: pa.Table) -> pa.Table:
            rows = [{**row, "candidates": [candidate(self.text)]} for row in block.to_pylist()]
            return pa.Table.from_pylist(rows, schema=schemas.GROUP)

    monkeypatch.setattr(actors, "GenerateGroups", Reports)
    engine = "generation.engine={tensor_parallel_size: 2, pipeline_parallel_size: 2}"
    config = load_config(copy.deepcopy(tiny_config), [engine, "training.enabled=false", "evaluation={}"])
    gpus = [node["Resources"]["GPU"] for node in ray.nodes()]
    plan = make_plan(config, cpus=8, gpus=4, num_nodes=2, gpus_per_node=gpus)
    assert plan.across_nodes

    def used() -> list[Any]:
        return [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]

    for _ in range(2):  # the second one finds the GPUs free again
        found = answered(ray.data.from_arrow(prompts(8)), config, plan)
        report = json.loads(found[f"{0:032x}"])
        assert report["bundles"] == [{"GPU": 1.0, "CPU": 1.0}, *[{"GPU": 1.0}] * 3]
        nodes = sorted(node["NodeID"] for node in ray.nodes())
        assert report["nodes"] == nodes
        assert report["own"] == report["first"]
        assert report["workers"] == sorted(nodes * 2)
        assert report["arguments"] == [True, True]
        assert used() == []


def test_blocks_go_to_the_engine_with_the_fewest_wherever_they_lie(
    tiny_config: dict[str, Any], two_gpu_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.data import DataContext

    class Where:
        def __init__(self, **_: Any) -> None:
            pass

        def __call__(self, block: pa.Table) -> pa.Table:
            import time

            import ray

            time.sleep(2)
            rows = [{**row, "candidates": [candidate(ray.get_runtime_context().get_node_id())]} for row in block.to_pylist()]
            return pa.Table.from_pylist(rows, schema=schemas.GROUP)

    monkeypatch.setattr(actors, "GenerateGroups", Where)
    monkeypatch.setattr(DataContext.get_current(), "wait_for_min_actors_s", 120)
    config = load_config(
        copy.deepcopy(tiny_config), ["generation.pool={size: 2, num_gpus: 2}", "training.enabled=false", "evaluation={}"]
    )
    plan = make_plan(config, cpus=8, gpus=4, num_nodes=2, gpus_per_node=[2, 2])
    # All blocks are on the first node, whose engine could take all four of them.
    found = answered(two_gpu_nodes.data.from_arrow(prompts(4)), config, plan)
    nodes = list(found.values())
    assert sorted(nodes.count(node) for node in set(nodes)) == [2, 2]
    assert DataContext.get_current().execution_options.actor_locality_enabled


@pytest.fixture
def room_for_one() -> Iterator[Any]:
    """A cluster on which one of the pools of `crowded` fits."""
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def crowded(tiny_config: dict[str, Any], **rewards: Any) -> Config:
    """An engine and these rewards, each of which takes more than half of that cluster."""
    raw = copy.deepcopy(tiny_config) | {"output": "not used", "prompts": {"path": "not used"}, "rewards": rewards}
    for section in (raw["generation"], *rewards.values()):
        section["pool"] = {"num_cpus": 0.6}
    config = load_config(raw)
    assert make_plan(config, cpus=1, gpus=0).phases == [["generation"], *([name] for name in rewards)]
    return config


def test_a_dataset_is_scored_by_one_pool_after_the_other_where_there_is_room_for_one(
    tiny_config: dict[str, Any], room_for_one: Any, tmp_path: Path
) -> None:
    config = crowded(tiny_config, **copy.deepcopy(tiny_config["rewards"]))
    answers = [["hello " * (i + 1), f"fine {i}"] for i in range(6)]
    blocks = prompts(6)
    for i, block in enumerate(blocks):
        (row,) = block.to_pylist()
        blocks[i] = pa.Table.from_pylist([{**row, "candidates": [candidate(a) for a in answers[i]]}], schema=schemas.GROUP)
    (tmp_path / "groups").mkdir()
    pq.write_table(pa.concat_tables(blocks), tmp_path / "groups" / "0.parquet")
    messages = [block.to_pylist()[0]["prompt"] for block in blocks]
    expected = {
        name: [
            [s.value for s in build_reward(reward, False, 1).score([m] * 2, a)] for m, a in zip(messages, answers, strict=True)
        ]
        for name, reward in config.rewards.items()
    }
    for number, source in enumerate((str(tmp_path / "groups"), room_for_one.data.from_arrow(blocks))):
        # Writing, too, finds room: no pool is left.
        rc_ray.score(config, source).write_parquet(str(tmp_path / f"scored{number}"))
        scored = pq.read_table(tmp_path / f"scored{number}").sort_by("prompt_id").to_pylist()
        assert len(scored) == 6
        for i, row in enumerate(scored):
            for name, values in expected.items():
                assert row[f"reward.{name}"] == pytest.approx(values[i], abs=1e-5)


def test_sampling_and_evaluation_go_in_phases_as_a_run_does(
    tiny_config: dict[str, Any], room_for_one: Any, tiny_policy: Path
) -> None:
    rule = {"kind": "rule", "function": "rc_ray.rewards.rules:length_near"}
    config = crowded(tiny_config, **{name: {**rule, "args": {"target_words": n}} for n, name in enumerate("abc")})
    sampled = rc_ray.sample(config, room_for_one.data.from_items([{"prompt": q} for q in ("hello", "world")]))
    rows = rc_ray.score(config, sampled).take_all()
    assert [len(row[f"reward.{name}"]) for row in rows for name in config.rewards] == [6] * 6
    # The policy against itself.
    found = rc_ray.evaluate(config, str(tiny_policy))
    assert found["num_prompts"] == 6
    assert [o["difference"]["mean"] for o in found["objectives"].values()] == pytest.approx([0, 0, 0], abs=1e-5)
