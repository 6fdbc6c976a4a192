"""Selection as its documentation defines it, in plain Python, one pair of answers at a time: what the tests compare with.

A candidate's score is a float64, added up in the documented order; from there on gaps are exact fractions.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa

from rc_ray.config import SelectionConfig, TransformConfig

Number = float | None


@dataclass(frozen=True)
class Answer:
    """One candidate; a reward per column of the table."""

    text: str | None
    rewards: tuple[Number, ...]
    finish: str | None = "stop"


@dataclass(frozen=True)
class Group:
    """All candidates of one prompt."""

    prompt_id: str
    answers: tuple[Answer, ...]
    failure: str | None = None


@dataclass(frozen=True)
class Pair:
    """A selected pair, by the positions of its answers."""

    strategy: str
    winner: int
    loser: int
    gap: float


@dataclass(frozen=True)
class Outcome:
    """What becomes of a group: pairs, or why there are none; and how many a cap left out."""

    pairs: tuple[Pair, ...] = ()
    reason: str | None = None
    beyond_cap: int = 0


def group_table(groups: Sequence[Group], columns: Sequence[str]) -> pa.Table:
    """Scored groups as a table."""
    candidate = pa.struct([("text", pa.string()), ("finish_reason", pa.string())])
    answers = [[{"text": a.text, "finish_reason": a.finish} for a in group.answers] for group in groups]
    return pa.table(
        {
            "prompt_id": pa.array([group.prompt_id for group in groups], pa.string()),
            "prompt": pa.array([f"prompt {group.prompt_id}" for group in groups], pa.string()),
            "candidates": pa.array(answers, pa.list_(candidate)),
            "failure": pa.array([group.failure for group in groups], pa.string()),
            **{
                f"reward.{name}": pa.array([[a.rewards[m] for a in group.answers] for group in groups], pa.list_(pa.float32()))
                for m, name in enumerate(columns)
            },
        }
    )


def preference_table(groups: Sequence[Group], columns: Sequence[str]) -> pa.Table:
    """Groups of two as existing pairs: the first answer is the chosen one."""
    sides = {}
    for side, name in enumerate(("chosen", "rejected")):
        answers = [group.answers[side] for group in groups]
        rewards = pa.struct([(column, pa.float32()) for column in columns])
        sides[name] = pa.array([a.text for a in answers], pa.string())
        sides[f"rewards_{name}"] = pa.array([dict(zip(columns, a.rewards, strict=True)) for a in answers], rewards)
    ids = pa.array([group.prompt_id for group in groups], pa.string())
    return pa.table({"prompt_id": ids, "prompt": pa.array([f"prompt {g.prompt_id}" for g in groups], pa.string()), **sides})


def numbered_groups(rewards: Any) -> list[Group]:
    """Groups with these rewards (groups, candidates, columns) and answers that all differ."""
    return [
        Group(str(g), tuple(Answer(f"answer {i}", tuple(row)) for i, row in enumerate(rows))) for g, rows in enumerate(rewards)
    ]


def consistent(
    winner: Sequence[float],
    loser: Sequence[float],
    consistency: str,
    margins: Sequence[float],
    members: Sequence[int] | None = None,
    shares: Sequence[float] | None = None,
    primary: int | None = None,
    min_agreeing: int | None = None,
) -> bool:
    """Whether the objectives agree that `winner` beats `loser`; both are rewards per column."""
    objective = list(range(len(margins))) if members is None else list(members)
    above, at_least = [], []
    for k in range(max(objective) + 1):
        own = [m for m in range(len(margins)) if objective[m] == k]
        share = 1.0 if shares is None else shares[k]
        above.append(sum(winner[m] - loser[m] > margins[m] for m in own) / len(own) >= share)
        at_least.append(sum(winner[m] - loser[m] >= margins[m] for m in own) / len(own) >= share)
    required = len(above) if min_agreeing is None else min_agreeing
    if consistency == "strict":
        return sum(above) >= required
    if consistency == "weak":
        return sum(at_least) >= required and any(above)
    assert primary is not None
    return above[primary] and sum(at_least) >= required


def deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and population standard deviation, added up in ascending order."""
    mean = square = 0.0
    for value in sorted(values):
        mean += value
    mean /= len(values)
    for value in sorted(values):
        square += (value - mean) * (value - mean)
    return mean, math.sqrt(square / len(values))


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _key(prompt_id: str, seed: int) -> int:
    """FNV-1a over the prompt id, started from the seed, mixed by splitmix64's finaliser."""
    mask = (1 << 64) - 1
    key = 14695981039346656037 ^ seed
    for byte in prompt_id.encode():
        key = (key ^ byte) * 1099511628211 & mask
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 & mask
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB & mask
    return key ^ (key >> 31)


