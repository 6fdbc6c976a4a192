"""What selection has to know about all the data before it looks at one group: scales, and MAP's weights.

A `Summary` is taken of each table and added up; the sum is exact (integers, not floats), so it is the same bit for bit however
the rows are ordered or split, on one machine or on a cluster. `fit` turns it into the numbers that `select_pairs` needs.

    fitted = fit(sum(summaries[1:], summaries[0]), config)
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt, ldexp
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rc_ray.config import SelectionConfig
from rc_ray.core.compiled import compiled
from rc_ray.errors import DataError

Pilot = tuple[bytes, str, tuple[tuple[float, ...], ...]]


@dataclass(frozen=True)
class Fitted:
    """Numbers about the data that selection uses; kept in the manifest.

    Attributes:
        scale: per reward column, None when none was needed or the configuration gives it.
        weights: MAP's weight per objective, None for other strategies.
    """

    scale: dict[str, float] | None = None
    weights: dict[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"scale": self.scale, "weights": self.weights}


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
        columns: the reward columns.
        count: (M,) int64, finite rewards per column.
        sums: (M, 256, 3) int64, see `_add_moments`.
        pilot: the groups whose prompt hashes lowest, with (N, M) rewards; at most `num_pilot_groups`.
        num_pilot_groups: 0 when no pilot is needed.
    """

    columns: tuple[str, ...]
    count: NDArray[np.int64]
    sums: NDArray[np.int64]
    pilot: tuple[Pilot, ...]
    num_pilot_groups: int

    @classmethod
    def of(cls, rewards: dict[str, pa.Array], num_pilot_groups: int = 0, prompt_ids: pa.Array | None = None) -> Summary:
        """Summary of one table: list<float32> columns by name; missing and non-finite rewards do not count."""
        count = np.zeros(len(rewards), dtype=np.int64)
        sums = np.zeros((len(rewards), 256, 3), dtype=np.int64)
        for m, column in enumerate(rewards.values()):
            bits = column.flatten().drop_null().to_numpy(zero_copy_only=False).astype(np.float32, copy=False).view(np.uint32)
            count[m] = _add_moments(bits, sums[m])
        pilot: tuple[Pilot, ...] = ()
        if num_pilot_groups:
            assert prompt_ids is not None
            pilot = _smallest(_pilots(rewards, prompt_ids), num_pilot_groups)
        return cls(tuple(rewards), count, sums, pilot, num_pilot_groups)

    def __add__(self, other: Summary) -> Summary:
        pilot = _smallest([*self.pilot, *other.pilot], self.num_pilot_groups)
        return Summary(self.columns, self.count + other.count, self.sums + other.sums, pilot, self.num_pilot_groups)

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
        }
        return json.dumps(value).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Summary:
        """The inverse of `to_bytes`."""
        value = json.loads(content)
        sums = np.zeros((len(value["columns"]), 256, 3), dtype=np.int64)
        sums[:, value["exponents"]] = np.asarray(value["sums"], dtype=np.int64).reshape(len(sums), -1, 3)
        pilot = tuple((bytes.fromhex(digest), prompt, tuple(map(tuple, rewards))) for digest, prompt, rewards in value["pilot"])
        return cls(tuple(value["columns"]), np.asarray(value["count"], dtype=np.int64), sums, pilot, value["num_pilot_groups"])

    def scale(self) -> dict[str, float]:
        """Standard deviation (of the population) per column, correctly rounded; 1 where a column never varies, which then adds nothing."""
        scales = {}
        for m, name in enumerate(self.columns):
            number = int(self.count[m])
            total = sum(int(s) << (e - 1) for e, s in enumerate(self.sums[m, :, 0]) if s)  # unit 2^-149
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
    return tuple(heapq.nsmallest(number, pilots))


def fit(summary: Summary, config: SelectionConfig) -> Fitted:
    """What the configuration needs to know about the data.

    Raises:
        DataError: MAP's targets cannot be reached, or are reached already.
    """
    scale = summary.scale() if config.needs_scale_of_data else None
    if config.strategy != "map":
        return Fitted(scale)
    given = config.scale if isinstance(config.scale, dict) else scale or {}
    columns = []
    rows = np.asarray([row for _, _, rewards in summary.pilot for row in rewards])
    if not rows.size:
        raise DataError("selection.strategy map: no group has all its rewards; score the groups first")
    by_name = dict(zip(summary.columns, rows.T, strict=True))
    for name in config.targets:
        members = config.columns_of([name])
        ensemble = name in config.ensembles
        columns.append(np.mean([by_name[m] / (given[m] if ensemble else 1.0) for m in members], axis=0))
    targets = np.asarray(list(config.targets.values()))
    values = np.stack(columns, axis=1)
    return Fitted(scale, dict(zip(config.targets, map_weights(values, targets, list(config.targets)).tolist(), strict=True)))


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
