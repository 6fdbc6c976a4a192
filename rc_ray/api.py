"""The Python interface: a whole run, and each stage as a function on Ray Datasets or paths.

Two ways to use a stage:

* On a **run directory** (no data argument): resumable, committed chunk by chunk. `sample(config)` runs the stage there and
  returns its result as a Dataset.
* On **your own data**: `sample(config, prompts)`, `score(config, groups)`, `select(config, groups)`, `train(config, pairs, output)`.
  Datasets in, lazy Datasets out, as everywhere in Ray Data: nothing is computed before it is consumed, and nothing is kept for
  a resume; call `.materialize()` or write it out to keep it. Where a cluster has no room for all pools at once, `score` computes in phases.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from rc_ray.config import (
    ClusterConfig,
    Config,
    PromptsConfig,
    RewardTrainingConfig,
    SelectionConfig,
    load_config,
    load_reward_training,
)
from rc_ray.core import schemas
from rc_ray.core.ids import bad_row_id, prompt_id
from rc_ray.core.measure import Fitted, Summary, add_up, fit
from rc_ray.core.selection import needs_fit, select_pairs, summarize
from rc_ray.errors import ClusterError, ConfigError, DataError, computing
from rc_ray.generation.arguments import check_engine_arguments
from rc_ray.ledger import rundir
from rc_ray.ledger.storage import Folder
from rc_ray.pipeline import run as pipeline
from rc_ray.pipeline import stages
from rc_ray.pipeline.graph import attach_phases
from rc_ray.pipeline.plan import Plan, make_plan
from rc_ray.pipeline.policies import policy_of
from rc_ray.pipeline.preview import plan
from rc_ray.pipeline.progress import start_board
from rc_ray.pipeline.prompts import BadRow, SeenPrompts, check_source, read_cells, to_messages
from rc_ray.pipeline.rounds import run_rounds
from rc_ray.pipeline.run import ConfigSource, RunResult
from rc_ray.training.arguments import check_training
from rc_ray.training.reward_model import RewardTrainingResult, prepare, train_here, train_on_ray

if TYPE_CHECKING:
    from ray.data import Dataset

    from rc_ray.evaluation.calibrate import CalibrationReport
    from rc_ray.training.dpo import Preflight

__all__ = [
    "Selection",
    "calibrate",
    "evaluate",
    "plan",
    "preflight",
    "report",
    "run",
    "sample",
    "score",
    "select",
    "train",
    "train_reward",
]


class Selection(NamedTuple):
    """Pairs and drops of a selection; together they have one row per group."""

    pairs: Dataset
    drops: Dataset


def run(
    config: ConfigSource,
    overrides: Iterable[str] = (),
    *,
    prompts: Dataset | Iterable[Any] | None = None,
    fork_from: str | None = None,
    emit: stages.Emit = print,
) -> RunResult:
    """Runs all stages in the run directory `config.output`, or resumes there. See `rc_ray.pipeline.run.run`, and for several rounds
    `rc_ray.pipeline.rounds.run_rounds`.

    Args:
        prompts: strings or message lists in memory, or a Dataset with the column `prompts.column`, in the place of
            `prompts.path`. They are kept in `<output>-prompts`, so that the run can be resumed, with or without giving them again.
    """
    if prompts is not None:
        config, overrides = _keep_prompts(config, overrides, prompts), ()
    return run_rounds(config, overrides, fork_from=fork_from, emit=emit)


def sample(config: ConfigSource, prompts: Dataset | str | None = None, *, overrides: Iterable[str] = ()) -> Dataset:
    """Samples N candidates per prompt with vLLM.

    Args:
        config: see `run`.
        prompts: None samples the prompts of the configuration into its run directory. A path or a Dataset with the column
            `config.prompts.column` gives a lazy Dataset of groups instead.

    Returns:
        Groups (`rc_ray.core.schemas.GROUP`), one row per row of the source; a row that holds no prompt, or a prompt that
        occurred before, is a group without candidates whose `failure` says why.
    """
    resolved = load_config(config, overrides)
    if prompts is None:
        pipeline.run(resolved, only="sample")
        return _read_groups(resolved)
    from rc_ray.pipeline.graph import attach_generation

    check_engine_arguments(resolved.generation.engine)
    if resolved.generation.max_candidates is not None:
        raise ConfigError(
            f"generation.max_candidates = {resolved.generation.max_candidates}: adaptive sampling needs the rewards while it samples; "
            "use `run`, or leave it out here"
        )
    source = resolved.prompts
    if isinstance(prompts, str):
        source = resolved.prompts.model_copy(update={"path": prompts})
        check_source("prompts", source)
    plan = _connect(resolved)
    if isinstance(prompts, str):
        cells: Iterator[Any] = read_cells("prompts", source)
    else:
        column = resolved.prompts.column
        if column not in (prompts.columns() or []):
            raise DataError(
                f"prompts.column = {column!r}: the Dataset has no such column (it has: {', '.join(prompts.columns() or [])})"
            )
        cells = (row[column] for row in prompts.iter_rows())
    import ray

    blocks = list(_prompt_blocks(cells, resolved.prompts, resolved.cluster.chunk_size))
    if not blocks:
        raise DataError("prompts: there is no row to sample")
    return attach_generation(ray.data.from_arrow(blocks), policy_of(resolved), resolved, plan, start_board())


def score(config: ConfigSource, groups: Dataset | str | None = None, *, overrides: Iterable[str] = ()) -> Dataset:
    """Adds the rewards of every objective to groups.

    Args:
        config: see `run`.
        groups: None scores the candidates of the run directory. A folder of Parquet files or a Dataset with `prompt` and
            `candidates` gives a Dataset instead: lazy where the cluster has room for all pools at once, otherwise computed here, in the
            phases of the plan.

    Raises:
        ConfigError, DataError, ModelError: the configuration, the groups or the models cannot be used. ClusterError: scoring failed here.
    """
    resolved = load_config(config, overrides)
    if groups is None:
        pipeline.run(resolved, only="score")
        return _read_groups(resolved)

    _check_input(groups, "groups")
    stages.check_rewards(resolved)
    plan = _connect(resolved)
    with computing("scoring"):
        return attach_phases(_dataset(groups), resolved, plan, start_board())


def select(config: ConfigSource, groups: Dataset | str | None = None, *, overrides: Iterable[str] = ()) -> Selection:
    """Applies the RC rule as a distributed map.

    Args:
        config: see `run`.
        groups: None selects from the run directory. A folder of Parquet files or a Dataset of scored groups gives Datasets
            instead; the groups are materialised, since a scale over all the data needs a pass before the selection.
    """
    resolved = load_config(config, overrides)
    if groups is None:
        pipeline.run(resolved, only="select")
        import ray

        _connect(resolved)
        run_dir = rundir.open_existing(resolved.output)
        return Selection(ray.data.read_parquet(run_dir.pairs.uri), ray.data.read_parquet(run_dir.drops.uri))
    _check_input(groups, "groups")
    _connect(resolved)
    scored = _dataset(groups).materialize()
    fitted = _fit(scored, resolved.selection)

    def pairs(table: pa.Table) -> pa.Table:
        return select_pairs(table, resolved.selection, fitted).pairs

    def drops(table: pa.Table) -> pa.Table:
        return select_pairs(table, resolved.selection, fitted).drops

    return Selection(scored.map_batches(pairs, batch_format="pyarrow"), scored.map_batches(drops, batch_format="pyarrow"))


def train(
    config: ConfigSource, pairs: Dataset | str | None = None, output: str | None = None, *, overrides: Iterable[str] = ()
) -> str:
    """Trains the policy with DPO on Ray Train and returns its folder.

    Args:
        config: see `run`.
        pairs: None trains on the pairs of the run directory. Otherwise a folder of Parquet files or a Dataset with `prompt`,
            `chosen`, `rejected` as message lists.
        output: where the policy goes when `pairs` is given; must be new.
    """
    resolved = load_config(config, overrides)
    if pairs is None:
        pipeline.run(resolved, only="train")
        return f"{rundir.open_existing(resolved.output).model.uri}"
    if output is None:
        raise ConfigError("train: `output` is missing; with pairs of your own, say where the policy goes")
    if resolved.generation.adapter is not None:
        raise ConfigError(
            f"generation.adapter = {resolved.generation.adapter!r}: DPO starts from `model`, without the adapter; merge it into the model and "
            "give that, or leave it out"
        )
    check_training(resolved.training)
    folder = Folder.at(output)
    from rc_ray.pipeline.progress import live_progress
    from rc_ray.training.dpo import train_dpo
    from rc_ray.training.workers import BEGUN

    work = folder.beside(".training")
    if not folder.is_empty() and not work.exists(BEGUN):
        raise DataError(f"output = {output!r}: the folder is not empty; give a new one")
    plan = _connect(resolved)
    if isinstance(pairs, str):
        source = Folder.at(pairs)
    else:
        from ray.data import SaveMode

        source = work / "pairs"
        pairs.write_parquet(source.uri, mode=SaveMode.OVERWRITE)
    with live_progress(resolved.cluster.progress_interval_s, print) as board:
        facts = train_dpo(resolved, source, folder, work, plan.train_cpus, plan.train_gpus, board, work / "reference")
    for line in facts["remarks"]:
        print(f"training  {line}")
    return folder.uri


def preflight(config: ConfigSource, pairs: str | None = None, *, overrides: Iterable[str] = ()) -> Preflight:
    """Looks at all pairs as training would, before any step, and trains nothing.

    Args:
        config: see `run`.
        pairs: None looks at the pairs of the run directory. Otherwise a folder of Parquet files as for `train`.

    Raises:
        DataError: what is wrong with how many pairs.
    """
    from rc_ray.training.dpo import preflight as look

    resolved = load_config(config, overrides)
    check_training(resolved.training)
    source = rundir.open_existing(resolved.output).pairs if pairs is None else Folder.at(pairs)
    plan = _connect(resolved)
    check_training(resolved.training, plan.train_gpus > 0)
    return look(resolved, source, plan.train_cpus)


def evaluate(config: ConfigSource, model: str | None = None, *, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Rewards on held-out prompts before and after training.

    Args:
        config: see `run`; needs `evaluation.prompts`.
        model: None evaluates the policy that the run trained. Otherwise a model to compare with `config.model`,
            which is taken without `generation.adapter`.

    Returns:
        The comparison as in metrics.json.
    """
    resolved = load_config(config, overrides)
    if resolved.evaluation.prompts is None:
        raise ConfigError("evaluation.prompts: missing; give held-out prompts to evaluate on")
    if model is None:
        pipeline.run(resolved, only="evaluate")
        return dict(rundir.open_existing(resolved.output).ledger.facts(stages.EVALUATE))
    from rc_ray.evaluation.compare import compare
    from rc_ray.models.resolve import check_model

    check_model("model", model)
    check_source("evaluation.prompts", resolved.evaluation.prompts)
    stages.check_rewards(resolved)
    import ray

    plan = _connect(resolved)
    tables, board = [], start_board()
    held_out = resolved.evaluation.prompts
    cells = read_cells("evaluation.prompts", held_out)
    prompts = ray.data.from_arrow(list(_prompt_blocks(cells, held_out, resolved.cluster.chunk_size)))
    with computing("sampling and scoring held-out prompts"):
        for name in (None, model):
            policy = policy_of(resolved, name, resolved.evaluation.num_samples)
            tables.append(_table(attach_phases(prompts, resolved, plan, board, policy)))
    before, after = tables
    return compare(before, after, list(resolved.rewards), resolved.evaluation, resolved.seed).as_dict()


