"""½‖W' - T‖² of one linear layer, and what it takes to train a model of real layers by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import rankwise


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_rank(seed: int, m: int, n: int, rank: int) -> Tensor:
    return drawn(seed, m, rank) @ drawn(seed + 1, rank, n)


class Quadratic:
    """A layer (m, n) whose input is the identity, so that its output is W'ᵀ and dL/dW' = W' - T."""

    def __init__(self, text: str, target: Tensor, weight: Tensor | None = None, *, lr: float = 1.0) -> None:
        m, n = target.shape
        self.model = nn.Sequential(nn.Linear(n, m, bias=False)).double()
        with torch.no_grad():
            self.model[0].weight.copy_(drawn(99, m, n) if weight is None else weight)
        self.target = target
        self.handle = rankwise.adapt_(self.model, rankwise.compose(text))
        self.optimizer = self.handle.optimizer(lr=lr)
        self.entry = self.handle.parameterization("0")

    def loss(self) -> Tensor:
        return 0.5 * (self.output() - self.target).square().sum()

    def output(self) -> Tensor:
        """W' (m, n), by the layer's path, with its graph."""
        return self.model(torch.eye(self.target.shape[1], dtype=torch.float64)).T

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """W' (m, n)."""
        return self.output()

    def step(self) -> float:
        loss = self.handle.backward(self.loss)
        self.optimizer.step()
        self.handle.after_step()
        self.optimizer.zero_grad()
        return float(loss)


def train(handle: rankwise.Handle, loss: Callable[[], Tensor], steps: int, lr: float) -> list[float]:
    optimizer = handle.optimizer(lr=lr)
    losses = []
    for _ in range(steps):
        losses.append(float(handle.backward(loss)))
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    return losses


def assert_orthonormal(U: Tensor, tolerance: float = 1e-12) -> None:
    assert float((U.mT @ U - torch.eye(U.shape[1], dtype=U.dtype)).abs().max()) < tolerance
