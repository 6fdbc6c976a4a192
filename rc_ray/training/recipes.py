"""Recipes: how pairs on which objectives may disagree become a policy (`training.recipe`), so that RC can be compared with its rivals.

Notation, for a pair with winner w and loser l: Delta = (log pi(w) - log pi(l)) - (log pi_ref(w) - log pi_ref(l)), in nats; d_k = r_k(w) - r_k(l), the difference of
objective k's rewards, and s_k its sign; w_k the weights of the objectives (`training.weights`), which sum to 1.

Invariant: a pair that an objective does not order (d_k = 0) says nothing about it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rc_ray.config import TrainingConfig
from rc_ray.core.ids import Message

Floats = NDArray[np.float64]
# One line each, as `rc-ray train --list-recipes` shows them.
RECIPES = {
    "dpo": "DPO on the pairs as selected (arXiv 2305.18290)",
    "mix": "DPO on every objective's own order of the pairs, losses weighted by training.weights",
    "sequential": "DPO on one objective's order after the other, in the order of the pairs' rewards; each policy is the next one's reference",
    "modpo": "DPO on training.primary's order, the other objectives' weighted rewards as margins (arXiv 2310.03708)",
    "soup": "a policy for each objective by DPO on its order, then the mean of their weights by training.weights (arXiv 2306.04488)",
    "raco": "mix, with each step turned away from conflicts between the objectives, at most by training.conflict (arXiv 2602.02495)",
    "reward_augmented": "DPO on every pair twice, each answer's scores once the goal in the system message (arXiv 2410.08067)",
}
# Scores of goals are on a scale of so many steps, as in the paper.
GOAL_STEPS = 10
GOAL = "The answer should get these scores out of 10: {}."


def objective_losses(delta: torch.Tensor, differences: torch.Tensor, beta: float, shares: torch.Tensor) -> torch.Tensor:
    """L_k = mean of -log sigma(beta s_k Delta) over the pairs that objective k orders; 0 where there is none.

    Divided is by as many pairs as k orders in B on average, so that the mean over batches does not depend on how the data are cut into them.

    Args:
        delta: (B,).
        differences: (B, K), d_k of every pair.
        shares: (K,), of all pairs those that each objective orders.

    Returns:
        (K,).
    """
    sign = torch.sign(differences)
    ordered = (sign != 0).to(delta.dtype)
    losses = -torch.nn.functional.logsigmoid(beta * sign * delta[:, None]) * ordered
    return losses.sum(dim=0) / (len(delta) * torch.where(shares > 0, shares, 1.0))


def mix_loss(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`mix`: sum of w_k L_k, DPO on every objective's own order of the pairs (the linear baseline, e.g. of arXiv 2602.02495).

    Args:
        losses: (K,), see `objective_losses`.
        weights: (K,).
    """
    return (weights * losses).sum()


def modpo_loss(
    delta: torch.Tensor, differences: torch.Tensor, weights: torch.Tensor, primary: int, beta: float
) -> torch.Tensor:
    """`modpo` (arXiv 2310.03708): mean of -log sigma((beta Delta - sum over k other than p of w_k d_k) / w_p) on pairs that the primary objective p orders.

    Args:
        delta, differences: see `objective_losses`; d_p > 0.
        weights: (K,).
        primary: p.
    """
    others = differences * weights
    margin = others.sum(dim=1) - others[:, primary]
    return -torch.nn.functional.logsigmoid((beta * delta - margin) / weights[primary]).mean()