def calibrate(
    config: ConfigSource, pairs: Mapping[str, str], output: str | None = None, *, precision: float = 0.9,
    overrides: Iterable[str] = (), emit: stages.Emit = print,
) -> CalibrationReport:  # fmt: skip
    """Says how far the configured rewards can be trusted, on labelled pairs.

    Args:
        config: see `run`; its rewards are what is judged.
        pairs: per objective a file whose labels are about it (`rc_ray.training.preferences`). Every objective scores every pair.
        output: None, or a new folder for `calibration.json` and `reliability.png`.
        precision: share of RC pairs that shall agree with the labels; the report gives margins for it.

    Raises:
        ConfigError, DataError, ModelError: the configuration, the pairs or the models cannot be used. ClusterError: scoring failed.
    """
    from rc_ray.evaluation.calibrate import calibrate_groups, check_precision, labelled_groups, other_rule, plot_reliability
    from rc_ray.training.preferences import read_preferences

    resolved = load_config(config, overrides)
    unknown = sorted(set(pairs) - set(resolved.rewards))
    if unknown or not pairs:
        named = f"{unknown[0]!r} is no objective" if unknown else "no labelled pairs are given"
        raise ConfigError(f"pairs: {named}; give OBJECTIVE=FILE for one or more of {', '.join(resolved.rewards)}")
    if output is not None and not Folder.at(output).is_empty():
        raise DataError(f"output = {output!r}: the folder is not empty; give a new one")
    check_precision(precision)
    stages.check_rewards(resolved)
    tables = []
    for name, path in pairs.items():
        preferences, left_out = read_preferences(path)
        for reason, count in left_out.items():
            emit(f"calibrate  {count} rows of {path} left out: {reason}")
        tables.append(labelled_groups(name, ((p.messages, p.chosen, p.rejected) for p in preferences)))
    import ray

    plan = _connect(resolved)
    labelled = pa.concat_tables(tables).combine_chunks()
    size = resolved.cluster.chunk_size
    groups = ray.data.from_arrow(labelled, override_num_blocks=-(-labelled.num_rows // size))
    with computing("scoring the labelled pairs"):
        scored = _table(attach_phases(groups, resolved, plan, start_board()))
    objectives = list(resolved.rewards)
    found = replace(calibrate_groups(scored, objectives, precision), other_rule=other_rule(resolved.selection, objectives))
    if output is not None:
        Folder.at(output).write_json("calibration.json", found.as_dict())
        picture = io.BytesIO()
        plot_reliability(found).savefig(picture, format="png", dpi=120)
        Folder.at(output).write_bytes("reliability.png", picture.getvalue())
    return found


def train_reward(
    pairs: str | Mapping[str, str], output: str, options: Mapping[str, Any] | RewardTrainingConfig | None = None, *, emit: stages.Emit = print
) -> RewardTrainingResult:  # fmt: skip
    """Trains a reward model on Ray Train, or goes on where it was killed; returns at once when `output` holds the result of the same data and options.

    Args:
        pairs: file of preference pairs (`rc_ray.training.preferences`), or one per objective for a model that learns them together.
        output: folder to write, which all nodes reach; `embedded:reward-NAME` for this machine's cache, which is filled without Ray.
        options: fields of `RewardTrainingConfig`.

    Raises:
        ConfigError: options that do not fit together. DataError: pairs unusable, too few, or `output` holds something else.
        ModelError: the base cannot be loaded. ResumeError: another training was begun there. ClusterError: the cluster is too small, or
        training failed.
    """
    from rc_ray.ledger.lock import DriverLock
    from rc_ray.pipeline.cluster import connected
    from rc_ray.pipeline.progress import live_progress
    from rc_ray.training.workers import remove

    chosen = load_reward_training(options or {})
    if output.startswith("embedded:"):
        return train_here(
            pairs, output, chosen, lambda done, total, loss: emit(f"train-reward  {done}/{total} pairs  loss {loss:.3f}")
        )
    prepared = prepare(pairs, output, chosen)
    result, settings = prepared.result, ClusterConfig()
    if result is None:
        with DriverLock(prepared.work, emit), connected(settings) as cluster:
            offered, what = (cluster.gpus, "GPUs") if cluster.gpus else (cluster.cpus, "CPUs")
            if chosen.num_workers > offered:
                raise ClusterError(
                    f"num_workers = {chosen.num_workers}: {cluster.description} has {offered:g} {what}; lower it, or add nodes"
                )
            with live_progress(settings.progress_interval_s, emit) as board:
                result = train_on_ray(prepared, 1.0 if cluster.gpus else 0.0, board)
    remove(prepared.work)
    return result


def report(run_directory: str) -> str:
    """Writes metrics.json, report/index.html and README.md of a run directory again; returns the path of the report."""
    run_dir = rundir.open_existing(run_directory)
    stages.report(run_dir.config(), run_dir)
    return (run_dir.report / "index.html").uri


def _keep_prompts(config: ConfigSource, overrides: Iterable[str], prompts: Dataset | Iterable[Any]) -> Config:
    """The configuration with prompts in memory as its source, written to a file that is named by its content."""
    resolved = load_config(config, [*overrides, "prompts.path=given"])
    column = resolved.prompts.column
    cells = (row.get(column) for row in prompts.iter_rows()) if hasattr(prompts, "iter_rows") else iter(prompts)
    content = "".join(json.dumps({column: cell}, default=_plain) + "\n" for cell in cells).encode()
    folder = Folder.at(resolved.output).beside("-prompts")
    name = f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.jsonl"
    if not folder.exists(name):
        folder.write_bytes(name, content)
    source = resolved.prompts.model_copy(update={"path": (folder / name).uri})
    return resolved.model_copy(update={"prompts": source})


def _plain(value: Any) -> Any:
    """For JSON: arrays as lists, anything else as what is no prompt."""
    return value.tolist() if hasattr(value, "tolist") else {"value": repr(value)}


def _connect(config: Config) -> Plan:
    """Connects this driver (and leaves it connected, since Datasets are lazy) and plans the pools."""
    from rc_ray.pipeline.cluster import connect

    stages.build_models(config, print)
    cluster, _ = connect(config.cluster)
    return make_plan(config, cluster.cpus, cluster.gpus, cluster.num_nodes, cluster.gpus_per_node)


def _read_groups(config: Config) -> Dataset:
    import ray

    _connect(config)
    return ray.data.read_parquet(rundir.open_existing(config.output).candidates.uri)


def _check_input(source: Dataset | str, what: str) -> None:
    if isinstance(source, str) and not Folder.at(source).exists():
        raise DataError(f"{what} = {source!r}: no such file or folder; give Parquet files")


def _dataset(source: Dataset | str) -> Dataset:
    if not isinstance(source, str):
        return source
    import ray

    return ray.data.read_parquet(Folder.at(source).uri)


def _table(dataset: Dataset) -> pa.Table:
    import ray

    return pa.concat_tables(ray.get(dataset.to_arrow_refs()))


def _prompt_blocks(cells: Iterator[Any], source: PromptsConfig, chunk_size: int) -> Iterator[pa.Table]:
    """Groups without candidates, in blocks of `chunk_size`; bad and repeated rows carry their failure."""
    seen = SeenPrompts()
    rows: list[dict[str, Any]] = []
    for number, cell in enumerate(cells):
        messages = to_messages(cell.tolist() if hasattr(cell, "tolist") else cell, source.column, source.system)
        failure: str | None = None
        detail: str | None = None
        if isinstance(messages, BadRow):
            identity = bad_row_id("dataset", number, repr(cell))
            failure, detail = messages.reason, f"row {number + 1}: {messages.detail}"
        else:
            identity = prompt_id(messages)
            if seen.first_row(identity, number) is not None:
                failure, detail = "duplicate_prompt", f"row {number + 1}"
        rows.append(
            {
                "prompt_id": identity,
                "prompt": [] if isinstance(messages, BadRow) else messages,
                "candidates": [] if failure else None,
                "failure": failure,
                "failure_detail": detail,
            }
        )
        if len(rows) == chunk_size:
            yield pa.Table.from_pylist(rows, schema=schemas.GROUP)
            rows = []
    if rows:
        yield pa.Table.from_pylist(rows, schema=schemas.GROUP)


def _fit(groups: Dataset, config: SelectionConfig) -> Fitted:
    if not needs_fit(config):
        return Fitted()

    def measure(fitted: Fitted | None = None) -> Summary:
        def summary(table: pa.Table) -> pa.Table:
            return pa.table({"summary": [summarize(table, config, fitted).to_bytes()]})

        rows = groups.map_batches(summary, batch_format="pyarrow").iter_rows()
        return add_up(Summary.from_bytes(row["summary"]) for row in rows)

    return fit(measure(), config, measure)
