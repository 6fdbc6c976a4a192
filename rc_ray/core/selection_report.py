"""Numbers about scored data: how many prompts have an RC pair, how far objectives agree, what each strategy's pairs are like.

    report = selection_report(table, SelectionConfig())
    print(report.text())

For a user who chooses N (answers per prompt), K (objectives) and a strategy. Invariant: all counts are integers over groups, so
the report is the same however rows are ordered or split; `ReportBuilder` holds counts and, per pair of the chosen strategy, one
gap and one length difference (12 bytes).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rc_ray.config import SelectionConfig
from rc_ray.config.selection import OPTIONS, PRIMARY
from rc_ray.core import pick
from rc_ray.core.compiled import compiled
from rc_ray.core.groups import ScoredTable, is_preference, read_scored, reward_columns
from rc_ray.core.measure import Fitted
from rc_ray.core.pick import same_text
from rc_ray.core.selection import BLOCK, fit_selection, flat_groups, merge, selection_objectives
from rc_ray.core.strategies import STRATEGIES, prepare

MOST_OBJECTIVES = 8  # with every subset of more, the table would have more than 255 lines
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


@compiled
def _count_groups(
    values: Any, margins: Any, offsets: Any, status: Any, text_offsets: Any, text_bytes: Any, consistent: Any, signs: Any
) -> None:
    """Adds the counts of usable groups.

    consistent: (2^K, L), whose running sum over n is the groups with at least n candidates of which the first n hold a pair on which
    every objective of the subset (bit k) differs by more than its margin in the same direction; the empty subset counts all
    groups with at least n candidates, from n = 2. signs: (K, K, 3): pairs of answers that objectives i and j order alike,
    oppositely, or that one of them ties. As in selection, two equal texts are no pair, and where a negative margin lets both
    directions hold, a tie on all objectives is none.
    """
    width = values.shape[1]
    subsets = 1 << width
    least, relaxed = np.empty(subsets, dtype=np.int64), np.empty(subsets, dtype=np.int64)
    for g in range(offsets.size - 1):
        if status[g] != 0:
            continue
        low, n = offsets[g], offsets[g + 1] - offsets[g]
        margin = margins[g if margins.shape[0] > 1 else 0]
        least[:] = n + 1  # number of first candidates that a pair with exactly these objectives needs
        relaxed[:] = n + 1
        for a in range(1, n):
            for b in range(a):
                forward, backward, unequal = 0, 0, 0
                for k in range(width):
                    difference = np.float64(values[low + a, k]) - np.float64(values[low + b, k])
                    forward |= (difference > margin[k]) << k
                    backward |= (-difference > margin[k]) << k
                    unequal |= (difference != 0) << k
                if not forward | backward or same_text(text_offsets, text_bytes, low + a, low + b):
                    pass
                elif forward & backward:
                    for s in range(subsets):
                        if s & unequal and (s & forward == s or s & backward == s):
                            relaxed[s] = min(relaxed[s], a + 1)
                else:
                    least[forward] = min(least[forward], a + 1)
                    least[backward] = min(least[backward], a + 1)
                for i in range(width):
                    x, y = values[low + a, i], values[low + b, i]
                    for j in range(i + 1, width):
                        u, v = values[low + a, j], values[low + b, j]
                        if x == y or u == v:
                            signs[i, j, 2] += 1
                        elif (x > y) == (u > v):
                            signs[i, j, 0] += 1
                        else:
                            signs[i, j, 1] += 1
                    signs[i, i, 2 if x == y else 0] += 1
        for k in range(width):  # a pair with more objectives than the subset serves the subset
            for s in range(subsets):
                if not s >> k & 1:
                    least[s] = min(least[s], least[s | 1 << k])
        least[0] = 2
        for s in range(subsets):
            least[s] = min(least[s], relaxed[s])
            if least[s] <= n:
                consistent[s, least[s]] += 1
                consistent[s, n + 1] -= 1


@dataclass
class _Tally:
    """Counts over the pairs of one strategy."""

    groups: int = 0
    pairs: int = 0
    conflicting: int = 0
    longer: int = 0
    same_length: int = 0


@dataclass
class SelectionReport:
    """The finished numbers.

    Attributes:
        num_groups: rows of the data.
        num_usable: of those, with all rewards, two candidates and two different answers.
        objectives: names, K of them.
        consistency: per subset of objectives, the share of usable groups with an RC pair among their first n candidates, by n; strict, with
            the configured margins. Groups with fewer than n candidates do not count for n.
        agreement: (K, K), of all pairs of answers neither objective ties, the share that both order alike.
        conflict: (K, K), of all pairs of answers, the share that the two order oppositely.
        rank_correlation: (K, K), Kendall's tau-b over the pairs of answers within groups.
        strategies: per strategy pairs, yield (share of usable groups with a pair), conflict (share of its pairs that some objective orders the
            other way) and length_only (share that the rule "the longer answer wins" predicts, equal lengths half).
        gap, length_difference: quantiles over the pairs of the configured strategy; length in characters, winner less loser.
    """

    num_groups: int
    num_usable: int
    objectives: list[str]
    consistency: dict[str, dict[int, float]]
    agreement: list[list[float | None]]
    conflict: list[list[float | None]]
    rank_correlation: list[list[float | None]]
    strategies: dict[str, dict[str, float | None]]
    strategy: str
    gap: dict[str, float] = field(default_factory=dict)
    length_difference: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def text(self) -> str:
        """For a terminal."""
        lines = [f"{self.num_groups} groups, {self.num_usable} usable; objectives: {', '.join(self.objectives)}"]
        grid = list(next(iter(self.consistency.values()), {}))
        if grid:
            lines += [
                "",
                "share of prompts with a strict RC pair among the first N answers",
                _row("objectives", [f"N={n}" for n in grid]),
            ]
            lines += [_row(name, [_percent(share.get(n)) for n in grid]) for name, share in self.consistency.items()]
        if len(self.objectives) > 1:
            header = ["agreement", "conflict", "tau-b"]
            lines += ["", "pairs of answers, ordered by two objectives", _row("", header)]
            for i, j in combinations(range(len(self.objectives)), 2):
                tau = self.rank_correlation[i][j]
                cells = [_percent(self.agreement[i][j]), _percent(self.conflict[i][j]), "-" if tau is None else f"{tau:+.3f}"]
                lines.append(_row(f"{self.objectives[i]} / {self.objectives[j]}", cells))
        lines += ["", "pairs by strategy", _row("", ["pairs", "yield", "conflict", "longer wins"])]
        for name, tally in self.strategies.items():
            cells = [str(tally["pairs"]), *(_percent(tally[key]) for key in ("yield", "conflict", "length_only"))]
            lines.append(_row(name, cells))
        for title, found in (
            (f"gap of {self.strategy}", self.gap),
            ("winner's characters less loser's", self.length_difference),
        ):
            if found:
                lines += ["", title, _row("", [f"{q}" for q in found]), _row("", [f"{value:.4g}" for value in found.values()])]
        return "\n".join(lines)


def _row(title: str, cells: list[str]) -> str:
    return f"  {title:<32}" + "".join(f"{cell:>12}" for cell in cells)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


class ReportBuilder:
    """Takes tables one by one and counts.

    Args:
        config: objectives, margins, gap, guards; its strategy is the one whose gaps are shown, the others are run beside it.
        fitted: see `fit_selection`.
        sizes: numbers of candidates N to report yields for; None: 2, 4, 8, ... and the largest group's.
    """

    def __init__(self, config: SelectionConfig, fitted: Fitted, sizes: Iterable[int] | None = None) -> None:
        self.config, self.fitted = config, fitted
        self._sizes = None if sizes is None else sorted(set(sizes))
        self._objectives: list[str] = []
        self._groups = self._usable = self._most = 0
        self._strategies: dict[str, tuple[SelectionConfig, _Tally]] = {}
        self._gaps: list[NDArray[np.float64]] = []
        self._lengths: list[NDArray[np.int32]] = []

    def add(self, table: pa.Table) -> None:
        """Counts one table of scored groups or existing pairs."""
        rows = _rows_at_a_time(table)
        for start in range(0, table.num_rows, rows):
            self._add(table.slice(start, rows))

    def _begin(self, schema: pa.Schema) -> None:
        columns = reward_columns(schema)
        self._objectives = selection_objectives(self.config, columns)
        self._columns = self.config.columns_of(self._objectives)
        width = min(len(self._objectives), MOST_OBJECTIVES)
        self._consistent = np.zeros((1 << width, 2), dtype=np.int64)
        self._signs = np.zeros((len(self._objectives),) * 2 + (3,), dtype=np.int64)
        self._strategies = {
            name: (config, _Tally()) for name, config in _variants(self.config, self._objectives, is_preference(schema))
        }  # fmt: skip

    def _add(self, table: pa.Table) -> None:
        if not self._objectives:
            self._begin(table.schema)
        data = read_scored(table, self._columns)
        lengths = np.asarray(pc.fill_null(pc.utf8_length(data.texts), 0), dtype=np.int32)
        prepared = prepare(flat_groups(data, self.config), self.config, self._objectives, data.columns, self.fitted)
        usable = prepared.groups.status == pick.OK
        self._groups += table.num_rows
        self._usable += int(usable.sum())
        self._most = max(self._most, int(np.diff(data.offsets)[usable].max(initial=0)))
        self._count(prepared.groups, prepared.scale)
        for name, (config, tally) in self._strategies.items():
            self._run(data, config, tally, lengths, name == self.config.strategy)

    def _count(self, groups: pick.Groups, scale: NDArray[np.float64]) -> None:
        unit = scale if self.config.margin_unit == "scale" else np.ones((1, len(self._objectives)))
        margins = unit * np.asarray([[self.config.margins.get(name, 0.0) for name in self._objectives]])
        width = min(len(self._objectives), MOST_OBJECTIVES)
        offsets, status = groups.offsets, groups.status
        shown = np.ascontiguousarray(groups.values[:, :width])
        signs = np.zeros((width, width, 3), dtype=np.int64)
        beyond = self._most + 2 - self._consistent.shape[1]
        if beyond > 0:
            self._consistent = np.pad(self._consistent, ((0, 0), (0, beyond)))
        texts = groups.text_offsets, groups.text_bytes
        _count_groups(shown, margins, offsets, status, *texts, self._consistent, signs)
        self._signs[:width, :width] += signs

    def _run(self, data: ScoredTable, config: SelectionConfig, tally: _Tally, lengths: NDArray[np.int32], keep: bool) -> None:
        prepared = prepare(flat_groups(data, config), config, self._objectives, data.columns, self.fitted)
        found = _all_given(prepared.groups) if config.strategy == "rc_filter" and not keep else None
        if found is None:
            found = merge(list(STRATEGIES[config.strategy](prepared).values()))
        winner, loser = data.offsets[found.group] + found.winner, data.offsets[found.group] + found.loser
        values = prepared.groups.values
        tally.groups += int(np.unique(found.group).size)
        tally.pairs += found.group.size
        tally.conflicting += int((values[winner] < values[loser]).any(axis=1).sum())
        difference = lengths[winner] - lengths[loser]
        tally.longer += int((difference > 0).sum())
        tally.same_length += int((difference == 0).sum())
        if keep:
            self._gaps.append(found.gap)
            self._lengths.append(difference)

    def finish(self) -> SelectionReport:
        """The numbers of everything that was added."""
        width = min(len(self._objectives), MOST_OBJECTIVES)
        counts = np.cumsum(self._consistent, axis=1) if self._objectives else np.zeros((1, 2), dtype=np.int64)
        sizes = {2**i for i in range(1, self._most.bit_length())} | {self._most} if self._sizes is None else set(self._sizes)
        grid = [n for n in sorted(sizes) if 2 <= n <= self._most]
        consistency = {
            " + ".join(self._objectives[k] for k in range(width) if subset >> k & 1): {
                n: float(counts[subset, n] / counts[0, n]) for n in grid
            }
            for subset in sorted(range(1, 1 << width), key=lambda s: (s.bit_count(), s))
        }
        return SelectionReport(
            self._groups,
            self._usable,
            self._objectives,
            consistency,
            self._matrix(lambda s: _share(s[0], s[0] + s[1])),
            self._matrix(lambda s: _share(s[1], s.sum())),
            self._kendall(),
            {name: self._tally(tally) for name, (_, tally) in self._strategies.items()},
            self.config.strategy,
            _quantiles(self._gaps),
            _quantiles(self._lengths),
        )

    def _tally(self, tally: _Tally) -> dict[str, float | None]:
        return {
            "pairs": tally.pairs,
            "yield": _share(tally.groups, self._usable),
            "conflict": _share(tally.conflicting, tally.pairs),
            "length_only": _share(tally.longer + tally.same_length / 2, tally.pairs),
        }

    def _matrix(self, of: Any) -> list[list[float | None]]:
        width = len(self._objectives)
        return [[of(self._signs[min(i, j), max(i, j)]) for j in range(width)] for i in range(width)]

    def _kendall(self) -> list[list[float | None]]:
        width = len(self._objectives)
        untied = [int(self._signs[k, k, 0]) for k in range(width)]
        matrix: list[list[float | None]] = []
        for i in range(width):
            row: list[float | None] = []
            for j in range(width):
                alike, opposite, _ = (int(c) for c in self._signs[min(i, j), max(i, j)])
                row.append(_share(alike - opposite, (untied[i] * untied[j]) ** 0.5))
            matrix.append(row)
        return matrix


def _rows_at_a_time(table: pa.Table) -> int:
    """So many that strategies which take every pair make about a million at most."""
    if "candidates" not in table.column_names:
        return BLOCK
    most = pc.max(pc.list_value_length(table.column("candidates"))).as_py() or 1
    return int(max(1, min(BLOCK, (1 << 20) // most**2)))


def _all_given(groups: pick.Groups) -> pick.Found:
    """Existing pairs as they are, before any rule."""
    group = np.flatnonzero(groups.status == pick.OK)
    zero = np.zeros(group.size, dtype=np.int64)
    return pick.Found(group, zero, zero + 1, np.zeros(group.size), groups.status, 0)


def _variants(config: SelectionConfig, objectives: list[str], preference: bool) -> Iterator[tuple[str, SelectionConfig]]:
    """The strategies to run beside the configured one, with as much of its configuration as they use."""
    yield config.strategy, config
    if preference:
        yield "as given", config
        return
    given = config.model_dump()
    every = frozenset().union(*OPTIONS.values())
    for strategy in STRATEGIES:
        if strategy in ("rc_filter", "map", config.strategy):
            continue
        kept = {key: value for key, value in given.items() if key not in every or key in OPTIONS[strategy]}
        if kept.get("gap") in ("min", "product") and strategy not in ("rcs", "rc_all"):
            kept["gap"] = "standardized_sum"
        yield strategy, _without_idle_scale({**kept, "strategy": strategy})
        if strategy == "best_worst" and len(objectives) > 1:
            for name in objectives:
                alone = {**kept, "strategy": strategy, "gap": f"{PRIMARY}{name}", "weights": {}}
                yield f"best_worst by {name}", _without_idle_scale(alone)


def _without_idle_scale(options: dict[str, Any]) -> SelectionConfig:
    """The configuration without a given scale where that would have no effect, which is an error."""
    config = SelectionConfig(**{**options, "scale": "data"})
    return SelectionConfig(**options) if config.uses_scale else config


def lacks_scale(config: SelectionConfig, fitted: Fitted) -> bool:
    """Whether the strategies beside the configured one need a scale of the data that this one did without."""
    return config.scale == "data" and fitted.scale is None


def scale_only(config: SelectionConfig) -> SelectionConfig:
    """A configuration that measures the scale of the same objectives."""
    return SelectionConfig(objectives=config.objectives, ensembles=config.ensembles, transforms=config.transforms)


def _quantiles(parts: list[Any]) -> dict[str, float]:
    values = np.concatenate(parts) if parts else np.empty(0)
    if not values.size:
        return {}
    values.sort()
    # Of existing values, without interpolation, so that no rounding enters.
    return {f"{100 * q:g} %": float(values[round(q * (values.size - 1))]) for q in QUANTILES}


def selection_report(
    tables: pa.Table | Iterable[pa.Table],
    config: SelectionConfig | None = None,
    fitted: Fitted | None = None,
    *,
    sizes: Iterable[int] | None = None,
) -> SelectionReport:
    """Numbers about scored groups, or about existing pairs (`rc_filter`).

    Args:
        tables: one table, or several that are taken one by one.
        config: see `ReportBuilder`; None: RCS.
        fitted: numbers about all the data; None: measured on `tables`, which then must be one table or a list.
        sizes: numbers of candidates N for the yields.

    Raises:
        DataError, ConfigError: as `select_pairs`.
    """
    config = config or SelectionConfig()
    source = [tables] if isinstance(tables, pa.Table) else tables
    if fitted is None:
        source = list(source)
        fitted = fit_selection(source, config)
        if lacks_scale(config, fitted):
            fitted = replace(fitted, scale=fit_selection(source, scale_only(config)).scale)
    builder = ReportBuilder(config, fitted, sizes)
    for table in source:
        builder.add(table)
    return builder.finish()
