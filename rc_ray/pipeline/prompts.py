"""Prompt sources: Parquet, JSONL, CSV, Hub datasets and embedded files, read row by row into numbered chunks.

Invariant: every row of the source becomes exactly one prompt or one drop with a reason; a bad row never stops a run, and a
bad source (no file, no such column) stops it before anything is written.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rc_ray.config import PromptsConfig
from rc_ray.core import schemas
from rc_ray.core.ids import Message, bad_row_id, prompt_id
from rc_ray.errors import DataError
from rc_ray.ledger.ledger import chunk_name
from rc_ray.ledger.storage import Folder

EMBEDDED = {
    "embedded:demo-prompts": Path(__file__).parent.parent / "demo" / "prompts.jsonl",
    "embedded:demo-eval-prompts": Path(__file__).parent.parent / "demo" / "eval_prompts.jsonl",
}
ENDINGS = {".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv"}
STAGE = "prompts"
# Rows of a JSONL file that may lack the column before the file as a whole is taken to lack it.
PROBE_ROWS = 100
DROPS_AT_ONCE = 10_000


@dataclass(frozen=True)
class BadRow:
    """A row that holds no prompt: the drop reason and what was found."""

    reason: str
    detail: str


@dataclass(frozen=True)
class _File:
    """One source file on some filesystem."""

    filesystem: pafs.FileSystem
    path: str
    name: str
    format: str

    def open(self) -> Any:
        raw = self.filesystem.open_input_file(self.path)
        return gzip.GzipFile(fileobj=raw) if self.path.endswith(".gz") else io.BufferedReader(raw)


class _Absent:
    """Marks a row without the column."""

    def __repr__(self) -> str:
        return "no such column"


def source_files(field: str, config: PromptsConfig) -> list[_File]:
    """The files a source consists of, in order of their names.

    Raises:
        DataError: nothing is there, or a format cannot be told.
    """
    path = config.path
    if path.startswith("embedded:"):
        if path not in EMBEDDED:
            raise DataError(f"{field}.path = {path!r}: no such embedded prompts; there are {', '.join(EMBEDDED)}")
        path = str(EMBEDDED[path])
    filesystem, root = Folder.at(path).filesystem()
    if any(c in path for c in "*?[") and "://" not in path and not Path(root).exists():
        paths = sorted(glob.glob(root))
    else:
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.Directory:
            selector = pafs.FileSelector(root, recursive=True)
            found = [i.path for i in filesystem.get_file_info(selector) if i.type == pafs.FileType.File]
            paths = sorted(p for p in found if config.format != "auto" or _ending(p) in ENDINGS)
        else:
            paths = [root] if info.type == pafs.FileType.File else []
    if not paths:
        raise DataError(
            f"{field}.path = {config.path!r}: no such file; give a Parquet, JSONL or CSV file, a folder or glob of them, or hub:org/name"
        )
    files = []
    for p in paths:
        kind = config.format if config.format != "auto" else ENDINGS.get(_ending(p), "")
        if not kind:
            raise DataError(
                f"{field}.path = {p!r}: the ending does not tell the format; set {field}.format to parquet, jsonl or csv"
            )
        files.append(_File(filesystem, p, Path(p).name, kind))
    return files


def _ending(path: str) -> str:
    return Path(path.removesuffix(".gz")).suffix.lower()


def check_source(field: str, config: PromptsConfig) -> str:
    """Checks that the source is there and has the column; returns a hash of its content.

    Raises:
        DataError: it does not.
    """
    if config.path.startswith("hub:"):
        return f"{config.path}@{config.revision or 'main'}/{config.split}"
    digest = hashlib.blake2b(digest_size=16)
    for file in source_files(field, config):
        try:
            columns = _columns(file, config.column)
        except (OSError, EOFError) as error:
            raise DataError(f"{field}.path = {file.path!r}: cannot be read: {type(error).__name__}: {error}") from None
        if not columns and file.format == "jsonl" and not any(True for _ in _read_file(file, config.column)):
            raise DataError(f"{field}.path = {file.path!r}: there is no row in it; give a file with prompts")
        if config.column not in columns:
            raise DataError(
                f"{field}.column = {config.column!r}: {file.path!r} has no such column (it has: {', '.join(columns) or 'none'}); "
                f"set {field}.column to the one with the prompts"
            )
        with file.filesystem.open_input_stream(file.path, compression=None) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _columns(file: _File, wanted: str) -> list[str]:
    if file.format == "parquet":
        try:
            return list(pq.read_schema(file.path, filesystem=file.filesystem).names)
        except pa.ArrowInvalid as error:
            raise DataError(f"{file.path!r} is not a Parquet file: {error}") from None
    with file.open() as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")
        if file.format == "csv":
            csv.field_size_limit(sys.maxsize)
            return next(csv.reader(text), [])
        found: dict[str, None] = {}
        for _, line in zip(range(PROBE_ROWS), text, strict=False):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            found |= dict.fromkeys(row if isinstance(row, dict) else ())
            if wanted in found:
                break
        return list(found)


def read_cells(field: str, config: PromptsConfig) -> Iterator[Any]:
    """The prompt cell of every row in order; a `BadRow` for rows that cannot be read."""
    cells = _read_hub(field, config) if config.path.startswith("hub:") else _read_files(field, config)
    for number, cell in enumerate(cells):
        if config.limit is not None and number >= config.limit:
            return
        yield cell


def _read_files(field: str, config: PromptsConfig) -> Iterator[Any]:
    for file in source_files(field, config):
        try:
            yield from _read_file(file, config.column)
        except (OSError, EOFError) as error:
            raise DataError(f"{field}.path = {file.path!r}: reading broke off: {type(error).__name__}: {error}") from None


def _read_hub(field: str, config: PromptsConfig) -> Iterator[Any]:
    import datasets

    name = config.path.removeprefix("hub:")
    try:
        dataset = datasets.load_dataset(name, split=config.split, revision=config.revision, streaming=True)
        columns = dataset.column_names
    except Exception as error:  # the library raises a different type for every way in which the Hub says no
        raise DataError(f"{field}.path = {config.path!r}: cannot load from the Hub: {type(error).__name__}: {error}") from None
    if columns is not None and config.column not in columns:
        raise DataError(f"{field}.column = {config.column!r}: the dataset has no such column (it has: {', '.join(columns)})")
    return (row.get(config.column, _Absent()) for row in dataset)


def _read_file(file: _File, column: str) -> Iterator[Any]:
    if file.format == "parquet":
        with file.filesystem.open_input_file(file.path) as source:
            for batch in pq.ParquetFile(source).iter_batches(columns=[column]):
                yield from _parquet_cells(batch.column(column))
        return
    with file.open() as stream:
        if file.format == "csv":
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
            csv.field_size_limit(sys.maxsize)
            for row in csv.DictReader(text):
                yield row.get(column)
            return
        for number, line in enumerate(stream):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, numbers of thousands of digits
                yield BadRow("invalid_prompt", f"not valid JSON: {error}")
                continue
            yield (
                row.get(column, _Absent()) if isinstance(row, dict) else BadRow("invalid_prompt", "the line is no JSON object")
            )


def _parquet_cells(column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_utf8_or_bad(value) for value in column]


def _utf8_or_bad(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return BadRow("invalid_prompt", "the text is not valid UTF-8")


def to_messages(cell: Any, column: str, system: str | None = None) -> list[Message] | BadRow:
    """A prompt cell as chat messages, or why it is none."""
    if isinstance(cell, BadRow):
        return cell
    if isinstance(cell, _Absent):
        return BadRow("invalid_prompt", f"the row has no column {column!r}")
    if cell is None:
        return BadRow("invalid_prompt", "null, not a string or a list of messages")
    if isinstance(cell, str):
        messages: list[Message] = [{"role": "user", "content": cell}]
    elif isinstance(cell, list) and all(isinstance(m, dict) for m in cell):
        for m in cell:
            if not (isinstance(m.get("role"), str) and isinstance(m.get("content"), str)):
                return BadRow("invalid_prompt", "a message needs `role` and `content`, both strings")
        messages = [{"role": m["role"], "content": m["content"]} for m in cell]
    else:
        return BadRow("invalid_prompt", f"{type(cell).__name__}, not a string or a list of messages: {cell!r}"[:200])
    if not messages or not messages[-1]["content"].strip():
        return BadRow("empty_prompt", "no text")
    if messages[-1]["role"] != "user":
        return BadRow("invalid_prompt", f"the last message is from {messages[-1]['role']!r}, not from `user`")
    try:
        for m in messages:
            (m["role"] + m["content"]).encode()
    except UnicodeEncodeError:
        return BadRow("invalid_prompt", "the text is not valid UTF-8")
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def prompt_ids(cells: Iterator[Any], config: PromptsConfig) -> list[str]:
    """Ids of the prompts among source rows."""
    found = (to_messages(cell, config.column, config.system) for cell in cells)
    return [prompt_id(messages) for messages in found if not isinstance(messages, BadRow)]


class SeenPrompts:
    """Which prompts have occurred, in a temporary file: the driver's memory does not grow with them."""

    def __init__(self) -> None:
        self._rows = sqlite3.connect("", isolation_level=None)
        self._rows.execute("PRAGMA journal_mode = OFF")
        self._rows.execute("BEGIN")  # one transaction that never ends; each insert in its own would write it out
        self._rows.execute("CREATE TABLE seen (id BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID")
        self.count = 0

    def first_row(self, identity: str, row: int) -> int | None:
        """Row at which a prompt occurred before; None the first time, when `row` is noted."""
        key = bytes.fromhex(identity)
        if self._rows.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, row)).rowcount:
            self.count += 1
            return None
        (first,) = self._rows.execute("SELECT row FROM seen WHERE id = ?", (key,)).fetchone()
        return int(first)


