"""Losses of the recipes on a policy of two parameters, by hand, and the step of RACO against a search of the simplex."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rc_ray.training.recipes import mix_loss, modpo_loss, objective_losses, oriented, raco_coefficients, reward_augmented

BETA = 0.5
# Two prompts with two answers each; the policy's logit of the first answer over the second is its parameter, the reference's is 0.
THETA = (0.8, -0.4)
# Rewards of the first answer less those of the second, of two objectives: they disagree on the second prompt, and the second ties on the first.
DIFFERENCES = [[1.0, 0.0], [2.0, -3.0]]
SHARES = torch.tensor([1.0, 0.5])


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def policy() -> tuple[torch.Tensor, torch.Tensor]:
    """The parameters, and Delta of each prompt's pair: log pi(first) - log pi(second) = theta, less 0 of the reference."""
    theta = torch.tensor(THETA, requires_grad=True)
    logits = torch.stack([theta, torch.zeros(2)], dim=1).log_softmax(dim=1)
    return theta, logits[:, 0] - logits[:, 1]


def test_losses_of_the_objectives() -> None:
    _, delta = policy()
    first = (softplus(-0.5 * 0.8) + softplus(0.5 * 0.4)) / 2
    second = softplus(0.5 * -0.4)  # the only pair that it orders, the other way round
    assert objective_losses(delta, torch.tensor(DIFFERENCES), BETA, SHARES).tolist() == pytest.approx([first, second])
    assert objective_losses(delta, torch.zeros(2, 1), BETA, torch.zeros(1)).tolist() == [0.0]


def test_losses_do_not_depend_on_how_pairs_are_cut_into_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(12, generator=generator)
    differences = torch.randint(-1, 2, (12, 3), generator=generator).float()
    shares = (differences != 0).float().mean(dim=0)
    whole = objective_losses(delta, differences, BETA, shares)
    for size in (1, 2, 4):
        parts = [objective_losses(d, e, BETA, shares) for d, e in zip(delta.split(size), differences.split(size), strict=True)]
        assert torch.stack(parts).mean(dim=0).tolist() == pytest.approx(whole.tolist())


def test_mix() -> None:
    theta, delta = policy()
    loss = mix_loss(objective_losses(delta, torch.tensor(DIFFERENCES), BETA, SHARES), torch.tensor([0.25, 0.75]))
    assert loss.item() == pytest.approx(0.25 * (softplus(-0.4) + softplus(0.2)) / 2 + 0.75 * softplus(-0.2))
    loss.backward()
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    # d/d theta_1 = -w_1 beta sigma(-beta theta_1) / 2; in the second prompt the objectives pull against each other.
    expected = [-0.25 * BETA * sigmoid(-0.4) / 2, -0.25 * BETA * sigmoid(0.2) / 2 + 0.75 * BETA * sigmoid(-0.2)]
    assert theta.grad is not None
    assert theta.grad.tolist() == pytest.approx(expected)


def test_modpo_takes_the_other_objectives_as_margins() -> None:
    _, delta = policy()
    loss = modpo_loss(delta, torch.tensor(DIFFERENCES), torch.tensor([0.4, 0.6]), 0, BETA)
    # Margins: 0.6 * 0 and 0.6 * -3.
    first, second = (0.5 * 0.8 - 0.0) / 0.4, (0.5 * -0.4 + 1.8) / 0.4
    assert loss.item() == pytest.approx((softplus(-first) + softplus(-second)) / 2)
    alone = modpo_loss(delta, torch.tensor(DIFFERENCES), torch.tensor([1.0, 0.0]), 0, BETA)
    assert alone.item() == pytest.approx(objective_losses(delta, torch.tensor(DIFFERENCES), BETA, SHARES)[0].item())


