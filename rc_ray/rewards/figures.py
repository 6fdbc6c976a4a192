"""What the actors of one objective did, in a few numbers that add up over actors, phases and sessions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Scoring:
    """Work of actors.

    Attributes:
        counts: of their rewards, see `Reward`; empty where these count nothing.
        busy_s: time in which actors scored.
        actor_s: time of actors, from when each was ready until the last of the stage's actors had scored.
        num_actors: in one session, at most.
    """

    counts: dict[str, int] = field(default_factory=dict)
    busy_s: float = 0.0
    actor_s: float = 0.0
    num_actors: int = 0

    def __add__(self, other: Scoring) -> Scoring:
        counts = Counter(self.counts)
        counts.update(other.counts)
        return Scoring(
            dict(counts), self.busy_s + other.busy_s, self.actor_s + other.actor_s, max(self.num_actors, other.num_actors)
        )

    def summary(self) -> dict[str, float]:
        """For metrics.json: the counts; tokens per second of scoring, shares of padding and of tokens from a prefix cache, of comparisons
        that turned with the order, and of the actors' time in which they scored, each where it is known."""
        count = self.counts.get
        found: dict[str, float] = {**self.counts, "num_actors": self.num_actors}
        if count("num_tokens") and self.busy_s:
            found["tokens_per_s"] = round(count("num_tokens", 0) / self.busy_s, 1)
        if count("num_padded_tokens"):
            found["padding_share"] = round(1 - count("num_tokens", 0) / count("num_padded_tokens", 0), 4)
        if count("num_cached_tokens") and count("num_tokens"):
            found["cached_share"] = round(count("num_cached_tokens", 0) / count("num_tokens", 0), 4)
        if count("num_comparisons"):
            found["disagreement_share"] = round(count("num_order_disagreements", 0) / count("num_comparisons", 0), 4)
        if self.actor_s:
            found["busy_share"] = round(min(1.0, self.busy_s / self.actor_s), 4)
        return found


def scoring_line(objective: str, summary: dict[str, Any]) -> str:
    """`summary`, for a terminal: `helpful: 6015 tok/s while scoring, 3.2 % padding, 2 actor(s) 63 % busy`."""
    parts = []
    if "tokens_per_s" in summary:
        parts.append(f"{summary['tokens_per_s']:.0f} tok/s while scoring")
    if "padding_share" in summary:
        parts.append(f"{100 * summary['padding_share']:.1f} % padding")
    if "cached_share" in summary:
        parts.append(f"{100 * summary['cached_share']:.0f} % of tokens from the prefix cache")
    parts.append(f"{summary['num_actors']} actor(s) {100 * summary.get('busy_share', 0):.0f} % busy")
    return f"{objective}: {', '.join(parts)}"


def remarks(objective: str, summary: dict[str, Any]) -> list[str]:
    """What the user should know of the rewards of an objective, a line each; usually none."""
    found = []
    if summary.get("num_too_long"):
        found.append(f"{objective}: {summary['num_too_long']} texts were too long for the model and have no reward")
    if summary.get("num_truncated"):
        found.append(f"{objective}: {_of(summary, 'num_truncated', 'num_texts')} texts were truncated before they were scored")
    if summary.get("num_order_disagreements"):
        counted = _of(summary, "num_order_disagreements", "num_comparisons")
        found.append(f"{objective}: {counted} comparisons turned with the order of the answers")
    return found


def _of(summary: dict[str, Any], part: str, whole: str) -> str:
    return f"{summary[part]} of {summary[whole]}" if whole in summary else f"{summary[part]}"
