"""Runs the library's own steps on a matrix problem and records how they get on.

The factors are a block {"A", "B"} under `BlockOptimizer`, the same shell and the same steps that train adapters; the
gradients G Aᵀ and Bᵀ G are put in by hand. A symmetric problem runs the same pair from A = Xᵀ, B = X: there G is symmetric,
so every step that treats the factors alike moves A by the transpose of what it moves B by, and the pair stays tied by itself.
That is checked in every iteration, and A is set to Bᵀ again, so that rounding does not add up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from rankwise.core.errors import ArgumentError
from rankwise.core.operators import LowRank
from rankwise.core.optimizer import BlockOptimizer
from rankwise.core.step import SiteBlock, Step
from rankwise.problems.problem import Problem
from rankwise.problems.starts import start_of
from rankwise.problems.trace import Recorder, Trace
from rankwise.steps.moments import sgd


def solve(
    problem: Problem,
    *,
    rank: int,
    init: str | LowRank = "small",
    step: Step | Sequence[Step] | None = None,
    lr: float | Callable[[int], float] = 0.3,
    iterations: int = 200,
    every: int = 1,
    alpha: float = 1e-6,
    symmetric: bool | None = None,
    seed: int = 0,
    stop: float = 0.0,
) -> Trace:
    """Minimizes the problem over B A of the given rank.

    Args:
        problem: what to solve.
        rank: r of the factors; may exceed the truth's.
        init: a name of `starts.STARTS`, or factors to begin from.
        step: a step, or a chain of steps (`recipe.steps()`); None means plain gradient descent. Without a step of stage
            "moments" in it, SGD makes the update.
        lr: learning rate η, or what gives it for iteration 1, 2, ….
        iterations: how many.
        every: record each so many iterations; the last is always recorded.
        alpha: size of the small start.
        symmetric: solve with A = Bᵀ; default: as the problem says, unless `init` is "lora".
        seed: of the start.
        stop: relative error at which to stop, looked at whenever it is recorded.

    Raises:
        ArgumentError: a start or a step that does not fit the symmetric form.
    """
    tied = (problem.symmetric and init != "lora") if symmetric is None else symmetric
    if tied and not problem.symmetric:
        raise ArgumentError(f"{problem.name!r} is not symmetric, so there is no X Xᵀ to look for; use symmetric=False")
    first = init if isinstance(init, LowRank) else start_of(problem, rank, init, symmetric=tied, alpha=alpha, seed=seed)
    start = first.folded()
    if start.shape != problem.shape or start.rank != rank:
        raise ArgumentError(
            f"the start is {start.shape[0]} × {start.shape[1]} of rank {start.rank}, the problem {problem.shape[0]} × "
            f"{problem.shape[1]} is to be solved with rank {rank}"
        )
    if tied and not torch.allclose(start.A, start.B.mT, rtol=1e-6, atol=0.0):
        raise ArgumentError("a symmetric start has A = Bᵀ; this one has not. Pass symmetric=False to solve for a free pair")
    B, A = nn.Parameter(start.B.detach().clone()), nn.Parameter(start.A.detach().clone())  # (m, r), (r, n)
    steps = _chain(step)
    rate_at = lr if callable(lr) else lambda iteration: lr
    known = SiteBlock(site="factors", scale=1.0, shape=problem.shape)
    optimizer = BlockOptimizer({"factors": {"A": A, "B": B}}, steps, rate_at(1), facts={"factors": known})
    gains = [part.gain for part in steps if part.gain is not None]  # there is no backward here that would apply them
    recorder, spent = Recorder(problem), 0.0
    recorder.record(0, LowRank(B.detach(), A.detach()), spent)
    for iteration in range(1, iterations + 1):
        began = time.perf_counter()
        with torch.no_grad():
            G = problem.gradient(LowRank(B, A))  # (m, n)
            for gain in gains:
                G = gain.rows(LowRank(B, A))[:, None] * G
            B.grad, A.grad = G @ A.mT, B.mT @ G  # (m, r), (r, n)
        optimizer.param_groups[0]["lr"] = rate_at(iteration)
        optimizer.step()
        if tied:
            _tie(A, B, steps)
        spent += time.perf_counter() - began
        finite = bool(torch.isfinite(B).all() and torch.isfinite(A).all())
        if iteration % every == 0 or iteration == iterations or not finite:
            recorder.record(iteration, LowRank(B.detach(), A.detach()), spent)
            if recorder.error < stop:
                break
        if not finite:
            break
    return recorder.trace(LowRank(B.detach().clone(), A.detach().clone()))


def _chain(step: Step | Sequence[Step] | None) -> list[Step]:
    steps = [] if step is None else [step] if isinstance(step, Step) else list(step)
    return steps if any(part.stage == "moments" for part in steps) else [*steps, sgd()]


@torch.no_grad()
def _tie(A: nn.Parameter, B: nn.Parameter, steps: Sequence[Step]) -> None:
    apart, size = torch.linalg.matrix_norm(A - B.mT), torch.linalg.matrix_norm(B)
    if apart > 1e-4 * size:
        names = " + ".join(step.name for step in steps)
        raise ArgumentError(
            f"{names} moves A and B differently (A is {float(apart / size):.1e} away from Bᵀ after a step), so it "
            "cannot solve the symmetric form; use symmetric=False"
        )
    A.copy_(B.mT)
