"""A run from end to end, and its stages one by one, on a run directory.

    prompts ─► generation ─► rewards ─► selection ─► pairs ─► DPO ─► evaluation ─► report

Invariant: at the end prompts = paired + dropped, counted from the files; otherwise the run is an error. Run again, a finished
run starts no Ray, generates no token and trains no step.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rc_ray.config import Config, fingerprint, load_config
from rc_ray.core.statistics import Interval
from rc_ray.errors import ClusterError, ConfigError, ResumeError
from rc_ray.evaluation.compare import Comparison, ObjectiveComparison
from rc_ray.generation.hardware import choose_dtype
from rc_ray.generation.load import load_line
from rc_ray.ledger import rundir
from rc_ray.ledger.lock import DriverLock
from rc_ray.ledger.rundir import RunDir
from rc_ray.ledger.storage import Folder
from rc_ray.pipeline import stages
from rc_ray.pipeline.fork import fork
from rc_ray.pipeline.pilot import pilot_lines
from rc_ray.pipeline.plan import make_plan
from rc_ray.pipeline.progress import duration
from rc_ray.rewards.figures import remarks, scoring_line
from rc_ray.training.arguments import check_training

ConfigSource = str | Path | Mapping[str, Any] | Config
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
STAGES = ("sample", "score", "select", "train", "evaluate", "report")


@dataclass(frozen=True)
class RunResult:
    """What a run gave.

    Attributes:
        run_dir: path or URI of the run directory.
        metrics: metrics.json: `identity`, `sampling`, and when done `training` and `evaluation`.
    """

    run_dir: str
    metrics: dict[str, Any]

    @property
    def pairs(self) -> str:
        """Folder with the pairs in Parquet."""
        return (Folder.at(self.run_dir) / "pairs").uri

    @property
    def model(self) -> str:
        """Folder of the trained policy."""
        return (Folder.at(self.run_dir) / "model").uri

    def lines(self) -> list[str]:
        """The summary that ends a run."""
        identity = self.metrics["identity"]
        shown = [
            f"run directory  {self.run_dir}",
            f"identity       {identity['prompts']} prompts = {identity['paired']} paired + {identity['dropped']} dropped"
            + (f" + {identity['not_sampled']} not sampled" if identity["not_sampled"] else ""),
        ]
        shown += [f"    {count:6d}  {reason}" for reason, count in sorted(identity["drops"].items(), key=lambda i: -i[1])]
        if "group_p50_s" in self.metrics["sampling"]:
            shown.append(f"engines        {load_line(self.metrics['sampling'])}")
        for name, summary in self.metrics.get("scoring", {}).items():
            shown += [f"rewards        {line}" for line in (scoring_line(name, summary), *remarks(name, summary))]
        if "evaluation" in self.metrics:
            shown += ["rewards before and after training", *("  " + line for line in comparison(self.metrics).lines())]
        if "pilot" in self.metrics:
            shown += pilot_lines(self.metrics["pilot"])
        if "training" in self.metrics:
            shown += [f"training       {line}" for line in self.metrics["training"].get("remarks", [])]
            shown.append(f"model          {self.model}")
        return [*shown, f"report         {self.run_dir}/report/index.html"]


def comparison(metrics: dict[str, Any]) -> Comparison:
    """The before/after comparison recorded in metrics.json."""
    recorded = dict(metrics["evaluation"])
    recorded["objectives"] = {
        name: ObjectiveComparison(**{key: Interval(**value) for key, value in values.items()})
        for name, values in recorded["objectives"].items()
    }
    return Comparison(**recorded)


def run(
    config: ConfigSource,
    overrides: Iterable[str] = (),
    *,
    only: str | None = None,
    fork_from: str | None = None,
    emit: stages.Emit = print,
) -> RunResult | None:
    """Runs all stages, or goes on where an earlier run of the same configuration stopped.

    Args:
        config: YAML file, `embedded:demo`, mapping or `Config`.
        overrides: `a.b=value` strings.
        only: one of `STAGES` to run that stage alone.
        fork_from: another run directory, of which what is still valid is taken over.
        emit: gets every line of progress.

    Returns:
        The result; None when `only` names a stage before `report`.

    Raises:
        RcRayError: see `rc_ray.errors`; everything committed so far is kept.
    """
    started = time.monotonic()
    resolved = load_config(config, overrides)
    if resolved.rounds.number > 1:
        raise ConfigError(
            f"rounds.number = {resolved.rounds.number}: a stage is of one round; give the run directory of that round, {resolved.output}/round-N"
        )
    hashes = stages.check(resolved)
    emit(f"rc_ray    run directory {resolved.output}, configuration {fingerprint(resolved)[:8]}")
    with _told_what_to_do(resolved.output), DriverLock(Folder.at(resolved.output), emit):
        if fork_from is not None:
            fork(fork_from, resolved, hashes, emit)
        run_dir = stages.prepare(resolved, hashes, emit)
        resolved = rundir.in_order(resolved, run_dir)
        todo = pending(resolved, run_dir, only)
        ended = stages.ended_early(resolved, run_dir)
        if todo:
            emit(f"rc_ray    to do: {', '.join(todo)}")
            ended = _run_pending(resolved, run_dir, todo, emit) or ended
        if only in (None, "sample", "score") and run_dir.manifest().get("ended") != ended:
            run_dir.update_manifest(ended=ended)
        if ended is not None and not run_dir.ledger.is_finished(stages.TRAIN):
            emit(
                f"budget    {ended}; the other prompts are not sampled. Go on with a larger budget, or train on what there is: "
                f"rc-ray train {run_dir.root.uri}"
            )
        elif not todo:
            emit("rc_ray    every stage is finished: 0 tokens generated, 0 steps trained")
        if only not in (None, "report"):
            emit(f"rc_ray    {only} finished in {duration(time.monotonic() - started)}")
            return None
        metrics = stages.report(resolved, run_dir)
    result = RunResult(run_dir.root.uri, metrics)
    emit(f"rc_ray    finished in {duration(time.monotonic() - started)}\n")
    for line in result.lines():
        emit(line)
    return result


@contextlib.contextmanager
def _told_what_to_do(output: str) -> Iterator[None]:
    """Makes an error to act on of a disk that takes no more.

    Raises:
        ClusterError: it is full, read-only or closed to this user.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise ClusterError(
            f"output = {output!r}: {error}\n"
            "What was committed is kept; free some space, or make it writable, and run the same command again to resume."
        ) from error


