"""The compiled searches over the pairs of each group: the largest gap, all pairs by gap, a partner for the best, a given pair.

Each takes flat arrays over all candidates (`Groups`), a score per candidate and a rule, and visits one group after the other,
so memory is that of the arrays. Gaps that are differences of scores are compared exactly (rounding of the subtraction
included), so the winner of the largest gap has the highest score and its loser the lowest that the rule lets it have. Equal gaps: lowest winner
index, then lowest loser index.

Rules that hold for every search: a group with a status other than OK is skipped; winner and loser have different texts; an answer that was
cut does not win unless allowed; a winner is not longer than `max_ratio` times its loser; and where a relaxed rule holds in
both directions, the one with the higher score counts, with equal scores neither.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rc_ray.core.compiled import compiled
from rc_ray.core.rule import CONSISTENT, DOMINATES, HIGHER, STRICT, Rule, agrees
from rc_ray.core.scores import ranks

# What became of a group. The first ones are found before the search, the others by it.
OK, FAILED, INVALID, MISSING, TOO_FEW, IDENTICAL, NO_PAIR, TRUNCATED, TOO_LONG = range(9)
ADDITIVE, MINIMUM, PRODUCT = 0, 1, 2
LARGEST = float(np.finfo(np.float64).max)


class Groups(NamedTuple):
    """Groups as flat arrays over their T candidates, group after group.

    Attributes:
        rewards: float32 (T, M), one column per reward model; or float64, what is derived of them.
        values: (T, K), one column per objective; `rewards` itself without ensembles.
        offsets: int64 (G + 1,), group g has candidates offsets[g] to offsets[g + 1].
        status: int8 (G,), OK or why the group cannot be searched.
        text_offsets, text_bytes: int64 (T + 1,) and uint8, UTF-8 of all texts; empty when all texts are different.
        truncated: bool (T,), cut at max_tokens; empty when none may matter.
        length: int32 (T,), characters; empty when no length guard is set.
        key: uint64 (G,), random number of the group.
    """

    rewards: NDArray[np.float32] | NDArray[np.float64]
    values: NDArray[np.float32] | NDArray[np.float64]
    offsets: NDArray[np.int64]
    status: NDArray[np.int8]
    text_offsets: NDArray[np.int64]
    text_bytes: NDArray[np.uint8]
    truncated: NDArray[np.bool_]
    length: NDArray[np.int32]
    key: NDArray[np.uint64]


class Found(NamedTuple):
    """Pairs that a search found, in the order of groups: group, winner and loser index within it, gap; and each group's status."""

    group: NDArray[np.int64]
    winner: NDArray[np.int64]
    loser: NDArray[np.int64]
    gap: NDArray[np.float64]
    status: NDArray[np.int8]
    num_beyond_cap: int


@compiled
def mark_unusable(groups: Any) -> None:
    """Sets the status of groups with missing or infinite rewards, fewer than two candidates, or equal texts only."""
    offsets, rewards = groups.offsets, groups.rewards
    for g in range(offsets.size - 1):
        if groups.status[g] != OK:
            continue
        low, high = offsets[g], offsets[g + 1]
        total = np.float32(0.0)  # x * 0 is NaN for NaN and infinity alone
        for i in range(low, high):
            for m in range(rewards.shape[1]):
                total += rewards[i, m] * np.float32(0.0)
        if total != 0:
            groups.status[g] = MISSING
        elif high - low < 2:
            groups.status[g] = TOO_FEW
        elif groups.text_offsets.size:
            same = True
            for i in range(low + 1, high):
                if not same_text(groups.text_offsets, groups.text_bytes, low, i):
                    same = False
                    break
            if same:
                groups.status[g] = IDENTICAL


@compiled
def same_text(offsets: Any, text: Any, i: int, j: int) -> bool:
    """Whether candidates i and j (positions in the flat arrays) are the same answer; never without texts."""
    if offsets.size == 0:
        return False
    length = offsets[i + 1] - offsets[i]
    if length != offsets[j + 1] - offsets[j]:
        return False
    for b in range(length):  # noqa: SIM110
        if text[offsets[i] + b] != text[offsets[j] + b]:
            return False
    return True


@compiled
def compare_differences(a: float, b: float, c: float, d: float) -> int:
    """Sign of (a - b) - (c - d), exact for finite numbers whose differences do not overflow.

    Rounding is monotone, so different rounded differences settle it; for equal ones the rounding errors do (Knuth's TwoSum).
    """
    x, y = a - b, c - d
    if x == y:
        x, y = _rounding_error(a, b), _rounding_error(c, d)
    return (x > y) - (x < y)


