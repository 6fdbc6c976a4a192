"""Scored tables as flat arrays: groups of candidates, and existing chosen/rejected pairs as groups of two.

Invariant: a row of the table is a group, in the same order; nothing is left out here. What cannot be searched (missing rewards, a
failure of sampling, a candidate without text) is marked with a status and keeps its row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rc_ray.core import schemas
from rc_ray.core.ids import prompt_id
from rc_ray.core.pick import FAILED, INVALID, MISSING, OK
from rc_ray.errors import DataError

PAIR_COLUMNS = ("prompt", "chosen", "rejected", "rewards_chosen", "rewards_rejected")


@dataclass(frozen=True)
class ScoredTable:
    """One table in the form that the searches read.

    Attributes:
        table: `prompt_id`, `prompt` and every column of the source that selection does not read itself.
        offsets: int64 (G + 1,).
        texts: string (T,), the answers.
        finish: string (T,) or None where the source has no finish reasons.
        columns: names of the reward columns, M of them.
        rewards: float32 (T, M); NaN where missing.
        status: int8 (G,).
        details: why, for groups with a status other than OK: status-specific text by group.
        is_preference: whether the source had chosen/rejected.
    """

    table: pa.Table
    offsets: NDArray[np.int64]
    texts: pa.Array
    finish: pa.Array | None
    columns: list[str]
    rewards: NDArray[np.float32]
    status: NDArray[np.int8]
    details: dict[int, str]
    is_preference: bool


def is_preference(schema: pa.Schema) -> bool:
    """Whether a table holds existing pairs rather than groups."""
    names = schema.names
    of_pairs = any(name in names for name in ("chosen", "rejected", "rewards_chosen", "rewards_rejected"))
    return of_pairs and "candidates" not in names and not schemas.scored_objectives(schema)


def reward_columns(schema: pa.Schema) -> list[str]:
    """Names of the rewards in a table of groups or of existing pairs.

    Raises:
        DataError: it has none, or chosen and rejected have different ones.
    """
    if not is_preference(schema):
        columns = schemas.scored_objectives(schema)
        if not columns:
            raise DataError(f"groups have no {schemas.REWARD_PREFIX}* column; run `rc-ray score` on them first")
        return columns
    names = []
    for side in ("rewards_chosen", "rewards_rejected"):
        kind = schema.field(side).type if side in schema.names else None
        if kind is None or not pa.types.is_struct(kind) or not kind.num_fields:
            raise DataError(
                f"pairs have no column {side!r} with a field per objective, such as {{helpful: 1.2, harmless: 0.3}} (columns: {', '.join(schema.names)})"
            )
        names.append([kind.field(i).name for i in range(kind.num_fields)])
    if set(names[0]) != set(names[1]):
        raise DataError(f"rewards_chosen has {names[0]} and rewards_rejected has {names[1]}; give the same objectives for both")
    return names[0]


def read_scored(table: pa.Table, columns: list[str] | None = None) -> ScoredTable:
    """Flattens one table, of at most 2 GiB of text.

    Args:
        table: groups (`schemas.GROUP` and `reward.*`), or existing pairs (`prompt`, `chosen`, `rejected` as strings or messages, and
            `rewards_chosen`, `rewards_rejected`).
        columns: rewards to read; None means all.

    Raises:
        DataError: a needed column is absent or of a wrong type.
    """
    names = reward_columns(table.schema) if columns is None else columns
    return _preferences(table, names) if is_preference(table.schema) else _groups(table, names)


def reward_lists(table: pa.Table, columns: list[str]) -> dict[str, pa.Array]:
    """list<float32> per reward column, as stored; existing pairs give lists of two. What a summary of the data reads."""
    if not is_preference(table.schema):
        return {name: _list_of(table, schemas.reward_column(name), pa.float32()) for name in columns}
    offsets = pa.array(np.arange(table.num_rows + 1, dtype=np.int32) * 2)
    return {name: pa.ListArray.from_arrays(offsets, pa.array(_both(table, name))) for name in columns}


def aligned_rewards(lists: dict[str, pa.Array]) -> dict[str, NDArray[np.float32]]:
    """All rewards of each column (NaN where missing), of the groups where all columns have equally many."""
    sizes = [_sizes(column) for column in lists.values()]
    alike = np.all([size == sizes[0] for size in sizes], axis=0)
    return {
        name: column.flatten().to_numpy(zero_copy_only=False)[np.repeat(alike, size)]
        for (name, column), size in zip(lists.items(), sizes, strict=True)
    }


def ids_of(table: pa.Table) -> pa.Array:
    """The prompt ids of a table, made from the prompts where it has none."""
    if "prompt_id" in table.column_names:
        ids = _whole(table.column("prompt_id"))
        if not pa.types.is_string(ids.type):
            ids = ids.cast(pa.string())
        if ids.null_count:
            raise DataError(f"prompt_id is null in {ids.null_count} rows; give every row an id, or leave the column out")
        return ids
    return pa.array([prompt_id(m or []) for m in messages(_whole(table.column("prompt"))).to_pylist()], pa.string())


def messages(column: pa.Array) -> pa.Array:
    """A column of strings or message lists as message lists (`schemas.MESSAGES`); strings become one user message.

    Raises:
        DataError: neither.
    """
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return one_message("user", column.cast(pa.string()))
    if column.type == schemas.MESSAGES:
        return column
    kind = column.type.value_type if pa.types.is_list(column.type) else None
    if kind is None or not pa.types.is_struct(kind) or kind.get_field_index("role") < 0 or kind.get_field_index("content") < 0:
        raise DataError(f"a prompt is a string or a list of messages {{role, content}}, not {column.type}")
    flat = column.flatten()
    fields = [pc.struct_field(flat, name).cast(pa.string()) for name in ("role", "content")]
    offsets = np.concatenate([[0], np.cumsum(_sizes(column))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.StructArray.from_arrays(fields, ["role", "content"]))


def one_message(role: str, texts: pa.Array) -> pa.Array:
    """Texts as message lists of one message each."""
    roles = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(texts), dtype=np.int32)), pa.array([role])).cast(pa.string())
    struct = pa.StructArray.from_arrays([roles, texts], fields=list(schemas.MESSAGES.value_type))
    return pa.ListArray.from_arrays(pa.array(np.arange(len(texts) + 1, dtype=np.int32)), struct, type=schemas.MESSAGES)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _sizes(lists: pa.Array) -> NDArray[np.int64]:
    return np.asarray(pc.fill_null(pc.list_value_length(lists), 0), dtype=np.int64)


def _list_of(table: pa.Table, name: str, kind: pa.DataType) -> pa.Array:
    column = _whole(table.column(name))
    if column.type == pa.list_(kind):
        return column
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.list_(kind))
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)):
        raise DataError(f"column {name!r} is {column.type}; expected a list<{kind}>, one number per candidate")
    try:
        # Not checked: a float64 that float32 cannot hold becomes infinite, which counts as missing.
        return column.cast(pa.list_(kind), safe=False)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"column {name!r} is {column.type}; expected a list<{kind}>, one number per candidate ({error})"
        ) from None


def _groups(table: pa.Table, names: list[str]) -> ScoredTable:
    for needed in ("prompt", "candidates"):
        if needed not in table.column_names:
            raise DataError(f"groups have no column {needed!r} (columns: {', '.join(table.column_names)}); run `rc-ray sample`")
    lists = _whole(table.column("candidates"))
    if pa.types.is_large_list(lists.type):
        lists = lists.cast(pa.list_(lists.type.value_type))
    element = lists.type.value_type if pa.types.is_list(lists.type) else None
    if element is None or not pa.types.is_struct(element) or element.get_field_index("text") < 0:
        raise DataError(f"column 'candidates' is {lists.type}; expected a list of structs with a field `text`")
    sizes = _sizes(lists)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    flat = lists.flatten()
    texts = pc.struct_field(flat, "text")
    texts = texts if pa.types.is_string(texts.type) else texts.cast(pa.string())
    finish = pc.struct_field(flat, "finish_reason") if element.get_field_index("finish_reason") >= 0 else None
    status = np.zeros(table.num_rows, dtype=np.int8)
    details: dict[int, str] = {}

    rewards = np.empty((offsets[-1], len(names)), dtype=np.float32)
    for m, name in reversed(list(enumerate(names))):  # the first objective that is missing is the one named
        column = _list_of(table, schemas.reward_column(name), pa.float32())
        counts = _sizes(column)
        values = column.flatten().to_numpy(zero_copy_only=False)
        if not np.array_equal(counts, sizes):
            # A list of another length cannot be aligned: all of it is missing.
            aligned = np.full(offsets[-1], np.nan, dtype=np.float32)
            fits = np.repeat(counts == sizes, sizes)
            aligned[fits] = values[np.repeat(counts == sizes, counts)]
            values = aligned
        rewards[:, m] = values
        bad = ~np.isfinite(values)
        if bad.any():
            why = table.column(schemas.missing_column(name)) if schemas.missing_column(name) in table.column_names else None
            for g in np.unique(np.searchsorted(offsets, np.flatnonzero(bad), side="right") - 1).tolist():
                status[g] = MISSING
                number = int(bad[offsets[g] : offsets[g + 1]].sum())
                reason = (why[g].as_py() if why is not None else None) or (
                    "null or not finite" if counts[g] == sizes[g] else f"{counts[g]} rewards for {sizes[g]} candidates"
                )
                details[g] = f"{name}: {number} of {sizes[g]} rewards missing: {reason}"
    if texts.null_count:
        for g in np.unique(np.searchsorted(offsets, np.flatnonzero(np.asarray(texts.is_null())), side="right") - 1).tolist():
            status[g], details[g] = INVALID, "a candidate has no text"
    if "failure" in table.column_names:
        failures = _whole(table.column("failure"))
        for g in np.flatnonzero(np.asarray(failures.is_valid())).tolist():
            status[g] = FAILED
    kept = [name for name in table.column_names if name not in ("candidates", "prompt_id", "prompt")]
    rest = (
        table.select(kept)
        .append_column("prompt_id", ids_of(table))
        .append_column("prompt", messages(_whole(table.column("prompt"))))
    )
    return ScoredTable(rest, offsets, texts, finish, names, rewards, status, details, False)


def _both(table: pa.Table, name: str) -> NDArray[np.float32]:
    """Rewards of chosen and rejected in turn, float32 (2 G,); NaN where missing."""
    values = np.empty((table.num_rows, 2), dtype=np.float32)
    for side, column in enumerate(("rewards_chosen", "rewards_rejected")):
        field = pc.struct_field(_whole(table.column(column)), name)
        try:
            values[:, side] = field.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise DataError(f"{column}.{name} is {field.type}; expected a number") from None
    return values.ravel()


def _preferences(table: pa.Table, names: list[str]) -> ScoredTable:
    for side in ("chosen", "rejected"):
        if side not in table.column_names:
            raise DataError(f"pairs have no column {side!r} (columns: {', '.join(table.column_names)}); give both answers")
    status = np.zeros(table.num_rows, dtype=np.int8)
    details: dict[int, str] = {}
    has_prompt = "prompt" in table.column_names
    prompts = messages(_whole(table.column("prompt"))) if has_prompt else None
    sides = [_whole(table.column(side)) for side in ("chosen", "rejected")]
    if all(_is_text(side.type) for side in sides):
        if prompts is None:
            raise DataError(
                "pairs have no column 'prompt'; give one, or give chosen and rejected as message lists that begin with it"
            )
        answers = [side.cast(pa.string()) for side in sides]
    else:
        if any(_is_text(side.type) for side in sides):
            raise DataError(
                f"chosen is {sides[0].type} and rejected is {sides[1].type}; give both as strings or both as messages"
            )
        talks = [messages(side).to_pylist() for side in sides]
        given = prompts.to_pylist() if prompts is not None else [None] * table.num_rows
        found, heads = [], []
        for g, (prompt, chosen, rejected) in enumerate(zip(given, *talks, strict=True)):
            head = (chosen or [])[:-1]
            wrong = _wrong_conversation(prompt, chosen or [], rejected or [])
            if wrong:
                status[g], details[g] = INVALID, wrong
                chosen, rejected = [{"content": ""}], [{"content": ""}]
            heads.append(prompt if prompt is not None else head)
            found.append((chosen[-1]["content"], rejected[-1]["content"]))
        answers = [pa.array([pair[side] for pair in found], pa.string()) for side in (0, 1)]
        prompts = pa.array(heads, schemas.MESSAGES)
    assert prompts is not None
    for side in answers:
        for g in np.flatnonzero(np.asarray(side.is_null())).tolist():
            status[g], details[g] = INVALID, "chosen or rejected is null"
    # chosen, rejected, chosen, rejected, ...
    order = np.arange(2 * table.num_rows).reshape(2, -1).T.ravel()
    texts = pa.concat_arrays(answers).take(pa.array(order))
    rewards = np.stack([_both(table, name) for name in names], axis=1)
    for m, name in reversed(list(enumerate(names))):
        for g in np.flatnonzero(~np.isfinite(rewards[:, m]).reshape(-1, 2).all(axis=1)).tolist():
            if status[g] == OK:
                status[g] = MISSING
            if status[g] == MISSING:
                details[g] = f"{name}: a reward is null or not finite"
    rest = table.select([name for name in table.column_names if name not in (*PAIR_COLUMNS, "prompt_id")])
    with_prompt = rest.append_column("prompt", prompts)
    if "prompt_id" in table.column_names:
        with_prompt = with_prompt.append_column("prompt_id", table.column("prompt_id"))
    rest = rest.append_column("prompt_id", ids_of(with_prompt)).append_column("prompt", prompts)
    offsets = np.arange(table.num_rows + 1) * 2
    return ScoredTable(rest, offsets, texts, None, names, rewards, status, details, True)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _wrong_conversation(prompt: Any, chosen: list[Any], rejected: list[Any]) -> str | None:
    """Why chosen and rejected are not two single answers to one prompt, or None."""
    if not chosen or not rejected:
        return "chosen or rejected has no message"
    if chosen[:-1] != rejected[:-1]:
        return "chosen and rejected differ before their last message"
    if prompt is None and not chosen[:-1]:
        return "there is no prompt: chosen has one message and the row has no prompt"
    if prompt is not None and chosen[:-1] and chosen[:-1] != prompt:
        return "chosen repeats a conversation that is not the prompt"
    return None