def run_stage(run_directory: str, stage: str, emit: stages.Emit = print) -> RunResult | None:
    """Runs one stage of an existing run directory with the configuration recorded in it."""
    return run(rundir.open_existing(run_directory).config(), only=stage, emit=emit)


def pending(config: Config, run_dir: RunDir, only: str | None) -> list[str]:
    """Stages with work left, in order; `only` narrows them to one."""
    groups, ledger = stages.training_groups(config, run_dir), run_dir.ledger
    ended = stages.ended_early(config, run_dir) is not None
    reached = {stage: ledger.done(stage) for stage in (stages.SAMPLE, stages.SCORE, stages.SELECT)}
    chunks = reached[stages.SAMPLE] if ended else set(groups.chunks())
    trained = ledger.is_finished(stages.TRAIN)
    goes_on = not ended or trained or only is not None
    left = {
        "sample": not ended and not reached[stages.SAMPLE] >= chunks,
        "score": not reached[stages.SCORE] >= chunks,
        "select": not reached[stages.SELECT] >= chunks,
        "train": goes_on and config.training.enabled and not trained,
        "evaluate": goes_on and stages.evaluates(config) and not ledger.is_finished(stages.EVALUATE),
    }
    if (left["sample"] or left["select"]) and trained and only not in ("train", "evaluate", "report"):
        raise ResumeError(
            f"output = {run_dir.root.uri!r}: the policy in model/ was trained on the pairs of the prompts sampled so far, and sampling the "
            "others would change them; give another output"
        )
    return [stage for stage in STAGES if left.get(stage) and only in (None, stage)]


def _run_pending(config: Config, run_dir: RunDir, todo: list[str], emit: stages.Emit) -> str | None:
    """Runs the stages; returns why sampling ended before the last prompt, if it did."""
    from rc_ray.pipeline.cluster import connected
    from rc_ray.pipeline.progress import live_progress

    stages.build_models(config, emit)
    config = stages.pin_models(config, run_dir)
    with connected(config.cluster) as cluster:
        emit(f"ray       {cluster.description}: {cluster.num_nodes} node(s), {cluster.cpus:g} CPUs, {cluster.gpus:g} GPUs")
        resources = (cluster.cpus, cluster.gpus, cluster.num_nodes, cluster.gpus_per_node)
        plan = make_plan(config, *resources)
        if {"sample", "evaluate"} & set(todo):
            on_gpu = plan.generation.num_gpus > 0
            pinned = stages.pin_engines(config, run_dir, on_gpu, emit)
            if pinned.generation.dtype != choose_dtype(config.generation.dtype, on_gpu)[0]:
                plan = make_plan(pinned, *resources)  # else it says why this one was chosen
            config = pinned
        for line in plan.lines():
            emit(f"pool      {line}")
        if "train" in todo:  # what it needs of the machines is missing now, not after days of sampling
            check_training(config.training, plan.train_gpus > 0)
        with live_progress(config.cluster.progress_interval_s, emit) as board:
            session = stages.Session(plan, board, emit)
            ended = None
            if "sample" in todo or "score" in todo:
                # A kill from now on leaves more than was to be trained on.
                if "sample" in todo and run_dir.manifest().get("ended"):
                    run_dir.update_manifest(ended=None)
                ended = stages.sample_and_score(config, run_dir, session, "sample" in todo, "score" in todo)
            if "select" in todo:
                stages.select(config, run_dir, session, ended)
            if ended is not None:
                return ended
            if "train" in todo:
                left = stages.identity(run_dir)["not_sampled"]
                if left and not run_dir.manifest().get("ended"):
                    raise ResumeError(f"{left} prompts are not sampled yet; run `rc-ray run {run_dir.root.uri}` first")
                stages.train(config, run_dir, session)
            if "evaluate" in todo:
                stages.evaluate(config, run_dir, session)
    return None