def raco_coefficients(gram: Floats, weights: Floats, conflict: float) -> Floats:
    """`raco` (arXiv 2602.02495): what each objective's gradient counts in the step, against conflicts, but never more against its weight than with it.

    With g_0 = sum of w_k g_k, p = argmin over the simplex of (sum of p_k g_k)^T g_0 + c |g_0| |sum of p_k g_k|; clipped to q_k = min(p_k, w_k); the step is
    along g_0 + c |g_0| h / |h| with h = sum of q_k g_k.

    Args:
        gram: (K, K), products of the gradients g_k of `objective_losses`.
        weights: (K,), not negative, sum 1.
        conflict: c, from 0 (then it is `mix`) to below 1.

    Returns:
        (K,), the coefficients of the g_k.
    """
    from scipy.optimize import minimize

    length = math.sqrt(max(float(weights @ gram @ weights), 0.0))
    if length == 0.0 or conflict == 0.0:
        return weights
    unit = gram / length**2

    def worst(p: Floats) -> float:
        return float(p @ unit @ weights) + conflict * math.sqrt(max(float(p @ unit @ p), 1e-16))

    found = minimize(
        worst, weights, method="SLSQP", bounds=[(0.0, 1.0)] * len(weights), constraints=[{"type": "eq", "fun": lambda p: p.sum() - 1}],
        options={"ftol": 1e-12, "maxiter": 300},
    )  # fmt: skip
    clipped = np.minimum(np.clip(found.x, 0.0, 1.0), weights)
    size = math.sqrt(max(float(clipped @ gram @ clipped), 0.0))
    return weights if size == 0.0 else np.asarray(weights + conflict * length / size * clipped, dtype=np.float64)


def oriented(rows: Iterable[dict[str, Any]], objective: str) -> list[dict[str, Any]]:
    """Pairs with the winner that one objective prefers; those that it does not order are left out. For `sequential`, `soup` and `modpo`."""
    sides = {"chosen": "rejected", "rewards_chosen": "rewards_rejected", "ref_chosen_logps": "ref_rejected_logps"}
    both = sides | {other: one for one, other in sides.items()}
    found = []
    for row in rows:
        chosen, rejected = row["rewards_chosen"][objective], row["rewards_rejected"][objective]
        if chosen > rejected:
            found.append(row)
        elif chosen < rejected:
            found.append({name: row[both.get(name, name)] for name in row})
    return found


def reward_augmented(rows: Iterable[dict[str, Any]], scales: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """`reward_augmented` (arXiv 2410.08067): every pair twice, each time with the scores of one answer as a goal in the system message, at which that
    answer is the better one.

    Args:
        scales: smallest and largest reward of each objective in the data, mapped to 1 and 10.
    """
    found = []
    for row in rows:
        for goal, other in (("chosen", "rejected"), ("rejected", "chosen")):
            rewards = row[f"rewards_{goal}"]
            if rewards == row[f"rewards_{other}"]:
                continue
            # Log-probs of a reference were for the prompt without a goal.
            found.append(
                {"prompt": with_goal(row["prompt"], rewards, scales), "chosen": row[goal], "rejected": row[other]}
                | {"rewards_chosen": rewards, "rewards_rejected": row[f"rewards_{other}"]}
            )
    return found


def with_goal(prompt: Sequence[Message], rewards: dict[str, float], scales: dict[str, tuple[float, float]]) -> list[Message]:
    """A prompt with goals for its answer; for the largest rewards, what to ask the trained policy for."""
    scores = []
    for name, (low, high) in scales.items():
        share = 1.0 if high == low else min(max((rewards[name] - low) / (high - low), 0.0), 1.0)
        scores.append(f"{name} {1 + round(share * (GOAL_STEPS - 1))}")
    goal = GOAL.format(", ".join(scores))
    if prompt and prompt[0]["role"] == "system":
        return [{"role": "system", "content": f"{prompt[0]['content']}\n{goal}"}, *prompt[1:]]
    return [{"role": "system", "content": goal}, *prompt]


def objective_weights(training: TrainingConfig, objectives: list[str]) -> list[float]:
    """The weights of the objectives, with the sum 1."""
    given = [float(training.weights.get(name, 0.0)) if training.weights else 1.0 for name in objectives]
    return [weight / sum(given) for weight in given]
