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

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.protocols import Report

Adapter = int | Mapping[str, Tensor] | str | Path
SCALE_BITS = 32  # one float32 step size per quantized tensor


def bits(adapter: Adapter, q: float = 16.0) -> float:
    """K: P q for a count or for tensors; eight times the size of a file, for a path (its own entropy code)."""
    if isinstance(adapter, str | Path):
        path = Path(adapter)
        if not path.is_file():
            raise ArgumentError(f"{path} is no file; pass the adapter's file, its tensors, or its number of trained numbers")
        return 8.0 * path.stat().st_size
    numbers = adapter if isinstance(adapter, int) else sum(tensor.numel() for tensor in adapter.values())
    if numbers < 0 or q < 0:
        raise ArgumentError(f"numbers and bits cannot be negative: {numbers}, {q}")
    return float(numbers) * q


def gap_it(bits: float, samples: int, *, sigma: float = 0.5) -> float:
    """The bound in expectation."""
    return math.sqrt(2.0 * sigma**2 * bits * math.log(2.0) / _positive(samples))


def gap_occam(bits: float, samples: int, *, delta: float = 0.05) -> float:
    """The bound for this model with probability 1 - δ; with no bits, Hoeffding's."""
    if not 0.0 < delta < 1.0:
        raise ArgumentError(f"delta is in (0, 1), not {delta}")
    return math.sqrt((bits * math.log(2.0) - math.log(delta)) / (2.0 * _positive(samples)))


def samples_for(gap: float, bits: float, *, sigma: float = 0.5) -> float:
    """How many samples bring the bound in expectation down to `gap`."""
    if gap <= 0:
        raise ArgumentError(f"a gap to reach is above 0, not {gap}")
    return 2.0 * sigma**2 * bits * math.log(2.0) / gap**2


def compare(adapters: Mapping[str, Adapter], samples: int, *, q: float = 16.0, sigma: float = 0.5) -> list[dict[str, Any]]:
    """One row per adapter: bits, bound, whether it is vacuous, and the ratio to the first, which is what to read."""
    if not adapters:
        raise ArgumentError("nothing to compare; pass name -> tensors, count of trained numbers, or file")
    gaps = {name: gap_it(bits(adapter, q), samples, sigma=sigma) for name, adapter in adapters.items()}
    first = next(iter(gaps.values()))
    return [
        {
            "name": name,
            "bits": bits(adapters[name], q),
            "bound": gap,
            "vacuous": gap > 1.0,
            "ratio to first": gap / first if first else math.nan,
            "samples for 0.1": samples_for(0.1, bits(adapters[name], q), sigma=sigma),
        }
        for name, gap in gaps.items()
    ]


def quantize(tensors: Mapping[str, Tensor], q: int) -> dict[str, Tensor]:
    """Each tensor on a symmetric grid of 2^q - 1 steps around zero, its step a float32 of its own: q bits per number and 32 more."""
    if q < 2:
        raise ArgumentError(f"q is at least 2 bits (a sign and a size), not {q}")
    most = 2 ** (q - 1) - 1
    result = {}
    for name, tensor in tensors.items():
        step = tensor.detach().abs().max().float() / most if tensor.numel() else torch.tensor(0.0)
        grid = (tensor.detach().double() / step.double().clamp_min(1e-300)).round().clamp(-most, most)
        result[name] = (grid * step.double()).to(tensor.dtype)
    return result


class BestQ(NamedTuple):
    """The chosen q, the quantized tensors, and a row per q tried."""

    q: int
    tensors: dict[str, Tensor]
    table: list[dict[str, float]]


def best_q(
    tensors: Mapping[str, Tensor],
    train_risk: Callable[[Mapping[str, Tensor]], float],
    samples: int,
    *,
    levels: Sequence[int] = (16, 8, 4, 3, 2),
    delta: float = 0.05,
) -> BestQ:
    """The q whose quantized adapter has the least train risk + bound; choosing among the levels costs log₂ of their number.

    Args:
        tensors: name -> trained tensor.
        train_risk: quantized tensors -> risk in [0, 1] on the training data, with those tensors in place.
        samples: N.
        levels: q to try.
        delta: δ.
    """
    table = []
    for q in levels:
        size = bits(tensors, q) + SCALE_BITS * len(tensors) + math.log2(len(levels))
        risk = float(train_risk(quantize(tensors, q)))
        gap = gap_occam(size, samples, delta=delta)
        table.append({"q": float(q), "bits": size, "train risk": risk, "bound": gap, "risk + bound": risk + gap})
    best = int(min(table, key=lambda row: row["risk + bound"])["q"])
    return BestQ(best, quantize(tensors, best), table)


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


def _positive(samples: int) -> int:
    if samples < 1:
        raise ArgumentError(f"samples is at least 1, not {samples}")
    return samples
