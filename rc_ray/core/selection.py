"""Selection: scored groups in, preference pairs and drops out.

    selected = select_pairs(table, SelectionConfig(), fit_selection([table], SelectionConfig()))
    found = select_indices(rewards, SelectionConfig())          # on a float32 array (groups, candidates, objectives)

Invariant: every group has at least one pair or exactly one drop with its reason, and which depends neither on the order of rows nor on how
rows are split into tables. Rules are in `rule.py`, strategies in `strategies.py`, the compiled searches in `pick.py`.

What is defined where: what is compared are the rewards, or with `transforms` and combined ensembles what `transforms.py` derives of them;
pairs are written with the rewards. Rewards are float32, larger ones a table may hold are rounded to it; null, NaN and infinite rewards are missing, and a
group with one is a drop (`reward_missing`); fewer than two candidates are `too_few_candidates`; equal answers only are `identical_candidates`;
one objective is allowed here, and makes `rcs` the same as `best_worst`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rc_ray.config import SelectionConfig
from rc_ray.core import pick, schemas
from rc_ray.core.groups import (
    ScoredTable,
    aligned_rewards,
    ids_of,
    is_preference,
    one_message,
    read_scored,
    reward_columns,
    reward_lists,
)
from rc_ray.core.measure import Fitted, Summary, fit, num_sampled_groups
from rc_ray.core.pick import Found, Groups, mark_unusable, random_keys
from rc_ray.core.strategies import STRATEGIES, prepare
from rc_ray.core.transforms import derive
from rc_ray.errors import ConfigError, DataError

STAGE = "select"
BLOCK = 8192  # groups that are searched at a time: their arrays stay in the cache
NO_TEXT = (np.empty(0, dtype=np.int64), np.frombuffer(b"", dtype=np.uint8))


@dataclass(frozen=True)
class Selected:
    """The outcome of selection over a table of groups.

    Attributes:
        pairs: `schemas.pair_schema`, in the order of groups; one row per paired prompt unless the strategy takes several. From existing
            pairs, every other column of theirs comes along.
        drops: `schemas.DROP`, one row per dropped prompt.
        num_paired: prompts with a pair.
        num_beyond_cap: pairs that `max_pairs` left out.
    """

    pairs: pa.Table
    drops: pa.Table
    num_paired: int
    num_beyond_cap: int = 0


def selection_objectives(config: SelectionConfig, columns: Iterable[str]) -> list[str]:
    """The objectives that are compared on a table with these reward columns.

    Raises:
        ConfigError: the configuration names what the table does not have.
    """
    try:
        return config.objective_names(columns)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def summarize(table: pa.Table, config: SelectionConfig, fitted: Fitted | None = None) -> Summary:
    """What one table contributes to the numbers about all the data; add them up, then `fit`.

    Args:
        table: as for `select_pairs`; without answers where no group is sampled (`measure.num_sampled_groups`).
        config: the options.
        fitted: what the first pass gave, in a second one.
    """
    objectives = selection_objectives(config, reward_columns(table.schema))
    columns = config.columns_of(objectives)
    ids = None
    if fitted is None and num_sampled_groups(config):
        # Of existing pairs, the prompt may be what chosen and rejected begin with.
        ids = read_scored(table, columns).table.column("prompt_id") if is_preference(table.schema) else ids_of(table)
    return _summary(reward_lists(table, columns), ids, config, objectives, fitted)


def _summary(
    lists: dict[str, pa.Array], ids: pa.Array | None, config: SelectionConfig, objectives: list[str], fitted: Fitted | None
) -> Summary:
    """Sums over what is compared as soon as it is known, and over rewards before; a sample of rewards in the first pass."""
    derived: dict[str, NDArray[np.float64]] | None = None
    if config.derives and (fitted is not None or not config.fits_transforms):
        derived = {}
        for name in config.judges_of(objectives):
            rewards = aligned_rewards({column: lists[column] for column in config.columns_of([name])})
            derived |= derive(rewards, config, [name], fitted.transforms if fitted is not None else None)
    return Summary.of(lists, num_sampled_groups(config) if ids is not None else 0, ids, derived)


def needs_fit(config: SelectionConfig) -> bool:
    """Whether selection needs a pass over all the data first."""
    return config.needs_scale_of_data or config.fits_transforms or config.strategy == "map"


def without_fit(config: SelectionConfig, columns: Iterable[str]) -> Fitted:
    """Stands in for the numbers about all the data while these are not there yet: every scale and weight is 1, and rewards whose transform
    is not fitted stay as they are."""
    objectives = selection_objectives(config, columns)
    transforms: dict[str, Any] = {name: {} for name, transform in config.transforms.items() if transform.needs_fit}
    return Fitted(dict.fromkeys(config.judges_of(objectives), 1.0), dict.fromkeys(objectives, 1.0), transforms)


def fit_selection(tables: Iterable[pa.Table], config: SelectionConfig) -> Fitted:
    """The numbers about all the data that `select_pairs` needs, from one pass over its tables; transforms that are fitted may take a second
    one, for which the tables are held.

    Raises:
        DataError: there is no table, or see `fit`.
    """
    if not needs_fit(config):
        return Fitted()
    source = list(tables) if config.fits_transforms else tables

    def measure(fitted: Fitted | None = None) -> Summary:
        total: Summary | None = None
        for table in source:
            for batch in _blocks(table):
                summary = summarize(batch, config, fitted)
                total = summary if total is None else total + summary
        if total is None:
            raise DataError("there is no group to measure the scale on; give at least one")
        return total

    return fit(measure(), config, measure)


def _blocks(table: pa.Table) -> Iterable[pa.Table]:
    """The table in zero-copy pieces of at most `BLOCK` rows; an empty one is a piece too."""
    for start in range(0, max(table.num_rows, 1), BLOCK):
        yield table.slice(start, BLOCK)


def select_pairs(groups: pa.Table, config: SelectionConfig, fitted: Fitted | None = None) -> Selected:
    """Applies the selection strategy to scored groups, or to existing pairs.

    Args:
        groups: `schemas.GROUP` plus `reward.<objective>` columns; or, for `rc_filter`, existing pairs: `prompt`, `chosen`, `rejected` as
            strings or messages, `rewards_chosen` and `rewards_rejected` as structs with a field per objective.
        config: strategy and options.
        fitted: numbers about all the data (`fit_selection`); None: measured on `groups`.

    Returns:
        `Selected`; every group has its pairs or one drop.

    Raises:
        DataError: a needed column is absent. ConfigError: the options name what the table does not have.
    """
    names = reward_columns(groups.schema)
    objectives = selection_objectives(config, names)
    if is_preference(groups.schema) != (config.strategy == "rc_filter"):
        kind = "existing pairs (chosen/rejected)" if is_preference(groups.schema) else "groups of candidates"
        raise ConfigError(
            f"selection.strategy = {config.strategy!r}: the data are {kind}; rc_filter is for existing pairs, the others for groups"
        )
    columns = config.columns_of(objectives)
    if fitted is None:
        fitted = fit_selection([groups], config)
    parts = [_select_block(read_scored(block, columns), config, objectives, fitted) for block in _blocks(groups)]
    return Selected(
        schemas.with_templates(pa.concat_tables([p.pairs for p in parts]), schemas.templates_of(groups.schema)),
        pa.concat_tables([p.drops for p in parts]),
        sum(p.num_paired for p in parts),
        sum(p.num_beyond_cap for p in parts),
    )


def flat_groups(data: ScoredTable, config: SelectionConfig) -> Groups:
    """The arrays that the searches read; guards that are not set leave theirs empty."""
    ids = data.table.column("prompt_id").combine_chunks()
    if isinstance(ids, pa.ChunkedArray):
        ids = pa.concat_arrays(ids.chunks) if ids.num_chunks else pa.array([], pa.string())
    truncated = np.empty(0, dtype=np.bool_)
    if data.finish is not None and not config.allow_truncated_winner:
        truncated = np.asarray(pc.fill_null(pc.equal(data.finish, "length"), False), dtype=np.bool_)
    length = np.empty(0, dtype=np.int32)
    if config.max_length_ratio is not None:
        length = np.asarray(pc.fill_null(pc.utf8_length(data.texts), 0), dtype=np.int32)
    key = np.empty(0, dtype=np.uint64)
    if config.strategy == "best_random":
        key = random_keys(*_string_buffers(ids), config.seed)
    groups = Groups(
        data.rewards, data.rewards, data.offsets, data.status.copy(), *_string_buffers(data.texts), truncated, length, key
    )  # fmt: skip
    mark_unusable(groups)
    return groups


def _string_buffers(array: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Offsets and UTF-8 bytes of a string array, without copying the text."""
    _, offsets, text = array.buffers()
    if offsets is None or not len(array):
        return NO_TEXT
    starts = np.frombuffer(offsets, dtype=np.int32)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    return starts, np.frombuffer(text if text is not None and text.size else b"", dtype=np.uint8)


