"""How much each of several preference sets counts in a step of a reward model: equally, or by MORE.

MORE (arXiv 2312.07401) takes the gradient of each set's loss in the weights of the reward head alone, which costs no second pass through
the network, and steps along the point of smallest norm in their convex hull (`rc_ray.core.min_norm`): a set whose gradient is large or stands
alone cannot drown the others. Invariant: all workers use the same weights, from gradients averaged over them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rc_ray.core.min_norm import min_norm_weights

Normalize = Literal["none", "l2", "loss", "loss+"]
STATE = "more.npz"


def pair_losses(differences: torch.Tensor, margins: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Bradley-Terry losses.

    Args:
        differences: (T, B), r(chosen) - r(rejected) of B pairs of each of T sets.
        margins: (T, B), by how much a difference shall be larger than 0 (arXiv 2307.09288, eq. 2).
        label_smoothing: share e of labels taken to be wrong: -(1 - e) log sigma(d - m) - e log sigma(-(d - m)).

    Returns:
        (T,), the mean of each set.
    """
    beyond = differences - margins
    logsigmoid = torch.nn.functional.logsigmoid
    return -((1 - label_smoothing) * logsigmoid(beyond) + label_smoothing * logsigmoid(-beyond)).mean(dim=1)


class EqualWeights:
    """The baseline: every set counts the same."""

    def __call__(self, losses: torch.Tensor) -> torch.Tensor:
        """1 / T each, (T,)."""
        return torch.full_like(losses.detach(), 1 / len(losses))


class MoreWeights:
    """Weights of MORE.

    Args:
        head: the last layer, whose gradients are compared.
        momentum: m <- momentum * m + (1 - momentum) * g, beginning with the first gradient; 0 takes each step's own.
        normalize: gradients before they are compared. `none`; `l2`: g / ||g||; `loss`: g / ((loss + 1) / sum of (loss + 1));
            `loss+`: g / (||g|| loss).
    """

    def __init__(self, head: torch.nn.Linear, momentum: float, normalize: Normalize) -> None:
        self._head, self._momentum, self._normalize = head, momentum, normalize
        self._average: Any = None
        self._steps, self._conflicts = 0, 0
        self._sum: Any = 0.0

    def __call__(self, losses: torch.Tensor) -> torch.Tensor:
        """The weights of this step, (T,), for the losses of its T sets."""
        found = [torch.autograd.grad(loss, self._head.weight, retain_graph=True)[0].flatten() for loss in losses]
        gradients = torch.cat([torch.stack(found).double(), losses.detach().double()[:, None]], dim=1)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(gradients)
            gradients /= torch.distributed.get_world_size()
        array = gradients.cpu().numpy()
        weights = self.step(array[:, :-1], array[:, -1])
        return torch.as_tensor(weights, dtype=losses.dtype, device=losses.device)

    def step(self, gradients: Any, losses: Any) -> Any:
        """The same on NumPy arrays, gradients (T, D) and losses (T,)."""
        if self._average is None:
            self._average = gradients
        self._average = self._momentum * self._average + (1 - self._momentum) * gradients
        weights = min_norm_weights(normalized(self._average, losses, self._normalize))
        products = gradients @ gradients.T
        self._steps += 1
        self._conflicts += bool(products.min() < 0)
        self._sum = self._sum + weights
        return weights

    def facts(self) -> tuple[list[float], float]:
        """Mean weight per set, and the share of steps in which two sets' gradients pointed away from each other."""
        steps = max(self._steps, 1)
        return (np.asarray(self._sum) / steps).tolist(), self._conflicts / steps

    def save(self, folder: Path) -> None:
        """Writes the state into a checkpoint."""
        np.savez(folder / STATE, average=self._average, sum=self._sum, counts=[self._steps, self._conflicts])

    def load(self, folder: Path) -> None:
        """Goes on from a checkpoint."""
        with np.load(folder / STATE, allow_pickle=False) as state:
            self._average, self._sum = state["average"], state["sum"]
            self._steps, self._conflicts = (int(count) for count in state["counts"])


def normalized(gradients: Any, losses: Any, how: Normalize) -> Any:
    """Gradients (T, D) as `MoreWeights` compares them; a zero gradient stays zero."""
    norms = np.linalg.norm(gradients, axis=1)
    by = {
        "none": np.ones_like(norms),
        "l2": norms,
        "loss": (losses + 1) / (losses + 1).sum(),
        "loss+": norms * losses,
    }[how]
    return gradients / np.where(by > 0, by, 1.0)[:, None]
