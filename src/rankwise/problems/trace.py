"""What a solver did, as plain arrays, and the questions asked of it: how many iterations, at what rate, stuck or not."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from rankwise.core.operators import LowRank
from rankwise.core.queries import svd
from rankwise.problems.problem import Problem

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One run. All arrays have one entry per recorded iteration, the first of them iteration 0, the start.

    Attributes:
        iteration: the iteration's number.
        loss: L(M).
        error: relative error ‖M - M*‖ / ‖M*‖.
        gradient: ‖G‖.
        lambda_min: smallest eigenvalue of G on a symmetric problem, NaN elsewhere; near 0 at a global minimum.
        rank: numerical rank of M (singular values above 1e-8 of the largest).
        seconds: time spent in iterations so far, recording left out.
        factors: the last B, A.
        damping: the damping in use, where the solver changes it; NaN elsewhere.
    """

    iteration: Array
    loss: Array
    error: Array
    gradient: Array
    lambda_min: Array
    rank: Array
    seconds: Array
    damping: Array
    factors: LowRank

    @property
    def diverged(self) -> bool:
        """Whether the run ended in numbers that are not finite."""
        return not bool(np.isfinite(self.loss[-1]))

    def iterations_to(self, tolerance: float) -> int | None:
        """The first recorded iteration with a relative error of at most `tolerance`; None if there is none."""
        reached = np.flatnonzero(self.error <= tolerance)
        return int(self.iteration[reached[0]]) if reached.size else None

    def rate(self, *, decades: float = 1.0, floor: float = 1e-13) -> float:
        """Factor of the error per iteration, by regression of its logarithm over the last decades above the floor.

        NaN where fewer than two recorded iterations lie there.
        """
        usable = np.isfinite(self.error) & (self.error > floor)
        if usable.sum() < 2:
            return float("nan")
        lowest = self.error[usable].min()
        inside = usable & (self.error <= lowest * 10.0**decades)
        if inside.sum() < 2:
            return float("nan")
        slope = np.polyfit(self.iteration[inside], np.log(self.error[inside]), 1)[0]
        return float(np.exp(slope))

    def plateau(self, *, last: int = 20, drop: float = 0.01) -> bool:
        """Whether the loss fell by less than the share `drop` over the last recorded iterations."""
        if self.loss.size <= last:
            return False
        return bool(self.loss[-1] > (1.0 - drop) * self.loss[-1 - last])

    def __str__(self) -> str:
        best = ", ".join(f"{tolerance:g} at {self.iterations_to(tolerance)}" for tolerance in (1e-2, 1e-4, 1e-6))
        return f"Trace({int(self.iteration[-1])} iterations, error {self.error[-1]:.3g}; error {best})"


class Recorder:
    """Collects a trace while a solver runs."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.rows: list[tuple[float, ...]] = []

    @property
    def error(self) -> float:
        """The relative error last recorded."""
        return self.rows[-1][2]

    @torch.no_grad()
    def record(self, iteration: int, factors: LowRank, seconds: float) -> None:
        """Measures where the solver is."""
        loss = float(self.problem.loss(factors))
        if not np.isfinite(loss):
            nothing = float("nan")
            self.rows.append((iteration, loss, float("inf"), nothing, nothing, -1, seconds))
            return
        G = self.problem.gradient(factors)
        lowest = float(torch.linalg.eigvalsh(G)[0]) if self.problem.symmetric else float("nan")
        values = svd(factors).S
        rank = int((values > 1e-8 * values.amax()).sum())
        error, size = self.problem.relative_error(factors), float(torch.linalg.matrix_norm(G))
        self.rows.append((iteration, loss, error, size, lowest, rank, seconds))

    def trace(self, factors: LowRank) -> Trace:
        """The finished trace."""
        iteration, loss, error, gradient, lowest, rank, seconds = (np.array(c) for c in zip(*self.rows, strict=True))
        return Trace(
            iteration=iteration,
            loss=loss,
            error=error,
            gradient=gradient,
            lambda_min=lowest,
            rank=rank,
            seconds=seconds,
            damping=np.full(len(self.rows), float("nan")),
            factors=factors,
        )


def joined(first: Trace, second: Trace) -> Trace:
    """A run and its continuation as one; the continuation's start, which is the first's end, is left out."""
    arrays = {}
    for entry in fields(Trace):
        if entry.name == "factors":
            continue
        tail = getattr(second, entry.name)[1:]
        shift = getattr(first, entry.name)[-1] if entry.name in ("iteration", "seconds") else 0
        arrays[entry.name] = np.concatenate([getattr(first, entry.name), tail + shift])
    return Trace(**arrays, factors=second.factors)