@compiled
def _rounding_error(a: float, b: float) -> float:
    """What is lost in a - b."""
    difference = a - b
    back = difference - a
    return (a - (difference - back)) - (b + back)


@compiled
def _sort(scores: Any, low: int, n: int, order: Any, keys: Any, rank: Any) -> None:
    """Fills order[:n] with indices by ascending score, equal scores by index, and keys[:n] with the scores."""
    group = scores[low : low + n]
    ranks(group, rank)
    for i in range(n):
        order[rank[i]] = i
        keys[rank[i]] = group[i]


@compiled
def _above(rewards: Any, margin: Any, w: int, l: int) -> bool:  # noqa: E741
    """Strict RC with one column per objective: (N, K) rewards."""
    if margin.size <= 4:  # so few are compared faster than a branch is guessed
        above = True
        for k in range(margin.size):
            above &= np.float64(rewards[w, k]) - np.float64(rewards[l, k]) > margin[k]
        return above
    for k in range(margin.size):  # noqa: SIM110
        if not np.float64(rewards[w, k]) - np.float64(rewards[l, k]) > margin[k]:
            return False
    return True


@compiled
def _dominates(values: Any, w: int, l: int) -> bool:  # noqa: E741
    """Whether w is at least as good as l everywhere and better somewhere."""
    better = False
    for k in range(values.shape[1]):
        if values[w, k] < values[l, k]:
            return False
        better |= values[w, k] > values[l, k]
    return better


@compiled
def _consistent(rewards: Any, rule: Any, g: int, w: int, l: int, score: float, other: float) -> bool:  # noqa: E741
    """RC in all its forms; where it holds in both directions, the higher score decides."""
    row = g if rule.margin.shape[0] > 1 else 0
    if not agrees(rewards, rule, row, w, l):
        return False
    if rule.one_way or score > other:
        return True
    return not agrees(rewards, rule, row, l, w)


@compiled
def _too_long(length: Any, max_ratio: float, w: int, l: int) -> bool:  # noqa: E741
    return bool(length.size > 0 and length[w] > max_ratio * length[l])


@compiled
def _why_not(blocked: int) -> int:
    if blocked & 2:
        return TOO_LONG
    return TRUNCATED if blocked & 1 else NO_PAIR


@compiled
def _largest(groups: Any, scores: Any, rule: Any, max_ratio: float) -> Any:
    offsets, truncated, length = groups.offsets, groups.truncated, groups.length
    text_offsets, text_bytes = groups.text_offsets, groups.text_bytes
    source = groups.values if rule.kind == DOMINATES else groups.rewards
    num_groups, width, most = offsets.size - 1, source.shape[1], _most(offsets)
    winner, loser = np.full(num_groups, -1, dtype=np.int64), np.full(num_groups, -1, dtype=np.int64)
    gap, status = np.zeros(num_groups), groups.status.copy()
    order, rank, keys = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.int64), np.empty(most)
    rewards = np.empty((most, width))  # of one group, by ascending score
    margin = rule.margin[0].copy()
    simple = rule.kind == CONSISTENT and rule.plain and rule.mode == STRICT and rule.one_way
    ordered = rule.kind != CONSISTENT or rule.one_way
    for g in range(num_groups):
        if status[g] != OK:
            continue
        low, n = offsets[g], offsets[g + 1] - offsets[g]
        _sort(scores, low, n, order, keys, rank)
        if rule.kind != HIGHER:
            for i in range(n):
                for m in range(width):
                    rewards[i, m] = source[low + order[i], m]
            if rule.margin.shape[0] > 1:
                for m in range(width):
                    margin[m] = rule.margin[g, m]
        found, best_w, best_l, blocked = False, 0, 0, 0
        high_score, low_score = 0.0, 0.0
        for a in range(n - 1, -1, -1):
            score, w = keys[a], order[a]
            if found and compare_differences(score, keys[0], high_score, low_score) < 0:
                break
            cut = truncated.size > 0 and truncated[low + w]
            if cut and (found or blocked & 1):
                continue
            for b in range(n):
                other = keys[b]
                if (ordered and other > score) or (found and compare_differences(score, other, high_score, low_score) < 0):
                    break
                if a == b:
                    continue
                if simple:
                    allowed = _above(rewards, margin, a, b)
                elif rule.kind == HIGHER:
                    allowed = score > other
                elif rule.kind == DOMINATES:
                    allowed = _dominates(rewards, a, b)
                else:
                    allowed = _consistent(rewards, rule, g, a, b, score, other)
                l = order[b]  # noqa: E741
                if not allowed or same_text(text_offsets, text_bytes, low + w, low + l):
                    continue
                if rule.kind == DOMINATES:
                    dominated = False
                    for i in range(n):
                        dominated |= _dominates(rewards, i, a)
                    if dominated:
                        break
                if cut:
                    blocked |= 1
                    break
                if _too_long(length, max_ratio, low + w, low + l):
                    blocked |= 2
                    continue
                if not found or w < best_w or compare_differences(score, other, high_score, low_score) > 0:
                    found, best_w, best_l, high_score, low_score = True, w, l, score, other
                break
        if found:
            winner[g], loser[g], gap[g] = best_w, best_l, high_score - low_score
        else:
            status[g] = _why_not(blocked)
    return winner, loser, gap, status


