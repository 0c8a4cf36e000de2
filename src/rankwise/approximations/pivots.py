"""Rows and columns that stand for a matrix: pivots of QR and of LU, norms, leverage scores.

pivoted_lu(M)            M[order] = L U with partial pivoting, the permutation as an index vector
select_columns(M, r)     r different columns of M (m, n), by one of these rules:

"qr"         greedy: the longest column, then the one that is longest after projecting out those chosen (pivots of a QR)
"norm"       the longest columns
"leverage"   the largest entries of diag(V_r V_rᵀ), from the r leading right singular vectors V_r (n, r)
"deim"       discrete empirical interpolation of V_r: the row pivots of its LU
"random"     drawn without replacement

Rows are the columns of Mᵀ. "qr" stops after r pivots, O(m n r); the two that need singular vectors take a whole SVD. All but
"random" are functions of M alone; which of two equal columns comes first may differ between machines, so indices are stored.

Drineas, Mahoney, Muthukrishnan: Relative-Error CUR Matrix Decompositions, 2008, arXiv:0708.3696. Sorensen, Embree: A DEIM
Induced CUR Factorization, 2016, arXiv:1407.5516.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.approximations.truncated_svd import check_rank, truncated_svd
from rankwise.core.errors import ArgumentError

RULES = ("qr", "norm", "leverage", "deim", "random")


def pivoted_lu(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """L and U packed in one (m, n) matrix, and the order (m,) of the rows: matrix[order] = L U.

    L (m, k) is below the diagonal and has a unit diagonal, U (k, n) is the rest, k = min(m, n).
    """
    packed, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    order = list(range(matrix.shape[0]))
    for row, pivot in enumerate(pivots.tolist()):  # LAPACK's record of swaps, counted from 1
        order[row], order[pivot - 1] = order[pivot - 1], order[row]
    return packed, torch.tensor(order, device=matrix.device)


def select_columns(matrix: Tensor, rank: int, rule: str = "qr", *, generator: torch.Generator | None = None) -> Tensor:
    """The indices (r,) of `rank` different columns of an (m, n) matrix.

    Args:
        matrix: M.
        rank: r, at most min(m, n).
        rule: one of `RULES`.
        generator: private CPU generator, for "random".

    Raises:
        ArgumentError: the rank does not fit, or the rule is unknown.
    """
    check_rank(rank, *matrix.shape)
    match rule:
        case "qr":
            return _greedy(matrix, rank)
        case "norm":
            return _largest(matrix.norm(dim=0), rank)
        case "leverage":
            return _largest(truncated_svd(matrix, rank).Vh.square().sum(0), rank)
        case "deim":
            return pivoted_lu(truncated_svd(matrix, rank).Vh.t())[1][:rank]
        case "random":
            if generator is None:
                raise TypeError("a random selection needs a generator; this is a bug in rankwise")
            return torch.randperm(matrix.shape[1], generator=generator)[:rank].to(matrix.device)
    raise ArgumentError(f"columns are selected by {', '.join(RULES)}, not {rule!r}")


def _largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the largest scores, the first of equal ones first."""
    return torch.sort(scores, descending=True, stable=True).indices[:count]


def _greedy(matrix: Tensor, rank: int) -> Tensor:
    """Pivots of a QR with column pivoting, by projecting every chosen direction out of what is left."""
    rest = matrix.clone()  # (m, n)
    chosen: list[int] = []
    for _ in range(rank):
        norms = rest.square().sum(0)  # (n,)
        norms[chosen] = -1.0  # a matrix of lower rank leaves only rounding; never the same column twice
        chosen.append(int(norms.argmax()))
        direction = rest[:, chosen[-1]]  # (m,)
        length = direction.norm()
        if length > 0:
            unit = direction / length
            rest -= torch.outer(unit, unit @ rest)
    return torch.tensor(chosen, device=matrix.device)
