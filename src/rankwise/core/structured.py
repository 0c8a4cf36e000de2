"""Operators with a structure of their own: Kronecker products, blocks, sparse entries, tensor trains and Tucker forms."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.core.handwritten import frozen_linear, sums_in_full
from rankwise.core.layouts import ConvLayout, Layout, LinearLayout
from rankwise.core.operators import Base, Operator, compute_dtype
from rankwise.core.sparse_linear import SparseLinear


def kron(left: Tensor, right: Tensor) -> Tensor:
    """The product left ⊗ right; torch.kron refuses some strides that `contiguous` leaves as they are (sides of length one)."""
    product = left[:, None, :, None] * right[None, :, None, :]  # (m₁, m₂, n₁, n₂)
    return product.reshape(left.shape[0] * right.shape[0], -1)


def _multiplied(factors: tuple[Tensor, ...]) -> Tensor:
    return factors[0] if len(factors) == 1 else factors[0] @ factors[1]


class Kronecker(Operator):
    """scale · left ⊗ right, left (m₁, n₁), right (m₂, n₂), each also as a pair of factors, shape (m₁m₂, n₁n₂).

    Applied factor by factor, (L ⊗ R) vec = vec(L X Rᵀ), in the order that is cheaper. In a convolution n₂ holds the kernel, and
    R is a convolution of n₂ channels on n₁ stacks of them.
    """

    def __init__(self, left: Tensor | tuple[Tensor, Tensor], right: Tensor | tuple[Tensor, Tensor], scale: float = 1.0) -> None:
        self.left = left if isinstance(left, tuple) else (left,)
        self.right, self.scale = right if isinstance(right, tuple) else (right,), scale

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """m₁, n₁, m₂, n₂."""
        return self.left[0].shape[0], self.left[-1].shape[1], self.right[0].shape[0], self.right[-1].shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        m1, n1, m2, n2 = self.sizes
        return m1 * m2, n1 * n2

    @property
    def left_first(self) -> bool:
        """Whether L X comes first: m₁(n₁ n₂ + ρ) < n₁(ρ + m₁ m₂), with ρ multiplications for R."""
        m1, n1, m2, n2 = self.sizes
        right = sum(factor.numel() for factor in self.right)
        return m1 * (n1 * n2 + right) < n1 * (right + m1 * m2)

    def dense(self) -> Tensor:
        return kron(_multiplied(self.left), _multiplied(self.right)) * self.scale

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        dtype = compute_dtype(x, self.left[0].dtype)
        left, right = (_multiplied(self.left) * self.scale).to(dtype), [factor.to(dtype) for factor in self.right]
        m1, n1, m2, n2 = self.sizes
        if isinstance(layout, ConvLayout):
            return self._convolve(x, layout, left, right)
        if not isinstance(layout, LinearLayout):  # token c n₂ + d: column c of L times column d of R
            columns = F.embedding(x % n2, right[-1].t())
            columns = columns if len(right) == 1 else F.linear(columns, right[0])  # (…, m₂)
            return (F.embedding(x // n2, left.t()).unsqueeze(-1) * columns.unsqueeze(-2)).flatten(-2)
        grid = x.reshape(-1, n1, n2).to(dtype)  # (T, n₁, n₂)
        if self.left_first:
            grid = torch.bmm(left.expand(grid.shape[0], m1, n1), grid)
        for factor in reversed(right):
            grid = grid @ factor.t()
        if not self.left_first:
            grid = torch.bmm(left.expand(grid.shape[0], m1, n1), grid)
        return grid.reshape(*x.shape[:-1], m1 * m2)

    def _convolve(self, x: Tensor, layout: ConvLayout, left: Tensor, right: list[Tensor]) -> Tensor:
        m1, n1, m2, _ = self.sizes
        if layout.groups > 1 or layout.channels % n1:
            return super().apply(x, layout)
        one = replace(layout, channels=layout.channels // n1)
        spatial = x.dim() - len(layout.kernel) - 1  # 1, or 0 for a single example without a batch
        stacks = x.to(left.dtype).reshape(-1, one.channels, *x.shape[spatial + 1 :])
        z = one.project(stacks, right[-1])
        z = z if len(right) == 1 else one.expand(z, right[0])  # (batch · n₁, m₂, positions…)
        y = left @ z.reshape(-1, n1, m2 * z[0, 0].numel())  # (batch, m₁, m₂ · positions)
        return y.reshape(*x.shape[:spatial], m1 * m2, *z.shape[2:])


class BlockDiagonal(Operator):
    """diag(blocks₁, …, blocks_k), blocks (k, p, q), shape (kp, kq)."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    @property
    def shape(self) -> tuple[int, int]:
        count, rows, columns = self.blocks.shape
        return count * rows, count * columns

    def dense(self) -> Tensor:
        return torch.block_diag(*self.blocks)

    def transposed(self) -> BlockDiagonal:
        return BlockDiagonal(self.blocks.mT)

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if not isinstance(layout, LinearLayout):
            return super().apply(x, layout)
        blocks = self.blocks.to(compute_dtype(x, self.blocks.dtype))
        parts = x.reshape(-1, blocks.shape[0], blocks.shape[2]).to(blocks.dtype)  # (tokens, k, q)
        if blocks.shape[2] < 16:  # tokens last inside: faster for small blocks, and not for large ones
            y = torch.bmm(blocks, parts.permute(1, 2, 0)).flatten(0, 1).t().contiguous()
        else:
            y = torch.bmm(parts.transpose(0, 1), blocks.mT).transpose(0, 1)
        return y.reshape(*x.shape[:-1], self.shape[0])


