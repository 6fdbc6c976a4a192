"""The Ray Data graph: chunks of prompts -> vLLM pool -> one pool per reward -> committed groups.

    load chunk ─► GenerateGroups ─► commit `sample` ─► ScoreGroups x K ─► commit `score`

One block is one chunk all the way, so a chunk is what is retried and committed. In streaming mode this is one graph; in phased
mode each phase is a graph of its own, from commit to commit. `attach_*` add the same pools to any Dataset of the user's, `attach_phases` as
the plan has them.

The pools use `Dataset.map_batches_internal`, since `map_batches` refuses whole blocks (`batch_size=None`) where there are GPUs (Ray 2.60). A block goes
to the actor of a pool that has the fewest (`_ActorPool.select_actors`), not to one on the block's node, which Ray would rather: blocks are
small and take long, so a full engine beside an idle one costs more than moving them.

An actor that dies is replaced by Ray and its blocks are run again without a limit of Ray's; `attempts.py` sets the limit.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rc_ray.config import BudgetConfig, Config
from rc_ray.errors import ClusterError, ResumeError, computing
from rc_ray.generation.hardware import cpu_runtime_env
from rc_ray.ledger.ledger import Ledger, chunk_name
from rc_ray.ledger.storage import Folder
from rc_ray.pipeline import actors
from rc_ray.pipeline.actors import CHUNK, SAMPLED, SCORED
from rc_ray.pipeline.adaptive import AdaptiveGroups
from rc_ray.pipeline.budget import exhausted
from rc_ray.pipeline.placement import EnginePlacement
from rc_ray.pipeline.plan import Plan, Pool, is_generation, reward_threads
from rc_ray.pipeline.policies import Policy, engines_of
from rc_ray.pipeline.watchdog import TooManyFailedError, check_failed, guard, session_counts
from rc_ray.rewards.code import named_code, read_code

if TYPE_CHECKING:
    from ray.data import Dataset
# Blocks an actor works on at once: enough for the engine to find new groups while the last ones of a block still decode.
BLOCKS_PER_ENGINE = 4
# For each reward actor, blocks between their first reward and their commit: the one it works on and the next.
BLOCKS_PER_SCORER = 2
# Blocks of a phase between loading and commit, for each that its actors can work on: enough for none to wait, and for slow ones among them.
BLOCKS_IN_WORK = 3


@dataclass(frozen=True)
class GroupRun:
    """Sampling and scoring of one set of prompts by one policy."""

    policy: Policy
    prompts: Folder
    groups: Folder
    ledger: Ledger
    prompts_stage: str
    sample_stage: str
    score_stage: str
    bounded: bool = False
    """Whether the budget counts for it."""

    select_stage: str | None = None
    """Stage that makes pairs and drops of it, in these folders."""

    selected: tuple[Folder, ...] = ()

    def sizes(self) -> dict[int, int]:
        """Prompts in each chunk, from what was recorded when they were split; no chunk is opened."""
        facts = self.ledger.facts(self.prompts_stage)
        size = facts["chunk_size"]
        return {chunk: min(size, facts["prompts"] - chunk * size) for chunk in range(facts["chunks"])}

    def chunks(self) -> list[int]:
        """All chunks of the prompts."""
        return list(self.sizes())

    def done(self, stage: str) -> set[int]:
        """Chunks that a stage has committed; those with all rewards have each of them, whatever phases the run has now."""
        whole = self.ledger.done(self.score_stage) if stage.startswith(f"{self.score_stage}_") else set()
        return self.ledger.done(stage) | whole


def attach_generation(
    dataset: Dataset, policy: Policy, config: Config, plan: Plan, board: Any = None, stage: str = "sample",
    adaptive: dict[str, Any] | None = None,
) -> Dataset:  # fmt: skip
    """Adds the vLLM pools, one per different model, to a Dataset of `schemas.GROUP` rows with `candidates` null.

    Args:
        adaptive: further arguments of `AdaptiveGroups`, which then takes the place of `GenerateGroups`.
    """
    for engine, pool in zip(range(len(engines_of(policy.members))), plan.engines.values(), strict=False):
        dataset = _attach_engine(dataset, policy, config, plan, board, stage, adaptive, engine, pool)
    return dataset


def _attach_engine(
    dataset: Dataset, policy: Policy, config: Config, plan: Plan, board: Any, stage: str, adaptive: dict[str, Any] | None, engine: int,
    pool: Pool,
) -> Dataset:  # fmt: skip
    from ray.data import ActorPoolStrategy

    # A block that waits for its rewards leaves the engine to others.
    blocks = BLOCKS_PER_ENGINE * (2 if adaptive else 1)
    worker: type[actors.GenerateGroups] = AdaptiveGroups if adaptive else actors.GenerateGroups
    if engine:  # a name of its own in what Ray and the watchdog say
        worker = type(f"GenerateGroups_{engine + 1}", (worker,), {})
    resources: dict[str, Any] = {"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus}
    if pool.num_gpus == 0:
        resources["runtime_env"] = cpu_runtime_env()
    if plan.across_nodes:
        placement = EnginePlacement(round(pool.num_gpus), pool.num_cpus)
        placement.remove_after(dataset)
        resources |= {"num_gpus": 0, "ray_remote_args_fn": placement.arguments}
    return _with_options(dataset, config).map_batches_internal(
        worker,
        fn_constructor_kwargs={
            "policy": policy,
            "on_gpu": pool.num_gpus > 0,
            "gpu_share": pool.num_gpus,
            "across_nodes": plan.across_nodes,
            "engines_per_host": plan.engines_per_host,
            "board": board,
            "stage": stage,
            "max_attempts": config.cluster.max_attempts,
            "engine": engine,
            **(adaptive or {}),
        },
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            **_sizes(pool),
            # Ray Data adds actors when the blocks given to a pool are 1.75 times those that it can work on (`AutoscalingConfig`), so some have to
            # wait at the actors of a pool that may grow. Where it may not, a block waits for whichever actor is free first.
            max_tasks_in_flight_per_actor=blocks if pool.max_size is None else 2 * blocks,
            max_concurrent_calls_per_actor=blocks,
            enable_true_multi_threading=True,
        ),
        **resources,
    )


def _with_options(dataset: Dataset, config: Config) -> Dataset:
    """The same Dataset, whose blocks go to the actor with the fewest wherever they lie, and in which nothing has to finish sooner than in a run."""
    # In a run the watchdog takes its place.
    dataset.context.execution_no_progress_timeout_s = math.ceil(config.cluster.stall_timeout_s)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray 2.60 means to take the switch away and decide by itself
        dataset.context.execution_options.actor_locality_enabled = False
    return dataset


def _sizes(pool: Pool) -> dict[str, Any]:
    """The size of a pool for Ray Data's `ActorPoolStrategy`."""
    return {"size": pool.size} if pool.max_size is None else {"min_size": pool.size, "max_size": pool.max_size}


