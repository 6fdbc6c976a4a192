"""The workers of the Ray Data graph: sampling and scoring actors, and the tasks that read and commit chunks.

Blocks are Arrow tables of groups, one chunk per block; columns beyond the group's own (`chunk`) travel with them.
Invariant: every row that comes in goes out, whatever happened to it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from rc_ray.config import RewardConfig, SelectionConfig
from rc_ray.core import schemas
from rc_ray.core.ids import candidate_seed
from rc_ray.errors import ResumeError
from rc_ray.generation.engine import EngineDied, GroupTimedOut
from rc_ray.ledger.ledger import Ledger, chunk_name
from rc_ray.ledger.storage import Folder
from rc_ray.models.loading import no_collections
from rc_ray.pipeline.attempts import Attempts, parts
from rc_ray.pipeline.policies import Member, Policy, engines_of
from rc_ray.pipeline.progress import Reporter, ask_board
from rc_ray.rewards.base import Score, figures_of

if TYPE_CHECKING:
    from concurrent.futures import Future

    from rc_ray.generation.engine import Candidate
# In messages of errors that PyTorch has no type for.
BROKEN = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS")
CHUNK, SAMPLED, SCORED = "chunk", "sampled", "scored"
# How often it is said that a long block of rewards goes on.
MOVED_INTERVAL_S = 5.0
Prompt = tuple[Member, list[int], int, int]  # policy, token ids, and which candidates [first, end) it is to give


def load_chunk(items: pa.Table, prompts: Folder, groups: Folder, board: Any) -> pa.Table:
    """Reads one chunk, when few enough are in work: its groups when they have been sampled, with the rewards that are committed; else its
    prompts with `candidates` null, or nothing after the end of sampling."""
    (item,) = items.to_pylist()
    name = f"{chunk_name(item[CHUNK])}.parquet"
    if ask_board(board.may_load, item[CHUNK], item[SAMPLED]):
        table = (groups if item[SAMPLED] else prompts).read_table(name)
    else:
        table = schemas.GROUP.empty_table()
    wanted = [*schemas.GROUP.names, *(field.name for field in schemas.reward_fields(item[SCORED].split()))]
    table = table.select([n for n in wanted if n in table.column_names])
    for field in schemas.GROUP:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    table = table.append_column(CHUNK, pa.array([item[CHUNK]] * table.num_rows, pa.int32()))
    return table.append_column(SAMPLED, pa.array([item[SAMPLED]] * table.num_rows, pa.bool_()))


class GenerateGroups:
    """Samples candidates for every prompt of a block. Threads may call it side by side; they share one engine.

    Where policies need several engines, each engine's actors append their policies' candidates, one engine after the other.

    Args:
        policy: what is sampled, by all engines together.
        engine: number of this one in `policies.engines_of`.
        others: see `graph.attach_generation`.
    """

    _in_rounds = False  # whether a group that was sampled may be sampled again
    _templates: tuple[str, ...] = ()

    @no_collections()
    def __init__(
        self, policy: Policy, on_gpu: bool, gpu_share: float, across_nodes: bool, engines_per_host: int, board: Any | None, stage: str,
        max_attempts: int, engine: int = 0,
    ) -> None:  # fmt: skip
        from rc_ray.generation.hardware import choose_dtype, cpu_engine_environment

        if not on_gpu:
            os.environ.update(cpu_engine_environment(engines_per_host, policy.generation.engine)[0])
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from rc_ray.generation.engine import SamplingEngine
        from rc_ray.generation.render import PromptRenderer, template_hash
        from rc_ray.models.resolve import local_adapter, local_model

        own = self._open(policy, engine, board, stage, max_attempts)
        model, revision, trust_remote_code = own[0].base
        path = local_model(model)
        adapters = {m.name: local_adapter(m.adapter) for m in own if m.adapter is not None}
        self._renderers = {m.name: PromptRenderer(path, revision, trust_remote_code, adapters.get(m.name)) for m in own}
        self._templates = tuple(sorted({template_hash(renderer.tokenizer) for renderer in self._renderers.values()}))
        self._engine = SamplingEngine(
            path,
            policy.generation,
            choose_dtype(policy.generation.dtype, on_gpu)[0],
            on_gpu,
            revision,
            trust_remote_code,
            adapters,
            len(adapters) < len(own),
            gpu_share,
            across_nodes,
        )
        self._reporter.ready()

    def _open(self, policy: Policy, engine: int, board: Any | None, stage: str, max_attempts: int) -> tuple[Member, ...]:
        """Everything but the engine itself; returns its policies."""
        engines = engines_of(policy.members)
        self._policy, self._own = policy, frozenset(m.name for m in engines[engine])
        self._first, self._last = engine == 0, engine == len(engines) - 1
        self._reporter = Reporter(board, stage)
        self._attempts = Attempts(board, stage, max_attempts, "" if self._first else f"engine {engine + 1} ")
        return engines[engine]

    def __call__(self, block: pa.Table) -> pa.Table:
        """Adds this engine's candidates to every row that lacks them, or a failure; after the end of sampling a block that no engine
        has begun comes out empty."""
        rows = block.to_pylist()
        new = not (SAMPLED in block.column_names and any(block.column(SAMPLED).to_pylist()))
        todo = [row for row in rows if self._lacking(row, self._policy.num_candidates)]
        if todo and self._first and not self._may_sample(block):
            return block.slice(0, 0)
        if new and self._last:  # they are finished without this engine
            ids = {row["prompt_id"] for row in todo}
            for row in rows:
                if row["prompt_id"] not in ids:
                    self._count(row)
        if todo:
            with self._attempts.block(todo[0]["prompt_id"]) as block_died:
                self._sample(todo, self._policy.num_candidates, block_died)
        self._reporter.flush()
        return schemas.with_templates(pa.Table.from_pylist(rows, schema=block.schema), self._templates)

    def _lacking(self, row: dict[str, Any], number: int) -> list[tuple[Member, int, int]]:
        """This engine's policies with the candidates [first, end) of `number` that the row does not have yet; none after a failure."""
        if row["failure"] is not None:
            return []
        have = len(row["candidates"] or ())
        shares = self._policy.shares(row["prompt_id"], number)
        return [(m, max(first, have), end) for m, first, end in shares if m.name in self._own and end > max(first, have)]

    def _may_sample(self, block: pa.Table) -> bool:
        """Whether the budget has room for a block. Datasets of the user's have no chunks, and no budget."""
        return CHUNK not in block.column_names or self._reporter.may_sample(block.column(CHUNK)[0].as_py())

    def _sample(self, rows: list[dict[str, Any]], number: int, block_died: bool) -> None:
        """Adds this engine's candidates to every row until it has its share of `number`, or a failure."""
        for part in parts(rows, block_died):
            with self._attempts.part(_work(part[0], number), len(part), block_died) as one_by_one:
                self._sample_part(part, number, one_by_one)
        self._reporter.add_load(self._engine.take_load())

    def _sample_part(self, rows: Sequence[dict[str, Any]], number: int, one_by_one: bool) -> None:
        if one_by_one:
            for row in rows:
                with self._attempts.group(_work(row, number)) as given_up:
                    self._finish(row, ("generation_failed", given_up) if given_up else self._submit(row, number))
        else:
            # How long an answer becomes is unknown; of what is known, the prompt, the longest goes first, so that it does not end last.
            rendered = [(row, self._prompts(row, number)) for row in rows]
            rendered.sort(key=lambda pair: sum(len(p[1]) for p in pair[1]) if isinstance(pair[1], list) else 0, reverse=True)
            pending = [(row, self._ask(row, prompts) if isinstance(prompts, list) else prompts) for row, prompts in rendered]
            for row, answers in pending:
                self._finish(row, answers)

    def _finish(self, row: dict[str, Any], pending: Any) -> None:
        """Waits for what `_submit` returned and enters it into the row."""
        row["candidates"] = row["candidates"] or []
        before = len(row["candidates"])
        if not isinstance(pending, tuple):
            pending = self._collect(row, pending)
        self._reporter.add(tokens=sum(len(c["token_ids"]) for c in row["candidates"][before:]))
        # What an earlier round sampled is kept; a group that one of several policies failed has failed.
        if pending is not None and not (self._in_rounds and before):
            row["candidates"] = []
            row["failure"], row["failure_detail"] = pending
            if row["failure"] == "generation_failed":
                self._reporter.error(row["failure_detail"])
        if self._last and not self._in_rounds:
            self._count(row)

    def _count(self, row: dict[str, Any]) -> None:
        self._reporter.add(1, failed=int(row["failure"] == "generation_failed"))

    def _submit(self, row: dict[str, Any], number: int) -> Any:
        """Futures of the candidates that are lacking, each with its policy, or (reason, detail) when the prompt cannot be sampled."""
        prompts = self._prompts(row, number)
        return self._ask(row, prompts) if isinstance(prompts, list) else prompts

    def _prompts(self, row: dict[str, Any], number: int) -> list[Prompt] | tuple[str, str]:
        """What to ask each policy for, or (reason, detail) when the prompt cannot be sampled."""
        limits = self._policy.generation
        prompts = []
        for member, first, end in self._lacking(row, number):
            whose = self._whose(member.name)
            try:
                ids = self._renderers[member.name](row["prompt"])
            except Exception as error:  # a template may refuse any conversation; the other rows go on
                return "generation_failed", f"{whose}chat template: {type(error).__name__}: {error}"[:500]
            if len(ids) + limits.max_tokens > limits.max_model_len:
                return (
                    "prompt_too_long",
                    f"{whose}{len(ids)} prompt tokens + max_tokens {limits.max_tokens} > max_model_len {limits.max_model_len}",
                )
            prompts.append((member, ids, first, end))
        return prompts

    def _whose(self, name: str) -> str:
        """Names the policy in a detail, where there are several."""
        return f"policy {name}: " if len(self._policy.members) > 1 else ""

    def _ask(self, row: dict[str, Any], prompts: list[Prompt]) -> list[tuple[str, Future[list[Candidate]]]]:
        seed = candidate_seed(self._policy.seed, row["prompt_id"])
        return [
            (member.name, self._engine.submit(ids, seed + first, end - first, member.name if member.adapter else None))
            for member, ids, first, end in prompts
        ]

    def _collect(self, row: dict[str, Any], futures: list[tuple[str, Future[list[Candidate]]]]) -> tuple[str, str] | None:
        """Appends the candidates of the futures to the row; returns (reason, detail) of one that has none."""
        for name, future in futures:
            whose = self._whose(name)
            try:
                row["candidates"] += [{**vars(candidate), "policy": name} for candidate in future.result()]
            except EngineDied as error:
                leave(self._reporter, error)
            except GroupTimedOut as error:
                return "generation_failed", f"{whose}{error}"
            except Exception as error:  # vLLM refused this request
                return "generation_failed", f"{whose}{type(error).__name__}: {error}"[:500]
        return None


