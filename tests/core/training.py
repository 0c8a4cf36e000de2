"""A small problem in float64, and the loop a user writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import rankwise


class Regression:
    """Two layers, three batches, and a loop over them."""

    def __init__(self, seed: int = 0, *, norm: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        middle: list[nn.Module] = [nn.BatchNorm1d(8)] if norm else []
        self.model = nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, 4)).double()
        self.where = [name for name, layer in self.model.named_modules() if isinstance(layer, nn.Linear)]
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
        self.batches = [
            (
                torch.randn(10, 6, generator=generator, dtype=torch.float64),
                torch.randn(10, 4, generator=generator, dtype=torch.float64),
            )
            for _ in range(3)
        ]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (self.model(batch[0]) - batch[1]).square().mean()

    def adapt(self, recipe: rankwise.Recipe | str, **arguments) -> rankwise.Handle:
        recipe = rankwise.compose(recipe) if isinstance(recipe, str) else recipe
        return rankwise.adapt_(self.model, recipe, where=self.where, **arguments)

    def gradients(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        def run() -> None:
            for batch in batches:
                (self.loss(batch) / len(batches)).backward()

        return run

    def train(self, handle: rankwise.Handle, optimizer: torch.optim.Optimizer, steps: int, *, first: int = 0) -> None:
        for step in range(first, first + steps):
            run = self.gradients([self.batches[step % len(self.batches)]])
            run()
            handle.after_backward(run)
            optimizer.step()
            handle.after_step()
            optimizer.zero_grad()


def numbers(handle: rankwise.Handle) -> dict[str, Tensor]:
    """Every trained tensor, copied."""
    return {
        f"{site}.{role}": tensor.detach().clone() for site, block in handle.blocks().items() for role, tensor in block.items()
    }


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), f"{name} differs by {(one[name] - other[name]).abs().max():.3e}"


def open_gates(handle: rankwise.Handle, seed: int = 5, scale: float = 0.5) -> None:
    """Moves every trained tensor to a generic point."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * scale)