def _scorer_arguments(config: Config, plan: Plan, objective: str, board: Any, stage: str, num_pools: int) -> dict[str, Any]:
    code = named_code(objective, config.rewards[objective])
    return {
        "objective": objective,
        "config": config.rewards[objective],
        "content": None if code is None else read_code(*code),
        "on_gpu": plan.rewards[objective].num_gpus > 0,
        "num_threads": reward_threads(num_pools),
        "board": board,
        "stage": stage,
        "max_attempts": config.cluster.max_attempts,
    }


def start_scorers(config: Config, plan: Plan, board: Any, stage: str) -> dict[str, list[Any]]:
    """The reward pools as actors that are asked directly; they live as long as their handles."""
    import ray

    scorers = {}
    for objective, pool in plan.rewards.items():
        actor = ray.remote(actors.ScoreGroups).options(  # type: ignore[attr-defined]
            num_cpus=pool.num_cpus, num_gpus=pool.num_gpus, max_restarts=-1, max_task_retries=-1
        )
        arguments = _scorer_arguments(config, plan, objective, board, stage, len(plan.rewards))
        scorers[objective] = [actor.remote(**arguments, first=False, last=False, keep_scored=False) for _ in range(pool.size)]
    return scorers


def attach_rewards(
    dataset: Dataset, config: Config, plan: Plan, board: Any = None, stage: str = "score", objectives: list[str] | None = None,
    keep_scored: bool = False,
) -> Dataset:  # fmt: skip
    """Adds one pool per objective, or per one of those named, to a Dataset of groups.

    Rewards that a block has already are replaced, or kept if so asked.
    """
    from ray.data import ActorPoolStrategy

    names = list(config.rewards) if objectives is None else objectives
    for objective in names:
        pool = plan.rewards[objective]
        dataset = _with_options(dataset, config).map_batches_internal(
            # A name of its own in what Ray and the watchdog say.
            type(f"ScoreGroups_{objective}", (actors.ScoreGroups,), {}),
            fn_constructor_kwargs={
                **_scorer_arguments(config, plan, objective, board, stage, len(names)),
                "first": objective == names[0],
                "last": objective == names[-1],
                "keep_scored": keep_scored,
            },
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(**_sizes(pool)),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
        )
    return dataset


