"""Adaptive N: few candidates for every prompt, more only where they do not hold a pair yet.

    sample num_candidates ─► score ─► a pair? ─► done
             ▲                          │ no
             └────── as many again ◄────┘      up to max_candidates

The sampling actor asks the scorers itself, so a group comes back to the engine while others decode, and one run does it all.
Invariant: candidate i of a group is what a fixed N would have sampled (its seed is the group's plus i), and whether there are
more depends on the group alone. So the candidates are a prefix of those of a fixed N, and groups lose no pair by it.
"""

from __future__ import annotations

import threading
from typing import Any

import pyarrow as pa

from rc_ray.config import SelectionConfig
from rc_ray.core import schemas
from rc_ray.core.selection import select_pairs, without_fit
from rc_ray.pipeline.actors import GenerateGroups
from rc_ray.pipeline.progress import Reporter

# Drops that more candidates may turn into pairs.
CURABLE = frozenset({"no_consistent_pair", "winner_truncated", "winner_too_long", "identical_candidates", "too_few_candidates"})


class ScorerPool:
    """The scorers of one objective: the one with the fewest requests of this process outstanding is asked next, in turn among equals."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles
        self._outstanding = [0] * len(handles)
        self._last = -1
        self._lock = threading.Lock()

    def ask(self, table: Any) -> tuple[int, Any]:
        """Sends groups to a scorer; returns its number, for `answered`, and the reference of its answer."""
        with self._lock:
            turns = (self._last + 1 + i for i in range(len(self._handles)))
            self._last = min((turn % len(self._handles) for turn in turns), key=self._outstanding.__getitem__)
            self._outstanding[self._last] += 1
            number = self._last
        return number, self._handles[number].score.remote(table)

    def answered(self, number: int) -> None:
        """Says that a scorer's answer is there."""
        with self._lock:
            self._outstanding[number] -= 1


class AdaptiveGroups(GenerateGroups):
    """Samples and scores the groups of a block in rounds.

    Args:
        scorers: per objective the handles of its `ScoreGroups` actors.
        selection: what counts as a pair.
        score_stage: under which finished groups are counted.
        others: see `GenerateGroups`.
    """

    _in_rounds = True

    def __init__(
        self, scorers: dict[str, list[Any]], selection: SelectionConfig, score_stage: str, board: Any | None, **others: Any
    ) -> None:
        super().__init__(board=board, **others)
        self._scorers = {name: ScorerPool(handles) for name, handles in scorers.items()}
        self._selection = selection
        self._scored = Reporter(board, score_stage)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Fills `candidates` (or `failure`) and the rewards of every row."""
        rows = block.to_pylist()
        for row in rows:
            row["rewards"] = {name: ([], None) for name in self._scorers}
        todo = [row for row in rows if row["failure"] is None]
        if any(row["candidates"] is None for row in todo) and not self._may_sample(block):
            return self._table([], block.schema)
        if todo:
            with self._attempts.block(todo[0]["prompt_id"]) as block_died:
                self._rounds(todo, block_died)
        for row in todo:
            self._count(row)
            lacking = any(why is not None for _, why in row["rewards"].values())
            self._scored.add(1, sum(len(c["token_ids"]) for c in row["candidates"]), int(lacking))
        self._reporter.flush()
        self._scored.flush()
        return schemas.with_templates(self._table(rows, block.schema), self._templates)

    def _rounds(self, rows: list[dict[str, Any]], block_died: bool) -> None:
        number, most = self._policy.num_candidates, self._policy.max_candidates
        assert most is not None
        while rows:
            # A resumed group may have candidates already.
            self._sample([row for row in rows if len(row["candidates"] or ()) < number], number, block_died)
            self._score([row for row in rows if row["failure"] is None])
            if number == most:
                return
            # One that could not be given as many as asked keeps what it has, and is not asked for more.
            rows = [row for row in self._without_pair(rows) if len(row["candidates"]) >= number]
            number = min(2 * number, most)

    def _score(self, rows: list[dict[str, Any]]) -> None:
        """Adds the rewards of the candidates that have none yet."""
        import ray

        if not rows:
            return
        first = next(iter(self._scorers))
        new = [{**row, "candidates": row["candidates"][len(row["rewards"][first][0]) :]} for row in rows]
        table = ray.put(pa.Table.from_pylist(new, schema=schemas.GROUP))
        asked = {name: pool.ask(table) for name, pool in self._scorers.items()}
        for name, (number, answer) in asked.items():
            scores = ray.get(answer)
            self._scorers[name].answered(number)
            for row, values, missing in zip(rows, *scores, strict=True):
                known, why = row["rewards"][name]
                row["rewards"][name] = ([*known, *values], why or missing)

    def _without_pair(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # Nothing about the data is known yet; where it matters to whether there is a pair, the configuration is refused.
        selected = select_pairs(self._table(rows, schemas.GROUP), self._selection, without_fit(self._selection, self._scorers))
        target = self._policy.generation.target_gap
        lacking = {row["prompt_id"] for row in selected.drops.to_pylist() if row["reason"] in CURABLE}
        if target is not None:
            widest: dict[str, float] = {}
            for row in selected.pairs.select(["prompt_id", "gap"]).to_pylist():
                widest[row["prompt_id"]] = max(row["gap"], widest.get(row["prompt_id"], row["gap"]))
            lacking |= {prompt_id for prompt_id, gap in widest.items() if gap < target}
        return [row for row in rows if row["prompt_id"] in lacking]

    def _table(self, rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
        table = pa.Table.from_pylist(rows, schema=schema)
        for name in self._scorers:
            values = zip(*(row["rewards"][name] for row in rows), strict=True) if rows else ((), ())
            for field, column in zip(schemas.reward_fields([name]), values, strict=True):
                table = table.append_column(field, pa.array(list(column), field.type))
        return table
