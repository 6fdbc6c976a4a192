"""What selection has to know about all the data before it looks at one group: transforms, scales, and MAP's weights.

A `Summary` is taken of each table and added up; the sum is exact (integers, not floats), so it is the same bit for bit however
the rows are ordered or split, on one machine or on a cluster. `fit` turns it into the numbers that `select_pairs` needs.

    fitted = fit(sum(summaries[1:], summaries[0]), config)

The scale of rewards that are transformed by what is fitted takes a second pass, which `fit` asks for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isqrt, ldexp
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rc_ray.config import SelectionConfig
from rc_ray.core.compiled import compiled
from rc_ray.core.transforms import SAMPLE_GROUPS, Parameters, derive, fit_shares
from rc_ray.errors import DataError

Pilot = tuple[bytes, str, tuple[tuple[float, ...], ...]]


@dataclass(frozen=True)
class Fitted:
    """Numbers about the data that selection uses; kept in the manifest.

    Attributes:
        scale: per `SelectionConfig.judges_of`, None when none was needed or the configuration gives it.
        weights: MAP's weight per objective, None for other strategies.
        transforms: per reward column with a transform that is fitted, its parameters (`core.transforms`); empty ones where no reward was
            there to fit it to, and then no group is selected from. None where nothing is fitted.
    """

    scale: dict[str, float] | None = None
    weights: dict[str, float] | None = None
    transforms: dict[str, Parameters] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        transforms = {} if self.transforms is None else {"transforms": self.transforms}
        return {"scale": self.scale, "weights": self.weights, **transforms}


@compiled
def _add_moments(bits: Any, counts: Any) -> int:
    """Adds float32 numbers, given as their bits, to sums per exponent: of the mantissa, and of the high and low 24 bits of its square."""
    number = 0
    for i in range(bits.size):
        exponent = np.int64((bits[i] >> np.uint32(23)) & np.uint32(255))
        if exponent == 255:  # infinite or NaN
            continue
        mantissa = np.int64(bits[i] & np.uint32(0x7FFFFF))
        if exponent:
            mantissa += 1 << 23
        else:
            exponent = np.int64(1)
        square = mantissa * mantissa
        counts[exponent, 0] += -mantissa if bits[i] >> np.uint32(31) else mantissa
        counts[exponent, 1] += square >> 24
        counts[exponent, 2] += square & 0xFFFFFF
        number += 1
    return number


@dataclass(frozen=True)
class Summary:
    """Exact sums over candidates per reward column, and a pilot sample of groups.

    Attributes:
        columns: what the sums are of: reward columns, or what is derived of them.
        count: (M,) int64, finite rewards per column.
        sums: (M, 256, 3) int64, see `_add_moments`.
        pilot: the groups whose prompt hashes lowest, with (N, M) rewards; at most `num_pilot_groups`.
        num_pilot_groups: 0 when no pilot is needed.
        pilot_columns: the reward columns of the pilot.
        ends: of these, the lowest and the highest finite reward of all candidates; infinite without one.
    """

    columns: tuple[str, ...]
    count: NDArray[np.int64]
    sums: NDArray[np.int64]
    pilot: tuple[Pilot, ...] = ()
    num_pilot_groups: int = 0
    pilot_columns: tuple[str, ...] = ()
    ends: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of(
        cls,
        rewards: dict[str, pa.Array],
        num_pilot_groups: int = 0,
        prompt_ids: pa.Array | None = None,
        derived: Mapping[str, NDArray[np.float64]] | None = None,
    ) -> Summary:
        """Summary of one table.

        Args:
            rewards: list<float32> columns by name; missing and non-finite rewards do not count.
            num_pilot_groups, prompt_ids: for a pilot.
            derived: flat values to sum up in the place of the rewards, rounded to float32.
        """
        columns = tuple(rewards if derived is None else derived)
        count = np.zeros(len(columns), dtype=np.int64)
        sums = np.zeros((len(columns), 256, 3), dtype=np.int64)
        for m, name in enumerate(columns):
            flat = derived[name] if derived is not None else _given(rewards[name])
            with np.errstate(over="ignore"):
                bits = flat.astype(np.float32, copy=False).view(np.uint32)
            count[m] = _add_moments(bits, sums[m])
        if not num_pilot_groups:
            return cls(columns, count, sums)
        assert prompt_ids is not None
        pilot = _smallest(_pilots(rewards, prompt_ids), num_pilot_groups)
        return cls(columns, count, sums, pilot, num_pilot_groups, tuple(rewards), tuple(map(_ends, rewards.values())))

    def __add__(self, other: Summary) -> Summary:
        other = other._ordered_as(self)
        pilot = _smallest([*self.pilot, *other.pilot], self.num_pilot_groups)
        ends = tuple((min(a, c), max(b, d)) for (a, b), (c, d) in zip(self.ends, other.ends, strict=True))
        count, sums = self.count + other.count, self.sums + other.sums
        return Summary(self.columns, count, sums, pilot, self.num_pilot_groups, self.pilot_columns, ends)

    def _ordered_as(self, model: Summary) -> Summary:
        """With the columns in another summary's order.

        Raises:
            DataError: they are others.
        """
        if (self.columns, self.pilot_columns) == (model.columns, model.pilot_columns):
            return self
        if set(self.columns) != set(model.columns) or set(self.pilot_columns) != set(model.pilot_columns):
            raise DataError(
                f"groups: some have the rewards {', '.join(sorted(model.columns))} and some {', '.join(sorted(self.columns))}; score all of them under the "
                "same objectives"
            )
        order = [self.columns.index(name) for name in model.columns]
        of_pilot = [self.pilot_columns.index(name) for name in model.pilot_columns]
        pilot = tuple((key, prompt, tuple(tuple(row[m] for m in of_pilot) for row in rows)) for key, prompt, rows in self.pilot)
        ends = tuple(self.ends[m] for m in of_pilot)
        return Summary(
            model.columns, self.count[order], self.sums[order], pilot, self.num_pilot_groups, model.pilot_columns, ends
        )

    def to_bytes(self) -> bytes:
        """For a column of a table; rows of zeros are left out."""
        used = np.flatnonzero(self.sums.any(axis=(0, 2)))
        value = {
            "columns": self.columns,
            "count": self.count.tolist(),
            "exponents": used.tolist(),
            "sums": self.sums[:, used].tolist(),
            "pilot": [[digest.hex(), prompt, rewards] for digest, prompt, rewards in self.pilot],
            "num_pilot_groups": self.num_pilot_groups,
            "pilot_columns": self.pilot_columns,
            "ends": self.ends,
        }
        return json.dumps(value).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Summary:
        """The inverse of `to_bytes`."""
        value = json.loads(content)
        sums = np.zeros((len(value["columns"]), 256, 3), dtype=np.int64)
        sums[:, value["exponents"]] = np.asarray(value["sums"], dtype=np.int64).reshape(len(sums), -1, 3)
        pilot = tuple((bytes.fromhex(digest), prompt, tuple(map(tuple, rewards))) for digest, prompt, rewards in value["pilot"])
        count, ends = np.asarray(value["count"], dtype=np.int64), tuple((low, high) for low, high in value["ends"])
        names = tuple(value["columns"]), tuple(value["pilot_columns"])
        return cls(names[0], count, sums, pilot, value["num_pilot_groups"], names[1], ends)

    def mean(self, column: str) -> float | None:
        """Mean of a column, correctly rounded; None without a reward."""
        m = self.columns.index(column)
        number = int(self.count[m])
        return self._total(m) / (number << 149) if number else None

    def sample(self, column: str) -> NDArray[np.float64]:
        """Rewards of all candidates of the first `SAMPLE_GROUPS` groups of the pilot."""
        m = self.pilot_columns.index(column)
        return np.asarray([row[m] for _, _, rewards in self.pilot[:SAMPLE_GROUPS] for row in rewards], dtype=np.float64)

    def _total(self, m: int) -> int:
        """Sum of a column in units of 2^-149."""
        return sum(int(s) << (e - 1) for e, s in enumerate(self.sums[m, :, 0]) if s)

    def scale(self) -> dict[str, float]:
        """Standard deviation (of the population) per column, correctly rounded; 1 where a column never varies, which then adds nothing."""
        scales = {}
        for m, name in enumerate(self.columns):
            number = int(self.count[m])
            total = self._total(m)
            square = sum(
                ((int(high) << 24) + int(low)) << (2 * e - 2) for e, (_, high, low) in enumerate(self.sums[m]) if high or low
            )  # unit 2^-298
            numerator = number * square - total * total
            scales[name] = _root(numerator, number * number << 298) if numerator else 1.0
        return scales


def _root(numerator: int, denominator: int) -> float:
    """The float64 nearest to the square root of a positive fraction."""
    shift = max(0, 132 - numerator.bit_length() + denominator.bit_length()) & ~1
    scaled = numerator << shift
    root = isqrt(scaled // denominator)
    # Of 66 bits or more, the last one set where something was cut off: rounding to 53 then sees which side of a tie it is on.
    return ldexp(float(root | (root * root * denominator != scaled)), -shift // 2)


def _given(column: pa.Array) -> NDArray[Any]:
    """All rewards of a column that are there."""
    return np.asarray(column.flatten().drop_null().to_numpy(zero_copy_only=False))


def _ends(column: pa.Array) -> tuple[float, float]:
    flat = _given(column)
    finite = flat[np.isfinite(flat)] + np.float32(0.0)  # -0.0 is 0.0
    return float(finite.min(initial=np.inf)), float(finite.max(initial=-np.inf))


def _pilots(rewards: dict[str, pa.Array], prompt_ids: pa.Array) -> Iterable[Pilot]:
    columns = [column.to_pylist() for column in rewards.values()]
    for prompt, *lists in zip(prompt_ids.to_pylist(), *columns, strict=True):
        sizes = {len(values or ()) for values in lists}
        if len(sizes) == 1 and sizes != {0} and all(v is not None and np.isfinite(v) for values in lists for v in values):
            yield (
                hashlib.blake2b(prompt.encode(), digest_size=8).digest(),
                prompt,
                tuple(zip(*(map(float, v) for v in lists), strict=True)),
            )


def _smallest(pilots: Iterable[Pilot], number: int) -> tuple[Pilot, ...]:
    return tuple(sorted(pilots)[:number])


def add_up(summaries: Iterable[Summary]) -> Summary:
    """The summary of all the data; one at a time, since all of them at once would grow with the data.

    Raises:
        DataError: there is none.
    """
    total: Summary | None = None
    for summary in summaries:
        total = summary if total is None else total + summary
    if total is None:
        raise DataError("groups: there is no row to select from")
    return total


def num_sampled_groups(config: SelectionConfig) -> int:
    """How many groups the pilot must have."""
    by_transforms = SAMPLE_GROUPS if any(t.needs_sample for t in config.transforms.values()) else 0
    return max(by_transforms, config.num_pilot_groups if config.strategy == "map" else 0)


def fit(summary: Summary, config: SelectionConfig, measure: Callable[[Fitted], Summary] | None = None) -> Fitted:
    """What the configuration needs to know about the data.

    Args:
        summary: of all the data.
        config: the options.
        measure: makes the second pass, with what the first one gave; called where transforms are fitted and the scale is needed.

    Raises:
        DataError: MAP's targets cannot be reached, or are reached already.
    """
    transforms = _fit_transforms(summary, config) if config.fits_transforms else None
    scale = None
    if config.needs_scale_of_data and transforms is not None:
        assert measure is not None
        scale = measure(Fitted(transforms=transforms)).scale()
    elif config.needs_scale_of_data:
        scale = summary.scale()
    if config.strategy != "map":
        return Fitted(scale, None, transforms)
    given = config.scale if isinstance(config.scale, dict) else scale or {}
    columns = []
    rows = np.asarray([row for _, _, rewards in summary.pilot[: config.num_pilot_groups] for row in rewards])
    if not rows.size:
        raise DataError("selection.strategy map: no group has all its rewards; score the groups first")
    by_name = dict(zip(summary.pilot_columns, rows.T, strict=True))
    if config.derives:
        by_name = derive(by_name, config, config.judges_of(config.targets), transforms)
    for name in config.targets:
        judges = config.judges_of([name])
        columns.append(np.mean([by_name[m] / (given[m] if config.is_split(name) else 1.0) for m in judges], axis=0))
    targets = np.asarray(list(config.targets.values()))
    values = np.stack(columns, axis=1)
    weights = map_weights(values, targets, list(config.targets)).tolist()
    return Fitted(scale, dict(zip(config.targets, weights, strict=True)), transforms)


def _fit_transforms(summary: Summary, config: SelectionConfig) -> dict[str, Parameters]:
    fitted: dict[str, Parameters] = {}
    for name, transform in config.transforms.items():
        if transform.kind == "zscore":
            mean = summary.mean(name)
            fitted[name] = {} if mean is None else {"mean": mean, "deviation": summary.scale()[name]}
        elif transform.kind == "quantile":
            fitted[name] = fit_shares(summary.sample(name), *summary.ends[summary.pilot_columns.index(name)])
        elif transform.needs_fit:
            sample = summary.sample(name)
            fitted[name] = {"reference": float(np.quantile(sample, transform.reference_quantile))} if sample.size else {}
    return fitted


def map_weights(rewards: NDArray[np.float64], targets: NDArray[np.float64], names: list[str]) -> NDArray[np.float64]:
    """Weights lambda >= 0 with which the policy proportional to p0 exp(lambda . r) reaches mean rewards >= targets.

    Maximises the concave dual  -log mean_j exp(lambda . r_j) + lambda . targets  by projected Newton steps.
    Source: MAP, arXiv 2410.19198 (its code ascends the gradient in log lambda; the optimum is the same).

    Args:
        rewards: (n, K) of samples of the policy.
        targets: (K,).
        names: of the objectives, for errors.

    Raises:
        DataError: no weights reach the targets on these samples, or the samples reach them without any.
    """
    for k, name in enumerate(names):
        if targets[k] >= rewards[:, k].max():
            raise DataError(
                f"selection.targets.{name} = {targets[k]:g}: no sample is above it (highest {rewards[:, k].max():g}, "
                f"mean {rewards[:, k].mean():g}); lower it"
            )
    # Standardised for the search, so that steps and tolerances do not depend on units.
    spread = np.where(rewards.std(axis=0) > 0, rewards.std(axis=0), 1.0)
    z = (rewards - targets) / spread
    weights = np.zeros(z.shape[1])

    def value(at: NDArray[np.float64]) -> float:
        exponent = z @ at
        top = exponent.max()
        return float(top + np.log(np.mean(np.exp(exponent - top))))

    for _ in range(500):
        exponent = z @ weights
        p = np.exp(exponent - exponent.max())
        p /= p.sum()
        gradient = p @ z
        free = (weights > 0) | (gradient < 0)
        if np.abs(np.where(free, gradient, 0.0)).max() < 1e-10:
            break
        centred = z[:, free] - gradient[free]
        hessian = centred.T @ (centred * p[:, None]) + 1e-12 * np.eye(int(free.sum()))
        step = np.zeros_like(weights)
        step[free] = -np.linalg.solve(hessian, gradient[free])
        now, size = value(weights), 1.0
        while size > 1e-12:
            trial = np.maximum(weights + size * step, 0.0)
            if value(trial) <= now + 1e-4 * gradient @ (trial - weights):
                break
            size /= 2
        weights = trial
        if weights.max() > 1e4:
            break
    exponent = z @ weights
    p = np.exp(exponent - exponent.max())
    short = -(p / p.sum() @ z)
    if short.max() > 1e-6:
        worst = names[int(np.argmax(short))]
        raise DataError(
            f"selection.targets: the targets {dict(zip(names, targets.tolist(), strict=True))} cannot be reached together on the pilot "
            f"sample ({worst} stays below); lower them"
        )
    if not weights.any():
        raise DataError(
            "selection.targets: the samples reach every target already (means "
            f"{dict(zip(names, np.round(rewards.mean(axis=0), 4).tolist(), strict=True))}), so all weights are 0; raise a target"
        )
    return np.asarray(weights / spread)
