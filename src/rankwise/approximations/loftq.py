"""LoftQ: a quantized base and a low-rank pair that together stay close to the weight.

    min over quantized Q, B (m, r), A (r, n) of ‖W − deq(Q) − s·B A‖_F, in turns from B A = 0, t = 1 … T:
    Q_t = q(W − s·B_{t−1} A_{t−1})          s·B_t A_t = the best rank-r part of W − deq(Q_t), split evenly

Q is not taken again after the last pair. T = 1 is the plain correction of a quantized weight. On purpose the model starts at
deq(Q) + s·B A, near the base but not at it. Mode "simulated" writes deq(Q) into the weight, in its own precision, and detaching
brings W back to the bit; stored beside A and B are the factors B_{T−1}, A_{T−1} (none for T = 1), from which a plain base gives
the same Q again, so a file has twice the numbers of LoRA and no weights. Mode "quantized" is for layers that really are
quantized (bitsandbytes, torchao): Q is theirs and stays, so one turn is all, and W must come with statistics from before.
Against W the update is of full rank: the pair is plain LoRA on deq(Q), not on W, and merging gives a dense weight.

The error need not fall with t. Data play no part. An exact SVD per turn, O(mn·min(m, n)).

*Differs*: the releases leave out the division by s, right for their s = 1 only. Bits mixed over layers: one adapter each.

Li, Yu, Liang, He, Karampatziakis, Chen, Zhao: LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, 2023,
arXiv:2310.08659.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from rankwise.approximations.quantizers import NormalFloat, Uniform
from rankwise.approximations.starting import check_choice
from rankwise.approximations.truncated_svd import plain_start, truncated_svd
from rankwise.core.errors import ArgumentError, StatisticsError
from rankwise.core.operators import LowRank
from rankwise.core.parameterization import PRODUCT, Replacement
from rankwise.core.piece import register
from rankwise.core.statistics import LayerStatistics, Statistic


class Rounded(Replacement):
    """deq(q(W − left right)).

    Args:
        quantizer: q.
        left, right: (m, k), (k, n) what is taken out of W before; k = 0 for nothing.
    """

    left: Tensor
    right: Tensor

    def __init__(self, quantizer: NormalFloat | Uniform, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.register_buffer("left", left)
        self.register_buffer("right", right)

    def forward(self, untouched: Tensor) -> Tensor:
        """deq(Q) (m, n) for the weight W."""
        # In float64, so that the same file gives the same codes on every machine.
        product = self.left.double() @ self.right.double()  # (m, n)
        return self.quantizer.quantize(untouched.double() - product).dequantize().to(untouched.dtype)


@register("start")
class LoftQ:
    """s·B A = the best rank-r part of W − deq(Q).

    Args:
        bits: of a code; None means those of the quantizer, or 4.
        iterations: T.
        block: numbers that share a scale.
        quantizer: "nf4", "nf2" or "uniform"; None means normal float with these bits.
        mode: "simulated", or "quantized" for layers that are quantized already.
    """

    needs: frozenset[Statistic] = frozenset({Statistic.WEIGHT})
    kind: str = PRODUCT
    shifted: bool = True

    def __init__(
        self,
        *,
        bits: int | None = None,
        iterations: int = 5,
        block: int = 64,
        quantizer: str | None = None,
        mode: str = "simulated",
    ) -> None:
        named = {"nf4": 4, "nf2": 2}
        if quantizer is not None:
            check_choice("quantizer", quantizer, ("nf4", "nf2", "uniform"))
        if bits is not None and named.get(quantizer or "", bits) != bits:
            raise ArgumentError(f"{quantizer} has {named[str(quantizer)]} bits, not {bits}; leave out one of the two")
        if iterations < 1:
            raise ArgumentError(
                f"iterations is at least 1, not {iterations}; without any it is a quantized base and plain LoRA"
            )
        self.mode = check_choice("mode", mode, ("simulated", "quantized"))
        width = named.get(quantizer or "", 4) if bits is None else bits
        self.quantizer = Uniform(width, block) if quantizer == "uniform" else NormalFloat(width, block)
        self.iterations = iterations

    def __call__(self, statistics: LayerStatistics, rank: int, *, generator: torch.Generator, scale: float = 1.0) -> LowRank:
        """Factors (B, A) with BᵀB = A Aᵀ.

        Raises:
            StatisticsError: mode and layer do not fit, or the weight from before quantizing is not known.
        """
        if self.mode == "simulated":
            return self.with_base(statistics, rank, generator=generator, scale=scale)[0]
        W, standing = statistics.weight, statistics.frozen
        if standing is None:
            raise StatisticsError(
                f"{statistics.site} is not quantized, so mode='quantized' has no codes to start from; drop it"
            )
        if W.shape == standing.shape and torch.equal(W, standing.to(W)):
            raise StatisticsError(
                f"{statistics.site} is quantized, and its weight from before is not known: call rankwise.collect(model, …) "
                "before quantizing the model, and pass the result as statistics="
            )
        return self._correction(W - standing.to(W), rank, generator, scale, statistics.site)

    def with_base(
        self, statistics: LayerStatistics, rank: int, *, generator: torch.Generator, scale: float = 1.0
    ) -> tuple[LowRank, Rounded]:
        """The factors, and deq(Q_T)."""
        W = statistics.weight  # (m, n)
        if statistics.frozen is not None:
            raise StatisticsError(
                f"{statistics.site} is quantized already, so nothing can be written into it; use mode='quantized', with "
                "statistics collected before quantizing"
            )
        base = self.blank(*W.shape, rank=0).to(W)
        for turn in range(self.iterations):
            factors = self._correction(W - base(W), rank, generator, scale, statistics.site)
            if turn + 1 < self.iterations:
                base = Rounded(self.quantizer, factors.B * scale, factors.A)
        return factors, base

    def blank(self, m: int, n: int, rank: int) -> Rounded:
        """A replacement to be filled from a file."""
        width = rank if self.iterations > 1 else 0
        return Rounded(self.quantizer, torch.zeros(m, width), torch.zeros(width, n))

    def _correction(self, error: Tensor, rank: int, generator: torch.Generator, scale: float, site: str) -> LowRank:
        if not error.any():
            warnings.warn(f"{site}: quantizing loses nothing here, so this layer starts as plain LoRA (B = 0)", stacklevel=4)
            return plain_start(error, rank, generator)
        U, S, Vh = truncated_svd(error, rank)
        root = (S / scale).sqrt()  # (r,)
        return LowRank(U * root, root[:, None] * Vh)