def attach_phases(dataset: Dataset, config: Config, plan: Plan, board: Any = None, policy: Policy | None = None) -> Dataset:
    """Adds the rewards of every objective to a Dataset of groups, and before them the candidates of a policy, if one is given.

    Where all pools fit at once the result is lazy. Otherwise the Dataset is computed here, and kept in Ray's object store: first as it is
    given, since that may need a pool of its own, then phase after phase of the plan.
    """
    in_phases = len(plan.phases) > 1
    if in_phases:
        dataset = dataset.materialize()
    for pools in plan.phases:
        if policy is not None and any(map(is_generation, pools)):
            dataset = attach_generation(dataset, policy, config, plan, board)
        objectives = [name for name in pools if not is_generation(name)]
        if objectives:
            dataset = attach_rewards(dataset, config, plan, board, objectives=objectives)
        if in_phases:
            dataset = dataset.materialize()
    return dataset


def run_groups(run: GroupRun, config: Config, plan: Plan, board: Any, sample: bool = True, score: bool = True) -> str | None:
    """Samples and scores every chunk that is not committed yet, phase after phase; returns when all are, or the budget is used up.

    Args:
        sample: whether chunks without candidates are sampled.
        score: whether sampled chunks are scored.

    Returns:
        Why sampling ended before the last chunk, or None.

    Raises:
        ClusterError: a pool failed for good, nothing moved, or too much failed; what was committed stays, so the run can be resumed.
        ResumeError: chunks are missing at the end.
    """
    import ray

    sizes = run.sizes()
    ended = budget_end(run, config)  # before this session; what is sampled may still have to be scored
    before = committed(run) if _is_limited(run, config) else (0, 0)
    ray.get(board.bound.remote(config.budget if _is_limited(run, config) else None, run.sample_stage, run.score_stage, *before))
    if run.policy.max_candidates is not None:  # rewards decide how many candidates there are, so the two stages are one
        sample = score = True
        if len(plan.phases) > 1:
            raise ClusterError(
                f"generation.max_candidates needs all pools at once, but {plan.mode_reason}; remove it or add resources"
            )
    unsampled = set(sizes) - run.ledger.done(run.sample_stage) if ended is None else set()
    if unsampled and not sample:
        raise ResumeError(
            f"{len(unsampled)} of {len(sizes)} chunks are not sampled (first: {min(unsampled)}); run `rc-ray sample` first"
        )
    if unsampled and run.bounded and config.budget.target_pairs is not None and not (score and len(plan.phases) == 1):
        mode = plan.mode_reason if score else "only sampling is asked for"
        raise ClusterError(
            f"budget.target_pairs = {config.budget.target_pairs} needs rewards while sampling, but {mode}; "
            "use budget.max_generated_tokens or budget.deadline, or add resources"
        )
    last = list(config.rewards)[-1]
    for pools in plan.phases:
        objectives = [name for name in pools if not is_generation(name) and score]
        stage = run.score_stage if last in objectives else f"{run.score_stage}_{objectives[-1]}" if objectives else None
        _run_phase(run, config, plan, board, sizes, sample and any(map(is_generation, pools)), objectives, stage)
    why: str | None = ray.get(board.sampling_ended.remote())
    return why if set(sizes) - run.ledger.done(run.sample_stage) else None  # nothing is left when the last blocks used it up


