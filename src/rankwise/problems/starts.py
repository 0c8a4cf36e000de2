"""Where a solver begins: the library's starts, for a matrix problem instead of a layer.

lora       B = 0, A uniform ± 1/√n: LoRA's own
small      α times Gaussian numbers N(0, 1/n) in both factors (in X)
spectral   the best rank-r approximation of -G(0), split evenly
nystrom    B = -G(0) Ω with a Gaussian Ω (n, r), A = 0; X = -G(0) Ω where symmetric
one_step   the leading part of -G(0) again, scaled to be small: divided by γ σ_1, as LoRA-One does

-G(0) is M* for factorization, and M* with an error elsewhere. Only `lora` and an asymmetric `nystrom` have no symmetric form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.operators import LowRank
from rankwise.core.randomness import generator_for
from rankwise.problems.problem import Problem

STARTS = ("lora", "small", "spectral", "nystrom", "one_step")


def start_of(
    problem: Problem,
    rank: int,
    name: str = "small",
    *,
    symmetric: bool = False,
    alpha: float = 1e-6,
    gamma: float = 128.0,
    seed: int = 0,
) -> LowRank:
    """The factors B (m, r), A (r, n) a solver begins from; symmetric: A = Bᵀ.

    Args:
        problem: gives the shape and G(0).
        rank: r.
        name: one of `STARTS`.
        symmetric: the form X Xᵀ.
        alpha: size of the small start.
        gamma: γ of the one-step start.
        seed: of the random numbers.

    Raises:
        ArgumentError: an unknown start, or LoRA's for a symmetric pair.
    """
    m, n = problem.shape
    generator = generator_for(seed, "start", name)
    like = problem.truth
    if not 1 <= rank <= min(m, n):
        raise ArgumentError(f"rank={rank} does not fit the {m} × {n} matrix of {problem.name!r}")
    if name == "lora":
        if symmetric:
            raise ArgumentError("LoRA's start has B = 0 and A ≠ 0, which is no X Xᵀ; use init='small', or symmetric=False")
        A = (torch.rand(rank, n, generator=generator, dtype=torch.float64) * 2 - 1) / n**0.5
        return LowRank(like.new_zeros(m, rank), A.to(like.dtype))
    if name == "small":
        B = _normal(m, rank, generator, like) * (alpha / n**0.5)
        return LowRank(B, B.mT.clone() if symmetric else _normal(rank, n, generator, like) * (alpha / n**0.5))
    target = -problem.gradient_at_zero()  # (m, n)
    if name == "nystrom":
        B = target @ _normal(n, rank, generator, like)
        return LowRank(B, B.mT.clone() if symmetric else like.new_zeros(rank, n))
    if name not in STARTS:
        raise ArgumentError(f"init is one of {', '.join(STARTS)}, or factors; not {name!r}")
    pair = _leading_symmetric(target, rank) if symmetric else _leading(target, rank)
    if name == "spectral":
        return pair
    shrink = (gamma * torch.linalg.matrix_norm(target, 2)).rsqrt()
    return LowRank(pair.B * shrink, pair.A * shrink)


def _leading(matrix: Tensor, rank: int) -> LowRank:
    """The best rank-r approximation, split evenly."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = S[:rank].sqrt()
    return LowRank(U[:, :rank] * root, root[:, None] * Vh[:rank])


def _leading_symmetric(matrix: Tensor, rank: int) -> LowRank:
    """The best positive semidefinite approximation X Xᵀ of rank r."""
    values, vectors = torch.linalg.eigh(matrix)
    X = vectors[:, -rank:].flip(1) * values[-rank:].flip(0).clamp_min(0.0).sqrt()  # (n, r)
    return LowRank(X, X.mT.clone())


def _normal(rows: int, columns: int, generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(like.dtype)
