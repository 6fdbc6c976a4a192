"""What a run will cost, from a pilot: `rc-ray plan CONFIG --pilot 64 --price-per-gpu-hour 2.5`.

Samples and scores a few prompts with the most answers that the configuration allows, in a run directory of its own
(in `<output>-pilot`, resumable), and predicts for fewer answers from the first ones of each group. The prompts are those with the
lowest ids, which are hashes; seeds come from prompt ids, so the pilot's answers are those that the run will sample.

Intervals are percentile bootstraps over prompts; speed is taken as the pilot had it. A pilot that is too small to fill the
engines is slower per token than the run: the prediction then errs on the dear side.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rc_ray.config import BudgetConfig, Config, GenerationConfig, load_config, result_fields
from rc_ray.core import schemas
from rc_ray.core.ids import canonical_json, prompt_id
from rc_ray.core.selection import fit_selection, select_pairs
from rc_ray.core.selection_report import selection_report
from rc_ray.core.statistics import Interval
from rc_ray.errors import DataError
from rc_ray.ledger import rundir
from rc_ray.ledger.rundir import RunDir
from rc_ray.ledger.storage import Folder
from rc_ray.pipeline.prompts import BadRow, read_cells, to_messages

FILE = "pilot.json"
PROMPTS = "prompts"
NUM_BOOTSTRAP = 2000
# Chunks of the pilot at least, so that several engines and the scorers have work at the same time.
FEWEST_CHUNKS = 8


@dataclass(frozen=True)
class Estimate:
    """What some number of answers per prompt gives, with 95 % intervals.

    Attributes:
        pairs_per_prompt: share of prompts with a pair.
        tokens_per_prompt, tokens_per_pair: sampled tokens.
        hours: for all prompts.
        cost_per_pair: in the unit of the price; None without one.
    """

    pairs_per_prompt: Interval
    tokens_per_prompt: Interval
    tokens_per_pair: Interval
    hours: Interval
    cost_per_pair: Interval | None


@dataclass(frozen=True)
class Prediction:
    """The outcome of a pilot.

    Attributes:
        num_pilot_prompts, num_prompts: sampled here; of the run.
        tokens_per_s: of the pilot, sampling and scoring together.
        num_gpus: at work at the same time; 0 on CPUs, where the price is per hour of the cluster.
        price: per GPU-hour.
        estimates: by what is sampled: `N=2`, ..., and `adaptive 2..N`.
        yields: per subset of objectives, the share of prompts with a strict RC pair by N.
        planned: the estimate that the configuration stands for.
    """

    num_pilot_prompts: int
    num_prompts: int
    tokens_per_s: float
    num_gpus: float
    price: float | None
    estimates: dict[str, Estimate]
    yields: dict[str, dict[int, float]]
    planned: str

    def lines(self) -> list[str]:
        """For a terminal."""
        device = f"{self.num_gpus:g} GPU(s)" if self.num_gpus else "CPUs"
        shown = [
            f"pilot     {self.num_pilot_prompts} of {self.num_prompts} prompts, {self.tokens_per_s:.0f} tok/s on {device}",
            f"  {'':<16}{'prompts with a pair':>26}{'tokens per pair':>26}{'hours':>26}"
            + (f"{'cost per pair':>26}" if self.price is not None else ""),
        ]
        for name, e in self.estimates.items():
            cells = [_cell(e.pairs_per_prompt, "{:.1%}"), _cell(e.tokens_per_pair, "{:.0f}"), _cell(e.hours, "{:.3g}")]
            if e.cost_per_pair is not None:
                cells.append(_cell(e.cost_per_pair, "{:.3g}"))
            shown.append(f"  {name + (' *' if name == self.planned else ''):<16}" + "".join(f"{cell:>26}" for cell in cells))
        shown.append("  * as configured; 95 % intervals over prompts, at the pilot's speed")
        grid = list(next(iter(self.yields.values()), {}))
        shown += ["  prompts with a strict RC pair, by objectives", f"  {'':<40}" + "".join(f"{f'N={n}':>10}" for n in grid)]
        shown += [f"  {name:<40}" + "".join(f"{share:>10.1%}" for share in by_n.values()) for name, by_n in self.yields.items()]
        return shown


def _cell(interval: Interval, form: str) -> str:
    return f"{form.format(interval.mean)} [{form.format(interval.low)}, {form.format(interval.high)}]"


def pilot(
    config: Any,
    overrides: Iterable[str] = (),
    *,
    num_prompts: int = 64,
    price: float | None = None,
    emit: Callable[[str], None] = print,
) -> Prediction:
    """Runs or resumes the pilot of a configuration, of rounds the first one, and predicts; the prediction is kept in `<output>-pilot/pilot.json`.

    Args:
        config, overrides: see `run`.
        num_prompts: to sample in the pilot.
        price: of a GPU for an hour, or of the cluster for an hour on CPUs.

    Raises:
        RcRayError: as `run`. DataError: there is no prompt.
    """
    from rc_ray.pipeline.rounds import round_config
    from rc_ray.pipeline.run import run

    resolved = load_config(config, overrides)
    if resolved.rounds.number > 1:
        resolved = round_config(resolved, 1, None)
    chosen, total = _draw(resolved, num_prompts)
    most = resolved.generation.most_candidates
    place = Folder.at(resolved.output).beside("-pilot")
    small = resolved.model_copy(
        update={
            "generation": resolved.generation.model_copy(
                update={"num_candidates": most, "max_candidates": None, "target_gap": None}
            ),
            "training": type(resolved.training)(enabled=False),
            "evaluation": type(resolved.evaluation)(),
            "budget": BudgetConfig(),
            "cluster": resolved.cluster.model_copy(
                update={"chunk_size": max(1, min(resolved.cluster.chunk_size, len(chosen) // FEWEST_CHUNKS))}
            ),
        }
    )
    # Another number of prompts, another reward: another pilot.
    key = hashlib.blake2b(canonical_json([result_fields(small), chosen]).encode(), digest_size=8).hexdigest()
    source = place / f"prompts-{key}"
    source.write_table("prompts.parquet", pa.table({"prompt": pa.array(chosen, schemas.MESSAGES)}))
    prompts = type(resolved.prompts)(path=(source / "prompts.parquet").uri)
    small = small.model_copy(update={"output": (place / f"run-{key}").uri, "prompts": prompts})
    run(small, emit=emit)
    prediction = _predict(resolved, rundir.open_existing(small.output), total, price)
    place.write_json(FILE, asdict(prediction))
    return prediction


def _draw(config: Config, number: int) -> tuple[list[Any], int]:
    """The prompts with the lowest ids, and how many there are."""
    found: dict[str, Any] = {}
    for cell in read_cells("prompts", config.prompts):
        messages = to_messages(cell, config.prompts.column, config.prompts.system)
        if not isinstance(messages, BadRow):
            found.setdefault(prompt_id(messages), messages)
    if not found:
        raise DataError(f"prompts.path = {config.prompts.path!r}: there is no prompt in it to sample")
    return [found[identity] for identity in heapq.nsmallest(number, found)], len(found)


def _predict(config: Config, directory: RunDir, num_prompts: int, price: float | None) -> Prediction:
    groups = directory.candidates.read_all()
    timing = directory.manifest().get("timing")
    if timing is None or not timing["tokens"]:
        raise DataError(
            f"{directory.root.uri!r}: this pilot was killed before it could say how long it took; remove that folder, and sample it again"
        )
    lengths = [[len(c["token_ids"]) for c in row or ()] for row in groups.column("candidates").to_pylist()]
    most = max(map(len, lengths), default=0)
    if most < 2:
        raise DataError("the pilot has no prompt with two answers; look at its drops/")
    sizes = [2**i for i in range(1, most.bit_length()) if 2**i < most] + [most]
    if len(config.generation.policies) > 1:  # the first answers are those of the first policies alone
        sizes = [most]
    start = config.generation.num_candidates if config.generation.max_candidates else sizes[0]
    rounds = [start]
    while rounds[-1] < most:
        rounds.append(min(2 * rounds[-1], most))
    selection = config.selection
    fitted = fit_selection([groups], selection)
    ids = groups.column("prompt_id").to_numpy(zero_copy_only=False)
    paired, enough, tokens, target = {}, {}, {}, config.generation.target_gap
    for n in sorted({*sizes, *rounds}):
        found = select_pairs(_first(groups, n), selection, fitted).pairs
        paired[n] = np.isin(ids, found.column("prompt_id").to_pylist()).astype(np.float64)
        wide = found if target is None else found.filter(pc.field("gap") >= target)
        enough[n] = np.isin(ids, wide.column("prompt_id").to_pylist())
        tokens[n] = np.asarray([sum(row[:n]) for row in lengths], dtype=np.float64)
    speed = timing["tokens"] / max(timing["seconds"], 1e-9)

    def estimate(pairs: NDArray[np.float64], spent: NDArray[np.float64]) -> Estimate:
        devices = timing["gpus"] or 1.0
        per_token = None if price is None else price * devices / speed / 3600
        ratio = _bootstrap(pairs, spent, lambda p, t: t / p if p else float("inf"))
        return Estimate(
            _bootstrap(pairs, spent, lambda p, _: p),
            _bootstrap(pairs, spent, lambda _, t: t),
            ratio,
            _bootstrap(pairs, spent, lambda _, t: t * num_prompts / speed / 3600),
            None if per_token is None else Interval(*(per_token * end for end in (ratio.mean, ratio.low, ratio.high))),
        )

    estimates = {f"N={n}": estimate(paired[n], tokens[n]) for n in sizes}
    if selection.strategy in ("rcs", "rc_all") and start < most:
        # A group takes the answers of the first round that gives it a pair of the wanted gap, or of the last one.
        first = np.argmax([*(enough[n] for n in rounds[:-1]), np.ones(len(ids), dtype=bool)], axis=0)
        spent = np.choose(first, [tokens[n] for n in rounds])
        estimates[f"adaptive {start}..{most}"] = estimate(np.max([paired[n] for n in rounds], axis=0), spent)
    return Prediction(
        groups.num_rows, num_prompts, speed, timing["gpus"], price, estimates,
        selection_report(groups, selection, fitted if fitted.scale is not None else None, sizes=sizes).consistency, _planned(config.generation),
    )  # fmt: skip


def _planned(generation: GenerationConfig) -> str:
    """The estimate that a configuration stands for."""
    few, most = generation.num_candidates, generation.max_candidates
    return f"N={few}" if most is None else f"adaptive {few}..{most}"


def _first(groups: pa.Table, number: int) -> pa.Table:
    """The groups with their first answers only."""
    for name in groups.column_names:
        if name == "candidates" or name.startswith(schemas.REWARD_PREFIX):
            index = groups.column_names.index(name)
            kind = groups.schema.field(name)
            groups = groups.set_column(
                index, kind, pa.array([row and row[:number] for row in groups.column(name).to_pylist()], kind.type)
            )
    return groups


def _bootstrap(pairs: NDArray[np.float64], tokens: NDArray[np.float64], of: Callable[[float, float], float]) -> Interval:
    """A function of the means of both, with its 95 % percentile interval over prompts."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, pairs.size, (NUM_BOOTSTRAP, pairs.size))
    values = [of(float(p), float(t)) for p, t in zip(pairs[drawn].mean(axis=1), tokens[drawn].mean(axis=1), strict=True)]
    # Of existing values: an infinite cost per pair, where no prompt has one, is then a value like others.
    low, high = np.quantile(values, [0.025, 0.975], method="nearest")
    return Interval(of(float(pairs.mean()), float(tokens.mean())), float(low), float(high))


