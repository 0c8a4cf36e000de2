"""The pieces of the asymmetric bound: rate, bound for a fixed β, the union over β, and the fit to measured gaps.

The formulas and their references stand in `theory_asym_bound.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError

UNION = math.pi / math.sqrt(2) / math.tanh(math.pi / math.sqrt(2))  # Σ over all integers j of 1 / (1 + 2j²)


class Rate(NamedTuple):
    """rank: √(r/N); floor: 1/√N. Without a unit."""

    rank: float
    floor: float


class Bound(NamedTuple):
    """value = complexity + fluctuation."""

    value: float
    complexity: float
    fluctuation: float


class Calibration(NamedTuple):
    """gap = c √(r/N) + d/√N with the root of the mean squared residual."""

    c: float
    d: float
    residual: float

    def gap(self, r: int, N: int) -> float:
        """The curve at rank r and N samples."""
        return self.c * math.sqrt(r / N) + self.d / math.sqrt(N)


def asym_gap_rate(r: int, N: int) -> Rate:
    """√(r/N) above and 1/√N below. Doubling r costs a factor 1.41, doubling N buys it back."""
    return Rate(math.sqrt(r / N), 1.0 / math.sqrt(N))


def asym_gap_bound(
    norms: Tensor, beta: float, lipschitz: float = 1.0, loss_bound: float = 1.0, *, outputs: int = 1, delta: float = 0.05
) -> Bound:
    """The bound for a β fixed before the data were seen.

    Args:
        norms: ‖A x_i‖ (N,), one per independent sample (not per token).
        beta: β >= ‖B‖_F.
        lipschitz: L, in the Euclidean norm of f.
        loss_bound: M.
        outputs: m.
        delta: δ.
    """
    N = norms.numel()
    if N < 1 or beta < 0 or not 0.0 < delta < 1.0 or outputs < 1:
        raise ArgumentError(f"needs norms, beta >= 0, delta in (0, 1), outputs >= 1; got {N}, {beta}, {delta}, {outputs}")
    contraction = lipschitz * (math.sqrt(2.0 * outputs) if outputs > 1 else 1.0)
    complexity = 2.0 * contraction * beta / N * float(norms.double().square().sum().sqrt())
    fluctuation = 3.0 * loss_bound * math.sqrt(math.log(2.0 / delta) / (2.0 * N))
    return Bound(complexity + fluctuation, complexity, fluctuation)


def union_over_beta(beta: float, delta: float) -> tuple[float, float]:
    """β rounded up to a power of two, and its share of δ."""
    if beta <= 0.0:
        return 0.0, delta / UNION
    power = math.ceil(math.log2(beta))
    return 2.0**power, delta / (UNION * (1 + 2 * power**2))


def calibrate(points: Sequence[tuple[int, int, float]]) -> Calibration:
    """Fits c, d >= 0 to measured (r, N, gap), by exact non-negative least squares in two unknowns.

    Raises:
        ArgumentError: fewer than four points.
    """
    if len(points) < 4:
        raise ArgumentError(f"calibration needs at least 4 measured (r, N, gap), got {len(points)}")
    X = torch.tensor([[math.sqrt(r / N), 1 / math.sqrt(N)] for r, N, _ in points], dtype=torch.float64)  # (points, 2)
    y = torch.tensor([gap for _, _, gap in points], dtype=torch.float64)
    both = torch.linalg.lstsq(X, y[:, None]).solution.flatten()
    single = [float(X[:, i] @ y / X[:, i].square().sum()) for i in (0, 1)]
    # The optimum has both free, or one of them at zero, or both.
    candidates = [
        both,
        torch.tensor([single[0], 0.0], dtype=X.dtype),
        torch.tensor([0.0, single[1]], dtype=X.dtype),
        torch.zeros(2, dtype=X.dtype),
    ]
    legal = [one for one in candidates if bool((one >= 0).all())]
    best = min(legal, key=lambda one: float((X @ one - y).norm()))
    return Calibration(float(best[0]), float(best[1]), float((X @ best - y).square().mean().sqrt()))