def largest(groups: Groups, scores: NDArray[np.float64], rule: Rule, max_ratio: float = np.inf) -> Found:
    """The pair with the largest difference of scores among those that the rule allows; at most one per group.

    Candidates are ordered by score and pairs visited from the largest gap, with a stop as soon as no remaining pair can
    reach the best. Cost per group: N log N (N^2 below 65, cheap) for the order, then few pairs where the objectives mostly agree; the
    worst case, a group without any allowed pair, looks at all N (N - 1) / 2 pairs and K rewards of each.
    """
    return _one_each(*_largest(groups, scores, rule, max_ratio))


@compiled
def _partner(groups: Any, scores: Any, max_ratio: float, nearest: bool, deviations: float) -> Any:
    offsets, truncated, length = groups.offsets, groups.truncated, groups.length
    text_offsets, text_bytes = groups.text_offsets, groups.text_bytes
    num_groups, most = offsets.size - 1, _most(offsets)
    winner, loser = np.full(num_groups, -1, dtype=np.int64), np.full(num_groups, -1, dtype=np.int64)
    gap, status = np.zeros(num_groups), groups.status.copy()
    order, rank, keys = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.int64), np.empty(most)
    partners = np.empty(most, dtype=np.int64)  # positions in `order`
    for g in range(num_groups):
        if status[g] != OK:
            continue
        low, n = offsets[g], offsets[g + 1] - offsets[g]
        _sort(scores, low, n, order, keys, rank)
        target = 0.0
        if nearest:
            # Over sorted scores, so that the sums do not depend on the order of the candidates.
            mean, square = 0.0, 0.0
            for i in range(n):
                mean += keys[i]
            mean /= n
            for i in range(n):
                square += (keys[i] - mean) ** 2
            target = mean + deviations * np.sqrt(square / n)
        blocked, a = 0, n - 1
        status[g] = NO_PAIR
        while a >= 0 and status[g] != OK:
            first = a  # of the equal scores that end at a; winners are tried from the lowest index up
            while first > 0 and keys[first - 1] == keys[a]:
                first -= 1
            for r in range(first, a + 1):
                w = order[r]
                cut = truncated.size > 0 and truncated[low + w]
                if cut and blocked & 1:
                    continue
                count = 0
                for b in range(first):
                    if same_text(text_offsets, text_bytes, low + w, low + order[b]):
                        continue
                    if cut:
                        blocked |= 1
                        break
                    if _too_long(length, max_ratio, low + w, low + order[b]):
                        blocked |= 2
                        continue
                    partners[count] = b
                    count += 1
                if count:
                    chosen = partners[0]
                    if nearest:
                        for p in range(1, count):
                            b = partners[p]
                            distance = abs(keys[b] - target) - abs(keys[chosen] - target)
                            if distance < 0 or (distance == 0 and order[b] < order[chosen]):
                                chosen = b
                    else:
                        chosen = partners[np.int64(groups.key[g] % np.uint64(count))]
                    winner[g], loser[g], gap[g] = w, order[chosen], keys[r] - keys[chosen]
                    status[g] = OK
                    break
            a = first - 1
        if status[g] != OK:
            status[g] = _why_not(blocked)
    return winner, loser, gap, status


def partner(groups: Groups, scores: NDArray[np.float64], max_ratio: float = np.inf, deviations: float | None = None) -> Found:
    """The candidate with the highest score that may win, against a loser with a lower score: drawn uniformly by the group's key,
    or, with `deviations`, the one nearest to mean + deviations x standard deviation of the group's scores."""
    return _one_each(*_partner(groups, scores, max_ratio, deviations is not None, deviations or 0.0))