def _work(row: dict[str, Any], number: int) -> str:
    """The key of a group's attempts; of each round, since the end of one round strikes out what it was booked as."""
    return f"{row['prompt_id']} to {number}"


def leave(reporter: Reporter, error: Exception) -> NoReturn:
    """Ends this process, whose engine died: raising would keep the actor as it is; now Ray starts another and retries the block."""
    print(f"rc_ray: the vLLM engine died: {error}", file=sys.stderr, flush=True)
    reporter.error(f"the vLLM engine died: {error}"[:500], leaving=True)
    os._exit(1)


class ScoreGroups:
    """Adds one objective's rewards to every group of a block."""

    @no_collections()
    def __init__(
        self, objective: str, config: RewardConfig, content: bytes | None, on_gpu: bool, num_threads: int, board: Any | None, stage: str,
        max_attempts: int, first: bool, last: bool, keep_scored: bool,
    ) -> None:  # fmt: skip
        if not on_gpu:
            os.environ["OMP_NUM_THREADS"] = str(num_threads)
            # An engine's threads wait for each other after every operation, so one that shares its core with a reward holds up all of
            # them. Rewards take what engines leave, and all of it once these have ended. For threads that start from here on.
            if hasattr(os, "sched_setscheduler"):
                os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        from rc_ray.rewards.base import build_reward

        self._objective, self._first, self._last, self._keep_scored = objective, first, last, keep_scored
        self._reward = build_reward(config, on_gpu, num_threads, content)
        self._reporter = Reporter(board, stage)
        self._attempts = Attempts(board, f"{stage} {objective}", max_attempts)
        if last:
            self._reporter.ready()
        self._busy_s, self._figures = 0.0, figures_of(self._reward)
        self._reporter.scored(objective, {}, 0.0)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Appends `reward.<objective>` and `missing.<objective>`."""
        if self._first and CHUNK in block.column_names and block.num_rows:
            self._reporter.may_score(block.column(CHUNK)[0].as_py())
        old = {field.name for field in schemas.reward_fields([self._objective])} & set(block.column_names)
        if not (old and self._keep_scored):
            block = block.drop_columns(sorted(old))
            for field, values in zip(schemas.reward_fields([self._objective]), self.score(block), strict=True):
                block = block.append_column(field, pa.array(values, field.type))
        if self._last:
            failed = sum(_has_failed(row) for row in block.drop_columns(["prompt", "candidates"]).to_pylist())
            self._reporter.add(block.num_rows, count_tokens(block), failed)
            self._reporter.flush()
        return block

    def score(self, block: pa.Table) -> tuple[list[list[float | None]], list[str | None]]:
        """Rewards of each group's candidates, and why some are missing."""
        ids = block.column("prompt_id").to_pylist()
        prompts = block.column("prompt").to_pylist()
        candidates = [c or [] for c in block.column("candidates").to_pylist()]
        scores: list[list[Score]] = [[] for _ in ids]
        todo = [i for i, group in enumerate(candidates) if group]
        if todo:
            with self._attempts.block(ids[todo[0]]) as block_died:
                for part in parts(todo, block_died):
                    with self._attempts.part(ids[part[0]], len(part), block_died) as one_by_one:
                        together = None if one_by_one else self._score_together([(prompts[i], candidates[i]) for i in part])
                        for number, i in enumerate(part):
                            if together is not None:
                                scores[i] = together[number]
                            else:
                                scores[i] = self._score_alone(
                                    ids[i], prompts[i], [c["text"] for c in candidates[i]], block_died
                                )
            self._report()
        rewards = [[s.value for s in group] for group in scores]
        missing = [self._why_missing(group) for group in scores]
        for reason in list(filter(None, missing))[-1:]:
            self._reporter.error(f"{self._objective}: {reason}")
        return rewards, missing

    def _score_together(self, groups: list[tuple[Any, list[dict[str, Any]]]]) -> list[list[Score]] | None:
        """The scores of each group; None after an error, which one group alone may have caused."""
        try:
            flat = [(prompt, c["text"]) for prompt, group in groups for c in group]
            scores = iter(self._ask([p for p, _ in flat], [a for _, a in flat]))
            return [[next(scores) for _ in group] for _, group in groups]
        except EngineDied as error:
            leave(self._reporter, error)
        except Exception as error:
            self._leave_a_broken_device(error)
            return None

    def _score_alone(self, prompt_id: str, prompt: Any, answers: list[str], block_died: bool) -> list[Score]:
        with self._attempts.group(prompt_id, block_died) as given_up:
            if given_up:
                return [Score(None, given_up)] * len(answers)
            try:
                return self._ask([prompt] * len(answers), answers)
            except EngineDied as error:
                leave(self._reporter, error)
            except Exception as error:
                self._leave_a_broken_device(error)
                return [Score(None, f"scoring failed: {type(error).__name__}: {error}"[:500])] * len(answers)

    def _leave_a_broken_device(self, error: Exception) -> None:
        """After some errors nothing runs on a GPU any more in this process, which would fail group after group, faster than others score."""
        if type(error).__name__ == "AcceleratorError" or any(mark in str(error) for mark in BROKEN):
            leave(self._reporter, EngineDied(f"{type(error).__name__}: {error}"[:500]))

    def _ask(self, prompts: list[Any], answers: list[str]) -> list[Score]:
        began_s = time.monotonic()
        try:
            with self._moving():
                return self._reward.score(prompts, answers)
        finally:
            self._busy_s += time.monotonic() - began_s

    @contextlib.contextmanager
    def _moving(self) -> Iterator[None]:
        """Around a call of the reward, which may take longer than the watchdog waits: as long as what it has read grows, the board is told."""
        ended = threading.Event()

        def watch() -> None:
            seen = self._figures
            while not ended.wait(MOVED_INTERVAL_S):
                with contextlib.suppress(RuntimeError):  # counted on while it was copied
                    if (now := figures_of(self._reward)) != seen:
                        seen = now
                        self._reporter.moved()

        thread = threading.Thread(target=watch, name="moving", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _report(self) -> None:
        """Tells the board what the reward has done since the last time."""
        before, self._figures = self._figures, figures_of(self._reward)
        counts = {name: value - before.get(name, 0) for name, value in self._figures.items()}
        self._reporter.scored(self._objective, counts, self._busy_s)
        self._busy_s = 0.0

    @staticmethod
    def _why_missing(group: list[Score]) -> str | None:
        reasons = Counter(s.missing for s in group if s.value is None)
        return "; ".join(f"{n}x {reason}" for reason, n in reasons.items()) or None


def _candidates(table: pa.Table) -> pa.StructArray:
    """All candidates of a table, one after the other."""
    return table.column("candidates").combine_chunks().flatten()


def count_tokens(table: pa.Table) -> int:
    """Tokens of all candidates of a table."""
    return pc.sum(pc.list_value_length(pc.struct_field(_candidates(table), "token_ids"))).as_py() or 0


def count_policies(candidates: pa.StructArray) -> dict[str, int]:
    """Candidates and tokens of each policy, under names such as `policy.large.tokens`."""
    tokens = pc.list_value_length(pc.struct_field(candidates, "token_ids"))
    table = pa.table({"policy": pc.struct_field(candidates, "policy"), "tokens": tokens})
    return {
        f"policy.{row['policy']}.{what}": row[key]
        for row in table.group_by("policy").aggregate([("tokens", "count"), ("tokens", "sum")]).to_pylist()
        for what, key in (("candidates", "tokens_count"), ("tokens", "tokens_sum"))
    }


def count_paired(table: pa.Table, selection: SelectionConfig) -> int:
    """Prompts of scored groups with a pair, as far as that can be known before all are scored."""
    from rc_ray.core.selection import select_pairs, without_fit  # with Numba, half a second of each worker's start

    return select_pairs(table, selection, without_fit(selection, schemas.scored_objectives(table.schema))).num_paired


def _has_failed(row: dict[str, Any]) -> bool:
    """Whether an error kept a group from selection, rather than a property of its prompt."""
    lacking = any(value is not None for name, value in row.items() if name.startswith(schemas.MISSING_PREFIX))
    return lacking or row["failure"] == "generation_failed"


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


def commit_groups(
    block: pa.Table, ledger: Ledger, stage: str, prompts: Folder, groups: Folder, objectives: list[str], skip_sampled: bool, board: Any,
    selection: SelectionConfig | None, by_policy: bool = False,
) -> pa.Table:  # fmt: skip
    """Writes each chunk of a block and its commit record; hands the block on unchanged.

    Args:
        objectives: of the run; in all files, their rewards are in this order.
        skip_sampled: pass over blocks that were committed by this stage before.
        selection: how to count prompts with a pair, once all rewards are there.
        by_policy: whether to count the candidates of each policy.
    """
    if block.num_rows and not (skip_sampled and block.column(SAMPLED)[0].as_py()):
        for chunk, table in split_chunks(block, prompts).items():
            if skip_sampled and ledger.has(stage, chunk):
                continue  # Ray runs a task again whose outcome a node took with it; by now, rewards may be in the file
            if selection is not None and (lacking := schemas.lacking_rewards(table, objectives)):
                raise ResumeError(f"chunk {chunk} has no {lacking[0]}; nothing was committed, run again to resume")
            table = schemas.with_rewards_last(table, objectives)
            candidates = _candidates(table)
            counts = {
                "groups": table.num_rows,
                "candidates": len(candidates),
                "tokens": count_tokens(table),
                "truncated": pc.sum(pc.equal(pc.struct_field(candidates, "finish_reason"), "length")).as_py() or 0,
                "failed": sum(_has_failed(row) for row in table.drop_columns(["prompt", "candidates"]).to_pylist()),
            }
            if by_policy:
                counts |= count_policies(candidates)
            if selection is not None:
                counts["paired"] = count_paired(table, selection)
            ledger.commit(stage, chunk, counts, {groups: table})
            board.committed.remote(stage, chunk, counts.get("paired"))
    return block
