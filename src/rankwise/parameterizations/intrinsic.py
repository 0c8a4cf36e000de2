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

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError

_BITS = 7  # the transform multiplies by Hadamard matrices of 128, which beats 7 passes of butterflies


def walsh_hadamard(x: Tensor) -> Tensor:
    """H x along the last dimension, whose size L is a power of two; H is unnormalized, H H = L I."""
    size = x.shape[-1]
    if size < 1 or size & (size - 1):
        raise ArgumentError(f"the Walsh-Hadamard transform needs a power of two, not {size} numbers")
    shape, before, after = x.shape, x.numel() // size, size
    while after > 1:  # one factor of the Kronecker product at a time
        width = min(2**_BITS, after)
        after //= width
        H = _sylvester(width, x)  # (width, width), symmetric
        x = (x.reshape(before, width) @ H if after == 1 else H @ x.reshape(before, width, after)).reshape(shape)
        before *= width
    return x


def _sylvester(size: int, like: Tensor) -> Tensor:
    """The Hadamard matrix (size, size): entry (i, j) is -1 to the number of ones that i and j share in binary."""
    numbers = torch.arange(size, device=like.device)
    shared = numbers[:, None] & numbers
    odd = torch.zeros_like(shared)
    for bit in range(size.bit_length() - 1):
        odd = odd ^ (shared >> bit & 1)
    return (1 - 2 * odd).to(like.dtype)


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
        padded = torch.nn.functional.pad(v, (0, signs.shape[0] - self.dimension))  # (L,)
        mixed = walsh_hadamard(padded * signs)[permutation.long()]  # (L,)
        return walsh_hadamard(mixed * gaussian.to(v.dtype))[: self.size]

    def adjoint(self, g: Tensor) -> Tensor:
        signs, permutation, gaussian = (self.tensors[key] for key in ("signs", "permutation", "gaussian"))
        padded = torch.nn.functional.pad(g, (0, signs.shape[0] - self.size))  # (L,)
        mixed = walsh_hadamard(padded) * gaussian.to(g.dtype)  # (L,)
        back = torch.zeros_like(mixed).index_copy(0, permutation.long(), mixed)  # (L,)
        return (walsh_hadamard(back) * signs)[: self.dimension]


PROJECTIONS: Mapping[str, type[Projection]] = {"fastfood": Fastfood, "dense": Dense, "sparse": Sparse}
