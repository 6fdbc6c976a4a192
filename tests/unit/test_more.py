"""Losses of reward-model training and the weights of MORE, against values computed by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rc_ray.core.min_norm import min_norm_weights
from rc_ray.training.more import EqualWeights, MoreWeights, normalized, pair_losses


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_losses_are_those_of_bradley_and_terry() -> None:
    d = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    plain = pair_losses(d, torch.zeros(2, 2), 0.0)
    assert plain.tolist() == pytest.approx([(softplus(-1) + softplus(2)) / 2, (math.log(2) + softplus(-3)) / 2])


def test_margins_and_smoothing() -> None:
    d, margins = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 1.0]])
    # Differences beyond the margins: 0.5 and -3.
    expected = (0.9 * softplus(-0.5) + 0.1 * softplus(0.5) + 0.9 * softplus(3) + 0.1 * softplus(-3)) / 2
    assert pair_losses(d, margins, 0.1).tolist() == pytest.approx([expected])


def two_sets(seed: int) -> tuple[torch.nn.Linear, torch.Tensor]:
    """A head, and (T, B, D) differences of the embeddings of two sets' pairs."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(3, 1, bias=False)
    head.weight.data = torch.randn(1, 3, generator=generator)
    return head, torch.randn(2, 4, 3, generator=generator)


def losses_of(head: torch.nn.Linear, embeddings: torch.Tensor) -> torch.Tensor:
    return pair_losses(head(embeddings)[..., 0], torch.zeros(2, 4), 0.0)


def by_hand(head: torch.nn.Linear, embeddings: torch.Tensor) -> np.ndarray:
    """Gradient of a set's loss in the head: the mean of -sigma(-d) x."""
    d = (embeddings @ head.weight.data.T)[..., 0]
    return (-torch.sigmoid(-d)[..., None] * embeddings).mean(dim=1).double().numpy()


@pytest.mark.parametrize("seed", range(5))
def test_weights_are_the_min_norm_point_of_the_gradients_in_the_head(seed: int) -> None:
    head, embeddings = two_sets(seed)
    weights = MoreWeights(head, 0.0, "none")(losses_of(head, embeddings))
    assert weights.tolist() == pytest.approx(min_norm_weights(by_hand(head, embeddings)).tolist(), abs=1e-5)
    assert head.weight.grad is None, "looking at gradients must not leave any behind"


def test_a_step_along_them_makes_no_set_worse() -> None:
    head, embeddings = two_sets(3)
    before = losses_of(head, embeddings)
    (MoreWeights(head, 0.0, "none")(before) * before).sum().backward()
    head.weight.data -= 1e-3 * head.weight.grad
    assert (losses_of(head, embeddings) <= before + 1e-7).all()


def test_momentum_averages_gradients_and_begins_with_the_first() -> None:
    weights = MoreWeights(torch.nn.Linear(2, 1), 0.75, "none")
    first, second = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[5.0, 0.0], [0.0, 1.0]])
    assert weights.step(first, np.ones(2)) == pytest.approx([0.5, 0.5])
    # Average: 0.75 * 1 + 0.25 * 5 = 2 in the first set; the weights of (2, 0) and (0, 1) are 1/5 and 4/5.
    assert weights.step(second, np.ones(2)) == pytest.approx([0.2, 0.8])
    assert weights.facts()[0] == pytest.approx([0.35, 0.65])


def test_gradients_are_normalized_as_the_authors_do() -> None:
    gradients, losses = np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([1.0, 3.0])
    assert normalized(gradients, losses, "none") == pytest.approx(gradients)
    assert normalized(gradients, losses, "l2") == pytest.approx(np.array([[0.6, 0.8], [0.0, 1.0]]))
    assert normalized(gradients, losses, "loss") == pytest.approx(np.array([[9.0, 12.0], [0.0, 3.0]]))
    assert normalized(gradients, losses, "loss+") == pytest.approx(np.array([[0.6, 0.8], [0.0, 1 / 3]]))
    assert not normalized(np.zeros((2, 2)), losses, "l2").any()


def test_conflicts_are_counted() -> None:
    weights = MoreWeights(torch.nn.Linear(2, 1), 0.0, "none")
    weights.step(np.array([[1.0, 0.0], [1.0, 1.0]]), np.ones(2))
    weights.step(np.array([[1.0, 0.0], [-1.0, 0.1]]), np.ones(2))
    assert weights.facts()[1] == 0.5


def test_a_checkpoint_holds_all_that_later_weights_depend_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(4, 2, 3))
    whole, begun, resumed = (MoreWeights(torch.nn.Linear(3, 1), 0.5, "none") for _ in range(3))
    expected = [whole.step(step, np.ones(2)) for step in steps]
    for step in steps[:2]:
        begun.step(step, np.ones(2))
    begun.save(tmp_path)
    resumed.load(tmp_path)
    assert np.array([resumed.step(step, np.ones(2)) for step in steps[2:]]) == pytest.approx(np.array(expected[2:]), abs=0)
    assert resumed.facts() == whole.facts()


def test_the_baseline_weighs_equally() -> None:
    assert EqualWeights()(torch.tensor([3.0, 1.0, 2.0, 2.0])).tolist() == [0.25] * 4
