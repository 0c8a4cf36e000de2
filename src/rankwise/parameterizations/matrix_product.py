"""Matrix product operators: a matrix as a chain of cores, one per pair of row and column factors.

    MPO(T)[i_1 … i_N, j_1 … j_N] = T_1[:, i_1, j_1, :] T_2[:, i_2, j_2, :] … T_N[:, i_N, j_N, :]

T_k is (R_{k-1}, m_k, n_k, R_k), R_0 = R_N = 1, the m_k multiply to m and the n_k to n, the first index slowest. A bond R_k
bounds the rank of the unfolding with rows (i_1 j_1 … i_k j_k), not the rank of the matrix: with all bonds 1 it is
T_1 ⊗ … ⊗ T_N, in general of full rank.

The increment MPO(T) - MPO(T⁰) is applied as one telescoping sum, Σ_k T_1 … T_{k-1} (T_k - T⁰_k) T⁰_{k+1} … T⁰_N, which costs
3N - 2 small products instead of 2N and loses no digits when T is near T⁰: the difference of the two results would, in half
precision, be mostly rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rankwise.core.handwritten import RemadeLinear, Tensors, frozen_linear, sums_in_full
from rankwise.core.layouts import Layout
from rankwise.core.operators import Base, Dense, Operator, compute_dtype
from rankwise.core.queries import svd


def bonds_of(rows: Sequence[int], columns: Sequence[int], most: int) -> list[int]:
    """R_0 … R_N: `most`, clipped where the pairs on one side have fewer entries."""
    sizes = [row * column for row, column in zip(rows, columns, strict=True)]
    bonds = [1]
    for k in range(1, len(sizes)):
        bonds.append(min(most, bonds[-1] * sizes[k - 1], math.prod(sizes[k:])))
    return [*bonds, 1]


def decompose(matrix: Tensor, rows: Sequence[int], columns: Sequence[int], most: int, *, balanced: bool) -> list[Tensor]:
    """Cores of the truncated MPO of a matrix (m, n), from one SVD per bond, left to right.

    Args:
        matrix: M.
        rows, columns: m_1 … m_N and n_1 … n_N.
        most: the largest bond.
        balanced: spread each bond's singular values as √S on both sides; otherwise all cores but the last are orthonormal.
            The operator is the same.
    """
    count, bonds = len(rows), bonds_of(rows, columns, most)
    interleaved = [axis for k in range(count) for axis in (k, count + k)]
    rest = matrix.reshape(*rows, *columns).permute(interleaved).reshape(1, -1)  # (1, m_1 n_1 … m_N n_N)
    cores, root = [], matrix.new_ones(1)  # root: √S of the bond to the left
    for k in range(count):
        shape = (bonds[k], rows[k], columns[k], bonds[k + 1])
        if k == count - 1:
            core, right = rest.reshape(shape), matrix.new_ones(1)
        else:
            U, S, Vh = svd(Dense(rest.reshape(bonds[k] * rows[k] * columns[k], -1))).truncated(bonds[k + 1])
            core, rest = U.reshape(shape), S[:, None] * Vh
            right = torch.where(S.gt(S[0] * 1e-12), S, 1.0).sqrt()  # a value that carries nothing stays as it is
        cores.append((core / root[:, None, None, None] * right if balanced else core).contiguous())
        root = right
    return cores


Act = Callable[[Tensor, Tensor], Tensor]


def _telescope(cores: Sequence[Tensor], start: Sequence[Tensor], state: Tensor, act: Act, axis: int) -> tuple[Tensor, Tensor]:
    """The telescoping sum up to its last product: (state, core) such that act(state, core) is the sum.

    act(state, core) contracts a state, whose bond is at `axis`, with the next core. The products of T alone and the sum so far
    stand side by side on the bond, so that both meet the next core, whose bond is the axis before, at once.
    """
    both, last = None, len(cores) - 1
    for k, (core, frozen) in enumerate(zip(cores, start, strict=True)):
        if both is None:
            pair = state, core - frozen
        else:
            pair = torch.cat([state, both], axis), torch.cat([core - frozen, frozen], axis - 1)
        if k == last:
            return pair
        both = act(*pair)
        state = act(state, core)
    raise ValueError("an operator has at least one core; this is a bug in rankwise")


def _extend(state: Tensor, core: Tensor) -> Tensor:
    """Entries of the operator: state (m_1 n_1 …, R_{k-1}) -> (m_1 n_1 … m_k n_k, R_k)."""
    return (state @ core.flatten(1)).reshape(-1, core.shape[3])


def _contract(state: Tensor, core: Tensor) -> Tensor:
    """A product with inputs: state (m_1 … m_{k-1}, R_{k-1}, n_k … n_N, T) -> (m_1 … m_k, R_k, n_{k+1} … n_N, T)."""
    left, m, n, right = core.shape
    step = core.permute(1, 3, 0, 2).reshape(m * right, left * n).to(state.dtype)
    state = state.reshape(-1, left * n, state.shape[-1] // n)
    return torch.bmm(step.expand(state.shape[0], -1, -1), state).reshape(-1, right, state.shape[-1])


class _Made(RemadeLinear):
    """The matrix W + MPO(T) - MPO(T⁰), or the increment alone where there is no W; tensors are T_1 … T_N, T⁰_1 … T⁰_N."""

    def __init__(self, rows: Sequence[int], columns: Sequence[int]) -> None:
        self.rows, self.columns, count = list(rows), list(columns), len(rows)
        self.pairs = [size for pair in zip(rows, columns, strict=True) for size in pair]
        self.order = [*range(0, 2 * count, 2), *range(1, 2 * count, 2)]  # interleaved -> rows, columns
        self.back = [axis for k in range(count) for axis in (k, count + k)]

    def _factors(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """(m_1 n_1 … n_{N-1}, 2R) and (2R, m_N n_N), whose product holds the entries in interleaved order."""
        count = len(self.rows)
        left, right = _telescope(tensors[:count], tensors[count:], tensors[0].new_ones(1, 1), _extend, 1)
        return left, right.flatten(1)

    def make(self, weight: Tensor | None, *factors: Any) -> tuple[Tensor, Any]:
        left, right = self._factors(*factors)
        entries = (left @ right).reshape(self.pairs).permute(self.order)  # m_1 … m_N, n_1 … n_N
        if weight is not None:  # one pass through both
            entries = weight.reshape(*self.rows, *self.columns) + entries.to(weight.dtype)
        return entries.reshape(math.prod(self.rows), math.prod(self.columns)), None

    def pull(self, G: Tensor, made: Any, weight: Tensor | None, *factors: Any) -> Tensors:
        trained = [factor.requires_grad for factor in factors]
        with torch.enable_grad():
            leaves = [factor.detach().requires_grad_(flag) for factor, flag in zip(factors, trained, strict=True)]
            left, right = self._factors(*leaves)
        G = G.to(left.dtype).reshape(*self.rows, *self.columns).permute(self.back).reshape(left.shape[0], right.shape[1])
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        sides = [(side, grad) for side, grad in ((left, G @ right.t()), (right, left.t() @ G)) if side.requires_grad]
        found = iter(torch.autograd.grad([side for side, _ in sides], wanted, [grad for _, grad in sides]))
        return tuple(next(found) if flag else None for flag in trained)


class Increment(Operator):
    """MPO(T) - MPO(T⁰), core by core or as a matrix, whichever is fewer operations.

    Args:
        cores: T_1 … T_N.
        start: T⁰_1 … T⁰_N, frozen.
    """

    def __init__(self, cores: Sequence[Tensor], start: Sequence[Tensor]) -> None:
        self.cores, self.start = tuple(cores), tuple(start)
        self.rows, self.columns = [core.shape[1] for core in cores], [core.shape[2] for core in cores]

    @property
    def shape(self) -> tuple[int, int]:
        return math.prod(self.rows), math.prod(self.columns)

    def dense(self) -> Tensor:
        return _Made(self.rows, self.columns).make(None, *self.cores, *self.start)[0]

    def prefers_cores(self, tokens: int, *, merged: bool) -> bool:
        """Whether core by core takes fewer operations than the matrix; see `operations`. Backward counts twice a forward.

        The matrix is made again in backward, has a gradient G = g xᵀ, and is applied where W does not hold it.
        """
        by_core, making = operations(self.cores)
        (m, n), trained = self.shape, torch.is_grad_enabled()
        products = trained + (0 if merged else 2 if trained else 1)  # of T tokens with (m, n)
        return (3 if trained else 1) * tokens * by_core < (4 if trained else 1) * making + tokens * m * n * products

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if layout.kind == "embedding":
            return self._looked_up(x)
        if layout.kind != "linear":
            return super().apply(x, layout)
        dtype = compute_dtype(x, self.cores[0].dtype)
        if self.prefers_cores(math.prod(x.shape[:-1]), merged=False):
            return self._core_by_core(x.to(dtype))
        return _Made(self.rows, self.columns)(x.to(dtype), None, None, *self.cores, *self.start)

    def add_to_base(self, base: Base, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor | None:
        frozen = frozen_linear(base, x, layout, bias)
        if frozen is None or not sums_in_full(frozen[0]) or self.prefers_cores(math.prod(x.shape[:-1]), merged=True):
            return None
        x, weight, bias = frozen
        return _Made(self.rows, self.columns)(x, weight, bias, *self.cores, *self.start)

    def _core_by_core(self, x: Tensor) -> Tensor:
        tokens = x.reshape(1, -1, x.shape[-1]).mT  # (1, n, T): the tokens last, so that every product is a wide one
        state = tokens.reshape(1, 1, -1)  # (1, R_0, n T)
        m, T = self.shape[0], tokens.shape[-1]
        y = _contract(*_telescope(self.cores, self.start, state, _contract, 1))  # (m, 1, T)
        return y.reshape(m, T).t().reshape(*x.shape[:-1], m)

    def _looked_up(self, x: Tensor) -> Tensor:
        """Columns of the matrix by token number: the digits of a number choose one slice (R_{k-1}, m_k, R_k) of each core."""
        flat, digits = x.reshape(-1), []
        for size in reversed(self.columns):
            digits.insert(0, flat % size)
            flat = flat // size
        chosen = [
            [core.movedim(2, 0).index_select(0, digit) for core, digit in zip(group, digits, strict=True)]
            for group in (self.cores, self.start)
        ]  # (T, R_{k-1}, m_k, R_k)

        def extend(state: Tensor, core: Tensor) -> Tensor:  # (T, m_1 …, R_{k-1}) -> (T, m_1 … m_k, R_k)
            return (state @ core.flatten(2)).reshape(state.shape[0], -1, core.shape[3])

        state = self.cores[0].new_ones(x.numel(), 1, 1)
        return extend(*_telescope(chosen[0], chosen[1], state, extend, 2)).reshape(*x.shape, self.shape[0])


def operations(cores: Sequence[Tensor]) -> tuple[int, int]:
    """Multiplications of an increment: applied core by core, per token, and to make its matrix."""
    by_core, making, last = 0, 0, len(cores) - 1
    inputs, outputs, entries = math.prod([core.shape[2] for core in cores]), 1, 1
    for k, core in enumerate(cores):
        size, times = core.numel(), min(2, len(cores)) if k in (0, last) else 3
        inputs //= core.shape[2]
        by_core += times * size * outputs * inputs
        making += times * size * entries
        outputs, entries = outputs * core.shape[1], entries * core.shape[1] * core.shape[2]
    return by_core, making
