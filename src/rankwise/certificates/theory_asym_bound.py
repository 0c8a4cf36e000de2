"""Generalization gap of B trained over a frozen random A: the rate √(r/N), a computable bound, and a calibrated curve.

For f(x) = B z with z = A x (r,), ‖B‖_F <= β, m outputs, a loss in [0, M] that is L-Lipschitz in f, and N independent samples,
with probability at least 1 - δ over the data given A, for every such B (so also for a trained one):

    gap <= 2 c β / N · √(Σ_i ‖A x_i‖²) + 3 M √(ln(2/δ) / (2N)),    c = L for one output, √(2m) L for m outputs

The second term is the fluctuation of one run; it does not fall with r. β is read off the trained B, so it is rounded up to 2^j
and δ is shared between all j: δ_j = δ / (S (1 + 2j²)), S = Σ_j 1/(1 + 2j²) = (π/√2) coth(π/√2) = 2.2739….

Not for LoRA with A trained (the class is then not linear in what is trained), and not tight: on least squares with a frozen A the
gap goes like r/N. `calibrate` fits gap = c √(r/N) + d/√N to measured gaps; that is the useful output.

*Differs* from the paper, whose constants hold a product of depth, width and norms: the form here is a textbook Rademacher
argument with vector contraction, for one adapted layer of a linear(ized) model.

Kratsios et al.: Sharp Generalization Bounds for Foundation Models with Asymmetric Randomized Low-Rank Adapters, 2025,
arXiv:2506.14530. Maurer: A Vector-Contraction Inequality for Rademacher Complexities, 2016, arXiv:1605.00251.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.protocols import Report

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
        torch.tensor([single[0], 0.0]).double(),
        torch.tensor([0.0, single[1]]).double(),
        torch.zeros(2).double(),
    ]
    legal = [one for one in candidates if bool((one >= 0).all())]
    best = min(legal, key=lambda one: float((X @ one - y).norm()))
    return Calibration(float(best[0]), float(best[1]), float((X @ best - y).square().mean().sqrt()))


def theory_asym_bound(
    *,
    rank: int,
    samples: int,
    norms: Tensor | None = None,
    factor: Tensor | None = None,
    lipschitz: float = 1.0,
    loss_bound: float = 1.0,
    delta: float = 0.05,
    points: Sequence[tuple[int, int, float]] = (),
    input_frozen: bool = True,
) -> Report:
    """The rate, the bound where norms and the trained factor are given, and the calibrated gap where points are.

    Args:
        rank: r.
        samples: N, independent ones.
        norms: ‖A x_i‖ (N,) at the frozen base.
        factor: the trained B (m, r), scale folded in.
        lipschitz, loss_bound, delta: L, M and δ.
        points: measured (r, N, gap), at least four.
        input_frozen: A is not trained.

    Raises:
        ArgumentError: A is trained, or norms and samples disagree.
    """
    if not input_frozen:
        raise ArgumentError(
            "A is trained: the bound and its rate are for a frozen A (lora_fa, lora_xs); see theory_information_bound"
        )
    if (norms is None) != (factor is None) or (norms is not None and norms.numel() != samples):
        raise ArgumentError(
            f"norms (N = {samples} of them) and factor come together; got {norms is not None} and {factor is not None}"
        )
    rate = asym_gap_rate(rank, samples)
    measured = {"rate sqrt(r/N)": rate.rank, "floor 1/sqrt(N)": rate.floor}
    assumptions = ["A frozen and drawn without the data", "samples independent (tokens of one text are not)"]
    bound, reading = None, "only the rate: it has no unit and is not a gap."
    if norms is not None and factor is not None:
        size = float(factor.double().norm())
        beta, share = union_over_beta(size, delta)
        bound = asym_gap_bound(norms, beta, lipschitz, loss_bound, outputs=factor.shape[0], delta=share)
        measured |= {"‖B‖_F": size, "β (rounded up)": beta}
        assumptions += [
            f"one adapted layer, prediction linear in B, loss in [0, {loss_bound:g}] and {lipschitz:g}-Lipschitz in it",
            f"probability 1 - {delta:g} over the data, shared over all powers of two for β",
        ]
        reading = (
            f"of the bound, {bound.complexity:.3g} comes from what B can fit and {bound.fluctuation:.3g} from one run's luck."
        )
    if points:
        fit = calibrate(points)
        measured |= {
            "calibrated c": fit.c,
            "calibrated d": fit.d,
            "residual": fit.residual,
            "calibrated gap": fit.gap(rank, samples),
        }
        free = (fit.d / fit.c) ** 2 if fit.c > 0 else math.inf
        reading += f" By the fit, raising r up to {free:.3g} stays below the sampling noise."
    return Report(
        name="theory_asym_bound",
        measured=measured,
        assumptions=tuple(assumptions),
        where=f"r = {rank}, N = {samples}",
        reading=reading,
        bound=None if bound is None else bound.value,
        unit="gap of the loss" if bound else "",
        vacuous=None if bound is None else bound.value >= loss_bound,
    )
