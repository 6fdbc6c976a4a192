"""A Ray Data pass over the pairs before training: a look at all of them, then the reference model's log-probs.

The training process then holds no reference model. Results are kept by content: a slice of pairs is one Parquet file, named after the hash of its tokens in
a folder named after the reference, so the same pairs with the same reference are computed once. Invariant: the slices, read in their order, are
the pairs in theirs, without those that `PairCounts` counts as left out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rc_ray import errors
from rc_ray.config import Config
from rc_ray.core import schemas
from rc_ray.errors import DataError, ModelError, RcRayError
from rc_ray.generation.render import template_hash
from rc_ray.ledger.storage import Folder
from rc_ray.models.identity import model_identity
from rc_ray.models.loading import no_collections
from rc_ray.models.resolve import local_model
from rc_ray.rewards.base import Score, reward_dtype
from rc_ray.training.pairs import SIDES, PairCounts, PairTokenizer, end_tokens

if TYPE_CHECKING:
    from rc_ray.rewards.language_model import LanguageModel

COLUMNS = ["prompt", "chosen", "rejected"]
REWARDS = ["rewards_chosen", "rewards_rejected"]
REFERENCE = [f"ref_{side}_logps" for side in SIDES]
SLICE_ROWS = 64
# Pairs whose given reference log-probs are computed again, and how far the two may differ, relative to the larger of 1 and the log-prob.
NUM_CHECKED, TOLERANCE = 8, {"float32": 3e-3, "bfloat16": 0.05, "float16": 0.05}
TOKENS = pa.schema(
    [
        ("row", pa.int64()),
        *((name, pa.list_(pa.int32())) for name in ("prompt_ids", "chosen_ids", "rejected_ids")),
        *((name, pa.float64()) for name in REFERENCE),
        ("differences", pa.list_(pa.float64())),
    ]
)


@dataclass(frozen=True)
class Slice:
    """Some rows, in their order."""

    first: int
    """Number of the first row among all."""
    parts: tuple[tuple[str, int, int], ...]
    """File, first row in it, number of rows."""


@dataclass(frozen=True)
class PairsTask:
    """All that an actor needs; plain values, sent through Ray."""

    pairs: Folder
    model: str
    revision: str | None
    trust_remote_code: bool
    max_length: int | None
    on_gpu: bool
    num_threads: int
    dtype: str
    max_batch_tokens: int
    recipe: str
    reference: str
    reference_revision: str | None
    trust_reference_code: bool
    objective: str | None = None
    """Whose order the pairs are turned to."""
    scales: dict[str, tuple[float, float]] | None = None
    """For `reward_augmented`: smallest and largest reward of each objective."""
    brought: bool = True
    """Whether log-probs that the pairs bring are of this reference."""
    any_template: bool = False
    """Whether pairs may be sampled with another template."""
    results: Folder | None = None
    """Where the log-probs go; None: only a look at the pairs."""
    stall_timeout_s: float = 1800.0
    """See `ClusterConfig`; some slice has to be ready in this time."""


class ReadPairs:
    """A Ray Data actor: tokenizes slices of pairs and looks at them, and computes the log-probs of the reference where they are wanted."""

    def __init__(self, task: PairsTask) -> None:
        self._task = task
        self._tokenizer: PairTokenizer | None = None
        self._model: LanguageModel | None = None
        self._last: tuple[str, pa.Table] | None = None
        self._others: dict[int, str] = {}
        """The policy's tokens that the reference does not read as such."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Slices as JSON in `slice`; adds counts, name and, in the place of both, an error of this package, which would lose its type on the way."""
        found: dict[str, list[Any]] = {"first": [], "counts": [], "name": [], "error": []}
        for text in batch["slice"]:
            part, counts, name, error = Slice(**json.loads(text)), PairCounts(), "", ""
            try:
                counts, name = self.read(part)
            except RcRayError as raised:
                error = json.dumps([type(raised).__name__, str(raised)])
            for key, value in zip(found, (part.first, json.dumps(counts.__dict__), name, error), strict=True):
                found[key].append(value)
        return {key: np.array(values, dtype=np.int64 if key == "first" else object) for key, values in found.items()}

    def _file(self, name: str) -> pa.Table:
        """A file of pairs. The last one stays, since the slices of a large one come one after the other."""
        if self._last is None or self._last[0] != name:
            self._last = name, self._task.pairs.read_table(name)
        return self._last[1]

    @no_collections()
    def _open(self) -> PairTokenizer:
        from transformers import AutoTokenizer

        task, path = self._task, local_model(self._task.model)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=task.revision, trust_remote_code=task.trust_remote_code)
        if not tokenizer.chat_template:
            raise ModelError(
                f"model = {task.model!r}: its tokenizer has no chat template, so messages cannot be rendered; save one with it"
            )
        template = None if task.any_template else template_hash(tokenizer)
        return PairTokenizer(tokenizer, end_tokens(path, tokenizer, task.revision), task.max_length, template)

    def read(self, part: Slice) -> tuple[PairCounts, str]:
        pairs = self._prepared(read_slice(self._file, part))
        self._tokenizer = self._tokenizer or self._open()
        rows, counts = self._tokenizer.tokenize(pairs, part.first)
        given = [
            tuple(pairs[row["row"] - part.first].get(name) if self._task.brought else None for name in REFERENCE)
            for row in rows
        ]
        is_given = any(pair != (None, None) for pair in given)
        if is_given:
            self._check_given(given, rows)
        if self._task.results is None:
            whole = json.dumps([part.first, pairs], default=str)
            counts.digest = int.from_bytes(hashlib.blake2b(whole.encode(), digest_size=16).digest(), "big")
            return counts, ""
        content = json.dumps([rows, given])
        name = f"{hashlib.blake2b(content.encode(), digest_size=16).hexdigest()}.parquet"
        if not self._task.results.exists(name):
            before = Counter(self._model.batches.counts if self._model else {})
            scores = self._given(given, rows) if is_given else self._logps(rows)
            for row, pair in zip(rows, scores, strict=True):
                row |= dict(zip(REFERENCE, pair, strict=True))
            self._task.results.write_table(name, pa.Table.from_pylist(rows, schema=TOKENS))
            read = Counter(self._model.batches.counts if self._model else {}) - before
            counts.num_read_tokens, counts.num_padded_tokens = read["num_tokens"], read["num_padded_tokens"]
        return counts, name

    def _prepared(self, table: pa.Table) -> list[dict[str, Any]]:
        """The pairs as the recipe wants them."""
        from rc_ray.training.recipes import oriented, reward_augmented

        task = self._task
        rows: list[dict[str, Any]] = table.to_pylist()
        if task.objective is not None:
            return oriented(rows, task.objective)
        return reward_augmented(rows, task.scales) if task.scales is not None else rows

    def _logps(self, rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
        """Log-probs of chosen and rejected of each pair. The model is loaded for the first ones that are not kept already."""
        self._model = self._model or self._load()
        texts = [row["prompt_ids"] + row[f"{side}_ids"] for row in rows for side in SIDES]
        found = self._others.keys() & {number for text in texts for number in text}
        if found:
            raise ModelError(
                f"training.reference.model = {self._task.reference!r}: its tokenizer has other tokens than the policy's for {len(found)} that the pairs hold, "
                f"such as {self._others[min(found)]!r}, so its log-probs would be of other texts; give a reference with the policy's tokenizer"
            )
        starts = [len(row["prompt_ids"]) for row in rows for _ in SIDES]
        scores = self._model.sums(texts, starts)
        for i, score in enumerate(scores):
            if score.value is None:
                raise DataError(
                    f"pair {rows[i // 2]['row']}: the reference model gives its {SIDES[i % 2]} answer no log-prob: {score.missing}"
                )
        values = [score.value or 0.0 for score in scores]
        return list(zip(values[::2], values[1::2], strict=True))

    @no_collections()
    def _load(self) -> LanguageModel:
        from rc_ray.rewards.language_model import LanguageModel

        task = self._task
        if not task.on_gpu:
            import torch

            torch.set_num_threads(task.num_threads)
        model = LanguageModel(
            task.reference, task.reference_revision, task.trust_reference_code, task.dtype, task.on_gpu, task.max_batch_tokens
        )
        assert self._tokenizer is not None
        theirs, ours = model.vocabulary(), self._tokenizer.vocabulary()
        self._others = {number: token for token, number in ours.items() if theirs.get(token) != number}
        return model

    def _check_given(self, given: list[tuple[Any, ...]], rows: list[dict[str, Any]]) -> None:
        for row, pair in zip(rows, given, strict=True):
            if any(Score.checked(value).value is None for value in pair):
                raise DataError(
                    f"pairs = {self._task.pairs.uri!r}: pair {row['row']} has the reference log-probs {pair}; they must be finite numbers, of both "
                    "answers and in all pairs, or in none"
                )

    def _given(self, given: list[tuple[Any, ...]], rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
        """Log-probs that the pairs came with, of which some are computed again."""
        tolerance = TOLERANCE[self._task.dtype]
        for row, pair, own in zip(rows, given, self._logps(rows[:NUM_CHECKED]), strict=False):
            for side, there, here in zip(SIDES, pair, own, strict=True):
                if abs(there - here) > tolerance * max(1.0, abs(here)):
                    raise DataError(
                        f"pairs = {self._task.pairs.uri!r}: ref_{side}_logps of pair {row['row']} is {there:.6g}, and {self._task.reference!r} gives {here:.6g} "
                        f"({self._task.dtype}, tolerance {tolerance:g}); they are of another reference model or template, or were computed in a lower precision: leave the columns out to have them "
                        "computed, or give the model they are of"
                    )
        return [(float(a), float(b)) for a, b in given]


def slices(pairs: Folder, recipe: str = "dpo") -> list[Slice]:
    """All rows of a folder's Parquet files in the order of their names, in slices of `SLICE_ROWS`.

    Raises:
        DataError: a file lacks a column.
    """
    filesystem, path = pairs.filesystem()
    found: list[Slice] = []
    parts: list[tuple[str, int, int]] = []
    first = total = 0

    def close() -> None:
        nonlocal parts, first
        if parts:
            found.append(Slice(first, tuple(parts)))
        parts, first = [], total

    for name in pairs.names(".parquet"):
        with filesystem.open_input_file(f"{path}/{name}") as file:
            reader = pq.ParquetFile(file)
            missing = sorted(set(COLUMNS if recipe == "dpo" else COLUMNS + REWARDS) - set(reader.schema_arrow.names))
            if missing:
                raise DataError(
                    f"pairs = {pairs.uri!r}: {name} has no column {', '.join(missing)}; expected are prompt, chosen and rejected as message lists"
                    + ("" if recipe == "dpo" else f", and for recipe {recipe} the rewards of both, as `select` writes them")
                )
            rows = reader.metadata.num_rows
        start = 0
        while start < rows:
            take = min(rows - start, SLICE_ROWS - (total - first))
            parts.append((name, start, take))
            start, total = start + take, total + take
            if total - first == SLICE_ROWS:
                close()
    close()
    return found


def read_slice(read: Callable[[str], pa.Table], part: Slice) -> pa.Table:
    """The rows of a slice, of files that `read` gives: prompt, chosen, rejected, reference log-probs and rewards where they are, and the templates that they were sampled with."""
    tables = []
    for name, start, count in part.parts:
        table = read(name)
        templates = pa.array([schemas.templates_of(table.schema)] * count, pa.list_(pa.string()))
        table = table.select([c for c in (*COLUMNS, *REWARDS, *REFERENCE) if c in table.column_names]).slice(start, count)
        tables.append(table.replace_schema_metadata(None).append_column("templates", templates))
    return pa.concat_tables(tables, promote_options="default")


def look(config: Config, pairs: Folder, num_actors: int, num_cpus: float) -> PairCounts:
    """Tokenizes all pairs on the connected cluster and counts; computes nothing."""
    task = pairs_task(config, pairs, False, 1)
    parts = slices(pairs, task.recipe)
    if len(parts) == 1:  # an actor takes longer to start than this to be read
        return ReadPairs(task).read(parts[0])[0]
    counts = PairCounts()
    for _, found, _ in _run(task, parts, num_actors, num_cpus, 0.0):
        counts.add(found)
    return counts


def pairs_task(config: Config, pairs: Folder, on_gpu: bool, num_threads: int) -> PairsTask:
    """What the actors do."""
    training = config.training
    return PairsTask(
        pairs=pairs,
        model=config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        max_length=training.max_length,
        on_gpu=on_gpu,
        num_threads=num_threads,
        dtype=reward_dtype(training.dtype, on_gpu),
        max_batch_tokens=training.reference.max_batch_tokens,
        recipe=training.recipe,
        reference=training.reference.model or config.model,
        reference_revision=training.reference.revision if training.reference.model else config.revision,
        trust_reference_code=training.reference.trust_remote_code if training.reference.model else config.trust_remote_code,
        any_template=training.allow_other_template,
        stall_timeout_s=config.cluster.stall_timeout_s,
    )


def reference_logps(
    task: PairsTask, cache: Folder, num_actors: int, num_cpus: float, num_gpus: float
) -> tuple[Folder, list[str], PairCounts]:
    """Computes what is not there yet; the folder of the results, their names in the pairs' order, and counts."""
    key = hashlib.blake2b(
        f"{model_identity(task.reference, task.reference_revision)} {task.dtype}".encode(), digest_size=8
    ).hexdigest()
    task, counts, found = replace(task, results=cache / key), PairCounts(), []
    for first, part, name in _run(task, slices(task.pairs, task.recipe), num_actors, num_cpus, num_gpus):
        counts.add(part)
        found.append((first, name))
    return cache / key, [name for _, name in sorted(found)], counts


def _run(
    task: PairsTask, parts: list[Slice], num_actors: int, num_cpus: float, num_gpus: float
) -> Iterator[tuple[int, PairCounts, str]]:
    """First row, counts and name of every slice, in any order.

    Raises:
        DataError, ModelError: of an actor. ClusterError: actors fail otherwise, as for lack of memory.
    """
    import ray
    from ray.data import ActorPoolStrategy

    todo = [{"slice": json.dumps(part.__dict__)} for part in parts]
    if not todo:
        return
    dataset = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
        ReadPairs,
        fn_constructor_args=(task,),
        batch_size=1,
        compute=ActorPoolStrategy(size=min(num_actors, len(todo))),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
    dataset.context.execution_no_progress_timeout_s = math.ceil(task.stall_timeout_s)
    kept = "" if task.results is None else "\nWhat was read is kept; run the same command again to go on."
    with errors.computing("reading the pairs", kept):
        for row in dataset.iter_rows():
            if row["error"]:
                kind, text = json.loads(row["error"])
                raise getattr(errors, kind)(text)
            yield int(row["first"]), PairCounts(**json.loads(row["counts"])), str(row["name"])
