"""The weighted ridge regression of IterIS at one site: balance λ_i, both Gram matrices with their ridge, and the solve."""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.core.errors import MergeError
from rankwise.core.operators import Dense, LowRank, Operator
from rankwise.core.statistics import MomentCollector


def balance(D: Operator, base: Tensor | None, gram: Tensor, weight: str) -> float:
    """‖F‖²_F / ‖F X‖²_F. For F = 0 (an adapter without this site) its mean over all F of one size, n / ‖X‖²_F."""
    if weight == "none":
        return 1.0
    F = D.dense() if base is None else base + D.dense()  # (m, n)
    size, seen = float(F.square().sum()), float(((F @ gram) * F).sum())
    if size == 0.0:
        size, seen = float(gram.shape[0]), float(gram.trace())
    if seen <= 0.0:
        raise MergeError("a task's inputs of some layer are all zero where its weight acts; give it other samples")
    return size / seen


def regularized(D: Operator, seen: MomentCollector, alpha: float) -> tuple[Tensor, Tensor]:
    """C_i (n, n), and A_i G_i (r_i, n) or, for a dense update, D_i G_i (m, n)."""
    C, G = seen.gram, seen.cross.t()  # type: ignore[union-attr]
    eye = torch.eye(C.shape[0], dtype=C.dtype)
    G = G + (alpha * G.norm()) * eye
    left = D.A if isinstance(D, LowRank) else D.dense()
    return C + (alpha * C.norm()) * eye, left.to(G.device) @ G


def solve(site: str, M: Tensor, parts: list[Tensor], updates: list[Operator]) -> list[Tensor]:
    """The right sides times M⁻¹; M (n, n) is symmetric, positive definite where there is enough data."""
    L, failed = torch.linalg.cholesky_ex((M + M.t()) / 2)
    pivots = L.diagonal().square()
    if int(failed) or not float(pivots.min()) > M.shape[0] * torch.finfo(M.dtype).eps * float(pivots.max()):
        raise MergeError(
            f"{site}: the {M.shape[0]} × {M.shape[0]} Gram matrix of its inputs is singular; give more samples (more tokens "
            "than inputs), or a larger alpha"
        )
    if not all(isinstance(update, LowRank) for update in updates):
        parts = [torch.stack([_dense(D, part) for D, part in zip(updates, parts, strict=True)]).sum(0)]
    return [torch.cholesky_solve(part.t(), L).t() for part in parts]


def _dense(D: Operator, part: Tensor) -> Tensor:
    return D.B @ part if isinstance(D, LowRank) else part


def solution(updates: list[Operator], solved: list[Tensor]) -> Operator:
    """D* from the solved right sides: exact factors, or a dense matrix."""
    pairs = [update for update in updates if isinstance(update, LowRank)]
    if len(pairs) < len(updates):
        return Dense(solved[0])
    return LowRank(torch.cat([pair.B for pair in pairs], dim=1), torch.cat(solved, dim=0))
