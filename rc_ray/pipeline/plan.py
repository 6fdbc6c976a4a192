"""Sizes the pools for a cluster before anything starts, each choice with its reason.

Ray's CPUs are tickets, not cores: a pool whose tickets do not fit waits without a word. So the sum of all pools, one reader
and one writer is compared with the cluster first. Invariant: a plan that is returned fits; one that cannot fit is a
`ClusterError` that says what to change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rc_ray.config import Config, PoolConfig, RuleReward
from rc_ray.errors import ClusterError
from rc_ray.generation.hardware import num_cores
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
    train_cpus: float
    train_gpus: float
    engines_per_host: int

    @property
    def generation(self) -> Pool:
        """The vLLM pool, the first where policies need several."""
        return next(iter(self.engines.values()))

    @property
    def num_engines(self) -> int:
        """vLLM engines of all pools."""
        return sum(pool.size for pool in self.engines.values())

    def lines(self) -> list[str]:
        """Human-readable, one line per pool."""
        pools = [*self.engines.values(), *self.rewards.values()]
        width = max(len(p.name) for p in pools)
        shown = [f"{p.name:<{width}}  {p.size} actor(s) x {p.num_cpus:g} CPU, {p.num_gpus:g} GPU  ({p.reason})" for p in pools]
        return [*shown, f"{'mode':<{width}}  {self.mode}  ({self.mode_reason})"]


def make_plan(config: Config, cpus: float, gpus: float, num_nodes: int = 1) -> Plan:
    """Pools for a cluster with so many CPUs and GPUs.

    Raises:
        ClusterError: the pools cannot fit even in phased mode.
    """
    engines = {name: _engine_pool(name, config, gpus) for name in engine_names(config)}
    pools = dict(engines)
    for name, reward in config.rewards.items():
        is_rule = isinstance(reward, RuleReward)
        pools[name] = _pool(name, reward.pool, 0.0 if is_rule or not gpus else 1.0, RULE_CPUS if is_rule else CLASSIFIER_CPUS)
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
            pools, task_cpus = _fit(config, phases, pools, cpus, gpus)
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
    if training.enabled and (training.num_workers * train_gpus > gpus or training.num_workers * train_cpus > cpus):
        raise ClusterError(
            f"training.num_workers = {training.num_workers} x ({train_cpus:g} CPU, {train_gpus:g} GPU) does not fit the cluster's "
            f"{cpus:g} CPUs and {gpus:g} GPUs; lower num_workers or the share per worker"
        )
    return Plan(
        engines={name: pools[name] for name in engines},
        rewards={name: pools[name] for name in config.rewards},
        mode="streaming" if way == "streaming" else "phased",
        mode_reason=reason,
        phases=phases,
        task_cpus=task_cpus,
        train_cpus=train_cpus,
        train_gpus=train_gpus,
        engines_per_host=max(1, math.ceil(sum(pools[name].size for name in engines) / max(1, num_nodes))),
    )


def _fit(
    config: Config, phases: list[list[str]], pools: dict[str, Pool], cpus: float, gpus: float
) -> tuple[dict[str, Pool], float]:
    """Pools with CPU tickets cut to what the cluster has, and the tickets of a small task.

    Tickets only order the work, so smaller ones cost nothing. Those that the user has set are kept.

    Raises:
        ClusterError: the pools of a phase cannot run at the same time.
    """
    pools, task_cpus = dict(pools), config.cluster.task_cpus
    task_is_fixed = "task_cpus" in config.cluster.model_fields_set
    for phase in phases:
        names = " + ".join(phase)
        needed = sum(pools[name].total_gpus for name in phase)
        if needed > gpus:
            raise ClusterError(
                f"{names} need {needed:g} GPUs at once and the cluster has {gpus:g}; lower generation.pool.size or "
                "rewards.<name>.pool.num_gpus (fractions share a GPU), or add GPUs"
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
            pools[name] = Pool(name, pool.size, _floor(pool.num_cpus * free / flexible), pool.num_gpus, reason)
        if not task_is_fixed:
            task_cpus = min(task_cpus, _floor(config.cluster.task_cpus * free / flexible))
    return pools, task_cpus


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
    pool = _pool(name, config.generation.pool, _engine_gpus(config) if gpus else 0.0, GENERATION_CPUS)
    # Each of several models has a pool of its own, all alike.
    return pool if name == GENERATION else replace(pool, reason=f"a model of its own; {pool.reason}")


def _pool(name: str, pool: PoolConfig, gpus: float, cpus: float) -> Pool:
    num_gpus = pool.num_gpus if pool.num_gpus is not None else gpus
    num_cpus = pool.num_cpus if pool.num_cpus is not None else cpus
    device = f"{num_gpus:g} GPU each" if num_gpus else "CPU"
    return Pool(name, pool.size, num_cpus, num_gpus, f"size {pool.size} as configured, on {device}")


def _engine_gpus(config: Config) -> float:
    engine = config.generation.engine
    return float(engine.get("tensor_parallel_size", 1) * engine.get("pipeline_parallel_size", 1))


def reward_threads(num_pools: int) -> int:
    """Threads of a CPU reward model: the cores shared among the pools, at least one."""
    return max(1, num_cores() // (num_pools + 1))
