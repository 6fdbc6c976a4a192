"""How far each objective's rewards can be trusted, on labelled pairs: accuracy, calibration, agreement, margins for RC.

Input are groups of two candidates, the one that the label prefers first, scored under every objective; each group carries the objective
that its label is about. Half of the prompts (by a hash) fit temperature and margins, the other half says what these are worth.

Invariant: a pair counts for an objective only when both answers have a reward, and how many had none is said.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rc_ray.config import SelectionConfig
from rc_ray.core import schemas
from rc_ray.core.calibration import (
    Floats,
    Margins,
    Reliability,
    directions,
    fit_temperature,
    precision_margins,
    reliability,
)
from rc_ray.core.ids import Message, prompt_id
from rc_ray.core.statistics import Interval, proportion
from rc_ray.errors import DataError
from rc_ray.evaluation.compare import aligned, cell

LABEL = "label"
BINS = (5, 10, 20)
LABELLED_GROUP = pa.schema([*schemas.GROUP, (LABEL, pa.string())])


def labelled_groups(objective: str, pairs: Iterable[tuple[list[Message], str, str]]) -> pa.Table:
    """Labelled pairs (prompt, better answer, worse answer) as groups that can be scored."""
    unknown: dict[str, Any] = {"token_ids": [], "finish_reason": None, "seed": None, "logprob": None, "policy": None}
    rows = [
        {
            "prompt_id": prompt_id(prompt),
            "prompt": prompt,
            "candidates": [{"text": text, **unknown} for text in (better, worse)],
            "failure": None,
            "failure_detail": None,
            LABEL: objective,
        }
        for prompt, better, worse in pairs
    ]
    return pa.Table.from_pylist(rows, schema=LABELLED_GROUP)


@dataclass(frozen=True)
class Trust:
    """One objective on the pairs that are labelled for it."""

    num_pairs: int
    num_missing: int
    """Pairs left out because an answer has no reward."""
    accuracy: Interval
    """Share of pairs whose better answer has the higher reward, a tie being wrong; 95 % Wilson interval."""
    length_accuracy: float
    """Share of pairs whose better answer is the longer one, in characters; a tie counts a half."""
    reliability: list[Reliability]
    """With 5, 10 and 20 bins, over all pairs."""
    temperature: float | None
    """What the rewards are to be divided by, fitted on one half; None: see `core.calibration.fit_temperature`."""
    ece_held_out: float
    """Expected calibration error (10 bins) of the other half as it is."""
    ece_scaled: float | None
    """The same with the temperature."""

    @property
    def verdict(self) -> str:
        """Whether the objective should take part in RC, and why."""
        if self.accuracy.low <= 0.5:
            return "not fit for RC: it cannot be told from a coin"
        if self.accuracy.low <= max(self.length_accuracy, 1 - self.length_accuracy):
            better = "longer" if self.length_accuracy >= 0.5 else "shorter"
            return f"doubtful for RC: it cannot be told from the rule that the {better} answer is better"
        return "fit for RC"


@dataclass(frozen=True)
class Precision:
    """Strict RC on the held-out pairs of one objective, against its labels."""

    num_pairs: int
    num_kept: int
    """Pairs on which the objectives agree."""
    precision: Interval | None
    """Of these, the share whose direction is the label's; 95 % Wilson interval, None when none is kept."""