def _select_block(data: ScoredTable, config: SelectionConfig, objectives: list[str], fitted: Fitted) -> Selected:
    prepared = prepare(flat_groups(data, config), config, objectives, data.columns, fitted)
    pools = STRATEGIES[config.strategy](prepared)
    found = merge(list(pools.values()))
    label = np.concatenate([np.full(f.group.size, i, dtype=np.int32) for i, f in enumerate(pools.values())])
    order = np.lexsort((np.arange(label.size), np.concatenate([f.group for f in pools.values()])))
    strategy = pa.DictionaryArray.from_arrays(pa.array(label[order]), pa.array(list(pools))).cast(pa.string())
    return Selected(
        _pair_table(data, found, strategy, config),
        _drop_table(data, found),
        int(np.unique(found.group).size),
        found.num_beyond_cap,
    )


def merge(pools: list[Found]) -> Found:
    """Several searches over the same groups as one, ordered by group; a group is dropped if none found a pair."""
    if len(pools) == 1:
        return pools[0]
    group = np.concatenate([f.group for f in pools])
    order = np.lexsort((np.arange(group.size), group))
    # What a guard held back says more than that there was nothing, and has the higher code.
    statuses = np.stack([f.status for f in pools])
    status = np.where((statuses == pick.OK).any(axis=0), pick.OK, statuses.max(axis=0))
    winner, loser, gap = (np.concatenate([getattr(f, name) for f in pools])[order] for name in ("winner", "loser", "gap"))
    return Found(group[order], winner, loser, gap, status.astype(np.int8), sum(f.num_beyond_cap for f in pools))


