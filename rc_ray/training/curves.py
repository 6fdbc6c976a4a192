"""What training logs, in a few words: while it runs, and at its end.

Both answers' log-probs may fall against the reference while the margin grows (likelihood displacement, arXiv 2410.08847): the policy then moves to answers
that nobody has judged. It is said, not prevented.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Logged steps that are averaged.
WINDOW = 20
SHOWN = {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}


def live_words(history: Sequence[dict[str, Any]], beta: float) -> str:
    """`loss 0.612  accuracy 0.75  margin 0.204` of the last logged step, and whether chosen and rejected answers both become less likely."""
    shown = [f"{name} {float(history[-1][key]):.3g}" for name, key in SHOWN.items() if key in history[-1]]
    changes = logp_changes(history[-WINDOW:], beta)
    return "  ".join(shown + (["both log-probs fall"] if changes and max(changes.values()) < 0 else []))


def logp_changes(history: Sequence[dict[str, Any]], beta: float) -> dict[str, float] | None:
    """By how much the log-probs of chosen and rejected answers are above the reference's, in nats, mean of the last `WINDOW` logged steps.

    Args:
        history: as the trainer logs it; `rewards/chosen` is beta times the change.
    """
    steps = [entry for entry in history if "rewards/chosen" in entry][-WINDOW:]
    if not steps:
        return None
    return {side: sum(entry[f"rewards/{side}"] for entry in steps) / len(steps) / beta for side in ("chosen", "rejected")}


def training_remarks(facts: dict[str, Any]) -> list[str]:
    """What the user should know of a training, a line each; usually none.

    Args:
        facts: as `train_dpo` returns them.
    """
    found = []
    changes = facts.get("logp_changes")
    if changes and max(changes.values()) < 0:
        found.append(
            f"log-probs of chosen ({changes['chosen']:+.2f} nats) and rejected answers ({changes['rejected']:+.2f}) both fell against the reference: "
            "likelihood displacement (arXiv 2410.08847), look at samples; a larger beta, a smaller learning rate or loss_type [sigmoid, sft] hold against it"
        )
    if facts.get("too_long"):
        found.append(f"{facts['too_long']} pairs longer than training.max_length were left out")
    return found
