"""The selection strategies: which pairs of a group are taken. One function each, one table of them.

All of them share what `rc_ray.core.pick` guarantees: winner and loser are different texts, ties never make a pair, a cut answer
does not win unless allowed, a winner is not too long for its loser if that is limited, equal gaps go to the lowest winner
index, then the lowest loser index. s(i) is a candidate's score under `gap` (sum, standardized_sum, primary:X), and gap(w, l) = s(w) - s(l).

`rcs` is what the project recommends; most of the others are what people compare it with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rc_ray.config import SelectionConfig
from rc_ray.config.selection import PRIMARY
from rc_ray.core import pick, scores
from rc_ray.core.measure import Fitted
from rc_ray.core.pick import Found, Groups
from rc_ray.core.rule import DOMINATES, HIGHER, Rule, make_rule, plain_rule
from rc_ray.core.transforms import derive

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Prepared:
    """Groups together with what the configuration makes of them.

    Attributes:
        groups: the flat arrays.
        config: the options.
        objectives: names, K of them.
        scale: (1, K) or (G, K) of the objectives; 1 for ensembles of members apart, whose values are in units of scale already.
        rule: the RC rule.
        fitted: numbers about the data.
    """

    groups: Groups
    config: SelectionConfig
    objectives: list[str]
    scale: Array
    rule: Rule
    fitted: Fitted

    @property
    def max_ratio(self) -> float:
        """The length guard."""
        return self.config.max_length_ratio or np.inf

    def weights(self) -> Array:
        """(K,), 1 where not configured."""
        return np.asarray([self.config.weights.get(name, 1.0) for name in self.objectives])

    def scores(self) -> Array:
        """Score per candidate under `gap`; for `min` and `product` the standardised sum, which only settles directions."""
        gap = self.config.gap
        if gap.startswith(PRIMARY):
            weights = (np.asarray(self.objectives) == gap.removeprefix(PRIMARY)).astype(np.float64)[None, :]
        else:
            weights = self.weights() / (np.ones((1, 1)) if gap == "sum" else self.scale)
        return np.asarray(scores.weighted(self.groups.values, self.groups.offsets, np.ascontiguousarray(weights)))

    def higher(self) -> Rule:
        """Any pair whose winner scores higher."""
        return plain_rule(HIGHER, len(self.objectives))

    @property
    def gap_kind(self) -> int:
        """How the search computes gaps."""
        return {"min": pick.MINIMUM, "product": pick.PRODUCT}.get(self.config.gap, pick.ADDITIVE)


def rcs(data: Prepared) -> dict[str, Found]:
    """Reward Consistency Sampling: of the pairs on which the objectives agree (`rc_ray.core.rule`), the one with the largest gap.

    Source: arXiv 2504.11337. Use it to train for several objectives at once; a prompt without such a pair is dropped.
    """
    if data.gap_kind == pick.ADDITIVE:
        return {"rcs": pick.largest(data.groups, data.scores(), data.rule, data.max_ratio)}
    found = pick.every(
        data.groups, data.scores(), data.rule, data.max_ratio, data.gap_kind, data.scale, first_only=True
    )  # fmt: skip
    return {"rcs": found}


def rc_all(data: Prepared) -> dict[str, Found]:
    """Every pair on which the objectives agree, largest gaps first, at most `max_pairs` per prompt.

    Source: arXiv 2504.11337's filter without its sampling step. Use it when prompts are few and answers many.
    """
    found = pick.every(
        data.groups, data.scores(), data.rule, data.max_ratio, data.gap_kind, data.scale, max_pairs=data.config.max_pairs
    )  # fmt: skip
    return {"rc_all": found}


def rc_filter(data: Prepared) -> dict[str, Found]:
    """Existing pairs (chosen, rejected) on which the objectives agree; never turned round.

    Source: arXiv 2504.11337. Use it to clean a preference set that somebody else labelled.
    """
    return {"rc_filter": pick.given(data.groups, data.scores(), data.rule, data.max_ratio, data.gap_kind, data.scale)}


def best_worst(data: Prepared) -> dict[str, Found]:
    """argmax s over argmin s: of all pairs with s(w) > s(l) the one with the largest gap.

    Source: SimPO's on-policy data (arXiv 2405.14734), Online-RLHF's max_min (arXiv 2405.07863). With `gap: primary:X` for one objective. The usual
    baseline; with one score its pairs contradict the other objectives more often the larger N is.
    """
    return {"best_worst": pick.largest(data.groups, data.scores(), data.higher(), data.max_ratio)}


def best_random(data: Prepared) -> dict[str, Found]:
    """argmax s over a candidate drawn uniformly from those with a lower score.

    Source: Tulu 3 (arXiv 2411.15124). The draw depends on seed, prompt id and rank by score. Use it for less extreme, more varied losers.
    """
    return {"best_random": pick.partner(data.groups, data.scores(), data.max_ratio)}


def sweet_spot(data: Prepared) -> dict[str, Found]:
    """argmax s over the candidate nearest to mean - 2 standard deviations (`rejected_at`) of the group's scores.

    Source: arXiv 2502.16825, which finds the minimum a worse loser than mu - 2 sigma as N grows. Use it with N of 16 or more.
    """
    return {"sweet_spot": pick.partner(data.groups, data.scores(), data.max_ratio, data.config.rejected_at)}


def rs_dpo(data: Prepared) -> dict[str, Found]:
    """Every pair with sigmoid((s(w) - s(l)) / tau) > eta, that is gap > tau log(eta / (1 - eta)).

    Source: RS-DPO, arXiv 2402.10038 (eta 0.85, tau 1, on the reward itself: `gap: primary:X`). Use it to get many clear pairs per prompt.
    """
    threshold = data.config.tau * float(np.log(data.config.eta / (1 - data.config.eta)))
    found = pick.every(
        data.groups, data.scores(), data.higher(), data.max_ratio, pick.ADDITIVE, data.scale, threshold, data.config.max_pairs
    )  # fmt: skip
    return {"rs_dpo": found}


def mixed(data: Prepared) -> dict[str, Found]:
    """For each objective k: argmax r_k over argmin r_k; pooled. `strategy` says `mixed:<objective>`, the gap is r_k's difference.

    The "vanilla" multi-objective data that RC is measured against (arXiv 2504.11337); its pairs may contradict each other.
    """
    return {
        f"mixed:{name}": pick.largest(data.groups, data.groups.values[:, k].astype(np.float64), data.higher(), data.max_ratio)
        for k, name in enumerate(data.objectives)
    }


def pareto(data: Prepared) -> dict[str, Found]:
    """A winner that no candidate dominates over a loser that it dominates (>= everywhere, > somewhere); the largest gap.

    Pareto dominance is weak RC without margins; the front is taken over all candidates. Use it where objectives often tie.
    """
    rule = plain_rule(DOMINATES, len(data.objectives))
    return {"pareto": pick.largest(data.groups, data.scores(), rule, data.max_ratio)}


def lsc(data: Prepared) -> dict[str, Found]:
    """argmax u over argmin u of u(i) = sum_k weight_k log sigmoid(r_k(i) - reference_k).

    Source: arXiv 2402.00742: the log-probability that an answer is good on all objectives at once, which stresses the weakest one. A soft
    form of RC that drops no prompt. The reference is given, or the 0.85 quantile of the group's own rewards.
    """
    config = data.config
    reference = np.asarray([config.reference[name] for name in data.objectives] if config.reference else [], dtype=np.float64)
    utility = scores.log_sigmoid(data.groups.values, data.groups.offsets, data.weights(), reference, config.reference_quantile)
    return {"lsc": pick.largest(data.groups, utility, data.higher(), data.max_ratio)}


def map_(data: Prepared) -> dict[str, Found]:
    """argmax over argmin of lambda . r, with lambda from MAP's dual for `targets` (`rc_ray.core.measure.map_weights`).

    Source: MAP, arXiv 2410.19198. Use it when means to reach per objective are known rather than weights.
    """
    weights = data.fitted.weights or {}
    row = np.asarray([[weights.get(name, 0.0) for name in data.objectives]])
    utility = scores.weighted(data.groups.values, data.groups.offsets, row)
    return {"map": pick.largest(data.groups, utility, data.higher(), data.max_ratio)}


STRATEGIES: dict[str, Callable[[Prepared], dict[str, Found]]] = {
    "rcs": rcs,
    "rc_all": rc_all,
    "rc_filter": rc_filter,
    "best_worst": best_worst,
    "best_random": best_random,
    "sweet_spot": sweet_spot,
    "rs_dpo": rs_dpo,
    "mixed": mixed,
    "pareto": pareto,
    "lsc": lsc,
    "map": map_,
}
"""Strategy by name; each returns its pairs under the name that goes into the column `strategy`."""


def prepare(groups: Groups, config: SelectionConfig, objectives: list[str], columns: list[str], fitted: Fitted) -> Prepared:
    """Computes transforms, scales, objective values and margins for groups.

    Args:
        groups: flat arrays; `rewards` are replaced by what is derived of them, `values` when there are ensembles.
        config, objectives: the options and what they select by.
        columns: names of the reward columns of `groups.rewards`.
        fitted: transforms and scale of the data, where needed.
    """
    if config.derives:
        rewards = {name: groups.rewards[:, m] for m, name in enumerate(columns)}
        columns = config.judges_of(objectives)
        derived = derive(rewards, config, columns, fitted.transforms)
        values = np.ascontiguousarray(np.stack([derived[name] for name in columns], axis=1))
        groups = groups._replace(rewards=values, values=values)
    members = [next(k for k, name in enumerate(objectives) if column in config.judges_of([name])) for column in columns]
    ensemble = np.asarray([config.is_split(name) for name in objectives])
    if not config.uses_scale:
        scale = np.ones((1, len(columns)))
    elif config.scale == "group":
        scale = np.asarray(scores.group_scale(groups.rewards, groups.offsets))
    else:
        known = config.scale if isinstance(config.scale, dict) else fitted.scale or {}
        scale = np.asarray([[known[name] for name in columns]])
    margin = np.asarray([[config.margins.get(objectives[k], 0.0) for k in members]])
    if config.margin_unit == "scale" and config.margins:
        margin = margin * scale
    rule = make_rule(
        margin,
        config.consistency,
        members,
        [config.ensembles[name].share if config.is_split(name) else 1.0 for name in objectives],
        objectives.index(config.primary) if config.primary is not None else None,
        config.min_agreeing,
    )
    if not ensemble.any() and members == list(range(len(objectives))):
        return Prepared(groups, config, objectives, scale, rule, fitted)
    values = scores.ensemble_means(groups.rewards, groups.offsets, np.asarray(members), scale, ensemble)
    of_objective = np.ones((scale.shape[0], len(objectives)))
    for m, k in enumerate(members):
        if not ensemble[k]:
            of_objective[:, k] = scale[:, m]
    return Prepared(groups._replace(values=values), config, objectives, of_objective, rule, fitted)