def _pair_table(data: ScoredTable, found: Found, strategy: pa.Array, config: SelectionConfig) -> pa.Table:
    group = pa.array(found.group)
    winner, loser = data.offsets[found.group] + found.winner, data.offsets[found.group] + found.loser
    higher = data.rewards[winner] > data.rewards[loser]
    columns = {
        "prompt": data.table.column("prompt").take(group),
        "chosen": one_message("assistant", data.texts.take(pa.array(winner))),
        "rejected": one_message("assistant", data.texts.take(pa.array(loser))),
        "prompt_id": data.table.column("prompt_id").take(group),
        "chosen_index": pa.array(found.winner, pa.int32()),
        "rejected_index": pa.array(found.loser, pa.int32()),
        "gap": pa.array(found.gap, pa.float64()),
        "rewards_chosen": _rewards(data.rewards[winner], data.columns),
        "rewards_rejected": _rewards(data.rewards[loser], data.columns),
        "agreeing": _names_where(higher, data.columns),
        "strategy": strategy,
    }
    schema = schemas.pair_schema(data.columns)
    pairs = pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)
    if data.is_preference:
        for name in data.table.column_names:
            if name not in pairs.column_names:
                pairs = pairs.append_column(data.table.schema.field(name), data.table.column(name).take(group))
    return pairs


def _rewards(rewards: NDArray[np.float32], columns: list[str]) -> pa.Array:
    return pa.StructArray.from_arrays([pa.array(np.ascontiguousarray(rewards[:, m])) for m in range(len(columns))], columns)


def _names_where(mask: NDArray[np.bool_], names: list[str]) -> pa.Array:
    """list<string>: the names of the true columns of each row."""
    offsets = np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.int32)
    codes = pa.array(np.nonzero(mask)[1].astype(np.int32))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.DictionaryArray.from_arrays(codes, pa.array(names)).cast(pa.string()))


_REASONS = {
    pick.INVALID: ("invalid_candidate", ""),
    pick.MISSING: ("reward_missing", ""),
    pick.TOO_FEW: ("too_few_candidates", "{n} candidates; a pair needs 2"),
    pick.IDENTICAL: ("identical_candidates", "{n} candidates, 1 distinct"),
    pick.NO_PAIR: ("no_consistent_pair", "no pair among {n} candidates that the strategy takes"),
    pick.TRUNCATED: ("winner_truncated", "every winner of {n} candidates was cut at max_tokens"),
    pick.TOO_LONG: ("winner_too_long", "every winner of {n} candidates is longer than its loser by more than max_length_ratio"),
}


def _drop_table(data: ScoredTable, found: Found) -> pa.Table:
    dropped = np.flatnonzero(found.status != pick.OK)
    sizes = np.diff(data.offsets)[dropped]
    reasons, details = [], []
    failures = {name: data.table.column(name) for name in ("failure", "failure_detail") if name in data.table.column_names}
    for g, status, n in zip(dropped.tolist(), found.status[dropped].tolist(), sizes.tolist(), strict=True):
        if status == pick.FAILED:
            reasons.append(failures["failure"][g].as_py())
            details.append((failures["failure_detail"][g].as_py() if "failure_detail" in failures else None) or "")
            continue
        reason, detail = _REASONS[status]
        reasons.append(reason)
        if status == pick.NO_PAIR and data.is_preference:
            detail = _disagreement(data, g)
        details.append(data.details.get(g, detail.format(n=n)))
    texts = pa.array(details, pa.string())
    stages = {pick.FAILED: "sample", pick.MISSING: "score"}
    return pa.table(
        {
            "prompt_id": data.table.column("prompt_id").take(pa.array(dropped)),
            "reason": pa.array(reasons, pa.string()),
            "stage": pa.array([stages.get(s, STAGE) for s in found.status[dropped].tolist()], pa.string()),
            "detail": texts,
        },
        schema=schemas.DROP,
    )


