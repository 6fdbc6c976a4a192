"""Reward Consistency (RC): when a winner beats a loser under every objective. The rule this project is named for.

A pair (winner w, loser l) of one group with differences d_k = r_k(w) - r_k(l) is reward-consistent when

    strict:         d_k >  margin_k for every objective k
    weak:           d_k >= margin_k for every k, and > for at least one      (margin 0: Pareto dominance)
    lexicographic:  d_p >  margin_p for the primary objective p, and d_k >= margin_k for the others

* m of K (`min_agreeing`): "every" becomes "at least m".
* Ensembles: objective k is judged by several reward columns and agrees when at least a share of them does.
* A negative margin relaxes the rule (epsilon-RC).

Source: Xu et al., "Reward Consistency", arXiv 2504.11337, for strict; weak as in the STAGE paper's reading of it; the
relaxations are ours. Differences and comparisons are in float64, exact for float32 rewards within 29 binary orders of
magnitude of each other; beyond that the smaller one rounds away in the difference, never in its sign.

Properties, each a test: with margins >= 0 and all objectives required, (w, l) and (l, w) are never both consistent; a larger
margin never adds a pair; strict implies weak; under strict, another objective never adds a pair. (Under weak it can: a tie on one objective
is no pair, but becomes one when a second objective prefers one of the two.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rc_ray.core.compiled import compiled

HIGHER, CONSISTENT, DOMINATES = 0, 1, 2
STRICT, WEAK, LEXICOGRAPHIC = 0, 1, 2
MODES = {"strict": STRICT, "weak": WEAK, "lexicographic": LEXICOGRAPHIC}


class Rule(NamedTuple):
    """Which ordered pairs a strategy may take, in the form that the kernels read.

    Attributes:
        kind: HIGHER (any pair whose winner has the higher score), CONSISTENT (RC) or DOMINATES (a Pareto-optimal winner and
            a loser that it dominates).
        mode: STRICT, WEAK or LEXICOGRAPHIC.
        margin: (1, M) or (G, M), margin per reward column, for all groups or for each.
        objective: (M,), index of the objective that a reward column judges.
        needed: (K,), members that must agree for the objective to agree.
        primary: index of the primary objective, -1 without one.
        min_agreeing: objectives that must agree.
        plain: every objective has one column and all must agree.
        one_way: the rule cannot hold in both directions, and the winner's score is never below the loser's.
    """

    kind: int
    mode: int
    margin: NDArray[np.float64]
    objective: NDArray[np.int64]
    needed: NDArray[np.int64]
    primary: int
    min_agreeing: int
    plain: bool
    one_way: bool


def make_rule(
    margin: NDArray[np.float64],
    consistency: str = "strict",
    members: Sequence[int] | None = None,
    shares: Sequence[float] | None = None,
    primary: int | None = None,
    min_agreeing: int | None = None,
) -> Rule:
    """The RC rule.

    Args:
        margin: (M,), or (G, M) when it differs between groups.
        consistency: `strict`, `weak` or `lexicographic`.
        members: (M,), objective of each reward column; None means one column per objective.
        shares: (K,), share of an objective's members that must agree; None means all.
        primary: index of the primary objective, for `lexicographic` only.
        min_agreeing: objectives that must agree, None means all.

    Raises:
        ValueError: an argument is out of range.
    """
    margins = np.atleast_2d(np.asarray(margin, dtype=np.float64))
    if np.isnan(margins).any():
        raise ValueError(f"margins {margins.tolist()} hold NaN, which no difference exceeds; give numbers")
    objective = np.arange(margins.shape[1]) if members is None else np.asarray(members, dtype=np.int64)
    sizes = np.bincount(np.maximum(objective, 0))
    if objective.shape != (margins.shape[1],) or (objective < 0).any() or not sizes.all():
        raise ValueError(f"members {list(objective)} must name an objective 0..K-1 for each of {margins.shape[1]} columns")
    share = np.ones(sizes.size) if shares is None else np.asarray(shares, dtype=np.float64)
    if share.shape != sizes.shape or not ((share > 0) & (share <= 1)).all():
        raise ValueError(f"shares {share.tolist()} must be one number in (0, 1] for each of {sizes.size} objectives")
    if consistency not in MODES:
        raise ValueError(f"consistency {consistency!r} is not one of {', '.join(MODES)}")
    if (primary is not None) != (consistency == "lexicographic"):
        raise ValueError("primary and consistency 'lexicographic' go together")
    if primary is not None and not 0 <= primary < sizes.size:
        raise ValueError(f"primary {primary} is not an objective 0..{sizes.size - 1}")
    required = sizes.size if min_agreeing is None else min_agreeing
    if not 1 <= required <= sizes.size:
        raise ValueError(f"min_agreeing {required} is not in 1..{sizes.size}")
    plain = bool((sizes == 1).all()) and required == sizes.size
    return Rule(
        CONSISTENT,
        MODES[consistency],
        np.ascontiguousarray(margins),
        objective.astype(np.int64),
        # A share of 2/3 of 3 members is 2 of them, although 2/3 * 3 may round up past 2.
        np.ceil(share * sizes - 1e-9).astype(np.int64),
        -1 if primary is None else primary,
        required,
        plain,
        plain and bool((margins >= 0).all()),
    )


def plain_rule(kind: int, num_objectives: int) -> Rule:
    """HIGHER or DOMINATES."""
    return make_rule(np.zeros(num_objectives), "weak")._replace(kind=kind)


@compiled
def agrees(rewards: Any, rule: Any, row: int, w: int, l: int) -> bool:  # noqa: E741
    """Whether the objectives agree that row w of `rewards` beats row l, by the margins in `rule.margin[row]`."""
    margin = rule.margin
    if rule.plain:
        better = False
        for m in range(rewards.shape[1]):
            difference = np.float64(rewards[w, m]) - np.float64(rewards[l, m])
            if difference > margin[row, m]:
                better = True
            elif rule.mode == STRICT or rule.objective[m] == rule.primary or not difference >= margin[row, m]:
                return False
        return bool(better or rule.mode == LEXICOGRAPHIC)
    num_objectives = rule.needed.size
    above, at_least, primary_above = 0, 0, False
    for k in range(num_objectives):
        members_above, members_at_least = 0, 0
        for m in range(rewards.shape[1]):
            if rule.objective[m] == k:
                difference = np.float64(rewards[w, m]) - np.float64(rewards[l, m])
                if difference > margin[row, m]:
                    members_above += 1
                if difference >= margin[row, m]:
                    members_at_least += 1
        if members_above >= rule.needed[k]:
            above += 1
            primary_above = primary_above or k == rule.primary
        if members_at_least >= rule.needed[k]:
            at_least += 1
    if rule.mode == STRICT:
        return bool(above >= rule.min_agreeing)
    if rule.mode == WEAK:
        return bool(at_least >= rule.min_agreeing and above > 0)
    return bool(primary_above and at_least >= rule.min_agreeing)


@compiled
def _matrix(rewards: Any, rule: Any) -> Any:
    n = rewards.shape[0]
    matrix = np.zeros((n, n), dtype=np.bool_)
    whole = np.ones(n, dtype=np.bool_)
    for i in range(n):
        for m in range(rewards.shape[1]):
            whole[i] = whole[i] and np.isfinite(rewards[i, m])
    for w in range(n):
        for l in range(n):  # noqa: E741
            if w != l and whole[w] and whole[l]:
                matrix[w, l] = agrees(rewards, rule, 0, w, l)
    return matrix


def consistency_matrix(
    rewards: NDArray[np.floating[Any]],
    consistency: str = "strict",
    margins: NDArray[np.floating[Any]] | None = None,
    *,
    members: Sequence[int] | None = None,
    shares: Sequence[float] | None = None,
    primary: int | None = None,
    min_agreeing: int | None = None,
) -> NDArray[np.bool_]:
    """Which ordered pairs of one group are reward-consistent.

    Args:
        rewards: (N, M), candidates by reward columns. A candidate with a missing (NaN) or infinite reward is in no pair.
        consistency: `strict`, `weak` or `lexicographic`; see the module's docstring for the formulas.
        margins: (M,), in each column's unit; None means 0. Negative margins relax the rule; then, and with fewer than all
            objectives required, a pair may be consistent in both directions, and selection keeps the one with the higher score.
        members, shares, primary, min_agreeing: see `make_rule`; None means one column per objective, all of which must agree.

    Returns:
        bool (N, N), entry [w, l] true when w beats l; the diagonal is false.

    Raises:
        ValueError: the shape is not (N, M) with M >= 1, or an argument is out of range.
    """
    values = np.ascontiguousarray(rewards, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] < 1:
        raise ValueError(f"rewards has shape {values.shape}; expected (N, M) with M >= 1")
    margin = np.zeros(values.shape[1]) if margins is None else np.asarray(margins, dtype=np.float64)
    if margin.shape != (values.shape[1],):
        raise ValueError(f"margins has shape {margin.shape}; expected ({values.shape[1]},)")
    matrix: NDArray[np.bool_] = _matrix(values, make_rule(margin, consistency, members, shares, primary, min_agreeing))
    return matrix
