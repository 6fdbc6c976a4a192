"""Recorded answers in the place of an engine: the pipeline is tested for volume, the model is not.

The pools, blocks, commits and rewards are those of a run; only `SamplingEngine` is replaced. `replay` puts the classes below into
the Ray Data graph of this driver.
"""

from __future__ import annotations

import functools
import gzip
import json
import random
import zlib
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from rc_ray.core.ids import candidate_seed
from rc_ray.generation.engine import Candidate
from rc_ray.generation.load import Load
from rc_ray.pipeline import actors, graph
from rc_ray.pipeline.actors import GenerateGroups
from rc_ray.pipeline.adaptive import AdaptiveGroups, ScorerPool
from rc_ray.pipeline.policies import Policy
from rc_ray.pipeline.progress import Reporter

WORDS = [f"word{i}" for i in range(1000)]


class _NoEngine:
    """Has no load to tell of."""

    def take_load(self) -> Load:
        return Load()


class _Replay:
    """In the place of the engine, whose answers are those of the record in order."""

    _policy: Policy
    _engine = _NoEngine()

    def _prompts(self, row: dict[str, Any], number: int) -> list[Any]:
        return [(self._policy.members[0].name, [], len(row["candidates"] or ()), number)]

    def _ask(self, row: dict[str, Any], prompts: list[Any]) -> list[tuple[str, Future[list[Candidate]]]]:
        ((name, _, first, end),) = prompts
        seed = candidate_seed(self._policy.seed, row["prompt_id"])
        texts = recorded_answers(row["prompt"][-1]["content"], self._policy.members[0].model)[first:end]
        future: Future[list[Candidate]] = Future()
        future.set_result([Candidate(t, list(range(len(t) // 4)), "stop", seed + first + i, -1.0) for i, t in enumerate(texts)])
        return [(name, future)]


class ReplayGroups(_Replay, GenerateGroups):
    """`GenerateGroups` without a model."""

    def __init__(self, policy: Policy, board: Any, stage: str, max_attempts: int, **_: Any) -> None:
        self._open(policy, 0, board, stage, max_attempts)
        self._reporter.ready()


class ReplayAdaptiveGroups(_Replay, AdaptiveGroups):
    """`AdaptiveGroups` without a model; it asks real scorers."""

    def __init__(
        self,
        policy: Policy,
        board: Any,
        stage: str,
        max_attempts: int,
        scorers: Any,
        selection: Any,
        score_stage: str,
        **_: Any,
    ) -> None:
        self._open(policy, 0, board, stage, max_attempts)
        self._reporter.ready()
        self._scorers, self._selection = {name: ScorerPool(handles) for name, handles in scorers.items()}, selection
        self._scored = Reporter(board, score_stage)


def replay() -> None:
    """From now on, runs of this driver take recorded answers."""
    actors.GenerateGroups = ReplayGroups  # type: ignore[misc]
    graph.AdaptiveGroups = ReplayAdaptiveGroups  # type: ignore[misc]


RECORD = "answers.json.gz"


@functools.cache
def _record(model: str) -> tuple[dict[str, list[str]], dict[str, float]]:
    """Answers by prompt, and the preference of each answer, as log-odds."""
    with gzip.open(Path(model) / RECORD, "rt") as file:
        recorded = json.load(file)
    return recorded["answers"], recorded["preference"]


def recorded_answers(prompt: str, model: str) -> list[str]:
    """All answers to a prompt: recorded in the model's folder, else eight made up from the prompt."""
    if (Path(model) / RECORD).exists():
        return _record(model)[0][prompt]
    words = random.Random(prompt)
    return [" ".join(words.choices(WORDS, k=words.randint(8, 24))) for _ in range(8)]


def write_record(model: Path, answers: dict[str, list[tuple[str, float]]]) -> None:
    """Puts answers with their preferences, by prompt, into the folder of a model."""
    texts = {prompt: [text for text, _ in group] for prompt, group in answers.items()}
    preference = {f"{prompt}\n{text}": value for prompt, group in answers.items() for text, value in group}
    with gzip.open(model / RECORD, "wt") as file:
        json.dump({"answers": texts, "preference": preference}, file)


def preference(prompts: list[Any], answers: list[str], model: str) -> list[float]:
    """A rule reward: what was recorded."""
    known = _record(model)[1]
    return [known[f"{prompt[-1]['content']}\n{answer}"] for prompt, answer in zip(prompts, answers, strict=True)]


def brevity(prompts: list[Any], answers: list[str]) -> list[float]:
    """A rule reward: minus the number of characters."""
    return [-float(len(answer)) for answer in answers]


def checksum(prompts: list[Any], answers: list[str]) -> list[float]:
    """A rule reward that has nothing to do with the others."""
    return [float(zlib.crc32(answer.encode()) % 1000) for answer in answers]
