"""Questions about operators: dispatched functions, each with a dense default, so that a new operator works at once.

row_norms(op)      (m,) Euclidean norms of the rows
column_norms(op)   (n,) Euclidean norms of the columns
as_low_rank(op)    the exact factors, or None where the operator has no exact narrow form
rank_bound(op)     an upper bound on the rank
frobenius(op)      the Frobenius norm
svd(op)            thin singular value decomposition; O((m + n) r²) through QR of the factors where they exist
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankwise.core.combinators import ColumnScale, Dropped, Rotated, RowScale, Scaled, Sum
from rankwise.core.operators import Base, Chain, LowRank, Operator
from rankwise.core.structured import Kronecker, TensorTrain, Tucker, kron


class SVD(NamedTuple):
    """U (m, k), S (k,) descending, Vh (k, n)."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    def truncated(self, rank: int) -> SVD:
        """The leading `rank` triplets."""
        return SVD(self.U[:, :rank], self.S[:rank], self.Vh[:rank])


_narrow: dict[type[Operator], Callable[..., LowRank | None]] = {}


def narrow_form(kind: type[Operator]) -> Callable[[Callable[..., LowRank | None]], Callable[..., LowRank | None]]:
    """Registers how `as_low_rank` works for a kind of operator; functools.singledispatch cannot be compiled."""

    def keep(function: Callable[..., LowRank | None]) -> Callable[..., LowRank | None]:
        _narrow[kind] = function
        return function

    return keep


def as_low_rank(operator: Operator) -> LowRank | None:
    """The exact (B, A) of an operator, or None where it has none narrower than the matrix itself."""
    for kind in type(operator).__mro__:
        if kind in _narrow:
            return _narrow[kind](operator)
    return None


@narrow_form(LowRank)
def _(operator: LowRank) -> LowRank | None:
    return operator


@narrow_form(Chain)
def _(operator: Chain) -> LowRank | None:
    return operator.narrowest() if len(operator.factors) > 1 else None


@narrow_form(Tucker)
def _(operator: Tucker) -> LowRank | None:
    return LowRank(operator.factors[0], operator.unfolded(), operator.scale)


@narrow_form(TensorTrain)
def _(operator: TensorTrain) -> LowRank | None:
    return LowRank(*operator.halves(), operator.scale)


@narrow_form(Kronecker)
def _(operator: Kronecker) -> LowRank | None:
    left_B, left_A = _halves(operator.left)
    right_B, right_A = _halves(operator.right)
    return LowRank(kron(left_B, right_B), kron(left_A, right_A), operator.scale)


@narrow_form(Sum)
def _(operator: Sum) -> LowRank | None:
    parts = [as_low_rank(term) for term in operator.terms]
    exact = [part.folded() for part in parts if part is not None]
    if len(exact) != len(parts):
        return None
    return LowRank(torch.cat([part.B for part in exact], dim=1), torch.cat([part.A for part in exact], dim=0))


@narrow_form(Scaled)
def _(operator: Scaled) -> LowRank | None:
    inner = as_low_rank(operator.inner)
    if inner is None:
        return None
    if isinstance(operator.factor, float):
        return LowRank(inner.B, inner.A, inner.scale * operator.factor)
    return LowRank(inner.B * operator.factor, inner.A, inner.scale)


@narrow_form(RowScale)
def _(operator: RowScale) -> LowRank | None:
    inner = as_low_rank(operator.inner)
    return None if inner is None else LowRank(operator.scale[:, None] * inner.B, inner.A, inner.scale)


@narrow_form(ColumnScale)
def _(operator: ColumnScale) -> LowRank | None:
    inner = as_low_rank(operator.inner)
    return None if inner is None else LowRank(inner.B, inner.A * operator.scale, inner.scale)


@narrow_form(Rotated)
def _(operator: Rotated) -> LowRank | None:
    """W · B A = (W B) A, and B A · W = B (A W): the exact factors depend on W."""
    pair = as_low_rank(operator.rotation)
    if pair is None:
        return None
    inner = operator.inner.dense()
    kind = torch.promote_types(inner.dtype, pair.B.dtype)
    if operator.side == "input":
        return LowRank(inner.to(kind) @ pair.B.to(kind), pair.A, pair.scale)
    return LowRank(pair.B, pair.A.to(kind) @ inner.to(kind), pair.scale)


@narrow_form(Dropped)
def _(operator: Dropped) -> LowRank | None:
    return as_low_rank(operator.inner)


def rank_bound(operator: Operator) -> int:
    """An upper bound on the rank: the inner width where there is one, else min(m, n)."""
    factors = as_low_rank(operator)
    return min(*operator.shape, *(() if factors is None else (factors.rank,)))


def row_norms(operator: Operator) -> Tensor:
    """(m,) norms of the rows, in at least float32.

    For a frozen base plus a low-rank update no dense (m, n) matrix is formed:
    ‖w_i + (B A)_i‖² = ‖w_i‖² + 2 ⟨(W Aᵀ)_i, B_i⟩ + B_i (A Aᵀ) B_iᵀ, and with scaled columns the same with weights.
    """
    with full_precision():
        return _row_norms(operator)


