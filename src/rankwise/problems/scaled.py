"""ScaledGD on matrix problems as two ready solvers; both run the library's `scaled_gd` step through `solve`.

`sensing_scaledgd`, ScaledGD(λ): recovery with a rank r that may exceed the truth's, from a tiny random start. The rate does
not depend on the condition number κ: O(log κ · log(κ n) + log(1/ε)) iterations, where gradient descent needs about κ times as
many. λ should be of the order of σ_min(M*), which nobody knows: by default it starts at a tenth of ‖G(0)‖ and is halved
whenever the loss stalls, so that the floor it puts under the error goes away too. Where y is noisy, the error stays near the
noise floor.

`nystrom_scaledgd`: factorization from a random sketch of the target. Asymmetric, η = 1: the first step gives B A = P M with P
the projector on range(M Ω), which is M itself if r >= rank(M): one step. Symmetric, η = ½: in a basis of range(M) the
iteration is Newton's for a square root, so the number of right digits doubles; η ≠ ½ is linear with factor |1 - 2η|. Random
starts have parts outside range(M), which only shrink by 1 - η per step. The asymmetric sketch is orthonormalized first, which
leaves the product as it is. Once rounding has left range(M), errors halve instead of squaring; that is not a fault.

Xu, Shen, Chi, Ma: The Power of Preconditioning in Overparameterized Low-Rank Matrix Sensing, 2023, arXiv:2302.01186. Li,
Zhang, Mokhtari, He: On the Crucial Role of Initialization for Matrix Factorization, 2024, arXiv:2410.18965.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import numpy as np
import torch

from rankwise.core.errors import ArgumentError
from rankwise.core.operators import LowRank
from rankwise.problems.measurements import Matrix
from rankwise.problems.problem import Problem, factorizing
from rankwise.problems.solve import solve
from rankwise.problems.starts import start_of
from rankwise.problems.trace import Trace, joined
from rankwise.steps.scaled_gd import scaled_gd

PATIENCE = 10  # iterations between two looks at whether the loss still falls
STALLED = 0.5  # a loss that did not fall to this share of itself in so many iterations
LOWEST = 1e-6  # of the first damping


def sensing_scaledgd(
    problem: Problem,
    *,
    rank: int | None = None,
    damping: float | None = None,
    lr: float = 0.3,
    alpha: float = 1e-6,
    iterations: int = 600,
    seed: int = 0,
) -> Trace:
    """ScaledGD(λ) from α times a Gaussian start.

    Args:
        problem: from `generators`; symmetric ones are solved as X Xᵀ.
        rank: r; default: twice the truth's, the over-parameterized case.
        damping: λ; None anneals it from 0.1 ‖G(0)‖₂.
        lr: η.
        alpha: size of the start.
        iterations: how many in all.
        seed: of the start.

    Example:
        >>> sensing_scaledgd(sensing(condition=100.0), rank=4).iterations_to(1e-4)
    """
    if iterations < 1:
        raise ArgumentError(f"sensing_scaledgd: iterations is {iterations}; at least one is needed")
    width = min(2 * problem.rank, *problem.shape) if rank is None else rank
    if damping is not None:
        trace = solve(
            problem, rank=width, step=scaled_gd(damping=damping), lr=lr, alpha=alpha, iterations=iterations, seed=seed
        )
        return replace(trace, damping=np.full(trace.loss.size, damping))
    value = first = 0.1 * float(torch.linalg.matrix_norm(problem.gradient_at_zero(), 2))
    factors = start_of(problem, width, "small", symmetric=problem.symmetric, alpha=alpha, seed=seed)
    parts: list[Trace] = []
    for done in range(0, iterations, PATIENCE):
        count = min(PATIENCE, iterations - done)
        part = solve(problem, rank=width, init=factors, step=scaled_gd(damping=value), lr=lr, iterations=count)
        parts.append(replace(part, damping=np.full(part.loss.size, value)))
        if part.diverged:
            break
        if part.loss[-1] > STALLED * part.loss[0]:
            value = max(value / 2.0, LOWEST * first)
        factors = part.factors
    return reduce(joined, parts)


def nystrom_scaledgd(
    target: Problem | Matrix,
    *,
    rank: int | None = None,
    lr: float | None = None,
    iterations: int = 20,
    symmetric: bool | None = None,
    seed: int = 0,
) -> Trace:
    """ScaledGD from the Nyström start, with pseudo-inverses.

    Args:
        target: a problem, or a matrix (m, n) to factorize (a tensor or an operator).
        rank: r; default: the truth's.
        lr: η; default: 1, or ½ where symmetric.
        iterations: how many.
        symmetric: look for X Xᵀ; default: as the problem is.
        seed: of the sketch Ω.

    Example:
        >>> nystrom_scaledgd(factorization(m=30, n=25, rank=4)).error[1] < 1e-10
    """
    problem = target if isinstance(target, Problem) else factorizing(target, symmetric=symmetric)
    tied = problem.symmetric if symmetric is None else symmetric
    width = problem.rank if rank is None else rank
    start = start_of(problem, width, "nystrom", symmetric=tied, seed=seed)
    if not tied:
        start = LowRank(torch.linalg.qr(start.B).Q, start.A)  # (m, r)
    rate = lr if lr is not None else 0.5 if tied else 1.0
    return solve(
        problem, rank=width, init=start, step=scaled_gd(damping=0.0), lr=rate, iterations=iterations, symmetric=tied, seed=seed
    )