def _run_phase(
    run: GroupRun, config: Config, plan: Plan, board: Any, sizes: dict[int, int], sample: bool, objectives: list[str],
    score_stage: str | None,
) -> None:  # fmt: skip
    """Runs generation and/or the rewards of some objectives for all chunks.

    Args:
        sizes: prompts per chunk.
        score_stage: under which the rewards are committed; None without objectives.
    """
    import ray

    sampled = run.ledger.done(run.sample_stage)
    finished = score_stage or run.sample_stage
    done = run.done(finished)
    ended = ray.get(board.sampling_ended.remote()) is not None
    todo = [c for c in sizes if c not in done and (c in sampled or (sample and not ended))]
    for stage in (run.sample_stage if sample else None, score_stage):
        if stage is not None:
            before = sum(sizes[c] for c in run.done(stage))
            ray.get(board.begin.remote(stage, "prompts", sum(sizes.values()), before))
    if not todo:
        return
    scored = {name: run.ledger.done(f"{run.score_stage}_{name}") for name in config.rewards}
    items = [{CHUNK: c, SAMPLED: c in sampled, SCORED: " ".join(n for n, of in scored.items() if c in of)} for c in todo]
    # Tasks are short beside the sampling of a block. Without a limit Ray starts a process for each that its tickets allow, all at once, and
    # each of them imports for seconds while the engines start.
    small: dict[str, Any] = {"batch_format": "pyarrow", "num_cpus": plan.task_cpus, "concurrency": 1 + plan.num_engines}
    # Not `from_arrow`: it starts a task for each item, all at once, to count the rows.
    # Loading waits for room, so it takes no CPU from those who make it.
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        actors.load_chunk,
        batch_size=1,
        fn_kwargs={"prompts": run.prompts, "groups": run.groups, "board": board},
        **{**small, "num_cpus": 0},
    )
    in_work = (2 * BLOCKS_PER_ENGINE * plan.num_engines if sample else 0) + BLOCKS_PER_SCORER * sum(
        plan.rewards[name].largest for name in objectives
    )
    ray.get(board.hold_loading.remote(BLOCKS_IN_WORK * in_work, finished))
    # While rewards are counted beside sampling: as many blocks as the engines hold may wait for theirs.
    streaming = sample and score_stage == run.score_stage and run.policy.max_candidates is None
    ray.get(board.hold_sampling.remote(2 * BLOCKS_PER_ENGINE * plan.num_engines if streaming else None))
    ray.get(board.hold_scoring.remote(BLOCKS_PER_SCORER * sum(plan.rewards[name].largest for name in objectives)))
    commit = {
        "ledger": run.ledger,
        "prompts": run.prompts,
        "groups": run.groups,
        "objectives": list(config.rewards),
        "board": board,
        "by_policy": run.policy.is_named,
    }
    adaptive = None
    if run.policy.max_candidates is not None:
        assert score_stage is not None
        scorers = start_scorers(config, plan, board, score_stage)
        adaptive = {"scorers": scorers, "selection": config.selection, "score_stage": score_stage}
    if sample and (adaptive or any(c not in sampled for c in todo)):
        dataset = attach_generation(dataset, run.policy, config, plan, board, run.sample_stage, adaptive)
        kwargs = {**commit, "stage": run.sample_stage, "skip_sampled": True, "selection": None}
        dataset = dataset.map_batches(actors.commit_groups, batch_size=None, fn_kwargs=kwargs, **small)
    if score_stage is not None:
        if adaptive is None:
            dataset = attach_rewards(dataset, config, plan, board, score_stage, objectives, keep_scored=True)
        selection = config.selection if score_stage == run.score_stage else None
        kwargs = {**commit, "stage": score_stage, "skip_sampled": False, "selection": selection}
        dataset = dataset.map_batches(actors.commit_groups, batch_size=None, fn_kwargs=kwargs, **small)
    dataset = dataset.select_columns([CHUNK])
    dataset.context.target_max_block_size = None  # a block is a chunk: large ones must not be cut in two
    _execute(dataset, run, config, board, finished)
    # Without the budget's end, all chunks; with it, those that were sampled.
    ended = ray.get(board.sampling_ended.remote()) is not None
    missing = (run.ledger.done(run.sample_stage) if ended else set(sizes)) - run.done(finished)
    if missing:
        raise ResumeError(f"{len(missing)} of {len(sizes)} chunks were not committed by {finished}; run again to resume")


def _execute(dataset: Dataset, run: GroupRun, config: Config, board: Any, stage: str) -> None:
    import ray

    try:
        with resumable(stage):
            for _ in guard(dataset, board, config.cluster).iter_internal_ref_bundles():
                pass
            stages, errors = ray.get(board.state.remote())
        check_failed(session_counts(stages), errors, config.cluster.max_failed_fraction)
    except TooManyFailedError:
        give_back_failed(run, list(config.rewards), stage)
        raise


def give_back_failed(run: GroupRun, objectives: list[str], stage: str) -> None:
    """Takes back the commits of chunks with failed groups, so that the next run does them again; what was made of them first."""
    of_candidates = [run.score_stage, *(f"{run.score_stage}_{name}" for name in objectives)]
    for name in (run.sample_stage, stage):
        for chunk, counts in run.ledger.counts(name):
            if counts.get("failed"):  # rewards that another run has scored say only that they are there
                if run.select_stage is not None:
                    run.ledger.give_back(run.select_stage, chunk)
                for folder in run.selected:
                    folder.remove(f"{chunk_name(chunk)}.parquet")
                for each in (*(of_candidates if name == run.sample_stage else ()), name):
                    run.ledger.give_back(each, chunk)


def resumable(stage: str) -> contextlib.AbstractContextManager[None]:
    """`computing`, for a stage of a run."""
    return computing(f"stage {stage}", "\nWhat was committed is kept; mend the cause and run the same command again to resume.")


def committed(run: GroupRun) -> tuple[int, int]:
    """Prompts with a pair, and tokens, in what is committed."""
    return int(run.ledger.totals(run.score_stage).get("paired", 0)), int(run.ledger.totals(run.sample_stage).get("tokens", 0))


def budget_end(run: GroupRun, config: Config) -> str | None:
    """Why no more may be sampled, by what is committed; None when more may or the budget does not count."""
    return exhausted(config.budget, *committed(run)) if _is_limited(run, config) else None


def _is_limited(run: GroupRun, config: Config) -> bool:
    """Whether a budget counts. Without one, the commit records need not be read."""
    return run.bounded and config.budget != BudgetConfig()