def _quantile(values: Sequence[float], quantile: float) -> float:
    """Linear between two values."""
    ascending = sorted(values)
    position = quantile * (len(values) - 1)
    below = int(position)
    if below + 1 == len(values):
        return ascending[below]
    return ascending[below] + (position - below) * (ascending[below + 1] - ascending[below])


class _Search:
    """One group under one configuration."""

    def __init__(
        self,
        group: Group,
        config: SelectionConfig,
        columns: Sequence[str],
        scale: dict[str, float] | None,
        lambdas: dict[str, float] | None,
        derived: bool,
    ) -> None:
        self.group, self.config, self.derived = group, config, derived
        self.answers, self.all = group.answers, range(len(group.answers))
        ensembles = {name: ensemble.members for name, ensemble in config.ensembles.items()}
        in_one = [column for members in ensembles.values() for column in members]
        self.objectives = config.objectives or [*(c for c in columns if c not in in_one), *ensembles]
        self.members = {name: ensembles.get(name, [name]) for name in self.objectives}
        self.used = [column for name in self.objectives for column in self.members[name]]
        self.rewards = {c: [a.rewards[columns.index(c)] for a in self.answers] for c in self.used}
        self.given_scale, self.lambdas = scale, lambdas or {}

    def unusable(self) -> str | None:
        """Why the group cannot be searched."""
        if self.group.failure:
            return self.group.failure
        if any(a.text is None for a in self.answers):
            return "invalid_candidate"
        if any(r is None or not math.isfinite(r) for column in self.rewards.values() for r in column):
            return "reward_missing"
        if len(self.answers) < 2:
            return "too_few_candidates"
        return "identical_candidates" if len({a.text for a in self.answers}) == 1 else None

    def prepare(self) -> None:
        """Scales, the value of each objective, margins, scores."""
        config = self.config
        if config.scale == "group":
            self.scale = {c: deviation(r)[1] if min(r) < max(r) else 1.0 for c, r in self.rewards.items()}
        else:
            self.scale = config.scale if isinstance(config.scale, dict) else self.given_scale or {}
        self.values, self.unit = {}, {}
        for name in self.objectives:
            self.values[name] = self.rewards[name] if name in self.rewards else [self._mean(name, i) for i in self.all]
            self.unit[name] = 1.0 if name in config.ensembles else self.scale.get(name, 1.0)
        self.margins = {}
        for name in self.objectives:
            for column in self.members[name]:
                margin = config.margins.get(name, 0.0)
                self.margins[column] = (
                    margin * self.scale[column] if config.margins and config.margin_unit == "scale" else margin
                )
        self.set_scores([self._score(i) for i in self.all])

    def set_scores(self, scores: Sequence[float]) -> None:
        """What winners and losers are ranked by."""
        self.scores, self.exact = scores, [Fraction(score) for score in scores]

    def _mean(self, ensemble: str, i: int) -> float:
        members = self.members[ensemble]
        total = 0.0
        for column in members:
            total += self.rewards[column][i] / self.scale[column]
        return total / len(members) if self.derived else _float32(total / len(members))

    def _score(self, i: int) -> float:
        gap = self.config.gap
        if gap.startswith("primary:"):
            return self.values[gap.removeprefix("primary:")][i]
        total = 0.0
        for name in self.objectives:
            weight = self.config.weights.get(name, 1.0)
            total += (weight if gap == "sum" else weight / self.unit[name]) * self.values[name][i]
        return total

    def gap(self, w: int, v: int) -> float | Fraction:
        """What pairs (winner w over loser v) are ranked by."""
        if self.config.gap not in ("min", "product"):
            return self.exact[w] - self.exact[v]
        differences = [(self.values[n][w] - self.values[n][v]) / self.unit[n] for n in self.objectives]
        if self.config.gap == "min":
            return min(differences)
        return math.prod(differences) if min(differences) > 0 else 0.0

    def pair(self, strategy: str, w: int, v: int) -> Pair:
        """A pair with its gap in float64."""
        return Pair(strategy, w, v, float(self.gap(w, v)))

    def agree(self, w: int, v: int) -> bool:
        """RC; where it holds in both directions, the higher score decides, and equal scores make no pair."""

        def one_way(w: int, v: int) -> bool:
            return consistent(
                [self.rewards[c][w] for c in self.used],
                [self.rewards[c][v] for c in self.used],
                self.config.consistency,
                [self.margins[c] for c in self.used],
                [k for k, name in enumerate(self.objectives) for _ in self.members[name]],
                [self.config.ensembles[n].share if n in self.config.ensembles else 1.0 for n in self.objectives],
                self.objectives.index(self.config.primary) if self.config.primary else None,
                self.config.min_agreeing,
            )

        return one_way(w, v) and (self.scores[w] > self.scores[v] or not one_way(v, w))

    def higher(self, w: int, v: int) -> bool:
        """A better score."""
        return self.scores[w] > self.scores[v]

    def dominates(self, w: int, v: int) -> bool:
        """At least as good everywhere, better somewhere."""
        columns = [self.values[name] for name in self.objectives]
        return all(r[w] >= r[v] for r in columns) and any(r[w] > r[v] for r in columns)

    def guarded(self, allowed: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], str]:
        """What is left of the pairs that a strategy allows, and the reason if that is nothing."""
        different = [(w, v) for w, v in allowed if self.answers[w].text != self.answers[v].text]
        whole = [(w, v) for w, v in different if self.config.allow_truncated_winner or self.answers[w].finish != "length"]
        ratio = math.inf if self.config.max_length_ratio is None else self.config.max_length_ratio
        size = [len(a.text or "") for a in self.answers]
        short = [(w, v) for w, v in whole if ratio == math.inf or size[w] <= ratio * size[v]]
        reason = "winner_too_long" if whole else "winner_truncated" if different else "no_consistent_pair"
        return short, reason

    def pairs_where(self, rule: Any) -> list[tuple[int, int]]:
        """All ordered pairs that a rule allows, by index."""
        return [(w, v) for w in self.all for v in self.all if w != v and rule(w, v)]

    def largest(self, strategy: str, allowed: list[tuple[int, int]]) -> Outcome:
        """The pair with the largest gap; equal ones go to the lowest winner, then the lowest loser."""
        kept, reason = self.guarded(allowed)
        if not kept:
            return Outcome(reason=reason)
        gaps = {pair: self.gap(*pair) for pair in kept}
        top = max(gaps.values())
        return Outcome((self.pair(strategy, *min(pair for pair in kept if gaps[pair] == top)),))

    def every(self, strategy: str, allowed: list[tuple[int, int]]) -> Outcome:
        """All pairs by falling gap; the same two texts make one of them; no more than the cap."""
        kept, reason = self.guarded(allowed)
        seen: set[frozenset[str | None]] = set()
        pairs = []
        for w, v in sorted(kept, key=lambda pair: (-self.gap(*pair), pair)):
            texts = frozenset((self.answers[w].text, self.answers[v].text))
            if texts not in seen:
                seen.add(texts)
                pairs.append(self.pair(strategy, w, v))
        cap = self.config.max_pairs or len(pairs)
        return Outcome(tuple(pairs[:cap]), None if pairs else reason, len(pairs[cap:]))

    def partner(self, strategy: str) -> Outcome:
        """The best candidate that may win; its loser is drawn, or the one nearest to the sweet spot."""
        kept, reason = self.guarded(self.pairs_where(self.higher))
        if not kept:
            return Outcome(reason=reason)
        winner = min((w for w, _ in kept), key=lambda w: (-self.exact[w], w))
        losers = sorted((self.exact[v], v) for w, v in kept if w == winner)
        if strategy == "best_random":
            loser = losers[_key(self.group.prompt_id, self.config.seed) % len(losers)][1]
        else:
            mean, spread = deviation(self.scores)
            target = mean + self.config.rejected_at * spread
            loser = min((abs(self.scores[v] - target), v) for _, v in losers)[1]
        return Outcome((self.pair(strategy, winner, loser),))

    def log_sigmoids(self) -> list[float]:
        """LSC's utility: sum of weight x log sigmoid(r - reference), the logarithms at once where all weights are 1."""
        config, utility = self.config, [0.0 for _ in self.all]
        odds = list(utility)
        weights = [config.weights.get(name, 1.0) for name in self.objectives]
        for name, weight in zip(self.objectives, weights, strict=True):
            values = self.values[name]
            base = config.reference[name] if config.reference else _quantile(values, config.reference_quantile)
            for i in self.all:
                x = values[i] - base
                e = math.exp(-abs(x))
                odds[i] += e + odds[i] * e
                utility[i] += min(x, 0.0) if set(weights) == {1.0} else weight * (min(x, 0.0) - math.log1p(e))
        return [u - math.log1p(o) for u, o in zip(utility, odds, strict=True)] if set(weights) == {1.0} else utility

    def run(self) -> Outcome:
        """The strategy."""
        name, config = self.config.strategy, self.config
        if name == "rcs":
            return self.largest(name, self.pairs_where(self.agree))
        if name == "rc_all":
            return self.every(name, self.pairs_where(self.agree))
        if name == "rc_filter":
            return self.largest(name, [(0, 1)] if self.agree(0, 1) else [])
        if name == "rs_dpo":
            threshold = config.tau * math.log(config.eta / (1 - config.eta))
            return self.every(name, self.pairs_where(lambda w, v: self.scores[w] - self.scores[v] > threshold))
        if name in ("best_random", "sweet_spot"):
            return self.partner(name)
        if name == "pareto":
            front = [w for w in self.all if not any(self.dominates(i, w) for i in self.all)]
            return self.largest(name, [(w, v) for w, v in self.pairs_where(self.dominates) if w in front])
        if name == "mixed":
            pools = []
            for objective in self.objectives:
                self.set_scores(self.values[objective])
                pools.append(self.largest(f"mixed:{objective}", self.pairs_where(self.higher)))
            pairs = tuple(pair for pool in pools for pair in pool.pairs)
            worst_first = ("winner_too_long", "winner_truncated", "no_consistent_pair")
            reasons = [pool.reason for pool in pools]
            return Outcome(pairs, None if pairs else next(reason for reason in worst_first if reason in reasons))
        if name == "lsc":
            self.set_scores(self.log_sigmoids())
        elif name == "map":
            scores = []
            for i in self.all:
                total = 0.0
                for objective in self.objectives:
                    total += self.lambdas.get(objective, 0.0) * self.values[objective][i]
                scores.append(total)
            self.set_scores(scores)
        return self.largest(name, self.pairs_where(self.higher))  # best_worst, lsc, map


