"""Random directions over all trained tensors, and visits to points along them: the engine of the methods without backward.

A direction u is never stored. It is drawn again whenever it is needed, tensor by tensor, from a number (its seed) and the
tensor's site and role, always in float32 on the CPU: the same seed means the same direction on every process, device and dtype.

    gaussian   u ~ N(0, I)
    sphere     u uniform on the sphere of radius √d, d trained numbers in all, so that E[u uᵀ] = I as well

While points are visited, x is kept as copies, from which it comes back to the bit. The copies' memory becomes that of the
gradients afterwards, so nothing is held beside `.grad` but one tensor's direction at a time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from rankwise.core.errors import ArgumentError, Problem, TrainingError
from rankwise.core.randomness import generator_for
from rankwise.core.recipe import Recipe
from rankwise.core.sharding import sharded_like
from rankwise.core.step import Block

DISTRIBUTIONS = ("gaussian", "sphere")
Blocks = Mapping[str, Block]
Weighted = Sequence[tuple[int, float]]  # (seed, weight) of the terms of Σ weight · u


def checked_distribution(distribution: str) -> str:
    """One of `DISTRIBUTIONS`.

    Raises:
        ArgumentError: it is none.
    """
    if distribution not in DISTRIBUTIONS:
        raise ArgumentError(f"distribution is one of {', '.join(DISTRIBUTIONS)}, not {distribution!r}")
    return distribution


def seed_of(seed: int, count: int) -> int:
    """The number that the direction drawn after `count` others stands for, below 2³²."""
    return generator_for(seed, "direction", count).initial_seed()


def drawn(blocks: Blocks, seed: int, distribution: str) -> Iterator[tuple[str, str, Tensor]]:
    """(site, role, u) of one direction, one tensor at a time."""
    factor = 1.0
    if distribution == "sphere":
        named = [(site, role, tensor.shape) for site, block in blocks.items() for role, tensor in block.items()]
        square = sum(float(_normal(seed, *name).double().square().sum()) for name in named)
        factor = math.sqrt(sum(shape.numel() for *_, shape in named) / square)
    for site, block in blocks.items():
        for role, tensor in block.items():
            wide = _normal(seed, site, role, tensor.shape).to(torch.promote_types(tensor.dtype, torch.float32))
            yield site, role, sharded_like(wide.mul_(factor), tensor)


def _normal(seed: int, site: str, role: str, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=generator_for(seed, f"{site}.{role}"), dtype=torch.float32)


def add_(sums: Sequence[Tensor], blocks: Blocks, terms: Weighted, distribution: str) -> None:
    """Adds Σ weight · u to tensors that correspond to those of the blocks."""
    for seed, weight in terms:
        for total, (_, _, u) in zip(sums, drawn(blocks, seed, distribution), strict=True):
            total.add_(u, alpha=weight)


def descend_(blocks: Blocks, terms: Weighted, rate: float, distribution: str) -> None:
    """Takes the step of plain SGD for the gradient Σ weight · u, to the bit."""
    gradients = [torch.zeros_like(tensor) for tensor in tensors_of(blocks)]
    add_(gradients, blocks, terms, distribution)
    for tensor, gradient in zip(tensors_of(blocks), gradients, strict=True):
        tensor.add_(gradient, alpha=-rate)


class Visits:
    """Goes from x to points x + Σ weight · u and back; a context, at whose end x is what it was, to the bit.

    Args:
        blocks: the trained tensors, which hold x.
        distribution: of the directions.
    """

    def __init__(self, blocks: Blocks, distribution: str = "gaussian") -> None:
        self.blocks, self.distribution = blocks, distribution
        self.tensors = tensors_of(blocks)
        self._copies = [tensor.detach().clone() for tensor in self.tensors]

    def __enter__(self) -> Visits:
        return self

    def __exit__(self, *_: object) -> None:
        self.back()

    def back(self) -> None:
        """Returns to x."""
        for tensor, copy in zip(self.tensors, self._copies, strict=True):
            tensor.copy_(copy)

    def at(self, terms: Weighted, evaluate: Callable[[], Tensor]) -> Tensor:
        """What `evaluate` gives at x + Σ weight · u."""
        self.back()
        add_(self.tensors, self.blocks, terms, self.distribution)
        return evaluate().detach()

    def end_with_gradient(self, terms: Weighted) -> None:
        """Returns to x for good, and puts Σ weight · u into the gradients."""
        self.back()
        gradients, self.tensors, self._copies = self._copies, [], []
        for gradient in gradients:
            gradient.zero_()
        add_(gradients, self.blocks, terms, self.distribution)
        for tensor, gradient in zip(tensors_of(self.blocks), gradients, strict=True):
            tensor.grad = gradient


def tensors_of(blocks: Blocks) -> list[Tensor]:
    """All tensors, in the order of the blocks."""
    return [tensor for block in blocks.values() for tensor in block.values()]


@contextmanager
def tangents(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within, forward-mode differentiation carries a tangent of every first tensor, whose numbers stay."""
    with torch.no_grad(), forward_ad.dual_level():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)  # torch's own, once
            for tensor, tangent in pairs:
                tensor.copy_(forward_ad.make_dual(tensor.detach().clone(), tangent))
        yield


def slope_along(blocks: Blocks, seed: int, distribution: str, evaluate: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The loss and its derivative along a direction, in one forward.

    Raises:
        TrainingError: an operation of the model has no forward-mode derivative.
    """
    directions = (u for _, _, u in drawn(blocks, seed, distribution))
    try:
        with tangents(zip(tensors_of(blocks), directions, strict=True)), sdpa_kernel(SDPBackend.MATH):  # the others have none
            loss = forward_ad.unpack_dual(evaluate())
            return loss.primal.clone(), loss.primal * 0 if loss.tangent is None else loss.tangent.clone()
    except NotImplementedError as error:
        raise TrainingError(
            "difference='derivative' needs forward-mode differentiation, which an operation of this model lacks "
            f"({str(error).splitlines()[0]}); use difference='central'"
        ) from error


def averaged(values: Sequence[Tensor]) -> Tensor:
    """Scalars as one vector in at least float32, each the mean over all processes, so that these go on alike."""
    wide = torch.promote_types(values[0].dtype, torch.float32)
    together = torch.stack([value.detach().to(wide).reshape(()) for value in values])  # (k,)
    if processes() > 1:
        torch.distributed.all_reduce(together)
        together /= processes()
    return together


def process() -> int:
    """Which of the processes that train together this is."""
    return torch.distributed.get_rank() if processes() > 1 else 0


def processes() -> int:
    """How many train together."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def without_backward(recipe: Recipe, name: str) -> list[Problem]:
    """Reasons why a recipe cannot do without backward."""
    return [
        Problem(
            piece=f"step {step.name}",
            needs="a backward, in which it rescales the rows of the gradient",
            has=f"{name} takes none",
            remedy=f"drop {step.name}, or {name}",
        )
        for step in recipe.steps()
        if step.gain is not None
    ]


def is_plain_sgd(recipe: Recipe) -> bool:
    """Whether the steps of a recipe are w <- w - η g and nothing else."""
    return all(step.name == "sgd" and not any(step.arguments.values()) for step in recipe.step)