def by_search(gradients: Any, weights: Any, conflict: float) -> Any:
    """The direction of RACO for two objectives, with p found on a fine grid."""
    g0 = weights @ gradients
    shares = np.linspace(0, 1, 20001)
    points = shares[:, None] * gradients[0] + (1 - shares[:, None]) * gradients[1]
    share = shares[np.argmin(points @ g0 + conflict * np.linalg.norm(g0) * np.linalg.norm(points, axis=1))]
    clipped = np.minimum([share, 1 - share], weights) @ gradients
    size = np.linalg.norm(clipped)
    return g0 if size == 0 else g0 + conflict * np.linalg.norm(g0) * clipped / size


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 0.9), st.floats(0.05, 0.9))
def test_raco_equals_a_search_of_the_simplex(seed: int, share: float, conflict: float) -> None:
    gradients = np.random.default_rng(seed).normal(size=(2, 3))
    weights = np.array([share, 1 - share])
    direction = raco_coefficients(gradients @ gradients.T, weights, conflict) @ gradients
    g0 = weights @ gradients
    assert direction == pytest.approx(by_search(gradients, weights, conflict), abs=5e-3 * np.linalg.norm(g0))
    assert np.linalg.norm(direction - g0) <= conflict * np.linalg.norm(g0) * (1 + 1e-9), "it stays near the weighted gradient"


def test_raco_without_conflict_aversion_is_mix() -> None:
    weights = np.array([0.3, 0.7])
    assert raco_coefficients(np.eye(2), weights, 0.0).tolist() == weights.tolist()
    assert raco_coefficients(np.zeros((2, 2)), weights, 0.5).tolist() == weights.tolist()


def test_raco_on_two_parameters_by_hand() -> None:
    # Orthogonal gradients of equal length and equal weights: p is (1/2, 1/2) by symmetry, h is g_0, and the step (1 + c) g_0.
    assert raco_coefficients(np.eye(2), np.array([0.5, 0.5]), 0.4) == pytest.approx([0.7, 0.7], abs=1e-4)


def row(chosen: dict[str, float], rejected: dict[str, float]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": "q"}], "chosen": "first", "rejected": "second", "rewards_chosen": chosen, "rewards_rejected": rejected,
    }  # fmt: skip


def test_pairs_are_turned_to_what_an_objective_prefers() -> None:
    rows = [row({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.5}), row({"a": 1.0, "b": 2.0}, {"a": 0.0, "b": 2.0})]
    assert oriented(rows, "a") == rows
    (turned,) = oriented(rows, "b")
    assert (turned["chosen"], turned["rejected"]) == ("second", "first")
    assert turned["rewards_chosen"] == {"a": 0.0, "b": 0.5}


def test_reward_augmented_pairs_hold_both_goals() -> None:
    given = row({"a": 1.0, "b": 5.0}, {"a": 0.0, "b": 9.0})
    given["prompt"] = [{"role": "system", "content": "Be brief."}, *given["prompt"]]
    first, second = reward_augmented(
        [given, row({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0})], {"a": (0.0, 1.0), "b": (1.0, 10.0)}
    )
    assert first["prompt"][0]["content"] == "Be brief.\nThe answer should get these scores out of 10: a 10, b 5."
    assert (first["chosen"], first["rejected"]) == ("first", "second")
    assert second["prompt"][0]["content"] == "Be brief.\nThe answer should get these scores out of 10: a 1, b 9."
    assert (second["chosen"], second["rejected"]) == ("second", "first")
    assert second["rewards_chosen"] == {"a": 0.0, "b": 9.0}


def test_products_of_gradients_are_over_all_parameters() -> None:
    from rc_ray.training.trainer import ReferenceDPOTrainer

    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
        model.bias.fill_(3.0)
    losses = torch.stack([model(torch.tensor([1.0, 0.0])).sum() ** 2, model(torch.tensor([0.0, 1.0])).sum()])
    # Gradients by weight and bias: 2 * 4 * (1, 0, 1) and (0, 1, 1).
    gram = ReferenceDPOTrainer._gram(None, model, losses)  # type: ignore[arg-type]
    assert gram.tolist() == [[128.0, 8.0], [8.0, 2.0]]