def write_chunks(
    cells: Iterator[Any],
    config: PromptsConfig,
    chunks: Folder,
    drops: Folder,
    chunk_size: int,
    excluded: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Splits prompts into chunk files and writes the drops beside them.

    Args:
        cells: prompt cells, one per source row.
        chunks: where `chunk-NNNNNN.parquet` files go (`schemas.PROMPT`).
        drops: where `prompts.parquet` goes (`schemas.DROP`).
        chunk_size: prompts per chunk.
        excluded: ids that are left out as `in_training_prompts`.

    Returns:
        `rows`, `prompts`, `chunks`, `chunk_size` (all chunks but the last have it) and `drops` (count per reason).
    """
    seen = SeenPrompts()
    dropped: list[dict[str, str]] = []
    tables: list[pa.Table] = []  # of drops; a fraction of what they take as dictionaries
    counted: Counter[str] = Counter()
    buffer: list[dict[str, Any]] = []
    num_chunks = num_rows = 0

    def flush() -> None:
        nonlocal num_chunks
        if buffer:
            chunks.write_table(f"{chunk_name(num_chunks)}.parquet", pa.Table.from_pylist(buffer, schema=schemas.PROMPT))
            num_chunks += 1
            buffer.clear()

    def flush_drops() -> None:
        tables.append(pa.Table.from_pylist(dropped, schema=schemas.DROP))
        counted.update(drop["reason"] for drop in dropped)
        dropped.clear()

    for row, cell in enumerate(cells):
        num_rows += 1
        messages = to_messages(cell, config.column, config.system)
        if isinstance(messages, BadRow):
            identity, reason, detail = bad_row_id(config.path, row, repr(cell)), messages.reason, messages.detail
        else:
            identity = prompt_id(messages)
            if identity in excluded:
                reason, detail = "in_training_prompts", "also among the training prompts"
            elif (first := seen.first_row(identity, row)) is not None:
                reason, detail = "duplicate_prompt", f"same as row {first + 1}"
            else:
                buffer.append({"prompt_id": identity, "prompt": messages})
                if len(buffer) == chunk_size:
                    flush()
                continue
        dropped.append({"prompt_id": identity, "reason": reason, "stage": STAGE, "detail": f"row {row + 1}: {detail}"})
        if len(dropped) == DROPS_AT_ONCE:
            flush_drops()
    flush()
    flush_drops()
    drops.write_table("prompts.parquet", pa.concat_tables(tables))
    return {
        "rows": num_rows,
        "prompts": seen.count,
        "chunks": num_chunks,
        "chunk_size": chunk_size,
        "drops": dict(counted),
    }
