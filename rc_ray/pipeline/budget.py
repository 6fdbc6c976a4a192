"""Ends sampling when enough is spent or found; what is in work is finished and committed.

The progress board compares its counts with the budget; sampling actors ask it before each block and let further blocks pass
empty. So beyond the budget there are at most the blocks that the engines hold, and with `target_pairs` as many again that wait
for their rewards: sampling does not run further ahead of them. In phased mode pairs are known too late, so it is refused.
"""

from __future__ import annotations

from datetime import UTC, datetime

from rc_ray.config import BudgetConfig


def exhausted(budget: BudgetConfig, pairs: int, tokens: int) -> str | None:
    """Which part of a budget is used up, in words; None when none is.

    Args:
        budget: the limits.
        pairs: prompts with a pair so far.
        tokens: tokens sampled so far, over all sessions.
    """
    if budget.target_pairs is not None and pairs >= budget.target_pairs:
        return f"budget.target_pairs = {budget.target_pairs} is reached ({pairs} prompts with a pair)"
    if budget.max_generated_tokens is not None and tokens >= budget.max_generated_tokens:
        return f"budget.max_generated_tokens = {budget.max_generated_tokens} is reached ({tokens} tokens)"
    if budget.deadline is not None and datetime.now(UTC) >= budget.deadline:
        return f"budget.deadline = {budget.deadline.isoformat()} has passed"
    return None
