"""Scored data in files (Parquet or JSONL), read as a stream of tables from any row on.

Invariant: rows come in the order of the files' names and of the rows in them, and a table holds the rows [start, start + size) of that
order whatever was read before; so a second attempt cuts the data where the first one did. Memory is that of one table, not of a
file or of a row group.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rc_ray.config import PromptsConfig
from rc_ray.core.groups import is_preference
from rc_ray.errors import DataError
from rc_ray.pipeline.prompts import source_files

TARGET_BYTES = 32 << 20  # of one table, uncompressed
MOST_ROWS = 1 << 16
READ_BUFFER = 1 << 20
_SAMPLE_ROWS = 256
_JSON_ROWS = 1024  # parsed at a time where all of a file is looked at


@dataclass(frozen=True)
class ScoredSource:
    """The files of one input.

    Attributes:
        path: as the user wrote it.
        files: from `source_files`.
        schema: of all columns; for JSONL the union over all rows.
        rows: number of rows per file.
        bytes_per_row: of one row in memory, estimated.
    """

    path: str
    files: list[Any]
    schema: pa.Schema
    rows: list[int]
    bytes_per_row: float

    @classmethod
    def open(cls, path: str, look: Callable[[pa.Table], None] | None = None) -> ScoredSource:
        """Opens the input; a JSONL file is parsed once from end to end to find its columns.

        Args:
            look: called with tables of rows of JSONL files in passing, so that they need not be parsed a second time.

        Raises:
            DataError: no such file, an unknown format, a damaged file or line, files with different columns.
        """
        files = source_files("--input", PromptsConfig(path=path))
        schemas, rows, size = [], [], 0
        for file in files:
            if file.format == "parquet":
                parquet = _open(file)
                schemas.append(parquet.schema_arrow.remove_metadata())
                rows.append(parquet.metadata.num_rows)
                size += sum(parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups))
                parquet.close()
            elif file.format == "jsonl":
                schema, number, length = _scan_jsonl(file, look)
                schemas.append(schema)
                rows.append(number)
                size += length
            else:
                raise DataError(f"--input = {file.name!r}: selection reads Parquet and JSONL, not {file.format}")
        if not sum(rows):
            raise DataError(f"--input = {path!r}: there is no row in it; give scored groups or pairs")
        source = cls(path, files, _unify(files, schemas), rows, size / sum(rows))
        # Parquet's own figure is too low where texts repeat and are stored once: look at some rows as they are in memory.
        sample = next(source.tables(_SAMPLE_ROWS))
        return replace(source, bytes_per_row=max(source.bytes_per_row, sample.nbytes / sample.num_rows))

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return sum(self.rows)

    @property
    def rows_per_table(self) -> int:
        """Rows that make a table of about `TARGET_BYTES`."""
        return max(16, min(MOST_ROWS, int(TARGET_BYTES / max(self.bytes_per_row, 1))))

    @property
    def parses_once(self) -> bool:
        """Whether `open` showed every row to `look` already."""
        return all(file.format == "jsonl" for file in self.files)

    def identity(self) -> list[list[Any]]:
        """Name, size and time of change of each file: what tells that a second attempt reads the same data."""
        infos = [file.filesystem.get_file_info(file.path) for file in self.files]
        return [[info.base_name, info.size, info.mtime_ns] for info in infos]

    def tables(self, size: int, start: int = 0, rewards_only: bool = False) -> Iterator[pa.Table]:
        """Tables of `size` rows (the last one may have fewer) from row `start` on.

        Args:
            rewards_only: leave out prompts and answers where the format allows it.
        """
        held: list[pa.Table] = []
        count = 0
        for batch in self._batches(min(size, 4096), start, rewards_only):
            held.append(batch)
            count += batch.num_rows
            while count >= size:
                whole = pa.concat_tables(held)
                yield whole.slice(0, size)
                held = [whole.slice(size)] if count > size else []
                count -= size
        if count:
            yield pa.concat_tables(held)

    def _batches(self, size: int, start: int, rewards_only: bool) -> Iterator[pa.Table]:
        for file, rows in zip(self.files, self.rows, strict=True):
            if start >= rows:
                start -= rows
                continue
            read = _parquet_batches if file.format == "parquet" else _jsonl_batches
            yield from read(file, self.schema, size, start, rewards_only)
            start = 0


def _open(file: Any) -> pq.ParquetFile:
    try:
        # Buffered, so that a row group of any size is read page by page.
        return pq.ParquetFile(file.filesystem.open_input_file(file.path), buffer_size=READ_BUFFER, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise DataError(f"--input = {file.path!r}: not a Parquet file: {error}") from None


def _unify(files: list[Any], found: list[pa.Schema]) -> pa.Schema:
    schema = found[0]
    for file, other in zip(files[1:], found[1:], strict=True):
        try:
            schema = pa.unify_schemas([schema, other], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"--input: {file.name!r} has other columns than {files[0].name!r}: {error}") from None
    return schema


def _leaves(parquet: pq.ParquetFile, rewards_only: bool) -> list[str]:
    """Columns to read. Of groups: what selection uses, without tokens and log-probabilities. Of existing pairs: all."""
    paths = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
    if is_preference(parquet.schema_arrow):
        return [p for p in paths if not rewards_only or p.startswith(("rewards_chosen.", "rewards_rejected."))]
    wanted = ["prompt_id"] if rewards_only else ["prompt_id", "prompt", "failure", "failure_detail"]
    return [
        path
        for path in paths
        if path.split(".")[0] in wanted
        or path.startswith("reward.")
        or (path.startswith("missing.") and not rewards_only)
        or (path.startswith("candidates.") and path.rsplit(".", 1)[-1] in ("text", "finish_reason") and not rewards_only)
    ]


def _parquet_batches(file: Any, schema: pa.Schema, size: int, start: int, rewards_only: bool) -> Iterator[pa.Table]:
    parquet = _open(file)
    first = 0
    while start >= parquet.metadata.row_group(first).num_rows:
        start -= parquet.metadata.row_group(first).num_rows
        first += 1
    groups = list(range(first, parquet.num_row_groups))
    for batch in parquet.iter_batches(batch_size=size, row_groups=groups, columns=_leaves(parquet, rewards_only)):
        if start >= batch.num_rows:
            start -= batch.num_rows
            continue
        table = pa.Table.from_batches([batch.slice(start)])
        start = 0
        whole = pa.schema(
            [_narrowed(schema.field(name), table.schema.field(name)) for name in schema.names if name in table.column_names]
        )
        yield table.select(whole.names).cast(whole).replace_schema_metadata()
    parquet.close()


def _narrowed(field: pa.Field, read: pa.Field) -> pa.Field:
    """The field of all files, or of what was read where that is part of a nested one."""
    return read if field.name == "candidates" else field


def _jsonl_batches(file: Any, schema: pa.Schema, size: int, start: int, rewards_only: bool) -> Iterator[pa.Table]:
    del rewards_only  # a line is parsed as a whole
    rows: list[Any] = []
    for number, (_, row) in enumerate(_lines(file, start)):
        rows.append(row)
        if len(rows) == size:
            yield _as_table(rows, file, start + number + 1 - size, schema)
            rows = []
    if rows:
        yield _as_table(rows, file, start, schema)


def _lines(file: Any, skip: int = 0) -> Iterator[tuple[int, Any]]:
    """Length in bytes and value of each line that is not empty, after the first `skip` ones."""
    with file.open() as stream:
        for number, line in enumerate(stream):
            if not line.strip():
                continue
            if skip:
                skip -= 1
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"--input: {file.name} line {number + 1} is not JSON: {error}; mend or remove it") from None
            if not isinstance(row, dict):
                raise DataError(f"--input: {file.name} line {number + 1} is {type(row).__name__}; expected an object per line")
            yield len(line), row


def _as_table(rows: list[Any], file: Any, start: int, schema: pa.Schema | None = None) -> pa.Table:
    try:
        # Without a schema, all keys of all rows; `from_pylist` would take those of the first.
        if schema is None:
            return pa.Table.from_struct_array(pa.array(rows))
        return pa.Table.from_pylist(rows, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"--input: {file.name}, among objects {start + 1} to {start + len(rows)}: {error}; give each key one type"
        ) from None


def _scan_jsonl(file: Any, look: Callable[[pa.Table], None] | None) -> tuple[pa.Schema, int, int]:
    """Schema, number of rows and bytes of a JSONL file."""
    schema, number, length = pa.schema([]), 0, 0
    rows: list[Any] = []

    def flush() -> None:
        nonlocal schema
        table = _as_table(rows, file, number - len(rows))
        try:
            schema = pa.unify_schemas([schema, table.schema], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"--input: {file.name}, about object {number}: {error}; give each key one type") from None
        if look is not None:
            look(table)
        rows.clear()

    for size, row in _lines(file):
        rows.append(row)
        number += 1
        length += size
        if len(rows) == _JSON_ROWS:
            flush()
    if rows:
        flush()
    return schema, number, length