@compiled
def _given(groups: Any, scores: Any, rule: Any, max_ratio: float, gap_kind: int, divisor: Any) -> Any:
    offsets = groups.offsets
    num_groups = offsets.size - 1
    winner, loser = np.full(num_groups, -1, dtype=np.int64), np.full(num_groups, -1, dtype=np.int64)
    gap, status = np.zeros(num_groups), groups.status.copy()
    for g in range(num_groups):
        if status[g] != OK:
            continue
        w = offsets[g]
        if not _consistent(groups.rewards, rule, g, w, w + 1, scores[w], scores[w + 1]):
            status[g] = NO_PAIR
        elif groups.truncated.size > 0 and groups.truncated[w]:
            status[g] = TRUNCATED
        elif _too_long(groups.length, max_ratio, w, w + 1):
            status[g] = TOO_LONG
        else:
            winner[g], loser[g] = 0, 1
            gap[g] = scores[w] - scores[w + 1]
            if gap_kind != ADDITIVE:
                gap[g] = _standardised(groups.values, divisor[g if divisor.shape[0] > 1 else 0], gap_kind, w, w + 1)
    return winner, loser, gap, status


def given(
    groups: Groups, scores: NDArray[np.float64], rule: Rule, max_ratio: float, gap_kind: int, divisor: NDArray[np.float64]
) -> Found:
    """The first candidate over the second, where the rule allows it; groups of two."""
    return _one_each(*_given(groups, scores, rule, max_ratio, gap_kind, divisor))


@compiled
def _standardised(values: Any, divisor: Any, kind: int, w: int, l: int) -> float:  # noqa: E741
    """The gaps MINIMUM and PRODUCT of rows w and l of (N, K) values."""
    gap: float = np.inf if kind == MINIMUM else 1.0
    for k in range(divisor.size):
        difference = (np.float64(values[w, k]) - np.float64(values[l, k])) / divisor[k]
        if kind == PRODUCT:
            gap = gap * difference if difference > 0 else 0.0
        elif difference < gap:
            gap = difference
    return LARGEST if gap > LARGEST else gap


