"""Selection from files to files, in one process and without Ray: `rc-ray select --input scored.parquet --output selected/`.

The input is cut into chunks of a fixed number of rows; each chunk's pairs and drops are committed to the ledger of the output folder.
Invariant: chunk i depends on the input and the options alone, so a killed and repeated run gives the same bytes as an
undisturbed one; memory is that of one chunk.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from rc_ray.config import SelectionConfig, differences, load_config
from rc_ray.core.groups import reward_columns
from rc_ray.core.measure import Fitted, Summary, fit, num_sampled_groups
from rc_ray.core.selection import needs_fit, select_pairs, summarize, without_fit
from rc_ray.core.selection_report import ReportBuilder, SelectionReport, lacks_scale, scale_only
from rc_ray.errors import DataError, ResumeError
from rc_ray.ledger import rundir
from rc_ray.ledger.ledger import Ledger
from rc_ray.ledger.lock import DriverLock
from rc_ray.ledger.storage import Folder
from rc_ray.pipeline.run import ConfigSource
from rc_ray.pipeline.scored_files import ScoredSource
from rc_ray.pipeline.stages import fitted_of

STAGE = "select"
MANIFEST = "manifest.json"
FORMAT = 1  # of the output; another one is not resumed
PROGRESS_S = 5.0


def select_files(
    path: str, output: str, config: SelectionConfig, emit: Callable[[str], None] = print, report: bool = False
) -> dict[str, Any]:
    """Selects pairs from scored files, or goes on where an earlier call was stopped.

    Args:
        path: Parquet or JSONL file, folder or glob: groups, or for `rc_filter` existing pairs.
        output: folder for pairs/, drops/, metrics.json, manifest.json, ledger/.
        config: strategy and options.
        emit: prints a line.
        report: also write and print `report.json`.

    Returns:
        The counts in metrics.json.

    Raises:
        DataError, ConfigError: bad input. ResumeError: the output folder belongs to another input or other options, or
            another process works in it.
    """
    folder = Folder.at(output)
    _manifest(folder)  # before the lock is written: not into a folder of something else
    with DriverLock(folder, emit):
        return _select_files(path, folder, config, emit, report)


def _select_files(
    path: str, folder: Folder, config: SelectionConfig, emit: Callable[[str], None], report: bool
) -> dict[str, Any]:
    ledger = Ledger(folder / "ledger")
    known = _manifest(folder)
    looked: list[Summary] = []
    source = ScoredSource.open(path, None if known else lambda table: _look(table, config, looked))
    unknown = without_fit(config, reward_columns(source.schema))
    wanted = {"format": FORMAT, "input": source.identity(), "selection": config.model_dump(mode="json")}
    if known is None:
        # Options and columns are checked on the first rows, before anything is written.
        select_pairs(next(source.tables(16)), config, unknown)
        known = {**wanted, "fitted": _fit(source, config, looked).as_dict(), "rows_per_chunk": source.rows_per_table}
        folder.write_json(MANIFEST, known)
    given = {key: known.get(key) for key in wanted}
    changed = differences({**given, "selection": _with_defaults(given["selection"])}, json.loads(json.dumps(wanted)))
    if changed:
        raise ResumeError(
            f"--output = {folder.uri!r}: it was begun with another input or other options ({'; '.join(changed)}); give another folder, or put them back"
        )
    fitted = Fitted(**known["fitted"])
    for written in (folder, folder / "pairs", folder / "drops", ledger.folder / STAGE):
        written.remove_unfinished()
    _select(source, folder, ledger, config, fitted, known["rows_per_chunk"], emit)
    metrics = _metrics(source, ledger)
    folder.write_json("metrics.json", metrics)
    _say(metrics, emit)
    if report:
        built = _build(source, config, fitted, known["rows_per_chunk"])
        folder.write_json("report.json", built.as_dict())
        emit(built.text())
    return metrics


def _manifest(folder: Folder) -> dict[str, Any] | None:
    if folder.exists(MANIFEST):
        try:
            return dict(folder.read_json(MANIFEST))
        except ValueError as error:
            raise ResumeError(f"--output = {folder.uri!r}: its {MANIFEST} is damaged ({error}); give another folder") from None
    if not folder.is_empty():
        raise DataError(f"--output = {folder.uri!r}: it exists and is not empty; give a new place")
    return None


def _with_defaults(selection: Any) -> Any:
    """Recorded options, among which those that were added since count with their defaults."""
    try:
        return SelectionConfig.model_validate(selection).model_dump(mode="json")
    except ValidationError:
        return selection


def _look(table: pa.Table, config: SelectionConfig, summaries: list[Summary], fitted: Fitted | None = None) -> None:
    if not needs_fit(config):
        return
    summary = summarize(table, config, fitted)
    summaries[:] = [summaries[0] + summary] if summaries else [summary]


def _measure(source: ScoredSource, config: SelectionConfig, fitted: Fitted | None = None) -> Summary:
    """One pass over the rewards, and over prompts where these say which groups are sampled."""
    summaries: list[Summary] = []
    for table in source.tables(source.rows_per_table, rewards_only=fitted is not None or not num_sampled_groups(config)):
        _look(table, config, summaries, fitted)
    return summaries[0]


def _fit(source: ScoredSource, config: SelectionConfig, looked: list[Summary]) -> Fitted:
    if not needs_fit(config):
        return Fitted()
    summary = looked[0] if source.parses_once and looked else _measure(source, config)
    return fit(summary, config, partial(_measure, source, config))


def _select(
    source: ScoredSource, folder: Folder, ledger: Ledger, config: SelectionConfig, fitted: Fitted, size: int,
    emit: Callable[[str], None],
) -> None:  # fmt: skip
    done = ledger.done(STAGE)
    total = -(-source.num_rows // size)
    chunk = next((i for i in range(total) if i not in done), total)
    if chunk:
        emit(f"select    {min(chunk * size, source.num_rows)} of {source.num_rows} rows are committed already")
    if chunk == total:
        return
    last = time.monotonic()
    for table in source.tables(size, chunk * size):
        if chunk not in done:
            selected = select_pairs(table, config, fitted)
            counts = {
                "rows": table.num_rows,
                "paired": selected.num_paired,
                "pairs": selected.pairs.num_rows,
                "pairs_beyond_cap": selected.num_beyond_cap,
                **{f"drop.{reason}": n for reason, n in sorted(Counter(selected.drops.column("reason").to_pylist()).items())},
            }
            ledger.commit(STAGE, chunk, counts, {folder / "pairs": selected.pairs, folder / "drops": selected.drops})
        chunk += 1
        if time.monotonic() - last >= PROGRESS_S:
            last = time.monotonic()
            emit(f"select    {min(chunk * size, source.num_rows)}/{source.num_rows} rows")


def _metrics(source: ScoredSource, ledger: Ledger) -> dict[str, Any]:
    totals = {key: int(value) for key, value in ledger.totals(STAGE).items()}
    drops = {key.removeprefix("drop."): value for key, value in sorted(totals.items()) if key.startswith("drop.")}
    metrics: dict[str, Any] = {
        "prompts": totals["rows"],
        "paired": totals["paired"],
        "pairs": totals["pairs"],
        "pairs_beyond_cap": totals["pairs_beyond_cap"],
        "dropped": sum(drops.values()),
        "drops": drops,
    }
    if not source.num_rows == metrics["prompts"] == metrics["paired"] + metrics["dropped"]:
        raise ResumeError(
            f"{source.num_rows} rows are not {metrics['paired']} paired + {metrics['dropped']} dropped; the output was changed by "
            "something else; give a new folder"
        )
    return metrics


def _say(metrics: dict[str, Any], emit: Callable[[str], None]) -> None:
    beyond = f", {metrics['pairs_beyond_cap']} more left out by max_pairs" if metrics["pairs_beyond_cap"] else ""
    reasons = f" ({', '.join(f'{n} {reason}' for reason, n in metrics['drops'].items())})" if metrics["drops"] else ""
    emit(
        f"select    {metrics['prompts']} prompts = {metrics['paired']} paired + {metrics['dropped']} dropped{reasons}; "
        f"{metrics['pairs']} pairs{beyond}"
    )


def _build(
    source: ScoredSource, config: SelectionConfig, fitted: Fitted, size: int, sizes: list[int] | None = None
) -> SelectionReport:
    if lacks_scale(config, fitted):
        fitted = replace(fitted, scale=_fit(source, scale_only(config), []).scale)
    builder = ReportBuilder(config, fitted, sizes)
    for table in source.tables(size):
        builder.add(table)
    return builder.finish()


def report_of_run(source: ConfigSource, overrides: Iterable[str] = (), emit: Callable[[str], None] = print) -> SelectionReport:
    """The report on the candidates of a run directory whose selection is finished; written to its report/selection.json."""
    config = load_config(source, overrides)
    run = rundir.open_existing(config.output)
    fitted = fitted_of(run)
    candidates = ScoredSource.open(run.candidates.uri)
    # Of several policies, the first answers of a group are those of the first policies alone.
    sizes = [config.generation.num_candidates] if len(config.generation.policies) > 1 else None
    report = _build(candidates, config.selection, fitted, candidates.rows_per_table, sizes)
    run.report.write_json("selection.json", report.as_dict())
    emit(report.text())
    return report
