"""The Ray Data graph: chunks of prompts -> vLLM pool -> one pool per reward -> committed groups.

    load chunk ─► GenerateGroups ─► commit `sample` ─► ScoreGroups x K ─► commit `score`

One block is one chunk all the way, so a chunk is what is retried and committed. In streaming mode this is one graph; in phased
mode it is run in two, up to the first commit and from there. `attach_*` add the same pools to any Dataset of the user's.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rc_ray.config import Config
from rc_ray.errors import ClusterError, ResumeError
from rc_ray.ledger.ledger import Ledger, chunk_name, chunk_numbers
from rc_ray.ledger.storage import Folder
from rc_ray.pipeline import actors
from rc_ray.pipeline.actors import CHUNK, SAMPLED, Policy
from rc_ray.pipeline.plan import Plan, reward_threads

if TYPE_CHECKING:
    from ray.data import Dataset

# Blocks an actor works on at once: enough for the engine to find new groups while the last ones of a block still decode.
BLOCKS_PER_ENGINE = 4
# Attempts for a block whose actor dies. Ray's own default retries for ever.
MAX_RETRIES = 3


@dataclass(frozen=True)
class GroupRun:
    """Sampling and scoring of one set of prompts by one policy."""

    policy: Policy
    prompts: Folder
    groups: Folder
    ledger: Ledger
    sample_stage: str
    score_stage: str

    def chunks(self) -> list[int]:
        """All chunks of the prompts."""
        return chunk_numbers(self.prompts, ".parquet")


def policy_of(config: Config, model: str | None = None, num_candidates: int | None = None) -> Policy:
    """The policy a configuration names, or another model sampled in the same way."""
    return Policy(
        model=model or config.model,
        revision=None if model else config.revision,
        trust_remote_code=config.trust_remote_code,
        generation=config.generation,
        num_candidates=num_candidates or config.generation.num_candidates,
        seed=config.seed,
    )


def _bounded_retries() -> dict[str, int]:
    """Actor options; Ray 2.60 has no named parameter for them yet and warns about that on each use."""
    warnings.filterwarnings("ignore", message=".*ray_remote_args. is deprecated")
    return {"max_task_retries": MAX_RETRIES}


def attach_generation(dataset: Dataset, policy: Policy, plan: Plan, board: Any = None, stage: str = "sample") -> Dataset:
    """Adds the vLLM pool to a Dataset of `schemas.GROUP` rows with `candidates` null."""
    from ray.data import ActorPoolStrategy

    pool = plan.generation
    return dataset.map_batches(
        actors.GenerateGroups,
        fn_constructor_kwargs={
            "policy": policy,
            "on_gpu": pool.num_gpus > 0,
            "engines_per_host": plan.engines_per_host,
            "board": board,
            "stage": stage,
        },
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=pool.size,
            max_tasks_in_flight_per_actor=BLOCKS_PER_ENGINE,
            max_concurrent_calls_per_actor=BLOCKS_PER_ENGINE,
            enable_true_multi_threading=True,
        ),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
        **_bounded_retries(),
    )


def attach_rewards(dataset: Dataset, config: Config, plan: Plan, board: Any = None, stage: str = "score") -> Dataset:
    """Adds one pool per objective to a Dataset of groups."""
    from ray.data import ActorPoolStrategy

    for number, (objective, reward) in enumerate(config.rewards.items()):
        pool = plan.rewards[objective]
        last = number == len(config.rewards) - 1
        dataset = dataset.map_batches(
            actors.ScoreGroups,
            fn_constructor_kwargs={
                "objective": objective,
                "config": reward,
                "on_gpu": pool.num_gpus > 0,
                "num_threads": reward_threads(len(config.rewards)),
                "board": board if last else None,
                "stage": stage,
            },
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=pool.size),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
            **_bounded_retries(),
        )
    return dataset


def run_groups(run: GroupRun, config: Config, plan: Plan, board: Any, sample: bool = True, score: bool = True) -> None:
    """Samples and scores every chunk that is not committed yet; returns when all are.

    Args:
        sample: whether chunks without candidates are sampled.
        score: whether sampled chunks are scored.

    Raises:
        ClusterError: a pool failed for good; what was committed stays, so the run can be resumed.
        ResumeError: chunks are missing at the end.
    """
    if sample and score and plan.mode == "phased":
        run_groups(run, config, plan, board, score=False)
        run_groups(run, config, plan, board, sample=False)
        return
    chunks = run.chunks()
    sampled = run.ledger.done(run.sample_stage)
    done = run.ledger.done(run.score_stage) if score else sampled
    todo = [c for c in chunks if c not in done and (sample or c in sampled)]
    sizes = {c: run.prompts.read_table(f"{chunk_name(c)}.parquet", ["prompt_id"]).num_rows for c in chunks}
    total = sum(sizes.values())
    import ray

    if sample:
        ray.get(board.begin.remote(run.sample_stage, "prompts", total, sum(sizes[c] for c in chunks if c in sampled)))
    if score:
        ray.get(board.begin.remote(run.score_stage, "prompts", total, sum(sizes[c] for c in chunks if c in done)))
    if todo:
        _execute(run, config, plan, board, todo, sampled, sample, score)
    committed = run.ledger.done(run.score_stage if score else run.sample_stage)
    missing = [c for c in chunks if c not in committed]
    if missing:
        raise ResumeError(
            f"{len(missing)} of {len(chunks)} chunks are not {'scored' if score else 'sampled'} (first: {missing[0]}); "
            "run `rc-ray sample` first"
            if not sample
            else f"{len(missing)} of {len(chunks)} chunks were not committed; run again to resume"
        )


def _execute(
    run: GroupRun, config: Config, plan: Plan, board: Any, todo: list[int], sampled: set[int], sample: bool, score: bool
) -> None:
    import ray
    from ray.exceptions import RayError

    items = [{CHUNK: c, SAMPLED: c in sampled} for c in todo]
    small: dict[str, Any] = {"batch_format": "pyarrow", "num_cpus": plan.task_cpus}
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        actors.load_chunk, batch_size=1, fn_kwargs={"prompts": run.prompts, "groups": run.groups}, **small
    )
    commit = {"ledger": run.ledger, "prompts": run.prompts, "groups": run.groups}
    if sample and any(c not in sampled for c in todo):
        dataset = attach_generation(dataset, run.policy, plan, board, run.sample_stage)
        dataset = dataset.map_batches(
            actors.commit_groups,
            batch_size=None,
            fn_kwargs={**commit, "stage": run.sample_stage, "skip_sampled": True},
            **small,
        )
    if score:
        dataset = attach_rewards(dataset, config, plan, board, run.score_stage)
        dataset = dataset.map_batches(
            actors.commit_groups,
            batch_size=None,
            fn_kwargs={**commit, "stage": run.score_stage, "skip_sampled": False},
            **small,
        )
    try:
        for _ in dataset.select_columns([CHUNK]).iter_internal_ref_bundles():
            pass
    except RayError as error:
        raise ClusterError(
            f"stage {run.score_stage if score else run.sample_stage} failed: {innermost(error)}\n"
            "What was committed is kept; mend the cause and run the same command again to resume."
        ) from error


def innermost(error: BaseException) -> str:
    """The first cause of an error that Ray wrapped, in one line."""
    cause: BaseException = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None and inner is not cause:
        cause = inner
    text = str(cause).strip() or type(cause).__name__
    return f"{type(cause).__name__}: {text.splitlines()[-1] if 'Traceback' in text else text}"[:600]
