"""Which of several policies gives which candidates of a prompt, by systematic sampling.

Candidate i of N belongs to the policy whose interval of the cumulative weights holds (i + u) / N, where u in [0, 1) is a hash of
the run seed and the prompt. Invariant: the shares depend on nothing else, so order of rows, actors and restarts do not matter; they
sum to N, each is within one of N times its weight, in expectation over prompts equal to it, and each is a range of indices.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import accumulate


def share_offset(run_seed: int, prompt: str) -> float:
    """u of a prompt, 48 bits of a hash; independent of the prompt's seeds."""
    digest = hashlib.blake2b(f"{run_seed}:{prompt}:policies".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / (1 << 48)


def candidate_ranges(weights: Sequence[float], number: int, offset: float) -> list[tuple[int, int]]:
    """Per policy the candidates [first, end) that it gives, in the order of the weights.

    Args:
        weights: of the policies, positive; only their ratios count.
        number: N.
        offset: u, see `share_offset`.
    """
    whole = math.fsum(weights)
    # The last end is N whatever rounding makes of the sum.
    ends = [min(number, max(0, math.ceil(number * (part / whole) - offset))) for part in accumulate(weights)]
    ends[-1] = number
    return list(zip([0, *ends[:-1]], ends, strict=True))
