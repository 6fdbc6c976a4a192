"""The workers of the Ray Data graph: sampling and scoring actors, and the tasks that read and commit chunks.

Blocks are Arrow tables of groups, one chunk per block; columns beyond the group's own (`chunk`) travel with them.
Invariant: every row that comes in goes out, whatever happened to it.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rc_ray.config import GenerationConfig, RewardConfig
from rc_ray.core import schemas
from rc_ray.core.ids import candidate_seed
from rc_ray.errors import ResumeError
from rc_ray.ledger.ledger import Ledger, chunk_name
from rc_ray.ledger.storage import Folder
from rc_ray.pipeline.progress import Reporter

CHUNK, SAMPLED = "chunk", "sampled"


@dataclass(frozen=True)
class Policy:
    """What candidates are sampled from, and how."""

    model: str
    revision: str | None
    trust_remote_code: bool
    generation: GenerationConfig
    num_candidates: int
    seed: int


def load_chunk(items: pa.Table, prompts: Folder, groups: Folder) -> pa.Table:
    """Reads one chunk: its groups when they have been sampled, else its prompts with `candidates` null."""
    (item,) = items.to_pylist()
    name = f"{chunk_name(item[CHUNK])}.parquet"
    table = (groups if item[SAMPLED] else prompts).read_table(name)
    table = table.select([n for n in schemas.GROUP.names if n in table.column_names])
    for field in schemas.GROUP:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    table = table.append_column(CHUNK, pa.array([item[CHUNK]] * table.num_rows, pa.int32()))
    return table.append_column(SAMPLED, pa.array([item[SAMPLED]] * table.num_rows, pa.bool_()))


class GenerateGroups:
    """Samples N candidates for every prompt of a block. Threads may call it side by side; they share one engine."""

    def __init__(self, policy: Policy, on_gpu: bool, engines_per_host: int, board: Any | None, stage: str) -> None:
        from rc_ray.generation.hardware import choose_dtype, cpu_engine_environment

        if not on_gpu:
            os.environ.update(cpu_engine_environment(engines_per_host)[0])
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from rc_ray.generation.engine import SamplingEngine
        from rc_ray.generation.render import PromptRenderer
        from rc_ray.models.resolve import local_model

        self._policy = policy
        self._reporter = Reporter(board, stage)
        path = local_model(policy.model)
        self._render = PromptRenderer(path, policy.revision, policy.trust_remote_code)
        self._engine = SamplingEngine(
            path,
            policy.generation,
            choose_dtype(policy.generation.dtype, on_gpu)[0],
            on_gpu,
            policy.num_candidates,
            policy.revision,
            policy.trust_remote_code,
        )
        self._reporter.ready()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Fills `candidates` (or `failure`) of every row that has neither."""
        rows = block.to_pylist()
        waiting = {i: self._submit(row) for i, row in enumerate(rows) if row["candidates"] is None}
        for i, pending in waiting.items():
            row = rows[i]
            row["candidates"] = []
            if isinstance(pending, tuple):
                row["failure"], row["failure_detail"] = pending
            else:
                self._collect(row, pending)
            self._reporter.add(1, sum(len(c["token_ids"]) for c in row["candidates"]))
        self._reporter.flush()
        return pa.Table.from_pylist(rows, schema=block.schema)

    def _submit(self, row: dict[str, Any]) -> Any:
        """A future of candidates, or (reason, detail) when the prompt cannot be sampled."""
        limits = self._policy.generation
        try:
            ids = self._render(row["prompt"])
        except Exception as error:  # a template may refuse any conversation; the other rows go on
            return "generation_failed", f"chat template: {type(error).__name__}: {error}"[:500]
        if len(ids) + limits.max_tokens > limits.max_model_len:
            return (
                "prompt_too_long",
                f"{len(ids)} prompt tokens + max_tokens {limits.max_tokens} > max_model_len {limits.max_model_len}",
            )
        return self._engine.submit(ids, candidate_seed(self._policy.seed, row["prompt_id"]))

    def _collect(self, row: dict[str, Any], future: Any) -> None:
        from rc_ray.generation.engine import EngineDied

        try:
            row["candidates"] = [vars(candidate) for candidate in future.result()]
        except EngineDied as error:
            # Raising would keep this actor with its dead engine; leaving makes Ray start another and retry the block.
            print(f"rc_ray: the vLLM engine died: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        except Exception as error:  # vLLM refused this request
            row["failure"], row["failure_detail"] = "generation_failed", f"{type(error).__name__}: {error}"[:500]


class ScoreGroups:
    """Adds one objective's rewards to every group of a block."""

    def __init__(
        self, objective: str, config: RewardConfig, on_gpu: bool, num_threads: int, board: Any | None, stage: str
    ) -> None:
        if not on_gpu:
            os.environ["OMP_NUM_THREADS"] = str(num_threads)
        from rc_ray.rewards.base import build_reward

        self._objective = objective
        self._reward = build_reward(config, on_gpu, num_threads)
        self._reporter = Reporter(board, stage)
        self._reporter.ready()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Appends `reward.<objective>` and `missing.<objective>`."""
        prompts = block.column("prompt").to_pylist()
        candidates = [c or [] for c in block.column("candidates").to_pylist()]
        flat = [(prompt, c["text"]) for prompt, group in zip(prompts, candidates, strict=True) for c in group]
        scores = iter(self._reward.score([p for p, _ in flat], [a for _, a in flat]) if flat else [])
        rewards: list[list[float | None]] = []
        missing: list[str | None] = []
        for group in candidates:
            scored = [next(scores) for _ in group]
            rewards.append([s.value for s in scored])
            reasons = Counter(s.missing for s in scored if s.value is None)
            missing.append("; ".join(f"{n}x {reason}" for reason, n in reasons.items()) or None)
        self._reporter.add(block.num_rows, sum(len(c["token_ids"]) for group in candidates for c in group))
        self._reporter.flush()
        reward_field, missing_field = schemas.reward_fields([self._objective])
        block = block.append_column(reward_field, pa.array(rewards, reward_field.type))
        return block.append_column(missing_field, pa.array(missing, missing_field.type))


def split_chunks(block: pa.Table, prompts: Folder) -> dict[int, pa.Table]:
    """The chunks of a block, without bookkeeping columns.

    Raises:
        ResumeError: a chunk is incomplete, so committing it would lose prompts.
    """
    chunks: dict[int, pa.Table] = {}
    column = block.column(CHUNK).to_numpy()
    for chunk in dict.fromkeys(int(c) for c in column):
        table = block.filter(pa.array(column == chunk)).drop_columns([CHUNK, SAMPLED])
        expected = prompts.read_table(f"{chunk_name(chunk)}.parquet", ["prompt_id"]).column(0).to_pylist()
        if sorted(table.column("prompt_id").to_pylist()) != sorted(expected):
            raise ResumeError(
                f"chunk {chunk} has {table.num_rows} groups of {len(expected)}; nothing was committed, run again to resume"
            )
        chunks[chunk] = table
    return chunks


def commit_groups(block: pa.Table, ledger: Ledger, stage: str, prompts: Folder, groups: Folder, skip_sampled: bool) -> pa.Table:
    """Writes each chunk of a block and its commit record; hands the block on unchanged."""
    if block.num_rows and not (skip_sampled and block.column(SAMPLED)[0].as_py()):
        for chunk, table in split_chunks(block, prompts).items():
            candidates = [c for group in table.column("candidates").to_pylist() for c in group or []]
            counts = {
                "groups": table.num_rows,
                "candidates": len(candidates),
                "tokens": sum(len(c["token_ids"]) for c in candidates),
                "truncated": sum(c["finish_reason"] == "length" for c in candidates),
            }
            ledger.commit(stage, chunk, counts, {groups: table})
    return block