def select(
    group: Group,
    config: SelectionConfig,
    columns: Sequence[str],
    scale: dict[str, float] | None = None,
    lambdas: dict[str, float] | None = None,
    derived: bool = False,
) -> Outcome:
    """What becomes of a group.

    Args:
        group, config: what to select from, and how.
        columns: names of the rewards of each answer.
        scale: of the data, per column, where the configuration measures it.
        lambdas: MAP's weight per objective.
        derived: whether the rewards are those of `transformed`, which are not float32.
    """
    search = _Search(group, config, columns, scale, lambdas, derived)
    reason = search.unusable()
    if reason is not None:
        return Outcome(reason=reason)
    search.prepare()
    return search.run()


def _finite(value: Number) -> bool:
    return value is not None and math.isfinite(value)


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of the population, correctly rounded; a deviation of 0 counts as 1."""
    exact = [Fraction(value) for value in values]
    mean = sum(exact) / len(exact)
    variance = sum((value - mean) ** 2 for value in exact) / len(exact)
    with localcontext(prec=1000):
        deviation = (Decimal(variance.numerator) / Decimal(variance.denominator)).sqrt()
    return float(mean), float(deviation) if variance else 1.0


def transformed_value(r: float, transform: TransformConfig, everywhere: Sequence[float], sample: Sequence[float]) -> float:
    """One reward after its transform; all rewards of its column, and those of groups that lack no reward."""
    value = r
    if transform.kind == "zscore":
        mean, spread = _moments(everywhere)
        value = (r - mean) / spread
    elif transform.kind == "lsc":
        x = r - (np.quantile(sample, transform.reference_quantile) if transform.reference is None else transform.reference)
        value = min(x, 0.0) - math.log1p(math.exp(-abs(x)))
    elif transform.kind == "quantile":
        value = (sum(s < r for s in sample) + sum(s <= r for s in sample)) / 2 / len(sample)
    low, high = transform.clip or (None, None)
    value = value if low is None else max(value, low)
    return float(value if high is None else min(value, high))


def transformed(
    groups: Sequence[Group], config: SelectionConfig, columns: Sequence[str]
) -> tuple[list[Group], SelectionConfig, list[str]]:
    """Groups with what is compared as their rewards, the configuration without what led there, and the names of these rewards."""
    objectives = config.objective_names(columns)
    used = [columns.index(name) for name in config.columns_of(objectives)]
    whole = [g for g in groups if g.answers and all(_finite(a.rewards[m]) for a in g.answers for m in used)]

    def after(m: int, r: Number) -> Number:
        transform = config.transforms.get(columns[m])
        if r is None or not math.isfinite(r) or transform is None:
            return r
        everywhere = [v for g in groups for a in g.answers if (v := a.rewards[m]) is not None and math.isfinite(v)]
        sample = [v for g in whole for a in g.answers if (v := a.rewards[m]) is not None]
        return transformed_value(r, transform, everywhere, sample) if sample else r

    names: list[str] = []
    parts: list[tuple[list[int], str]] = []
    for objective in objectives:
        ensemble = config.ensembles.get(objective)
        if ensemble is None or ensemble.combine == "agree":
            members = [objective] if ensemble is None else ensemble.members
            names += members
            parts += [([columns.index(name)], "alone") for name in members]
        else:
            names.append(objective)
            parts.append(([columns.index(name) for name in ensemble.members], ensemble.combine))

    def value(answer: Answer, members: list[int], how: str) -> Number:
        values = [after(m, answer.rewards[m]) for m in members]
        known = [v for v in values if v is not None and math.isfinite(v)]
        if len(known) < len(values):
            return None
        return min(known) if how == "minimum" else _sum(known) / len(known)

    made = [
        replace(g, answers=tuple(replace(a, rewards=tuple(value(a, *part) for part in parts)) for a in g.answers))
        for g in groups
    ]
    apart = {
        name: ensemble for name, ensemble in config.ensembles.items() if ensemble.combine == "agree" and name in objectives
    }
    plain = config.model_copy(update={"transforms": {}, "ensembles": apart, "objectives": objectives})
    return made, plain, names


def _sum(values: Sequence[float]) -> float:
    total = values[0]
    for each in values[1:]:
        total += each
    return total
