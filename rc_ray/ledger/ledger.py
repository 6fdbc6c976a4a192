"""What is done: one small commit record per stage and chunk of prompts, on any filesystem, without a central writer.

Prompts are split once, in order, into numbered chunks. A stage turns chunk i into a Parquet file named after i and then
writes `ledger/<stage>/<i>.json`. That record is the commit:

* A kill before it leaves a data file that the next attempt overwrites with equal content (ids and seeds come from content),
  so nothing is there twice; a kill after it loses nothing. Lost work is bounded by the chunks in flight.
* What is done is a listing of names: no answer, no id has to be read, and prompts that were dropped are as done as paired ones.

Invariant: a data file without its record does not count; a record is only written after its data file.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rc_ray.ledger.storage import Folder

# Records read at once: object storage takes tens of milliseconds for each, however small.
READERS = 32


def chunk_name(chunk: int) -> str:
    """File name of a chunk without its ending."""
    return f"chunk-{chunk:06d}"


@dataclass(frozen=True)
class Ledger:
    """The commit records below one folder."""

    folder: Folder

    def done(self, stage: str) -> set[int]:
        """Chunks that a stage has committed."""
        names = (self.folder / stage).names(".json")
        return {int(name[len("chunk-") : -len(".json")]) for name in names if name.startswith("chunk-")}

    def has(self, stage: str, chunk: int) -> bool:
        """Whether a stage has committed a chunk."""
        return (self.folder / stage).exists(f"{chunk_name(chunk)}.json")

    def commit(self, stage: str, chunk: int, counts: dict[str, Any], files: dict[Folder, pa.Table]) -> None:
        """Writes a chunk's tables, one file per folder, then the record that makes them count."""
        for folder, table in files.items():
            folder.write_table(f"{chunk_name(chunk)}.parquet", table)
        (self.folder / stage).write_json(f"{chunk_name(chunk)}.json", counts)

    def give_back(self, stage: str, chunk: int) -> None:
        """Takes a commit back: the chunk is done again by the next run."""
        (self.folder / stage).remove(f"{chunk_name(chunk)}.json")

    def counts(self, stage: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Chunk and counts of every commit of a stage, in the order of chunks."""
        records, chunks = self.folder / stage, sorted(self.done(stage))
        with ThreadPoolExecutor(READERS) as pool:
            yield from zip(chunks, pool.map(lambda chunk: records.read_json(f"{chunk_name(chunk)}.json"), chunks), strict=True)

    def totals(self, stage: str) -> dict[str, float]:
        """Sum of the counts over all commits of a stage."""
        totals: dict[str, float] = {}
        for _, counts in self.counts(stage):
            for key, value in counts.items():
                totals[key] = totals.get(key, 0) + value
        return totals

    def is_finished(self, stage: str) -> bool:
        """Whether a stage as a whole is marked finished."""
        return (self.folder / stage).exists("finished.json")

    def finish(self, stage: str, facts: dict[str, Any]) -> None:
        """Marks a stage as finished, with facts worth keeping."""
        (self.folder / stage).write_json("finished.json", facts)

    def facts(self, stage: str) -> dict[str, Any]:
        """What `finish` recorded."""
        return dict((self.folder / stage).read_json("finished.json"))
