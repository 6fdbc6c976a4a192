"""Sizes the pools for a cluster before anything starts, each choice with its reason.

Ray's CPUs are tickets, not cores: a pool whose tickets do not fit waits without a word. So the sum of all pools, one reader
and one writer is compared with the cluster first. Invariant: a plan that is returned fits; one that cannot fit is a
`ClusterError` that says what to change. A pool that may grow is planned with the size it begins with: its maximum is for a cluster that grows.

The devices of an engine are on one node where nodes are large enough, which Ray sees to by itself when one actor asks for them all; otherwise
each engine has a placement group (`placement.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rc_ray.config import Config, PoolConfig
from rc_ray.errors import ClusterError
from rc_ray.generation.hardware import (
    choose_dtype,
    cpu_engine_environment,
    cpu_runtime_env,
    engine_choices,
    num_cores,
    scoring_choices,
)
from rc_ray.pipeline.policies import engines_of, members_of

GENERATION = "generation"
# Tickets an actor takes unless the configuration says otherwise.
GENERATION_CPUS, CLASSIFIER_CPUS, RULE_CPUS = 1.0, 0.5, 0.1


@dataclass(frozen=True)
class Pool:
    """One actor pool as it will be started."""

    name: str
    size: int
    num_cpus: float
    num_gpus: float
    reason: str
    max_size: int | None = None
    """For a pool that grows with the work."""

    @property
    def largest(self) -> int:
        """The most actors that it may have."""
        return self.max_size or self.size

    @property
    def total_cpus(self) -> float:
        """CPUs of all its actors."""
        return self.size * self.num_cpus

    @property
    def total_gpus(self) -> float:
        """GPUs of all its actors."""
        return self.size * self.num_gpus


@dataclass(frozen=True)
class Plan:
    """All pools, the mode, and why. `engines`: the vLLM pools, in the order of `policies.engines_of`. `phases`: names of the pools that
    run at the same time, phase after phase."""

    engines: dict[str, Pool]
    rewards: dict[str, Pool]
    mode: str
    mode_reason: str
    phases: list[list[str]]
    task_cpus: float
    num_tasks: int
    train_cpus: float
    train_gpus: float
    engines_per_host: int
    across_nodes: bool = False
    """Whether each engine has a placement group over several nodes."""
    settings: list[str] = field(default_factory=list)
    """What is chosen for the engines, with reasons."""

    @property
    def generation(self) -> Pool:
        """The vLLM pool, the first where policies need several."""
        return next(iter(self.engines.values()))

    @property
    def num_engines(self) -> int:
        """vLLM engines of all pools, at most."""
        return sum(pool.largest for pool in self.engines.values())

    def lines(self) -> list[str]:
        """Human-readable, one line per pool, and one per setting of the engines."""
        pools = [*self.engines.values(), *self.rewards.values()]
        width = max(len(p.name) for p in pools)
        shown = [
            f"{p.name:<{width}}  {p.size}{f' to {p.max_size}' if p.max_size else ''} actor(s) x {p.num_cpus:g} CPU, {p.num_gpus:g} GPU  "
            f"({p.reason})"
            for p in pools
        ]
        settings = [f"{'engine':<{width}}  {setting}" for setting in self.settings]
        return [*shown, f"{'mode':<{width}}  {self.mode}  ({self.mode_reason})", *settings]


def make_plan(
    config: Config, cpus: float, gpus: float, num_nodes: int = 1, gpus_per_node: Sequence[float] | None = None
) -> Plan:
    """Pools for a cluster with so many CPUs and GPUs.

    Args:
        gpus_per_node: of each node; None: all GPUs are on one.

    Raises:
        ClusterError: the pools cannot fit even in phased mode.
    """
    nodes = [gpus] if gpus_per_node is None else gpus_per_node
    engine_gpus = float(config.generation.devices_per_engine) if gpus else 0.0
    if engine_gpus > gpus and config.generation.pool.num_gpus is None:
        raise ClusterError(
            f"one engine with generation.engine.tensor_parallel_size x pipeline_parallel_size needs {engine_gpus:g} GPUs and the whole cluster has "
            f"{gpus:g}; lower these, or add GPUs"
        )
    engines = {name: _engine_pool(name, config, engine_gpus) for name in engine_names(config)}
    pools = dict(engines)
    for name, reward in config.rewards.items():
        is_model = bool(reward.models())
        pools[name] = _pool(name, reward.pool, float(is_model and gpus > 0), CLASSIFIER_CPUS if is_model else RULE_CPUS)
    rewards = list(config.rewards)
    ways = {
        "streaming": [[*engines, *rewards]],
        "phased": [[*engines], rewards],
        "one by one": [[*engines], *([name] for name in rewards)],
    }
    if config.cluster.mode == "streaming":
        del ways["phased"], ways["one by one"]
    elif config.cluster.mode == "phased":
        del ways["streaming"]
    refused = ""
    for way, phases in ways.items():
        try:
            pools, task_cpus = _fit(config, phases, pools, cpus, nodes)
            break
        except ClusterError as error:
            refused = refused or str(error)
            if way == list(ways)[-1]:
                raise
    if refused:
        after = "scoring after" if way == "phased" else "then one reward after the other"
        reason = f"{refused.partition(';')[0]}; generation first, {after}"
    elif config.cluster.mode != "auto":
        reason = "set in the configuration"
    else:
        reason = "all pools fit at once, so scoring overlaps generation"
    training = config.training
    train_gpus = training.num_gpus_per_worker if training.num_gpus_per_worker is not None else (1.0 if gpus else 0.0)
    train_cpus = training.num_cpus_per_worker
    if train_cpus is None:
        train_cpus = min(1.0, _floor(cpus * 0.9 / training.num_workers))
    least = training.least_workers
    if training.enabled and (least * train_gpus > gpus or least * train_cpus > cpus):
        name = "num_workers" if training.min_workers is None else "min_workers"
        raise ClusterError(
            f"training.{name} = {least} x ({train_cpus:g} CPU, {train_gpus:g} GPU) does not fit the cluster's "
            f"{cpus:g} CPUs and {gpus:g} GPUs; lower {name} or the share per worker"
        )
    first = pools[next(iter(engines))]  # the others are as large
    num_engines = len(engines) * first.largest
    across_nodes, placed = _placement(config, first, len(engines), nodes)
    engines_per_host = max(1, math.ceil(num_engines / max(1, num_nodes)))
    return Plan(
        engines={name: pools[name] for name in engines},
        rewards={name: pools[name] for name in config.rewards},
        mode="streaming" if way == "streaming" else "phased",
        mode_reason=reason,
        phases=phases,
        task_cpus=task_cpus,
        num_tasks=max(2, round(cpus / 4)),
        train_cpus=train_cpus,
        train_gpus=train_gpus,
        engines_per_host=engines_per_host,
        across_nodes=across_nodes,
        settings=[*placed, *_settings(config, first, engines_per_host, across_nodes), *_reward_settings(config, pools)],
    )


def _placement(config: Config, pool: Pool, num_pools: int, gpus_per_node: Sequence[float]) -> tuple[bool, list[str]]:
    """Whether each engine needs a placement group over several nodes, and the line that says so and why.

    Raises:
        ClusterError: a placement group is needed and the pool is to grow.
    """
    needed = round(pool.num_gpus)
    backend = config.generation.engine.get("distributed_executor_backend")
    if needed < 1 or (needed == 1 and backend != "ray"):
        return False, []
    nodes = ", ".join(f"{n:g}" for n in gpus_per_node)
    on_one = _held_on_one(pool, gpus_per_node)
    if backend == "ray":
        reason = "distributed_executor_backend: ray is set in the configuration"
    elif on_one >= num_pools * pool.size:
        return False, [f"its {needed} GPUs on one node  (nodes have {nodes} GPUs, which holds {on_one} such engines)"]
    else:
        reason = f"nodes have {nodes} GPUs, which holds {on_one} of {num_pools * pool.size} engines on one node each"
    if backend not in (None, "ray"):
        raise ClusterError(
            f"generation.engine.distributed_executor_backend = {backend!r} needs the {needed} GPUs of an engine on one node, but {reason}; remove "
            "it, so that engines are spread with Ray, or lower tensor_parallel_size or generation.pool.size"
        )
    if pool.max_size is not None:
        raise ClusterError(
            f"generation.pool.max_size = {pool.max_size}: engines over several nodes are a pool of fixed size ({reason}); remove it, or use nodes "
            f"with {needed} GPUs"
        )
    return True, [f"its {needed} GPUs in a placement group over several nodes, with vLLM's Ray executor  ({reason})"]


def _settings(config: Config, pool: Pool, engines_per_host: int, across_nodes: bool) -> list[str]:
    """The settings of the engines that are chosen, with reasons."""
    generation, on_gpu = config.generation, pool.num_gpus > 0
    dtype, why = choose_dtype(generation.dtype, on_gpu)
    where = "" if on_gpu else "; on hosts like this one"
    chosen = [f"dtype={dtype}  ({why}{where})"]
    if not on_gpu:
        environment, why = cpu_engine_environment(engines_per_host, generation.engine)
        chosen.append(f"{' '.join(f'{name}={value}' for name, value in environment.items())}  ({why}{where})")
        kept = " ".join(f"{name}={value}" for name, value in cpu_runtime_env()["env_vars"].items())
        chosen.append(f"{kept}  (freed memory is kept, or the kernel would clear large blocks at every use{where})")
    choices = engine_choices(generation.engine, generation.max_model_len, on_gpu, pool.num_gpus, across_nodes)
    return chosen + [f"{name}={value}  ({why})" for name, (value, why) in choices.items()]


def _reward_settings(config: Config, pools: dict[str, Pool]) -> list[str]:
    """What is chosen for the engines of classifiers that vLLM runs, with reasons."""
    chosen = []
    for name, reward in config.rewards.items():
        if reward.kind == "classifier" and reward.engine == "vllm":
            num_gpus = pools[name].num_gpus
            choices = scoring_choices(reward.engine_arguments, reward.max_batch_tokens, num_gpus > 0, num_gpus)
            chosen += [f"{name}: {argument}={value}  ({why})" for argument, (value, why) in choices.items()]
    return chosen


def _fit(
    config: Config, phases: list[list[str]], pools: dict[str, Pool], cpus: float, gpus_per_node: Sequence[float]
) -> tuple[dict[str, Pool], float]:
    """Pools with CPU tickets cut to what the cluster has, and the tickets of a small task.

    Tickets only order the work, so smaller ones cost nothing. Those that the user has set are kept.

    Raises:
        ClusterError: the pools of a phase cannot run at the same time.
    """
    pools, task_cpus, gpus = dict(pools), config.cluster.task_cpus, sum(gpus_per_node)
    task_is_fixed = "task_cpus" in config.cluster.model_fields_set
    for phase in phases:
        names = " + ".join(phase)
        needed = sum(pools[name].total_gpus for name in phase)
        if needed > gpus + 1e-6:
            raise ClusterError(
                f"{names} need {needed:g} GPUs at once and the cluster has {gpus:g}; lower generation.pool.size or "
                "rewards.<name>.pool.num_gpus (fractions share a GPU), or add GPUs"
            )
        if not _hold(gpus_per_node, _shares(config, [pools[name] for name in phase], gpus_per_node)):
            shares = " + ".join(f"{pools[name].size} x {pools[name].num_gpus:g}" for name in phase if pools[name].num_gpus)
            raise ClusterError(
                f"{names} need {shares} GPUs at once and have no room on nodes with {', '.join(f'{n:g}' for n in gpus_per_node)}, since an actor's GPUs are "
                "on one node and a share is of one GPU; lower generation.pool.size or rewards.<name>.pool.num_gpus, or add GPUs"
            )
        ours = [name for name in phase if _configured(config, name).num_cpus is None]
        flexible = sum(pools[name].total_cpus for name in ours)
        fixed = sum(pools[name].total_cpus for name in phase) - flexible
        # One reader and one writer run beside the pools.
        tasks = 2 * config.cluster.task_cpus
        fixed, flexible = (fixed + tasks, flexible) if task_is_fixed else (fixed, flexible + tasks)
        if fixed + flexible <= cpus:
            continue
        free = cpus * 0.95 - fixed
        if free <= 0 or flexible == 0:
            raise ClusterError(
                f"{names}, a reader and a writer need {fixed + flexible:g} CPUs at once, {fixed:g} of them as configured, and the "
                f"cluster has {cpus:g}; lower pool.num_cpus or pool.size, or start it with more (logical) CPUs"
            )
        for name in ours:
            pool = pools[name]
            reason = f"{pool.reason}; CPU tickets cut to fit {cpus:g} CPUs"
            pools[name] = replace(pool, num_cpus=_floor(pool.num_cpus * free / flexible), reason=reason)
        if not task_is_fixed:
            task_cpus = min(task_cpus, _floor(config.cluster.task_cpus * free / flexible))
    return pools, task_cpus


def _shares(config: Config, pools: list[Pool], gpus_per_node: Sequence[float]) -> list[float]:
    """GPUs that must be together, of every actor; of engines that are spread over nodes, one each."""
    shares: list[float] = []
    engines = [pool for pool in pools if is_generation(pool.name)]
    for pool in pools:
        spread = pool in engines and pool.num_gpus >= 1 and not _on_one_node(config, pool, len(engines), gpus_per_node)
        shares += [1.0] * round(pool.total_gpus) if spread else [pool.num_gpus] * pool.size
    return shares


def _on_one_node(config: Config, pool: Pool, num_pools: int, gpus_per_node: Sequence[float]) -> bool:
    """Whether the GPUs of each engine are on one node: as long as nodes hold so many engines, and Ray is not asked to run their workers."""
    enough = _held_on_one(pool, gpus_per_node) >= num_pools * pool.size
    return enough and config.generation.engine.get("distributed_executor_backend") != "ray"


def _held_on_one(pool: Pool, gpus_per_node: Sequence[float]) -> int:
    """Engines that nodes hold, each on one of them."""
    return sum(int(n // round(pool.num_gpus)) for n in gpus_per_node)


def _hold(gpus_per_node: Sequence[float], shares: list[float]) -> bool:
    """Whether all shares find room, the largest first: whole GPUs on one node, less than one on one GPU."""
    nodes = [[1.0] * int(n) for n in gpus_per_node]
    for share in sorted(shares, reverse=True):
        if share >= 1:
            rooms = [node for node in nodes if len(node) >= share]
            if not rooms:
                return False
            del min(rooms, key=len)[: round(share)]
        elif share > 0:
            left, node, gpu = min(
                ((left, node, gpu) for node, free in enumerate(nodes) for gpu, left in enumerate(free) if left >= share - 1e-6),
                default=(0.0, -1, -1),
            )
            if node < 0:
                return False
            nodes[node][gpu] = left - share
    return True


def _floor(cpus: float) -> float:
    """Ray counts CPUs in ten-thousandths; a thousandth is fine enough."""
    return max(0.001, math.floor(cpus * 1000) / 1000)


def _configured(config: Config, name: str) -> PoolConfig:
    return config.generation.pool if is_generation(name) else config.rewards[name].pool


def engine_names(config: Config) -> list[str]:
    """Names of the vLLM pools: `generation`, or where policies need several, with the policies of each."""
    engines = engines_of(members_of(config))
    if len(engines) == 1:
        return [GENERATION]
    return [f"{GENERATION} {'+'.join(member.name for member in engine)}" for engine in engines]


def is_generation(name: str) -> bool:
    """Whether a pool samples."""
    return name.partition(" ")[0] == GENERATION


def _engine_pool(name: str, config: Config, gpus: float) -> Pool:
    pool = _pool(name, config.generation.pool, gpus, GENERATION_CPUS)
    # Each of several models has a pool of its own, all alike.
    return pool if name == GENERATION else replace(pool, reason=f"a model of its own; {pool.reason}")


def _pool(name: str, pool: PoolConfig, gpus: float, cpus: float) -> Pool:
    num_gpus = pool.num_gpus if pool.num_gpus is not None else gpus
    num_cpus = pool.num_cpus if pool.num_cpus is not None else cpus
    device = f"{num_gpus:g} GPU each" if num_gpus else "CPU"
    size = (
        f"size {pool.size} as configured"
        if pool.max_size is None
        else f"size {pool.size}, up to {pool.max_size} while blocks wait"
    )
    return Pool(name, pool.size, num_cpus, num_gpus, f"{size}, on {device}", pool.max_size)


def reward_threads(num_pools: int) -> int:
    """Threads of a CPU reward model: the cores shared among the pools, at least one."""
    return max(1, num_cores() // (num_pools + 1))
