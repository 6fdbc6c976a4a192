"""How long groups are in an engine and how full it is, in a few numbers that add up over engines and sessions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

# Seconds are counted in steps of ten per cent, so quantiles are right within five; the longest is kept as it is.
STEP = math.log(1.1)
SHORTEST_S = 1e-3
# An engine is thin while it holds less than this share of the most groups that it has held.
THIN = 0.25


@dataclass
class Load:
    """Load of engines.

    Attributes:
        counts: groups by the logarithm of their seconds from first token to last, in steps of ten per cent.
        longest_s: of a group.
        engine_s: time of engines from their first group on.
        thin_s: of which they held less than a quarter of the most groups that they have held: the tail, or waiting for work.
    """

    counts: dict[int, int] = field(default_factory=dict)
    longest_s: float = 0.0
    engine_s: float = 0.0
    thin_s: float = 0.0

    def add_group(self, seconds: float) -> None:
        """Counts a finished group."""
        step = math.floor(math.log(max(seconds, SHORTEST_S)) / STEP)
        self.counts[step] = self.counts.get(step, 0) + 1
        self.longest_s = max(self.longest_s, seconds)

    def add_time(self, seconds: float, held: int, most: int) -> None:
        """Counts time in which the engine held so many groups, at most `most` before."""
        if most:
            self.engine_s += seconds
            self.thin_s += seconds if held < THIN * most else 0.0

    def __add__(self, other: Load) -> Load:
        counts = {
            step: self.counts.get(step, 0) + other.counts.get(step, 0) for step in self.counts.keys() | other.counts.keys()
        }
        return Load(counts, max(self.longest_s, other.longest_s), self.engine_s + other.engine_s, self.thin_s + other.thin_s)

    def quantile_s(self, share: float) -> float:
        """Seconds that so large a share of the groups took at most."""
        left = share * sum(self.counts.values())
        for step in sorted(self.counts):
            left -= self.counts[step]
            if left <= 1e-9:
                return min(math.exp((step + 0.5) * STEP), self.longest_s)
        return self.longest_s

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "counts": {str(step): count for step, count in sorted(self.counts.items())}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Load:
        """What `as_dict` gave."""
        return cls(**{**values, "counts": {int(step): count for step, count in values["counts"].items()}})

    def summary(self) -> dict[str, float]:
        """For metrics.json: seconds of a group, and the share of the engines' time in which they were thin."""
        return {
            "group_p50_s": round(self.quantile_s(0.5), 3),
            "group_p99_s": round(self.quantile_s(0.99), 3),
            "group_max_s": round(self.longest_s, 3),
            "thin_share": round(self.thin_s / self.engine_s, 4) if self.engine_s else 0.0,
        }


def load_line(summary: dict[str, float]) -> str:
    """`summary`, for a terminal."""
    return (
        f"a group took {summary['group_p50_s']:.3g} s (median), {summary['group_p99_s']:.3g} s (99 %), {summary['group_max_s']:.3g} s (longest); "
        f"{summary['thin_share']:.0%} of the engines' time with less than a quarter of their groups"
    )
