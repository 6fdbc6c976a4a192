"""Pool sizes for a cluster: what fits is returned with its reason, what cannot is an error that says what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rc_ray.config import Config, load_config
from rc_ray.errors import ClusterError, ConfigError
from rc_ray.generation import hardware
from rc_ray.generation.hardware import engine_choices
from rc_ray.ledger import rundir
from rc_ray.pipeline.plan import make_plan, reward_threads
from rc_ray.pipeline.stages import pin_engines

BASE: dict[str, Any] = {
    "model": "some/model",
    "output": "runs/x",
    "prompts": {"path": "prompts.jsonl"},
    "rewards": {
        "helpful": {"kind": "classifier", "model": "some/helpful"},
        "harmless": {"kind": "classifier", "model": "some/harmless"},
        "length": {"kind": "rule", "function": "rc_ray.rewards.rules:length_near", "args": {"target_words": 20}},
    },
}


def config(*overrides: str) -> Config:
    return load_config(BASE, overrides)


def test_a_run_goes_on_with_the_dtype_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, said = rundir.create(config(f"output={tmp_path / 'run'}"), {}), []
    monkeypatch.setattr(hardware, "cpu_flags", lambda: {"avx512_bf16"})
    # What each worker would choose by its own machine is settled for all of them.
    assert pin_engines(config(), run, False, said.append) == config("generation.dtype=bfloat16")
    assert said == []
    monkeypatch.setattr(hardware, "cpu_flags", set)
    resumed = pin_engines(config(), run, False, said.append)
    assert resumed == config("generation.dtype=bfloat16")
    assert said == ["engines   dtype=bfloat16, with which the run began on other machines, and not float32"]
    monkeypatch.setattr(rundir, "versions", lambda: {"vllm": "99.0"})
    pin_engines(resumed, run, False, said.append)
    assert "the next ones of 99.0" in said[1]


def test_eight_cpus_hold_all_pools_at_once() -> None:
    plan = make_plan(config(), cpus=8, gpus=0)
    assert plan.mode == "streaming"
    assert "fit at once" in plan.mode_reason
    assert plan.generation.num_cpus == 1
    assert {name: pool.num_cpus for name, pool in plan.rewards.items()} == {"helpful": 0.5, "harmless": 0.5, "length": 0.1}
    assert [pool.num_gpus for pool in (plan.generation, *plan.rewards.values())] == [0, 0, 0, 0]
    assert plan.task_cpus == 0.25
    assert (plan.train_cpus, plan.train_gpus) == (1, 0)
    assert all("tickets cut" not in line for line in plan.lines())


@pytest.mark.parametrize("cpus", [2, 1, 0.5])
def test_tickets_are_cut_to_fit_few_cpus_and_say_so(cpus: float) -> None:
    plan = make_plan(config(), cpus=cpus, gpus=0)
    pools = [plan.generation, *plan.rewards.values()]
    assert plan.mode == "streaming"
    assert all(pool.num_cpus > 0 for pool in pools)
    # One reader and one writer run beside the pools.
    assert sum(pool.total_cpus for pool in pools) + 2 * plan.task_cpus <= cpus
    assert all(f"cut to fit {cpus:g} CPUs" in pool.reason for pool in pools)
    assert 2 * plan.train_cpus <= cpus


def test_pool_sizes_count() -> None:
    sizes = config("generation.pool.size=4", "rewards.helpful.pool.size=6")
    roomy = make_plan(sizes, cpus=9, gpus=0, num_nodes=3)
    assert (roomy.generation.total_cpus, roomy.rewards["helpful"].total_cpus) == (4, 3)
    assert roomy.engines_per_host == 2
    tight = make_plan(sizes, cpus=4, gpus=0)
    assert sum(p.total_cpus for p in (tight.generation, *tight.rewards.values())) + 2 * tight.task_cpus <= 4
    assert (tight.rewards["helpful"].size, tight.engines_per_host) == (6, 4)


def test_num_cpus_of_the_user_is_kept_while_others_are_cut() -> None:
    plan = make_plan(config("generation.pool.num_cpus=0.6"), cpus=2, gpus=0)
    assert plan.generation.num_cpus == 0.6
    assert "cut" not in plan.generation.reason
    assert plan.rewards["helpful"].num_cpus < 0.5


def test_num_cpus_of_the_user_that_cannot_fit_is_an_error() -> None:
    with pytest.raises(ClusterError) as caught:
        make_plan(config("generation.pool.num_cpus=3"), cpus=2, gpus=0)
    for word in ("generation", "cluster has 2", "pool.num_cpus", "pool.size"):
        assert word in str(caught.value)


def test_enough_gpus_hold_all_pools_at_once() -> None:
    plan = make_plan(config(), cpus=32, gpus=3)
    assert plan.mode == "streaming"
    assert plan.generation.num_gpus == 1
    assert {name: pool.num_gpus for name, pool in plan.rewards.items()} == {"helpful": 1, "harmless": 1, "length": 0}
    assert plan.train_gpus == 1
    assert "1 GPU each" in plan.generation.reason


def test_too_few_gpus_for_all_pools_at_once_give_two_phases() -> None:
    plan = make_plan(config(), cpus=32, gpus=2)
    assert plan.mode == "phased"
    assert plan.phases == [["generation"], ["helpful", "harmless", "length"]]
    assert plan.mode_reason == (
        "generation + helpful + harmless + length need 3 GPUs at once and the cluster has 2; generation first, scoring after"
    )
    assert f"mode        phased  ({plan.mode_reason})" in plan.lines()


def test_fractions_of_a_gpu_keep_the_pools_together() -> None:
    shared = [f"rewards.{name}.pool.num_gpus=0.5" for name in ("helpful", "harmless")]
    assert make_plan(config(*shared), cpus=32, gpus=2).mode == "streaming"


def test_rewards_that_do_not_fit_together_come_one_after_the_other() -> None:
    alone = [["generation"], ["helpful"], ["harmless"], ["length"]]
    plan = make_plan(config("training.enabled=false"), cpus=32, gpus=1)
    assert (plan.mode, plan.phases) == ("phased", alone)
    assert plan.mode_reason.endswith("the cluster has 1; generation first, then one reward after the other")
    fixed = [f"{pool}.num_cpus=1" for pool in ("generation.pool", *(f"rewards.{name}.pool" for name in BASE["rewards"]))]
    by_cpus = make_plan(config("training.enabled=false", *fixed), cpus=1.5, gpus=0)
    assert (by_cpus.mode, by_cpus.phases) == ("phased", alone)
    assert "4 of them as configured" in by_cpus.mode_reason
    assert all(pool.num_cpus == 1 for pool in (by_cpus.generation, *by_cpus.rewards.values()))


def test_a_pool_that_does_not_fit_alone_is_an_error_that_says_what_to_change() -> None:
    with pytest.raises(ClusterError) as caught:
        make_plan(config("training.enabled=false", "rewards.harmless.pool.num_gpus=2"), cpus=32, gpus=1)
    for word in ("harmless need 2 GPUs", "cluster has 1", "rewards.<name>.pool.num_gpus", "add GPUs"):
        assert word in str(caught.value)
    with pytest.raises(ClusterError, match=r"generation need 4 GPUs at once.*generation\.pool\.size"):
        make_plan(config("generation.pool.size=4"), cpus=32, gpus=2)


def test_gpus_that_are_not_together_are_not_counted_together() -> None:
    alone = config("training.enabled=false", "rewards.harmless.pool.num_gpus=2")
    assert make_plan(alone, cpus=32, gpus=4, gpus_per_node=[2, 2]).mode == "streaming"
    assert make_plan(alone, cpus=32, gpus=4, gpus_per_node=[3, 1]).mode == "streaming"
    # 1 + 1 + 2 GPUs are there, but no two of them on one node.
    with pytest.raises(
        ClusterError, match=r"harmless need 1 x 2 GPUs at once and have no room on nodes with 1, 1, 1, 1, .*; lower"
    ):
        make_plan(alone, cpus=32, gpus=4, gpus_per_node=[1] * 4)
    # The engine's two GPUs are together, and so are the reward's.
    engine = "generation.engine={tensor_parallel_size: 2}"
    both = config("training.enabled=false", engine, "rewards.harmless.pool.num_gpus=2", "rewards.helpful.pool.num_gpus=0")
    assert make_plan(both, cpus=32, gpus=4, gpus_per_node=[3, 1]).mode == "phased"
    assert make_plan(both, cpus=32, gpus=4, gpus_per_node=[2, 2]).mode == "streaming"
    # Three shares of 0.6 are less than two GPUs, and need three.
    shares = config(
        "training.enabled=false",
        "generation.pool.num_gpus=0.6",
        *(f"rewards.{name}.pool.num_gpus=0.6" for name in ("helpful", "harmless")),
    )
    assert make_plan(shares, cpus=32, gpus=3).mode == "streaming"
    plan = make_plan(shares, cpus=32, gpus=2)
    assert (plan.mode, plan.phases) == ("phased", [["generation"], ["helpful", "harmless", "length"]])
    assert "need 1 x 0.6 + 1 x 0.6 + 1 x 0.6 GPUs at once and have no room on nodes with 2" in plan.mode_reason
    # 3 x 0.2 + 0.3 + 0.1 is a little more than 1 in floating point.
    tenths = [
        "generation.pool={size: 3, num_gpus: 0.2}",
        "rewards.helpful.pool.num_gpus=0.3",
        "rewards.harmless.pool.num_gpus=0.1",
    ]
    assert make_plan(config("training.enabled=false", *tenths), cpus=32, gpus=1).mode == "streaming"
    # An engine may be spread over nodes, a reward model may not.
    engine = "training.enabled=false", "generation.engine={tensor_parallel_size: 2}"
    assert make_plan(config(*engine), cpus=32, gpus=4, gpus_per_node=[1] * 4).across_nodes


def test_parallel_sizes_of_the_engine_are_its_gpus() -> None:
    engine = ["generation.engine={tensor_parallel_size: 2, pipeline_parallel_size: 2}"]
    plan = make_plan(config(*engine), cpus=32, gpus=6)
    assert (plan.generation.num_gpus, plan.mode) == (4, "streaming")
    assert make_plan(config(*engine), cpus=32, gpus=5).mode == "phased"
    assert make_plan(config(*engine), cpus=32, gpus=0).generation.num_gpus == 0
    with pytest.raises(ClusterError, match=r"one engine with .* needs 4 GPUs and the whole cluster has 3"):
        make_plan(config(*engine), cpus=32, gpus=3)
    with pytest.raises(
        ConfigError, match=r"pool\.num_gpus \(2\) is not tensor_parallel_size x pipeline_parallel_size of the engine \(4\)"
    ):
        config(*engine, "generation.pool.num_gpus=2")
    with pytest.raises(ConfigError, match=r"engine\.tensor_parallel_size \('two'\) must be a whole number"):
        config("generation.engine={tensor_parallel_size: two}")


def test_asking_for_gpus_that_are_not_there_is_an_error() -> None:
    with pytest.raises(ClusterError, match="cluster has 0"):
        make_plan(config("generation.pool.num_gpus=1"), cpus=8, gpus=0)


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.num_workers=4", "training.num_cpus_per_worker=3"],
        ["training.num_gpus_per_worker=1"],
    ],
)
def test_training_workers_that_do_not_fit_are_an_error(overrides: list[str]) -> None:
    with pytest.raises(ClusterError, match=r"training\.num_workers = \d.*does not fit.*lower num_workers"):
        make_plan(config(*overrides), cpus=8, gpus=0)
    assert make_plan(config(*overrides, "training.enabled=false"), cpus=8, gpus=0).mode == "streaming"


def test_training_workers_need_a_gpu_each_on_a_gpu_cluster() -> None:
    with pytest.raises(ClusterError, match="4 x "):
        make_plan(config("training.num_workers=4"), cpus=32, gpus=3)
    assert make_plan(config("training.num_workers=4", "training.num_gpus_per_worker=0.5"), cpus=32, gpus=3).train_gpus == 0.5


def test_many_training_workers_share_few_cpus() -> None:
    plan = make_plan(config("training.num_workers=8"), cpus=2, gpus=0)
    assert 0 < 8 * plan.train_cpus <= 2


def test_the_mode_of_the_configuration_is_taken_and_still_has_to_fit() -> None:
    plan = make_plan(config("cluster.mode=phased"), cpus=8, gpus=0)
    assert (plan.mode, plan.mode_reason) == ("phased", "set in the configuration")
    with pytest.raises(ClusterError, match="need 3 GPUs at once and the cluster has 2"):
        make_plan(config("cluster.mode=streaming"), cpus=32, gpus=2)


def test_phases_are_fitted_one_by_one() -> None:
    # 1 + 0.5 CPUs for generation fit into 2, and so do 0.5 + 0.5 + 0.1 + 0.5 for scoring; together they would not.
    phased = make_plan(config("cluster.mode=phased"), cpus=2, gpus=0)
    assert phased.generation.num_cpus == 1
    assert phased.rewards["helpful"].num_cpus == 0.5


def test_every_pool_has_a_line() -> None:
    lines = make_plan(config(), cpus=8, gpus=0).lines()
    assert [line.split()[0] for line in lines[:5]] == ["generation", "helpful", "harmless", "length", "mode"]
    assert lines[0] == "generation  1 actor(s) x 1 CPU, 0 GPU  (size 1 as configured, on CPU)"
    assert {line.split()[0] for line in lines[5:]} == {"engine"}


def settings(*overrides: str, **cluster: Any) -> str:
    return "\n".join(make_plan(config(*overrides), **{"cpus": 32, "gpus": 0, **cluster}).lines())


def test_a_pool_that_may_grow_is_planned_with_what_it_begins_with() -> None:
    grows = config("generation.pool.size=2", "generation.pool.max_size=9", "rewards.helpful.pool.max_size=4")
    plan = make_plan(grows, cpus=8, gpus=6, num_nodes=3)
    assert (plan.mode, plan.generation.total_gpus, plan.generation.max_size) == ("streaming", 2, 9)
    assert plan.lines()[0] == "generation  2 to 9 actor(s) x 1 CPU, 1 GPU  (size 2, up to 9 while blocks wait, on 1 GPU each)"
    assert plan.lines()[1].startswith("helpful     1 to 4 actor(s)")
    assert plan.engines_per_host == 3
    cut = make_plan(grows, cpus=2, gpus=4)
    assert (cut.generation.max_size, cut.rewards["helpful"].max_size) == (9, 4)
    assert "cut to fit" in cut.generation.reason


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["generation.pool.max_size=2", "generation.pool.size=2"],
            r"max_size \(2\) has no effect unless it is above size \(2\)",
        ),
        (["generation.pool.max_size=1"], "max_size"),
        (["generation.pool.num_gpus=1.5"], r"num_gpus \(1\.5\) must be a whole number"),
        (
            ["generation.max_candidates=16", "rewards.helpful.pool.max_size=2"],
            r"rewards\.helpful\.pool\.max_size has no effect with",
        ),
    ],
)
def test_pools_that_cannot_be_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*overrides)


TWO_BY_TWO = "generation.engine={tensor_parallel_size: 2, pipeline_parallel_size: 2}"


def test_an_engine_is_on_one_node_where_nodes_hold_it_and_else_in_a_placement_group() -> None:
    small = {"cpus": 32, "gpus": 8, "gpus_per_node": [4, 4]}
    one = make_plan(config(TWO_BY_TWO, "training.enabled=false", "generation.pool.size=2"), **small)
    assert not one.across_nodes
    assert any("its 4 GPUs on one node  (nodes have 4, 4 GPUs, which holds 2 such engines)" in line for line in one.lines())
    assert any("distributed_executor_backend=mp" in line for line in one.lines())
    several = make_plan(config(TWO_BY_TWO, "training.enabled=false"), **{**small, "gpus_per_node": [3, 3, 2]})
    assert several.across_nodes
    text = "\n".join(several.lines())
    assert (
        "its 4 GPUs in a placement group over several nodes, with vLLM's Ray executor  (nodes have 3, 3, 2 GPUs, which holds 0 of 1"
        in text
    )
    assert "distributed_executor_backend=ray" in text
    # Enough GPUs in all, but two of the three engines only fit on a node each.
    assert make_plan(
        config(TWO_BY_TWO, "training.enabled=false", "generation.pool.size=3"), cpus=32, gpus=12, gpus_per_node=[4, 4, 2, 2]
    ).across_nodes
    # Ray's executor always gets its placement group, also for one GPU.
    ray = "generation.engine={distributed_executor_backend: ray}"
    assert make_plan(config(ray), cpus=32, gpus=8, gpus_per_node=[8]).across_nodes
    assert not make_plan(config(), cpus=32, gpus=8, gpus_per_node=[1] * 8).across_nodes


def test_an_engine_that_no_node_holds_and_that_cannot_be_spread_is_an_error() -> None:
    small = {"cpus": 32, "gpus": 4, "gpus_per_node": [2, 2]}
    alone = "generation.engine={tensor_parallel_size: 4, distributed_executor_backend: mp}"
    with pytest.raises(
        ClusterError,
        match=r"distributed_executor_backend = 'mp' needs the 4 GPUs of an engine on one node, but nodes have 2, 2",
    ):
        make_plan(config(alone), **small)
    with pytest.raises(ClusterError, match=r"max_size = 2: engines over several nodes are a pool of fixed size"):
        make_plan(config(TWO_BY_TWO, "generation.pool.max_size=2"), **small)


def test_engines_that_share_a_gpu_share_its_memory_unless_the_user_says_how() -> None:
    shared = "generation.pool={size: 2, num_gpus: 0.5}"
    assert "gpu_memory_utilization=0.45  (0.9 of the 0.5 GPU that the engine has)" in settings(shared, gpus=4)
    assert "gpu_memory_utilization" not in settings(gpus=4)
    assert "gpu_memory_utilization" not in settings(
        "generation.pool={size: 2, num_gpus: 0.5}", "generation.engine={gpu_memory_utilization: 0.3}", gpus=4
    )
    assert "gpu_memory_utilization" not in settings(shared, "generation.engine={kv_cache_memory_bytes: 1000000000}", gpus=4)
    third = engine_choices({}, 2048, on_gpu=True, gpu_share=1 / 3)["gpu_memory_utilization"][0]
    assert 0.299 <= third <= 0.3  # three of them take no more than nine tenths


def test_settings_of_cpu_engines_are_shown_with_their_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "num_cores", lambda: 12)
    text = settings("generation.pool={size: 2, max_size: 3}", cpus=32)
    for part in (
        "dtype=",
        "VLLM_CPU_OMP_THREADS_BIND=nobind",
        "OMP_NUM_THREADS=4",
        "65 instead of 107 tok/s",
        "MALLOC_ARENA_MAX=1",
        "max_num_seqs=32",
        "enforce_eager=True",
    ):
        assert part in text
    assert "max_num_seqs" not in settings("generation.engine={max_num_seqs: 8}")
    on_gpu = settings(gpus=4)
    assert "OMP_NUM_THREADS" not in on_gpu
    assert "MALLOC" not in on_gpu
    assert "enforce_eager" not in on_gpu
    assert "max_num_seqs=256" in on_gpu


def test_settings_of_classifiers_in_vllm_are_shown_with_their_reasons() -> None:
    assert "harmless:" not in settings()
    chosen = ["rewards.harmless.engine=vllm", "rewards.harmless.engine_arguments={max_num_seqs: 8}"]
    text = settings(*chosen)
    for part in (
        "harmless: block_size=32",
        "harmless: max_num_batched_tokens=8192  (max_batch_tokens",
        "harmless: enforce_eager=True",
    ):
        assert part in text
    assert "harmless: max_num_seqs" not in text
    assert "harmless: enable_prefix_caching" not in text
    shared = settings(*chosen, "rewards.harmless.pool={num_gpus: 0.5}", gpus=4)
    assert "harmless: gpu_memory_utilization=0.45" in shared
    assert "block_size" not in shared


def test_reward_threads_share_the_cores_and_are_never_none() -> None:
    assert reward_threads(10_000) == 1
    assert reward_threads(0) >= reward_threads(1) >= 1