def _row_norms(operator: Operator) -> Tensor:
    inner, weights = (operator.inner, operator.scale.square()) if isinstance(operator, ColumnScale) else (operator, None)
    base, update = _split(inner)
    if base is None or update is None:
        return wide(operator.dense()).norm(dim=1)
    W, pair = wide(base.dense()), update.folded()
    B, A = wide(pair.B), wide(pair.A)
    weighted = A if weights is None else A * weights  # (r, n)
    cross = (weighted @ W.t()).t()  # (m, r): W Aᵀ, with the thin matrix first, which is faster
    half = torch.addmm(cross, B, weighted @ A.t(), alpha=0.5)  # (m, r): W Aᵀ + ½ B A Aᵀ
    square = _square_row_norms(base, W) if weights is None else W.square() @ weights  # (m,)
    return root(torch.add(square, (half * B).sum(1), alpha=2))


def square_row_norms(operator: Operator) -> Tensor:
    """(m,) squares of the norms of the rows, in at least float32; those of a frozen layer are kept on it."""
    matrix = wide(operator.dense())
    return _square_row_norms(operator, matrix) if isinstance(operator, Base) else matrix.square().sum(1)


def column_norms(operator: Operator) -> Tensor:
    """(n,) norms of the columns, in at least float32, by the same identity on the transposed factors."""
    with full_precision():
        return _column_norms(operator)


def _column_norms(operator: Operator) -> Tensor:
    inner, weights = (operator.inner, operator.scale.square()) if isinstance(operator, RowScale) else (operator, None)
    base, update = _split(inner)
    if base is None or update is None:
        return wide(operator.dense()).norm(dim=0)
    W, pair = wide(base.dense()), update.folded()
    B, A = wide(pair.B), wide(pair.A)
    weighted = B if weights is None else B * weights[:, None]  # (m, r)
    cross = ((weighted.t() @ W) * A).sum(0)  # (n,)
    square = (((weighted.t() @ B) @ A) * A).sum(0)  # (n,)
    return root((W.square().sum(0) if weights is None else weights @ W.square()) + 2 * cross + square)


def frobenius(operator: Operator) -> Tensor:
    """The Frobenius norm: ‖B A‖² = tr((BᵀB)(A Aᵀ)) where there are factors."""
    factors = as_low_rank(operator)
    if factors is None:
        return wide(operator.dense()).norm()
    pair = factors.folded()
    B, A = wide(pair.B), wide(pair.A)
    return ((B.t() @ B) * (A @ A.t())).sum().clamp_min(0).sqrt()


def svd(operator: Operator) -> SVD:
    """Thin singular value decomposition, signs fixed so that the largest entry of each left vector is positive."""
    factors = as_low_rank(operator)
    if factors is None or factors.rank >= min(operator.shape):
        U, S, Vh = torch.linalg.svd(wide(operator.dense()), full_matrices=False)
    else:
        pair = factors.folded()
        left, left_core = torch.linalg.qr(wide(pair.B))  # (m, r), (r, r)
        right, right_core = torch.linalg.qr(wide(pair.A).t())  # (n, r), (r, r)
        u, S, vh = torch.linalg.svd(left_core @ right_core.t())
        U, Vh = left @ u, vh @ right.t()
    signs = torch.gather(U, 0, U.abs().argmax(0, keepdim=True)).sign()  # (1, k)
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)
    return SVD(U * signs, S, Vh * signs.t())


def _halves(factors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """A pair of factors, or one matrix and an identity on its shorter side."""
    if len(factors) == 2:
        return factors[0], factors[1]
    m, n = factors[0].shape
    identity = torch.eye(min(m, n), dtype=factors[0].dtype, device=factors[0].device)
    return (identity, factors[0]) if m < n else (factors[0], identity)


def wide(tensor: Tensor) -> Tensor:
    """At least float32, so that sums of squares of half-precision weights are right."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def full_precision() -> AbstractContextManager[Any]:
    """Autocast switched off: it would take the matrix products under a norm to half precision."""
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            return torch.autocast(kind, enabled=False)
    return nullcontext()


def root(square: Tensor) -> Tensor:
    """√square where it is positive, 0 elsewhere (rounding, rows of zeros), with gradient 0 there instead of NaN."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def _split(operator: Operator) -> tuple[Base | None, LowRank | None]:
    """The frozen base and the low-rank rest of a sum, or None for what is not of that form."""
    if not isinstance(operator, Sum) or not isinstance(operator.terms[0], Base) or len(operator.terms) < 2:
        return None, None
    rest = operator.terms[1:]
    return operator.terms[0], as_low_rank(rest[0] if len(rest) == 1 else Sum(*rest))


def _square_row_norms(base: Base, weight: Tensor) -> Tensor:
    """‖w_i‖² of the frozen layer, kept on the layer until its weight changes."""
    source = base.plain_weight()
    if torch.compiler.is_compiling() or source is None or source.requires_grad or source.is_inference():
        return weight.square().sum(1)
    key = (source.data_ptr(), source._version, weight.dtype, str(source.device))
    cached = base.layer.__dict__.get("_rankwise_square_row_norms")
    if cached is None or cached[0] != key:
        cached = (key, weight.detach().square().sum(1))
        base.layer.__dict__["_rankwise_square_row_norms"] = cached
    return cached[1]