@compiled
def _every(
    groups: Any, scores: Any, rule: Any, max_ratio: float, gap_kind: int, divisor: Any, threshold: float, cap: int,
    first_only: bool, start: int,
    group: Any, winner: Any, loser: Any, gap: Any, status: Any,
) -> Any:  # fmt: skip
    """Fills the arrays from group `start` on until they are full; returns the next group, pairs written, pairs beyond the cap."""
    offsets, truncated, length, rewards, values = groups.offsets, groups.truncated, groups.length, groups.rewards, groups.values
    text_offsets, text_bytes = groups.text_offsets, groups.text_bytes
    num_groups = offsets.size - 1
    most = _most(offsets)
    gaps, errors = np.empty(most * most), np.empty(most * most)
    pair = np.empty(most * most, dtype=np.int64)
    code = np.empty(most, dtype=np.int64)
    margin = rule.margin[0].copy()
    simple = rule.kind == CONSISTENT and rule.plain and rule.mode == STRICT and rule.one_way
    written, beyond = 0, 0
    for g in range(start, num_groups):
        if groups.status[g] != OK:
            continue
        low, n = offsets[g], offsets[g + 1] - offsets[g]
        count, blocked = 0, 0
        if rule.margin.shape[0] > 1:
            for m in range(margin.size):
                margin[m] = rule.margin[g, m]
        own = divisor[g if divisor.shape[0] > 1 else 0]
        for w in range(low, low + n):
            score = scores[w]
            for l in range(low, low + n):  # noqa: E741
                if w == l:
                    continue
                if simple:
                    allowed = _above(rewards, margin, w, l)
                elif rule.kind == HIGHER:
                    allowed = score > scores[l]
                else:
                    allowed = _consistent(rewards, rule, g, w, l, score, scores[l])
                if not allowed:
                    continue
                value = score - scores[l] if gap_kind == ADDITIVE else _standardised(values, own, gap_kind, w, l)
                if not value > threshold or same_text(text_offsets, text_bytes, w, l):
                    continue
                if truncated.size > 0 and truncated[w]:
                    blocked |= 1
                elif _too_long(length, max_ratio, w, l):
                    blocked |= 2
                else:
                    gaps[count], pair[count] = value, (w - low) * n + (l - low)
                    errors[count] = _rounding_error(score, scores[l]) if gap_kind == ADDITIVE else 0.0
                    count += 1
        if count == 0:
            status[g] = _why_not(blocked)
            continue
        ranked = _rank(gaps, errors, count, first_only)
        for i in range(n):
            code[i] = i
            for j in range(i):
                if same_text(text_offsets, text_bytes, low + i, low + j):
                    code[i] = code[j]
                    break
        # The same two texts make one pair at most: two candidates may be equal, and equal texts may have unequal rewards.
        taken = np.zeros((n, n), dtype=np.bool_)
        unique = 0
        for r in range(ranked.size):
            p = ranked[r]
            first, second = code[pair[p] // n], code[pair[p] % n]
            if not taken[first, second]:
                taken[first, second] = taken[second, first] = True
                ranked[unique] = p
                unique += 1
        kept = min(unique, cap)
        if written + kept > group.size:
            return g, written, beyond
        for r in range(kept):
            p = ranked[r]
            group[written], winner[written], loser[written], gap[written] = g, pair[p] // n, pair[p] % n, gaps[p]
            written += 1
        beyond += unique - kept
    return num_groups, written, beyond


@compiled
def _rank(gaps: Any, errors: Any, count: int, first_only: bool) -> Any:
    """Positions of the pairs by falling gap, equal gaps in their order; or the first alone."""
    if first_only:
        best = np.zeros(1, dtype=np.int64)
        for p in range(1, count):
            b = best[0]
            if gaps[p] > gaps[b] or (gaps[p] == gaps[b] and errors[p] > errors[b]):
                best[0] = p
        return best
    ranked = np.argsort(-gaps[:count], kind="mergesort")
    for r in range(1, count):
        p, s = ranked[r], r
        while s > 0 and gaps[ranked[s - 1]] == gaps[p] and errors[ranked[s - 1]] < errors[p]:
            ranked[s] = ranked[s - 1]
            s -= 1
        ranked[s] = p
    return ranked


def every(
    groups: Groups,
    scores: NDArray[np.float64],
    rule: Rule,
    max_ratio: float,
    gap_kind: int,
    divisor: NDArray[np.float64],
    threshold: float = -np.inf,
    max_pairs: int | None = None,
    first_only: bool = False,
) -> Found:
    """All allowed pairs with a gap above the threshold, by falling gap, at most `max_pairs` per group; what is beyond is counted.

    Looks at all N (N - 1) ordered pairs and K rewards of each. Two texts make one pair at most. `first_only` takes the one
    with the largest gap and counts nothing, which spares sorting them.
    """
    num_groups = groups.offsets.size - 1
    status = groups.status.copy()
    most = int(_most(groups.offsets))
    cap = 1 if first_only else max_pairs or most * most
    start, beyond = 0, 0
    parts = []
    while start < num_groups:
        size = max(num_groups - start if cap == 1 else 1 << 18, min(cap, most * most))
        index = [np.empty(size, dtype=np.int64) for _ in range(3)]
        gap = np.empty(size)
        start, written, more = _every(
            groups,
            scores,
            rule,
            max_ratio,
            gap_kind,
            divisor,
            threshold,
            cap,
            first_only,
            start,
            index[0],
            index[1],
            index[2],
            gap,
            status,
        )
        beyond += more
        parts.append([array[:written].copy() for array in (*index, gap)])
    group, winner, loser, gap = (np.concatenate([part[i] for part in parts]) for i in range(4)) if parts else _nothing()
    return Found(group, winner, loser, gap, status, beyond)


def _nothing() -> Any:
    return (*(np.empty(0, dtype=np.int64) for _ in range(3)), np.empty(0))


def _one_each(winner: Any, loser: Any, gap: Any, status: Any) -> Found:
    group = np.flatnonzero(winner >= 0)
    return Found(group, winner[group], loser[group], gap[group], status, 0)


@compiled
def _most(offsets: Any) -> int:
    most = 1
    for g in range(offsets.size - 1):
        most = max(most, offsets[g + 1] - offsets[g])
    return most


@compiled
def random_keys(id_offsets: Any, id_bytes: Any, seed: int) -> Any:
    """uint64 (G,): FNV-1a over each id and the seed, mixed by splitmix64's finaliser. Depends on id and seed alone."""
    keys = np.empty(id_offsets.size - 1, dtype=np.uint64)
    for g in range(keys.size):
        key = np.uint64(14695981039346656037) ^ np.uint64(seed)
        for b in range(id_offsets[g], id_offsets[g + 1]):
            key = (key ^ np.uint64(id_bytes[b])) * np.uint64(1099511628211)
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        keys[g] = key ^ (key >> np.uint64(31))
    return keys
