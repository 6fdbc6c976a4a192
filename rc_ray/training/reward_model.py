"""Trains reward models: sequence classifiers on preference pairs, by the Bradley-Terry likelihood.

    loss = mean of -log sigma(r(prompt, chosen) - r(prompt, rejected))          (Bradley & Terry 1952; arXiv 2203.02155, eq. 1)

Several preference sets are learned at once by one model: with equal weights (`multitask`), or by MORE (arXiv 2312.07401), which chooses weights
at every step so that no set is drowned by another. The result is a plain `AutoModelForSequenceClassification` folder, with what it
reaches on held-out pairs in `reward_training.json` and `held_out.parquet`. Invariant: the record is written last, so a folder that has it is whole,
and the same command, run again, trains nothing; one that was killed goes on from its last checkpoint.

    rc-ray train-reward --pairs embedded:helpful --output my-reward
    rc-ray train-reward --pairs helpful=a.jsonl --pairs harmless=b.jsonl --method more --output my-reward
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rc_ray.config import RewardTrainingConfig, result_fields
from rc_ray.config.base import NAME_PATTERN
from rc_ray.core.calibration import reliability
from rc_ray.core.ids import canonical_json
from rc_ray.core.statistics import proportion
from rc_ray.errors import ConfigError, DataError, ModelError
from rc_ray.ledger.rundir import versions
from rc_ray.ledger.storage import Folder
from rc_ray.models import embedded
from rc_ray.models.resolve import check_model, local_model
from rc_ray.rewards.batches import num_positions
from rc_ray.rewards.self_test import padding_at_the_end, wrong_texts
from rc_ray.training.preferences import read_preferences
from rc_ray.training.reward_data import Encoded, SetCounts, encode_sets, split_by_prompt
from rc_ray.training.reward_loop import DATA, DIFFERENCES, EXPERIMENT, FACTS, RewardTask, ray_worker, train_reward_model
from rc_ray.training.workers import BEGUN, fit, is_begun, remove

RECORD = "reward_training.json"


@dataclass(frozen=True)
class SetResult:
    """What training gave for one preference set."""

    num_train: int
    num_test: int
    num_repeated: int
    """Training pairs taken again in an epoch, since another set is larger."""
    accuracy: float
    """Share of held-out pairs whose chosen answer scores higher; a tie counts as wrong."""
    accuracy_low: float
    accuracy_high: float
    """Ends of the 95 % Wilson interval of the accuracy."""
    ece: float
    """Expected calibration error on them, 10 bins (`rc_ray.core.calibration.reliability`)."""
    length_accuracy: float
    """Accuracy of the rule "the longer answer is better" on the same pairs (a tie counts a half)."""
    mean_weight: float | None
    """Mean weight of this set over the steps; `more` only."""
    num_prompts_cut: int
    """Texts whose prompt lost its oldest part to `max_length`."""
    left_out: dict[str, int]
    """Rows not used, by reason."""


@dataclass(frozen=True)
class RewardTrainingResult:
    """What training gave; also written to `reward_training.json` beside the weights."""

    output: str
    method: str
    sets: dict[str, SetResult]
    conflicts: float | None
    """Share of steps in which the gradients of two sets pointed away from each other; `more` only."""
    seconds: float
    reused: bool = False
    """Whether an earlier result with the same data and options was found in place."""

    def lines(self) -> list[str]:
        """For people."""
        shown = ["found the finished result of the same data and options; trained nothing"] if self.reused else []
        for name, s in self.sets.items():
            shown += [f"{name}: {count} pairs left out: {reason}" for reason, count in s.left_out.items()]
            weight = "" if s.mean_weight is None else f", mean weight {s.mean_weight:.2f}"
            repeated = f", {s.num_repeated} of them twice or more" if s.num_repeated else ""
            shown.append(
                f"{name}: {s.num_train} training pairs{repeated}, prompt shortened in {s.num_prompts_cut} texts{weight}; held-out accuracy "
                f"{s.accuracy:.3f} [{s.accuracy_low:.3f}, {s.accuracy_high:.3f}] and ECE {s.ece:.3f} on {s.num_test} pairs; the longer answer alone: "
                f"{s.length_accuracy:.3f}"
            )
        if self.conflicts is not None:
            shown.append(f"the sets' gradients conflicted in {self.conflicts:.0%} of the steps")
        return [*shown, f"{self.output}  ({self.seconds:.0f}s)"]


@dataclass(frozen=True)
class Prepared:
    """A training that can begin, or has ended before."""

    output: Folder
    options: RewardTrainingConfig
    """With the method chosen."""
    recipe: dict[str, Any]
    encoded: Encoded | None
    result: RewardTrainingResult | None
    """Of the same data and options, if it is there."""

    @property
    def work(self) -> Folder:
        """Data and checkpoints while it runs."""
        return self.output.beside(".training")


def prepare(pairs: str | Mapping[str, str], output: str, options: RewardTrainingConfig) -> Prepared:
    """Checks everything and reads the pairs; trains nothing.

    Raises:
        ConfigError, DataError, ModelError, ResumeError: see `rc_ray.train_reward`.
    """
    files = {"reward": pairs} if isinstance(pairs, str) else dict(pairs)
    for name in files:
        if not NAME_PATTERN.match(name):
            raise ConfigError(f"pairs: {name!r} is no name of a preference set; use letters, digits and _")
    if not files:
        raise ConfigError("pairs: none given")
    options = options.model_copy(update={"method": _method(options, len(files))})
    check_model("base", options.base, options.revision)
    sets = {name: read_preferences(path) for name, path in files.items()}
    hashes = {name: _hash([asdict(p) for p in found]) for name, (found, _) in sets.items()}
    recipe = {"pairs_hash": hashes, **result_fields(options), "build": embedded.BUILD}
    folder = Folder.at(str(embedded.target(output)) if output.startswith("embedded:") else output)
    prepared = Prepared(folder, options, recipe, None, None)
    if folder.exists(RECORD):
        record = folder.read_json(RECORD)
        if record["recipe"] == recipe:
            result = {**record["result"], "sets": {name: SetResult(**s) for name, s in record["result"]["sets"].items()}}
            return Prepared(folder, options, recipe, None, RewardTrainingResult(**{**result, "reused": True}))
    if not output.startswith("embedded:") and not is_begun(prepared.work, recipe) and not folder.is_empty():
        raise DataError(f"output = {output!r}: the folder holds something else than this training's result; give a new folder")
    from transformers import AutoConfig, AutoTokenizer

    path = local_model(options.base)
    code: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(path, **code)
    if wrong := wrong_texts(tokenizer):
        raise ModelError(f"base = {options.base!r}: {wrong}")
    if (padding := padding_at_the_end(tokenizer, tokenizer.pad_token_id)) is not None:
        raise ModelError(
            f"base = {options.base!r}: its padding token {padding!r} also ends its texts, so the reward would be that of the token before; save it with another pad_token"
        )
    limit = num_positions(AutoConfig.from_pretrained(path, **code))
    if limit is not None and options.max_length > limit:
        raise ConfigError(
            f"max_length = {options.max_length}: the base {options.base!r} reads at most {limit} tokens; lower it"
        )
    train, test = split_by_prompt(
        {name: found for name, (found, _) in sets.items()}, options.num_train, options.num_test, options.seed
    )
    left_out = {name: dict(counted) for name, (_, counted) in sets.items()}
    return Prepared(folder, options, recipe, encode_sets(train, test, left_out, tokenizer, options.max_length), None)


def _method(options: RewardTrainingConfig, num_sets: int) -> Literal["single", "multitask", "more"]:
    """The method for so many preference sets.

    Raises:
        ConfigError: the one chosen does not fit.
    """
    if options.method == "single" and num_sets > 1:
        raise ConfigError(f"method = single: trains on one preference set, and {num_sets} are given; train one model for each")
    if num_sets == 1 and (options.method in ("multitask", "more") or options.heads == "per_objective"):
        field = "heads = per_objective" if options.heads == "per_objective" else f"method = {options.method}"
        raise ConfigError(f"{field}: has no effect with one preference set; give several (NAME=FILE for each), or leave it out")
    return options.method or ("single" if num_sets == 1 else "multitask")


def train_here(pairs: str | Mapping[str, str], output: str, options: RewardTrainingConfig, on_step: Callable[[int, int, float], None]) -> RewardTrainingResult:  # fmt: skip
    """Trains a small model in this process, without Ray, for the cache of embedded models.

    Args:
        on_step: called with (pairs done, pairs in all, loss).
    """
    import torch

    prepared = prepare(pairs, output, options)
    if prepared.result is not None:
        return prepared.result
    assert prepared.encoded is not None
    started = time.monotonic()
    total = round(len(prepared.encoded.train) * options.num_epochs)
    with embedded.build_once(Path(prepared.output.uri), replace=True) as staged:
        assert staged is not None
        model, tokenizer, facts, judged = train_reward_model(
            list(prepared.encoded.counts),
            prepared.options,
            prepared.encoded.train,
            prepared.encoded.held_out,
            torch.cuda.is_available(),
            lambda done, loss: on_step(done, total, loss),
            None,
        )
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        return _record(prepared, Folder.at(staged), facts, judged, time.monotonic() - started)


def train_on_ray(prepared: Prepared, num_gpus: float, board: Any, stage: str = "train-reward") -> RewardTrainingResult:
    """Trains on the connected cluster, or goes on where it was killed; `prepared.work` is left to the caller to remove.

    Args:
        prepared: with `encoded`.
        num_gpus: per worker; each takes one CPU.
        board: progress actor.

    Raises:
        ClusterError: see `rc_ray.training.workers.fit`.
    """
    import ray

    assert prepared.encoded is not None
    started, options, work = time.monotonic(), prepared.options, prepared.work
    if not is_begun(work, prepared.recipe):
        work.remove(BEGUN)  # first: the data below are of this training alone
        remove(work / EXPERIMENT)
        (work / DATA).write_table("train.parquet", prepared.encoded.train)
        (work / DATA).write_table("held_out.parquet", prepared.encoded.held_out)
        work.write_json(BEGUN, prepared.recipe)
    ray.get(board.begin.remote(stage, "pairs", round(len(prepared.encoded.train) * options.num_epochs)))
    task = RewardTask(list(prepared.encoded.counts), options, prepared.output, work, num_gpus > 0, stage)
    fit(EXPERIMENT, ray_worker, {"task": task, "board": board}, work, options.num_workers, 1.0, num_gpus, options.max_failures)
    facts, judged = (work / EXPERIMENT).read_json(FACTS), (work / EXPERIMENT).read_table(DIFFERENCES)
    return _record(prepared, prepared.output, facts, judged, time.monotonic() - started)


def _record(
    prepared: Prepared, folder: Folder, facts: dict[str, Any], judged: pa.Table, seconds: float
) -> RewardTrainingResult:
    """Judges the held-out differences and writes them and the record."""
    assert prepared.encoded is not None
    names = list(prepared.encoded.counts)
    sets = {}
    for number, (name, count) in enumerate(prepared.encoded.counts.items()):
        own = judged.column("difference").to_numpy()[judged.column("set").to_numpy() == number]
        sets[name] = _set_result(count, own, None if facts["weights"] is None else facts["weights"][number])
    result = RewardTrainingResult(prepared.output.uri, str(prepared.options.method), sets, facts["conflicts"], seconds)
    named = pa.array([names[number] for number in judged.column("set").to_pylist()])
    folder.write_table(DIFFERENCES, judged.set_column(0, "set", named))
    folder.write_json(RECORD, {"recipe": prepared.recipe, "result": asdict(result), "versions": versions()})
    return result


def _set_result(count: SetCounts, d: Any, weight: float | None) -> SetResult:
    if not np.isfinite(d).all():
        raise DataError(
            "training: the model's rewards of held-out pairs are not finite; lower the learning rate, or use dtype float32"
        )
    accuracy = proportion(int((d > 0).sum()), len(d))
    return SetResult(
        num_train=count.num_train,
        num_test=count.num_test,
        num_repeated=count.num_repeated,
        accuracy=accuracy.mean,
        accuracy_low=accuracy.low,
        accuracy_high=accuracy.high,
        ece=reliability(np.asarray(d, dtype=np.float64)).ece,
        length_accuracy=count.length_accuracy,
        mean_weight=weight,
        num_prompts_cut=count.num_prompts_cut,
        left_out=count.left_out,
    )


def _hash(rows: list[dict[str, Any]]) -> str:
    return hashlib.blake2b(canonical_json(rows).encode(), digest_size=16).hexdigest()
