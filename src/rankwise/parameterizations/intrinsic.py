"""Random projections from d to D numbers for training in a random subspace: dense, sparse, and Fastfood.

    x = P v          v (d,), P (D, d) frozen, seeded, columns of norm one          project(v) = P v, adjoint(g) = Pᵀ g

dense     entries N(0, 1), columns normalized; d·D numbers
sparse    about √D entries ±1 per column, columns normalized; d·√D numbers
Fastfood  P v = first D entries of H G Π H S [v; 0] / √(D Σ G²), L the power of two from D on: S signs, Π a permutation,
          G ~ N(0, 1), H the unnormalized Walsh-Hadamard matrix. 2L numbers, O(L log L) time; columns of norm exactly one
          where D = L, on average elsewhere

*Differs*: the sparse projection has √D entries in every column, drawn with replacement and doubles left out, instead of a
chance of 1/√D for each entry.

Li, Farkhoor, Liu, Yosinski: Measuring the Intrinsic Dimension of Objective Landscapes, 2018, arXiv:1804.08838. Le, Sarlós,
Smola: Fastfood: Approximate Kernel Expansions in Loglinear Time, 2013.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.transforms import transformed

_WIDTH = 32  # the transform multiplies by Hadamard matrices of this size, a fraction of what butterflies take
_CACHED = 2**18  # numbers that stay in a processor's cache
_LOW = 2**15  # a long vector is a grid with rows of this many numbers


def walsh_hadamard(x: Tensor) -> Tensor:
    """H x along the last dimension, whose size L is a power of two; H is unnormalized, H H = L I."""
    size = x.shape[-1]
    if size < 1 or size & (size - 1):
        raise ArgumentError(f"the Walsh-Hadamard transform needs a power of two, not {size} numbers")
    return _multiplied(x.reshape(-1), x.numel() // size, size, 1).reshape(x.shape)


def _multiplied(x: Tensor, before: int, size: int, after: int) -> Tensor:
    """The transform of the middle of (before, size, after), one factor of the Kronecker product at a time."""
    while size > 1:
        width = min(_WIDTH, size)
        size //= width
        H = _sylvester(width, x)  # (width, width), symmetric
        rest = size * after
        x = x.reshape(before, width) @ H if rest == 1 else H @ x.reshape(before, width, rest)
        before *= width
    return x.reshape(-1)


def _rows_transformed(rows: Tensor, out: Tensor) -> None:
    """The transform of each row of (rows, _LOW), some at a time."""
    step = _CACHED // _LOW
    for source, target in zip(rows.split(step), out.split(step), strict=True):
        target.copy_(_multiplied(source.reshape(-1), source.shape[0], _LOW, 1).view(source.shape))


@functools.lru_cache(maxsize=32)
def _kept_sylvester(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    numbers = torch.arange(size, device=device)
    shared = numbers[:, None] & numbers
    odd = torch.zeros_like(shared)
    for bit in range(size.bit_length() - 1):
        odd = odd ^ (shared >> bit & 1)
    return (1 - 2 * odd).to(dtype)


def _sylvester(size: int, like: Tensor) -> Tensor:
    """The Hadamard matrix (size, size): entry (i, j) is -1 to the number of ones that i and j share in binary."""
    if torch.compiler.is_compiling() or transformed() or torch.is_inference_mode_enabled():
        return _kept_sylvester.__wrapped__(size, like.dtype, like.device)
    return _kept_sylvester(size, like.dtype, like.device)


class Projection(ABC):
    """Interface: a frozen random matrix P (size, dimension) with columns of norm one, drawn by a private CPU generator.

    Args:
        size: D.
        dimension: d, at most `largest(D)`.
        seed: of the generator.
        tensors: what it was drawn as before, on another device or in another dtype; then nothing is drawn.
    """

    def __init__(self, size: int, dimension: int, seed: int = 0, *, tensors: Mapping[str, Tensor] | None = None) -> None:
        if not 1 <= dimension <= self.largest(size):
            raise ArgumentError(f"dimension is 1 to {self.largest(size)} for {size} numbers, not {dimension}")
        self.size, self.dimension = size, dimension
        self.tensors = dict(tensors) if tensors is not None else self._draw(torch.Generator().manual_seed(seed))

    @staticmethod
    def largest(size: int) -> int:
        """The largest dimension for D numbers."""
        return size

    @abstractmethod
    def _draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """The tensors that define P, in float64 where they are not integers."""

    @abstractmethod
    def project(self, v: Tensor) -> Tensor:
        """P v (D,), differentiable, in the dtype of v but at least float32."""

    @abstractmethod
    def adjoint(self, g: Tensor) -> Tensor:
        """Pᵀ g (d,), differentiable."""

    def cut(self, v: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
        """P v, cut into pieces of the given lengths, in one node that saves no tensors.

        So its result can serve graphs that are run backward one by one. Slices of one vector would be a node each, and each
        would make a gradient as long as the whole vector.
        """
        if torch.compiler.is_compiling() or transformed():
            return self.project(v).split(list(counts))
        return cast(tuple[Tensor, ...], _Cut.apply(v, self, tuple(counts)))


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, projection: Projection, counts: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.projection, ctx.counts = projection, counts
        ctx.set_materialize_grads(False)
        return projection.project(v).split(list(counts))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        known = next((gradient for gradient in gradients if gradient is not None), None)
        if known is None:
            return None, None, None
        parts = [known.new_zeros(count) if part is None else part for part, count in zip(gradients, ctx.counts, strict=True)]
        return ctx.projection.adjoint(torch.cat(parts)), None, None


class Dense(Projection):
    """P with Gaussian entries."""

    def _draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        P = torch.randn(self.size, self.dimension, generator=generator, dtype=torch.float64)
        return {"matrix": P / P.norm(dim=0)}  # (D, d)

    def project(self, v: Tensor) -> Tensor:
        return self.tensors["matrix"].to(v.dtype) @ v

    def adjoint(self, g: Tensor) -> Tensor:
        return g @ self.tensors["matrix"].to(g.dtype)


class Sparse(Projection):
    """P with about √D entries in every column."""

    def _draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        count = max(1, round(math.sqrt(self.size)))
        rows = torch.randint(self.size, (self.dimension, count), generator=generator)
        places = torch.unique(rows + self.size * torch.arange(self.dimension)[:, None])  # (K,) column by column
        rows, columns = places % self.size, places // self.size
        values = torch.randint(2, places.shape, generator=generator).double() * 2 - 1  # (K,)
        lengths = torch.bincount(columns, minlength=self.dimension).double().sqrt()  # (d,)
        return {"rows": rows, "columns": columns, "values": values / lengths[columns]}

    def project(self, v: Tensor) -> Tensor:
        rows, columns, values = (self.tensors[key] for key in ("rows", "columns", "values"))
        return v.new_zeros(self.size).index_add(0, rows, values.to(v.dtype) * v[columns])

    def adjoint(self, g: Tensor) -> Tensor:
        rows, columns, values = (self.tensors[key] for key in ("rows", "columns", "values"))
        return g.new_zeros(self.dimension).index_add(0, columns, values.to(g.dtype) * g[rows])


class Fastfood(Projection):
    """P as a product of two Walsh-Hadamard transforms with signs, a permutation and a Gaussian diagonal."""

    @staticmethod
    def largest(size: int) -> int:
        """L, the power of two from D on."""
        return 1 << (size - 1).bit_length()

    def _draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        length = self.largest(self.size)
        signs = (torch.randint(2, (length,), generator=generator) * 2 - 1).to(torch.int8)  # (L,)
        permutation = torch.randperm(length, generator=generator).to(torch.int32)  # (L,)
        gaussian = torch.randn(length, generator=generator, dtype=torch.float64)  # (L,)
        divisor = math.sqrt(self.size) * gaussian.norm()  # √(L Σ G²) · √(D / L)
        return {"signs": signs, "permutation": permutation, "gaussian": gaussian / divisor}

    def project(self, v: Tensor) -> Tensor:
        signs, permutation, gaussian = (self.tensors[key] for key in ("signs", "permutation", "gaussian"))
        tile = self._tile()  # H repeats itself, so that H of a vector with zeros behind is a short one, many times
        short = walsh_hadamard(torch.nn.functional.pad(v, (0, tile - self.dimension)) * signs[:tile])  # (tile,)
        if self._in_pieces(v):
            return self._gathered(short)
        mixed = short.index_select(0, permutation & (tile - 1))  # (L,)
        return walsh_hadamard(mixed * gaussian.to(v.dtype))[: self.size]

    def adjoint(self, g: Tensor) -> Tensor:
        signs, permutation, gaussian = (self.tensors[key] for key in ("signs", "permutation", "gaussian"))
        tile = self._tile()
        if self._in_pieces(g):
            short = self._collected(g)  # (tile,)
        else:
            padded = torch.nn.functional.pad(g, (0, signs.shape[0] - self.size))  # (L,)
            mixed = walsh_hadamard(padded) * gaussian.to(g.dtype)  # (L,)
            short = torch.zeros_like(mixed[:tile]).index_add(0, permutation & (tile - 1), mixed)  # (tile,)
        return (walsh_hadamard(short) * signs[:tile])[: self.dimension]

    def _in_pieces(self, like: Tensor) -> bool:
        """Whether the long vector is made piece by piece, where nothing is recorded and pieces fit a processor's cache."""
        traced = torch.compiler.is_compiling() or transformed()
        recorded = traced or (torch.is_grad_enabled() and like.requires_grad)
        return self.tensors["signs"].shape[0] > _CACHED and not recorded and like.device.type == "cpu"

    def _pieces(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The grid (L / _LOW, _LOW) by columns: which, places in the short vector, and entries of G, (height, columns)."""
        permutation, gaussian = (self.tensors[key].view(-1, _LOW) for key in ("permutation", "gaussian"))
        step = max(16, _CACHED // gaussian.shape[0])
        for first in range(0, _LOW, step):
            columns = slice(first, first + step)
            yield columns, permutation[:, columns] & (self._tile() - 1), gaussian[:, columns]

    def _gathered(self, short: Tensor) -> Tensor:
        """The last transform, along columns of the grid and then along rows, of what is gathered from the short vector."""
        grid = short.new_empty(-(-self.size // _LOW), _LOW)
        for columns, places, gaussian in self._pieces():
            part = short.index_select(0, places.reshape(-1)).view(places.shape).mul_(gaussian)
            part = _multiplied(part.reshape(-1), 1, *part.shape).view(part.shape)
            grid[:, columns] = part[: grid.shape[0]]
        _rows_transformed(grid, grid)
        return grid.view(-1)[: self.size]

    def _collected(self, g: Tensor) -> Tensor:
        """The transpose of `_gathered`."""
        given = torch.nn.functional.pad(g, (0, -self.size % _LOW)).view(-1, _LOW)
        grid = torch.empty_like(given)
        _rows_transformed(given, grid)
        total = g.new_zeros(self._tile())
        for columns, places, gaussian in self._pieces():
            part = torch.nn.functional.pad(grid[:, columns], (0, 0, 0, places.shape[0] - grid.shape[0]))
            part = _multiplied(part.reshape(-1), 1, *part.shape).view(part.shape) * gaussian
            total += torch.zeros_like(total).index_add_(0, places.reshape(-1), part.reshape(-1))  # a sum of sums loses less
        return total

    def _tile(self) -> int:
        """The power of two from d on."""
        return 1 << (self.dimension - 1).bit_length()


PROJECTIONS: Mapping[str, type[Projection]] = {"fastfood": Fastfood, "dense": Dense, "sparse": Sparse}