class Sparse(Operator):
    """values (k,) at rows (k,) and columns (k,) of an (m, n) matrix of zeros."""

    def __init__(self, values: Tensor, rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> None:
        self.values, self.rows, self.columns, self._shape = values, rows, columns, shape

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def dense(self) -> Tensor:
        zeros = self.values.new_zeros(self._shape)
        return zeros.index_put((self.rows, self.columns), self.values, accumulate=True)

    def add_to_base(self, base: Base, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor | None:
        frozen = frozen_linear(base, x, layout, bias)
        if frozen is None or not sums_in_full(frozen[0]):
            return None
        return SparseLinear()(*frozen, self.values, self.rows * self._shape[1] + self.columns)


class Tucker(Operator):
    """core ×₁ out ×₂ in ×₃ kernel…, flattened to (m, n): core (j_out, j_in, j_k…), factors (size_k, j_k) in the same order.

    m = size of the first factor; n = product of the others (in · kernel), so the factors fit a convolution's weight
    (out, in, kernel…). With two factors it is the chain out · core · inᵀ. The exact pair (B, A) is (out, unfolded rest).
    """

    def __init__(self, core: Tensor, *factors: Tensor, scale: float = 1.0) -> None:
        self.core, self.factors, self.scale = core, factors, scale

    @property
    def shape(self) -> tuple[int, int]:
        return self.factors[0].shape[0], math.prod(factor.shape[0] for factor in self.factors[1:])

    def unfolded(self) -> Tensor:
        """A (j_out, n): the core expanded in every mode but the output's, small modes first."""
        return self._expanded(range(1, self.core.dim())).reshape(self.core.shape[0], -1)

    def _expanded(self, modes: Iterable[int]) -> Tensor:
        """The core with some modes expanded to full size, small ones first."""
        tensor = self.core
        for mode in sorted(modes, key=lambda k: self.factors[k].shape[0]):
            tensor = (tensor.movedim(mode, -1) @ self.factors[mode].t()).movedim(-1, mode)
        return tensor

    def _fits(self, layout: Layout) -> TypeGuard[ConvLayout]:
        """Whether the modes are those of the convolution's own weight."""
        sizes = tuple(factor.shape[0] for factor in self.factors[1:])
        return isinstance(layout, ConvLayout) and sizes == (layout.channels, *layout.kernel)

    def dense(self) -> Tensor:
        return (self.factors[0] @ self.unfolded()) * self.scale

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        dtype = compute_dtype(x, self.core.dtype)
        if len(self.factors) == 2:  # three thin products instead of one (j_out, n)
            z = layout.mix(layout.project(x, self.factors[1].t().to(dtype)), self.core.to(dtype))
        elif self._fits(layout) and self.core.shape[1] < layout.channels:
            # A pointwise step down to j_in channels commutes with padding, so the kernel meets j_in channels only.
            narrow = replace(layout, channels=self.core.shape[1])
            kernel = self._expanded(range(2, self.core.dim()))  # (j_out, j_in, kernel…)
            z = narrow.project(layout.mix(x.to(dtype), self.factors[1].t().to(dtype)), kernel.flatten(1).to(dtype))
        else:
            z = layout.project(x, self.unfolded().to(dtype))
        return layout.expand(z if self.scale == 1.0 else z * self.scale, self.factors[0].to(dtype))


class TensorTrain(Operator):
    """A chain of cores (r_{k-1}, size_k, r_k), r₀ = r_K = 1; the first `output_modes` sizes multiply to m, the rest to n."""

    def __init__(self, *cores: Tensor, output_modes: int, scale: float = 1.0) -> None:
        self.cores, self.output_modes, self.scale = cores, output_modes, scale

    @property
    def shape(self) -> tuple[int, int]:
        sizes = [core.shape[1] for core in self.cores]
        return math.prod(sizes[: self.output_modes]), math.prod(sizes[self.output_modes :])

    def halves(self) -> tuple[Tensor, Tensor]:
        """The exact pair (B, A) at the bond between output and input modes."""
        left, right = self.cores[0], self.cores[-1]
        for core in self.cores[1 : self.output_modes]:
            left = torch.tensordot(left, core, dims=1).flatten(1, 2)  # (1, sizes…, r)
        for core in reversed(self.cores[self.output_modes : -1]):
            right = torch.tensordot(core, right, dims=1).flatten(1, 2)  # (r, sizes…, 1)
        return left.squeeze(0), right.squeeze(-1)

    def dense(self) -> Tensor:
        B, A = self.halves()
        return (B @ A) * self.scale

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        B, A = self.halves()
        dtype = compute_dtype(x, A.dtype)
        return layout.expand(layout.project(x, A.to(dtype)) * self.scale, B.to(dtype))