def _disagreement(data: ScoredTable, g: int) -> str:
    """Which objectives prefer the chosen answer, which the rejected one, and which neither."""
    chosen, rejected = data.rewards[data.offsets[g]], data.rewards[data.offsets[g] + 1]
    sides = (("agree", chosen > rejected), ("disagree", chosen < rejected), ("tie", chosen == rejected))
    return "; ".join(
        f"{what}: {', '.join(np.asarray(data.columns)[where].tolist())}" for what, where in sides if where.any()
    )  # fmt: skip


def select_indices(
    rewards: NDArray[np.float32],
    config: SelectionConfig | None = None,
    fitted: Fitted | None = None,
    *,
    objectives: list[str] | None = None,
) -> Found:
    """Selection on an array, without texts: every candidate counts as a different, complete answer.

    Args:
        rewards: float32 (G, N, M): groups, candidates, reward columns. NaN and infinity mean missing.
        config: strategy and options; None: RCS.
        fitted: numbers about all the data; None: measured on `rewards`.
        objectives: names of the reward columns; None: "0", "1", ...

    Returns:
        `Found`: group, winner, loser, gap of each pair, in the order of groups. `best_random` draws by group number here.

    Raises:
        ValueError: the shape is not (G, N, M). ConfigError: the options name an unknown objective, or need texts.
    """
    config = config or SelectionConfig()
    values = np.ascontiguousarray(rewards, dtype=np.float32)
    if values.ndim != 3 or values.shape[2] < 1:
        raise ValueError(f"rewards has shape {values.shape}; expected (groups, candidates, objectives)")
    if config.max_length_ratio is not None:
        raise ConfigError("selection.max_length_ratio needs texts; use select_pairs")
    num_groups, n, width = values.shape
    if config.strategy == "rc_filter" and n != 2:
        raise ConfigError(f"selection.strategy rc_filter needs groups of two (chosen, rejected), not {n}")
    columns = objectives or [str(m) for m in range(width)]
    if len(columns) != width:
        raise ValueError(f"objectives names {len(columns)} reward columns, but rewards has {width}: {columns}")
    names = selection_objectives(config, columns)
    used = config.columns_of(names)
    if used != columns:
        values = np.ascontiguousarray(values[:, :, [columns.index(name) for name in used]])
    if fitted is None:
        fitted = fit_array(values, used, config, names)
    parts: list[Found] = []
    for start in range(0, num_groups, BLOCK):
        block = values[start : start + BLOCK].reshape(-1, len(used))
        size = min(BLOCK, num_groups - start)
        empty = np.empty(0, dtype=np.bool_), np.empty(0, dtype=np.int32)
        numbers = [str(g).encode() for g in range(start, start + size)] if config.strategy == "best_random" else []
        key = random_keys(
            np.concatenate([[0], np.cumsum([len(b) for b in numbers])]).astype(np.int64),
            np.frombuffer(b"".join(numbers), np.uint8),
            config.seed,
        )
        groups = Groups(block, block, np.arange(size + 1) * n, np.zeros(size, dtype=np.int8), *NO_TEXT, *empty, key)
        mark_unusable(groups)
        found = merge(list(STRATEGIES[config.strategy](prepare(groups, config, names, used, fitted)).values()))
        parts.append(found._replace(group=found.group + start))
    if not parts:
        raise ValueError("rewards has no group")
    return concatenate(parts)


def concatenate(parts: list[Found]) -> Found:
    """Searches over consecutive groups, whose numbers are those of the whole already, as one."""
    group, winner, loser, gap, status = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in range(5))
    return Found(group, winner, loser, gap, status, sum(part.num_beyond_cap for part in parts))


def fit_array(
    rewards: NDArray[np.float32], columns: list[str], config: SelectionConfig, objectives: list[str] | None = None
) -> Fitted:
    """`fit_selection` on an array (G, N, M)."""
    if not needs_fit(config):
        return Fitted()
    num_groups, n, _ = rewards.shape
    offsets = pa.array(np.arange(num_groups + 1, dtype=np.int32) * n)
    lists = {
        name: pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(rewards[:, :, m]).ravel()))
        for m, name in enumerate(columns)
    }
    names = selection_objectives(config, columns) if objectives is None else objectives

    def measure(fitted: Fitted | None = None) -> Summary:
        sampled = fitted is None and num_sampled_groups(config)
        ids = pa.array([str(g) for g in range(num_groups)], pa.string()) if sampled else None
        return _summary(lists, ids, config, names, fitted)

    return fit(measure(), config, measure)
