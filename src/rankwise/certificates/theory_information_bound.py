"""Gap bounds that count the bits a trained adapter can hold: rank, freezing A, sharing and quantizing all pay in one coin.

P trained numbers of q bits, N samples, K = P q bits:

    in expectation    |E gap| <= √(2 σ² K ln 2 / N)                          loss σ-sub-Gaussian; in [0, 1]: σ = 1/2
    for this model    gap <= √((K ln 2 + ln(1/δ)) / (2N)), prob. 1 - δ       loss in [0, 1], model stored in K bits of a code
                                                                             fixed before the data were seen
    samples for a gap g:   N = 2 σ² K ln 2 / g²

Above about a thousand trained numbers the absolute bound is vacuous (> 1) and says so; the ratio between methods is what to
use. `best_q` quantizes the adapter for real and chooses q by train risk + bound. Not a bound on the test error: a B-only
adapter has a smaller gap and may fit worse.

*Differs*: hyperparameters and seeds that were selected cost log₂ of their number in bits; pass `extra_bits`.

Zhu et al.: Asymmetry in Low-Rank Adapters of Foundation Models, 2024, arXiv:2402.16842. Li, Farkhoor, Liu, Yosinski: Measuring
the Intrinsic Dimension of Objective Landscapes, 2018, arXiv:1804.08838. Xu, Raginsky: Information-Theoretic Analysis of
Generalization Capability of Learning Algorithms, 2017, arXiv:1705.07809.
"""

from __future__ import annotations

from rankwise.certificates.bit_counting import Adapter, best_q, bits, compare, gap_it, gap_occam, quantize, samples_for
from rankwise.core.protocols import Report

__all__ = ["best_q", "bits", "compare", "gap_it", "gap_occam", "quantize", "samples_for", "theory_information_bound"]


def theory_information_bound(
    adapter: Adapter, samples: int, *, q: float = 16.0, sigma: float = 0.5, delta: float = 0.05, extra_bits: float = 0.0
) -> Report:
    """Both bounds of one adapter (`handle.trained_numbers`, its tensors or its file), and the samples a gap of 0.1 takes."""
    size = bits(adapter, q) + extra_bits
    occam, expected = gap_occam(size, samples, delta=delta), gap_it(size, samples, sigma=sigma)
    return Report(
        name="theory_information_bound",
        measured={"bits": size, "samples for a gap of 0.1": samples_for(0.1, size, sigma=sigma)},
        assumptions=(
            f"loss in [0, 1], {samples} independent samples, probability 1 - {delta:g}",
            f"the model is really stored in these bits ({q:g} per number) by a code fixed before the data were seen",
            "choices made on the data (hyperparameters, seeds) are counted in extra_bits",
        ),
        where=f"N = {samples}",
        reading="use the ratio between two adapters: the bound grows with the square root of their bits."
        if occam > 1.0
        else "the train risk of this adapter is within the bound of its true risk.",
        bound=occam,
        unit="gap of a loss in [0, 1]",
        vacuous=occam > 1.0,
        table=(
            {"bound": "for this model", "value": occam, "vacuous": occam > 1.0},
            {"bound": f"in expectation, {sigma:g}-sub-Gaussian loss", "value": expected, "vacuous": expected > 1.0},
        ),
    )