def side_by_side(run_dir: RunDir, metrics: dict[str, Any]) -> dict[str, Any] | None:
    """What the pilot of this run predicted beside what came out, for metrics.json; None without a pilot."""
    folder = run_dir.root.beside("-pilot")
    if not folder.exists(FILE):
        return None
    prediction = folder.read_json(FILE)
    planned = _planned(run_dir.config().generation)
    predicted = prediction["estimates"].get(planned)
    sampled = run_dir.ledger.facts(PROMPTS)["prompts"] - metrics["identity"]["not_sampled"]
    timing = run_dir.manifest().get("timing")
    tokens, paired = metrics["sampling"].get("tokens", 0), metrics["identity"]["paired"]
    # Of sessions that were killed, and of the run of a fork, the tokens are known and the time is not.
    hours = timing["seconds"] / 3600 * tokens / timing["tokens"] if timing and timing["tokens"] else None
    devices = (timing or {}).get("gpus") or 1.0
    price = prediction["price"]
    actual = {
        "pairs_per_prompt": paired / sampled if sampled else None,
        "tokens_per_prompt": tokens / sampled if sampled else None,
        "tokens_per_pair": tokens / paired if paired else None,
        "hours": hours,
        "cost_per_pair": price * devices * hours / paired if price is not None and hours is not None and paired else None,
    }
    return {"planned": planned, "predicted": predicted, "actual": actual}


def pilot_lines(pilot: dict[str, Any]) -> list[str]:
    """What `side_by_side` gave, for a terminal."""
    shown = [f"predicted by the pilot for {pilot['planned']}, and actual"]
    for name, actual in pilot["actual"].items():
        predicted = pilot["predicted"][name] if pilot["predicted"] else None
        if predicted is not None and actual is not None:
            shown.append(f"  {name.replace('_', ' '):<18} {_cell(Interval(**predicted), '{:.4g}'):>28}  {actual:.4g}")
    return shown
