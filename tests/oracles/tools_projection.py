"""One whole weight trained by a step that projects its gradient: what it was, and what the step kept, after every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rankwise.core.recipe import Recipe
from tests.oracles.tools_training import SITE, normal, optimizer_on

Gradient = Callable[[int, Tensor], Tensor]  # (step, weight) -> gradient


class Run:
    """A weight trained by the library's optimizer.

    Attributes:
        path: the weight before the first step and after every one.
        directions: (W_t - W_{t+1}) / lr.
        gradients: what the step was given.
        kept: the state after every step, by name without the step's own ("inner.exp_avg", "P").
    """

    def __init__(
        self,
        recipe: Recipe,
        gradient: Gradient,
        steps: int,
        *,
        weight: Tensor,
        lr: float = 1.0,
        rates: list[float] | None = None,
    ) -> None:
        self.weight = nn.Parameter(weight.clone())
        self.optimizer = optimizer_on({SITE: {"weight": self.weight}}, recipe.steps(), lr)
        self.path, self.directions, self.gradients, self.kept = [weight.clone()], [], [], []
        for step in range(steps):
            rate = lr if rates is None else rates[step]
            self.optimizer.param_groups[0]["lr"] = rate
            self.weight.grad = gradient(step, self.weight.detach()).clone()
            self.gradients.append(self.weight.grad.clone())
            self.optimizer.step()
            self.path.append(self.weight.detach().clone())
            self.directions.append((self.path[-2] - self.path[-1]) / rate)
            state = self.optimizer.state[self.weight]
            self.kept.append(
                {name.split(".", 1)[1]: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
            )

    def basis(self, step: int) -> Tensor:
        """The basis in use after a step, as orthonormal-to-be columns: P (m, r), or the transpose of Q (r, n)."""
        kept = self.kept[step]
        return kept["P"] if "P" in kept else kept["Q"].T

    @property
    def numbers(self) -> int:
        """How many numbers the step keeps beside counters and other scalars."""
        return sum(value.numel() for value in self.optimizer.state[self.weight].values() if value.dim())


def stream(seed: int, m: int, n: int, length: int = 64) -> Gradient:
    """Gaussian gradients that do not look at the weight."""
    drawn = normal(seed, length, m, n)
    return lambda step, W: drawn[step]


def adam(gradients: list[Tensor], eps: float = 1e-8, betas: tuple[float, float] = (0.9, 0.999)) -> Tensor:
    """Adam's direction after these gradients."""
    mean, square = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
    for gradient in gradients:
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
    count = len(gradients)
    return mean / (1 - betas[0] ** count) / ((square / (1 - betas[1] ** count)).sqrt() + eps)