@dataclass(frozen=True)
class CalibrationReport:
    """What labelled pairs say about the rewards of a configuration."""

    trust: dict[str, Trust]
    """Per labelled objective."""
    agreement: dict[str, float]
    """Share of all pairs on which two objectives have the same sign, by `a, b`; pairs on which one of them ties are left out."""
    precision: float
    """As wanted."""
    without_margins: dict[str, Precision]
    margins: dict[str, float] | None
    """For `selection.margins` of rewards without a transform; None when the wanted precision is out of reach."""
    with_margins: dict[str, Precision]
    other_rule: tuple[str, ...] = ()
    """Options of `selection` by which pairs are chosen otherwise than by strict RC on the rewards as they are, which is what was judged."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "verdict": {name: trust.verdict for name, trust in self.trust.items()}}

    def lines(self) -> list[str]:
        """Tables and what follows from them."""
        head = (
            "objective",
            "pairs",
            "accuracy",
            "longer",
            *(f"ECE{b}" for b in BINS),
            "ACE10",
            "MCE10",
            "temperature",
            "held-out ECE10",
        )
        rows = [head]
        for name, t in self.trust.items():
            ten = t.reliability[1]
            scaled = "" if t.ece_scaled is None else f" -> {t.ece_scaled:.3f}"
            rows.append((
                name, str(t.num_pairs), cell(t.accuracy), f"{t.length_accuracy:.3f}", *(f"{r.ece:.3f}" for r in t.reliability),
                f"{ten.ace:.3f}", f"{ten.mce:.3f}", "none" if t.temperature is None else f"{t.temperature:.3g}",
                f"{t.ece_held_out:.3f}{scaled}",
            ))  # fmt: skip
        shown = aligned(rows)
        for name, t in self.trust.items():
            missing = f"; {t.num_missing} pairs without a reward left out" if t.num_missing else ""
            shown.append(f"{name}: {t.verdict}{missing}")
        shown += [f"agreement of {names}: {share:.3f}" for names, share in self.agreement.items()]
        shown += _precision_lines("no margins", self.without_margins)
        if self.margins is None:
            shown.append(
                f"precision {self.precision:g}: no margins reach it on the half that fits them; more labelled pairs or a better reward may"
            )
        else:
            given = ", ".join(f"{name}: {margin:.6g}" for name, margin in self.margins.items())
            if self.other_rule:
                shown.append(
                    f"precision {self.precision:g}: margins {given}, for strict RC on the rewards as they are; not for this configuration, which has "
                    f"{', '.join(f'selection.{name}' for name in self.other_rule)}"
                )
            else:
                shown.append(f"precision {self.precision:g}: --set 'selection.margins={{{given}}}'")
            shown += _precision_lines("with them", self.with_margins)
        return shown


def _precision_lines(title: str, found: dict[str, Precision]) -> list[str]:
    return [
        f"RC pairs, {title}: {p.num_kept} of {p.num_pairs} held-out pairs labelled for {name}"
        + (f", {cell(p.precision)} of them as labelled" if p.precision else "")
        for name, p in found.items()
    ]


def other_rule(selection: SelectionConfig, objectives: Sequence[str]) -> tuple[str, ...]:
    """See `CalibrationReport.other_rule`."""
    differs = {
        "objectives": selection.objectives is not None and set(selection.objectives) != set(objectives),
        "transforms": any(not transform.is_identity for transform in selection.transforms.values()),
        "ensembles": bool(selection.ensembles),
        "consistency": selection.consistency != "strict",
        "min_agreeing": selection.min_agreeing is not None,
        "margin_unit": selection.margin_unit != "absolute",
    }
    return tuple(name for name, is_so in differs.items() if is_so)


def check_precision(precision: float) -> None:
    """Raises:
    DataError: no share of pairs that could be wanted.
    """
    if not 0.5 < precision < 1:
        raise DataError(f"precision = {precision}: must be above 0.5, which a coin reaches, and below 1")


def calibrate_groups(groups: pa.Table, objectives: Sequence[str], precision: float) -> CalibrationReport:
    """Judges the rewards of scored `labelled_groups`.

    Args:
        groups: `LABELLED_GROUP` with a reward column per objective.
        objectives: all that take part in RC.
        precision: share of RC pairs that shall agree with the labels, in (0.5, 1).

    Raises:
        DataError: an objective has no labelled pair with rewards, or so few that a half is empty.
    """
    check_precision(precision)
    labels = np.asarray(groups.column(LABEL).to_pylist())
    d = np.stack([_differences(groups.column(schemas.reward_column(name)).to_pylist()) for name in objectives], axis=1)
    fits = np.asarray([_in_first_half(each) for each in groups.column("prompt_id").to_pylist()])
    longer = np.asarray([_longer(pair) for pair in groups.column("candidates").to_pylist()])
    labelled = [name for name in objectives if (labels == name).any()]
    columns = [objectives.index(name) for name in labelled]
    trust = {}
    for name, column in zip(labelled, columns, strict=True):
        own = labels == name
        trust[name] = _trust(name, d[own, column], fits[own], longer[own])
    found = precision_margins([d[(labels == name) & fits] for name in labelled], columns, precision)
    held_out = {name: d[(labels == name) & ~fits] for name in labelled}
    return CalibrationReport(
        trust=trust,
        agreement=_agreement(d, objectives),
        precision=precision,
        without_margins=_precision(held_out, Margins(0.0, [0.0] * len(objectives))),
        margins=None if found is None else dict(zip(objectives, found.margins, strict=True)),
        with_margins={} if found is None else _precision(held_out, found),
    )


def _differences(rewards: list[list[float | None] | None]) -> Floats:
    """Reward of the first candidate minus that of the second, (n,); NaN where one is missing."""
    pairs = [pair if pair and len(pair) == 2 and None not in pair else (math.nan, math.nan) for pair in rewards]
    values = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    return np.asarray(values[:, 0] - values[:, 1], dtype=np.float64)


def _in_first_half(key: str) -> bool:
    return hashlib.blake2b(f"calibrate:{key}".encode(), digest_size=1).digest()[0] < 128


def _longer(candidates: list[dict[str, Any]]) -> float:
    better, worse = (len(c["text"]) for c in candidates)
    return 0.5 if better == worse else float(better > worse)


def _trust(name: str, differences: Floats, fits: Any, longer: Floats) -> Trust:
    there = np.isfinite(differences)
    d, first = differences[there], fits[there]
    if not first.any() or first.all():
        raise DataError(
            f"pairs of {name!r}: {d.size} of {differences.size} have both rewards, too few for one half to fit and one to test; give more"
        )
    right = int((d > 0).sum())
    temperature = fit_temperature(d[first])
    return Trust(
        num_pairs=d.size,
        num_missing=int((~there).sum()),
        accuracy=proportion(right, d.size),
        length_accuracy=float(longer[there].mean()),
        reliability=[reliability(d, bins) for bins in BINS],
        temperature=temperature,
        ece_held_out=reliability(d[~first]).ece,
        ece_scaled=None if temperature is None else reliability(d[~first], temperature=temperature).ece,
    )


def _agreement(d: Floats, objectives: Sequence[str]) -> dict[str, float]:
    shares = {}
    for i, first in enumerate(objectives):
        for j in range(i + 1, len(objectives)):
            product = np.sign(d[:, i]) * np.sign(d[:, j])
            decided = np.isfinite(product) & (product != 0)
            if decided.any():
                shares[f"{first}, {objectives[j]}"] = float((product[decided] > 0).mean())
    return shares


def _precision(held_out: dict[str, Floats], margins: Margins) -> dict[str, Precision]:
    found = {}
    for name, d in held_out.items():
        said = directions(d, np.asarray(margins.margins))
        kept, right = int(np.count_nonzero(said)), int((said == 1).sum())
        interval = proportion(right, kept) if kept else None
        found[name] = Precision(len(d), kept, interval)
    return found


def plot_reliability(report: CalibrationReport) -> Any:
    """A matplotlib figure: observed over predicted share per objective, 10 bins; the diagonal is perfect."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(report.trust), 3.4), layout="constrained")
    for number, (name, trust) in enumerate(report.trust.items()):
        axes = figure.add_subplot(1, len(report.trust), number + 1)
        curve = trust.reliability[1]
        axes.plot([0, 1], [0, 1], color="#888888", linewidth=1)
        axes.plot(curve.predicted, curve.observed, "o-", color="#22aa77")
        axes.set(title=f"{name}: ECE {curve.ece:.3f}", xlabel="predicted", ylabel="observed", xlim=(0, 1), ylim=(0, 1))
    return figure
