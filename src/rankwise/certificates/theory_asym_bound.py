"""Generalization gap of B trained over a frozen random A: the rate √(r/N), a computable bound, and a calibrated curve.

For f(x) = B z with z = A x (r,), ‖B‖_F <= β, m outputs, a loss in [0, M] that is L-Lipschitz in f, and N independent samples,
with probability at least 1 - δ over the data given A, for every such B (also a trained one):

    gap <= 2 c β / N · √(Σ_i ‖A x_i‖²) + 3 M √(ln(2/δ) / (2N)),    c = L for one output, √(2m) L for m outputs

The second term is the fluctuation of one run; it does not fall with r. β is read off the trained B, so it is rounded up to 2^j
and δ is shared between all j: δ_j = δ / (S (1 + 2j²)), S = Σ_j 1/(1 + 2j²) = (π/√2) coth(π/√2) = 2.2743….

Not for LoRA with A trained (the class is then not linear in what is trained), and not tight: on least squares with a frozen A
the gap goes like r/N. `calibrate` fits gap = c √(r/N) + d/√N to measured gaps; that is the useful output.

*Differs* from the paper, whose constants hold a product of depth, width and norms: the form here is a textbook Rademacher
argument with vector contraction, for one adapted layer of a linear(ized) model.

Kratsios et al.: Sharp Generalization Bounds for Foundation Models with Asymmetric Randomized Low-Rank Adapters, 2025,
arXiv:2506.14530. Maurer: A Vector-Contraction Inequality for Rademacher Complexities, 2016, arXiv:1605.00251.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from rankwise.certificates.asym_gap import asym_gap_bound, asym_gap_rate, calibrate, union_over_beta
from rankwise.core.errors import ArgumentError
from rankwise.core.protocols import Report

__all__ = ["asym_gap_bound", "asym_gap_rate", "calibrate", "theory_asym_bound", "union_over_beta"]


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
        lipschitz: L, of the loss in the prediction.
        loss_bound: M.
        delta: δ.
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
