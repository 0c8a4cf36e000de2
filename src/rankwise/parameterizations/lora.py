"""LoRA: a trained low-rank correction beside a frozen weight.

    W' = W + s · B A          B (m, r) trained, starts at 0; A (r, n) trained or frozen, starts random

The update is zero at the start, so the first forward equals the base to the bit. `scale` chooses s: alpha / r ("lora"),
alpha / √r ("rslora", stable for large r) or alpha ("constant"). With `freeze_input` only B is trained (LoRA-FA, asymmetric
LoRA): half the numbers, no input kept for backward, and the update stays in the row space of A. Trained numbers r(m + n),
or r·m with A frozen; extra FLOPs 2r(m + n) per token. Rank at most r; exported as it is.

Not weight decay on W: decay on B and A acts like a nuclear-norm penalty on the update.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen: LoRA: Low-Rank Adaptation of Large Language Models, 2021,
arXiv:2106.09685. Kalajdzievski: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023, arXiv:2312.03732.
Zhu et al.: Asymmetry in Low-Rank Adapters of Foundation Models, 2024, arXiv:2402.16842. Zhang et al.: LoRA-FA, 2023,
arXiv:2308.03303.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.combinators import Dropped
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import Dense, LowRank, Operator
from rankwise.core.parameterization import FROZEN_OUTPUT, INPUT, OUTPUT, PAIR, PRODUCT, Additive, Site
from rankwise.core.piece import register
from rankwise.core.queries import svd
from rankwise.parameterizations.corrected import correct_gradient
from rankwise.parameterizations.scaling import scale_of


@register("parameterization")
class LoRA(Additive):
    """W' = W + s · B A.

    Args:
        site: the layer.
        rank: r.
        alpha: numerator of the scale s; None means r.
        scale: "lora" (alpha / r), "rslora" (alpha / √r) or "constant" (alpha).
        dropout: probability of dropping an input of the update's branch.
        input_start: how A starts: "kaiming" U(±1/√n), "gaussian" N(0, 1/r²), "sketch" N(0, 1/r), "orthonormal" rows, or
            "leading" or "trailing" right singular vectors of W.
        freeze_input: keep A as it starts and train B from 0.
        freeze_output: keep B as it starts and train A from 0, the control of the asymmetry paper.
        output_start: how a frozen B starts: "orthonormal" columns, or "sketch" N(0, 1/r).
        correct: with a frozen A, ε for which the gradient of B becomes (1/s²) ∂L/∂B (A Aᵀ + ε I)⁻¹ (see `corrected.py`).
    """

    A: Tensor
    B: Tensor

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float | None = None,
        scale: str = "lora",
        dropout: float = 0.0,
        input_start: str = "kaiming",
        freeze_input: bool = False,
        freeze_output: bool = False,
        output_start: str = "orthonormal",
        correct: float | None = None,
    ) -> None:
        super().__init__()
        if correct is not None and not freeze_input:
            raise ArgumentError("the correction is for a frozen input factor (lora_fa); with A trained use scaled_gd")
        if freeze_input and freeze_output:
            raise ArgumentError("freeze_input and freeze_output together leave nothing to train; choose one")
        if not 0.0 <= dropout < 1.0:
            raise ArgumentError(f"dropout is a probability in [0, 1), not {dropout}")
        self.rank, self.scale, self.dropout = rank, scale_of(scale, alpha, rank), dropout
        self.thin, self.input_start, self.output_start = site.thin, input_start, output_start
        self.frozen = "A" if freeze_input else "B" if freeze_output else ""
        for role, factor in zip("BA", self._draw(site), strict=True):  # (m, r), (r, n)
            if role == self.frozen:
                self.register_buffer(role, factor)
            else:
                self.register_parameter(role, nn.Parameter(factor))
        self.correct = correct

    def _draw(self, site: Site) -> tuple[Tensor, Tensor]:
        """B (m, r) and A (r, n) with B A = 0. The zero sits in A for an embedding, whose columns are looked up one by one."""
        if self.frozen == "B":
            return self._frozen_output(site), site.zeros(self.rank, site.n)
        if site.layout.kind == "embedding" and not self.frozen:
            return site.normal(site.m, self.rank), site.zeros(self.rank, site.n)
        return site.zeros(site.m, self.rank), self._input_factor(site)

    def _frozen_output(self, site: Site) -> Tensor:
        """B (m, r) as `output_start` says."""
        if self.output_start not in ("orthonormal", "sketch"):
            raise ArgumentError(f"output_start is orthonormal or sketch, not {self.output_start!r}")
        if self.output_start == "sketch":
            return site.normal(site.m, self.rank, std=self.rank**-0.5)
        return torch.linalg.qr(site.normal(site.m, self.rank))[0]

    def _input_factor(self, site: Site) -> Tensor:
        """A (r, n) as `input_start` says."""
        match self.input_start:
            case "kaiming":
                return site.uniform(self.rank, site.n, bound=1.0 / math.sqrt(site.n))
            case "gaussian":
                return site.normal(self.rank, site.n, std=1.0 / self.rank)
            case "sketch":
                return site.normal(self.rank, site.n, std=self.rank**-0.5)
            case "orthonormal":
                return torch.linalg.qr(site.normal(site.n, self.rank))[0].t().contiguous()
            case "leading":
                return site.cast(svd(Dense(site.weight())).Vh[: self.rank])
            case "trailing":
                return site.cast(svd(Dense(site.weight())).Vh[-self.rank :])
        raise ArgumentError(
            f"input_start is kaiming, gaussian, sketch, orthonormal, leading or trailing, not {self.input_start!r}"
        )

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        frozen = {"A"} if arguments.get("freeze_input") else {"B"} if arguments.get("freeze_output") else set()
        return frozenset({"A", "B"} - frozen)

    @classmethod
    def start_kinds(cls, **arguments: Any) -> frozenset[str]:
        if arguments.get("freeze_output"):  # an input factor would leave B = 0 for good
            return frozenset({PRODUCT, FROZEN_OUTPUT})
        return frozenset({PRODUCT, INPUT} if arguments.get("freeze_input") else {PRODUCT, INPUT, OUTPUT, PAIR})

    @classmethod
    def narrows(cls, **arguments: Any) -> bool:
        return True

    def update(self) -> Operator:
        B = self.B
        if self.correct is not None and torch.is_grad_enabled():
            B = correct_gradient(B, self.A, self.scale, self.correct)
        update = LowRank(B, self.A, self.scale)
        if self.training and self.dropout and self.thin is not None:
            return Dropped(update, self.dropout, self.thin)
        return update

    def load_factors(self, factors: LowRank) -> None:
        self.B.copy_(factors.B)
        self.A.copy_(factors.A)

    def restart(self, site: Site) -> None:
        B, A = self._draw(site)
        self.B.copy_(B)
        self.A.copy_(A)
