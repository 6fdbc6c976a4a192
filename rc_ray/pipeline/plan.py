"""Sizes the pools for a cluster before anything starts, each choice with its reason.

Ray's CPUs are tickets, not cores: a pool whose tickets do not fit waits without a word. So the sum of all pools, one reader
and one writer is compared with the cluster first. Invariant: a plan that is returned fits; one that cannot fit is a
`ClusterError` that says what to change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rc_ray.config import Config, PoolConfig, RuleReward
from rc_ray.errors import ClusterError
from rc_ray.generation.hardware import num_cores

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
    """All pools, the mode, and why."""

    generation: Pool
    rewards: dict[str, Pool]
    mode: str
    mode_reason: str
    task_cpus: float
    train_cpus: float
    train_gpus: float
    engines_per_host: int

    def lines(self) -> list[str]:
        """Human-readable, one line per pool."""
        pools = [self.generation, *self.rewards.values()]
        width = max(len(p.name) for p in pools)
        shown = [f"{p.name:<{width}}  {p.size} actor(s) x {p.num_cpus:g} CPU, {p.num_gpus:g} GPU  ({p.reason})" for p in pools]
        return [*shown, f"{'mode':<{width}}  {self.mode}  ({self.mode_reason})"]


def make_plan(config: Config, cpus: float, gpus: float, num_nodes: int = 1) -> Plan:
    """Pools for a cluster with so many CPUs and GPUs.

    Raises:
        ClusterError: the pools cannot fit even in phased mode.
    """
    pools = {GENERATION: _pool(GENERATION, config.generation.pool, _engine_gpus(config) if gpus else 0.0, GENERATION_CPUS)}
    for name, reward in config.rewards.items():
        is_rule = isinstance(reward, RuleReward)
        pools[name] = _pool(name, reward.pool, 0.0 if is_rule or not gpus else 1.0, RULE_CPUS if is_rule else CLASSIFIER_CPUS)
    rewards = {name: pools[name] for name in config.rewards}
    task_cpus = config.cluster.task_cpus

    mode, reason = "streaming", "all pools fit at once, so scoring overlaps generation"
    gpus_needed = sum(p.total_gpus for p in pools.values())
    if config.cluster.mode != "auto":
        mode, reason = config.cluster.mode, "set in the configuration"
    elif gpus_needed > gpus:
        mode, reason = (
            "phased",
            f"the pools need {gpus_needed:g} GPUs at once and the cluster has {gpus:g}; generation first, scoring after",
        )
    phases = [[pools[GENERATION], *rewards.values()]] if mode == "streaming" else [[pools[GENERATION]], list(rewards.values())]
    for phase in phases:
        needed = sum(p.total_gpus for p in phase)
        if needed > gpus:
            raise ClusterError(
                f"{' + '.join(p.name for p in phase)} need {needed:g} GPUs at once and the cluster has {gpus:g}; lower "
                "generation.pool.size or rewards.<name>.pool.num_gpus (fractions share a GPU), or add GPUs"
            )
        task_cpus = min(task_cpus, _fit_tickets(config, phase, pools, cpus))
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
        generation=pools[GENERATION],
        rewards={name: pools[name] for name in config.rewards},
        mode=mode,
        mode_reason=reason,
        task_cpus=task_cpus,
        train_cpus=train_cpus,
        train_gpus=train_gpus,
        engines_per_host=max(1, math.ceil(pools[GENERATION].size / max(1, num_nodes))),
    )


def _fit_tickets(config: Config, phase: list[Pool], pools: dict[str, Pool], cpus: float) -> float:
    """Cuts the CPU tickets of a phase to what the cluster has, in `pools`; returns those of a small task.

    Tickets only order the work, so smaller ones cost nothing. Those that the user has set are kept.
    """
    fixed = sum(p.total_cpus for p in phase if _configured(config, p.name).num_cpus is not None)
    flexible = sum(p.total_cpus for p in phase) - fixed
    task_cpus = config.cluster.task_cpus
    task_is_fixed = "task_cpus" in config.cluster.model_fields_set
    # One reader and one writer run beside the pools.
    fixed, flexible = (fixed + 2 * task_cpus, flexible) if task_is_fixed else (fixed, flexible + 2 * task_cpus)
    if fixed + flexible <= cpus:
        return task_cpus
    free = cpus * 0.95 - fixed
    if free <= 0 or flexible == 0:
        raise ClusterError(
            f"{' + '.join(p.name for p in phase)}, a reader and a writer need {fixed + flexible:g} CPUs at once, {fixed:g} of them as "
            f"configured, and the cluster has {cpus:g}; lower pool.num_cpus or pool.size, or start it with more (logical) CPUs"
        )
    factor = free / flexible
    for p in phase:
        if _configured(config, p.name).num_cpus is None:
            reason = f"{p.reason}; CPU tickets cut to fit {cpus:g} CPUs"
            pools[p.name] = Pool(p.name, p.size, _floor(p.num_cpus * factor), p.num_gpus, reason)
    return task_cpus if task_is_fixed else _floor(task_cpus * factor)


def _floor(cpus: float) -> float:
    """Ray counts CPUs in ten-thousandths; a thousandth is fine enough."""
    return max(0.001, math.floor(cpus * 1000) / 1000)


def _configured(config: Config, name: str) -> PoolConfig:
    return config.generation.pool if name == GENERATION else config.rewards[name].pool


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
