"""LoRA: a trained low-rank correction beside a frozen weight.

    W' = W + s · B A          B (m, r) trained, starts at 0; A (r, n) trained or frozen, starts random

The update is zero at the start, so the first forward equals the base to the bit. `scale` chooses s: alpha / r ("lora"),
alpha / √r ("rslora", stable for large r) or alpha ("constant"). With `freeze_input` only B is trained (LoRA-FA, asymmetric
LoRA): half the numbers, and the update stays in the row space of A. Trained numbers r(m + n), or r·m with A frozen; extra
FLOPs 2r(m + n) per token. Rank at most r; exported as it is.

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
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import INPUT, PRODUCT, Additive, Site
from rankwise.core.recipe import register

SCALES = ("lora", "rslora", "constant")


def scale_of(policy: str, alpha: float | None, rank: int) -> float:
    """The scale s of a policy: alpha / r, alpha / √r, or alpha. alpha None means r, so that s is 1 (or √r)."""
    value = float(rank if alpha is None else alpha)
    if policy not in SCALES:
        raise ArgumentError(f"scale is one of {', '.join(SCALES)}, not {policy!r}")
    return {"lora": value / rank, "rslora": value / math.sqrt(rank), "constant": value}[policy]


@register("parameterization")
class LoRA(Additive):
    """W' = W + s · B A.

    Args:
        site: the layer.
        rank: r.
        alpha: numerator of the scale s; None means r.
        scale: "lora" (alpha / r), "rslora" (alpha / √r) or "constant" (alpha).
        dropout: probability of dropping an input of the update's branch.
        input_start: how A starts: "kaiming" U(±1/√n), "gaussian" N(0, 1/r²), or "orthonormal" rows.
        freeze_input: keep A as it starts.
    """

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
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ArgumentError(f"dropout is a probability in [0, 1), not {dropout}")
        self.rank, self.scale, self.dropout = rank, scale_of(scale, alpha, rank), dropout
        self.masks, self.input_start = site.masks, input_start
        B, A = self._draw(site, frozen=freeze_input)  # (m, r), (r, n)
        self.B = nn.Parameter(B)
        if freeze_input:
            self.register_buffer("A", A)
        else:
            self.A = nn.Parameter(A)

    def _draw(self, site: Site, *, frozen: bool) -> tuple[Tensor, Tensor]:
        """B (m, r) and A (r, n) with B A = 0. The zero sits in A for an embedding, whose columns are looked up one by one."""
        zero = site.zeros(site.m, self.rank)
        if site.layout.kind == "embedding" and not frozen:
            return site.normal(site.m, self.rank), site.zeros(self.rank, site.n)
        if self.input_start == "orthonormal":
            return zero, torch.linalg.qr(site.normal(site.n, self.rank))[0].t().contiguous()
        if self.input_start == "gaussian":
            return zero, site.normal(self.rank, site.n, std=1.0 / self.rank)
        if self.input_start != "kaiming":
            raise ArgumentError(f"input_start is kaiming, gaussian or orthonormal, not {self.input_start!r}")
        return zero, site.uniform(self.rank, site.n, bound=1.0 / math.sqrt(site.n))

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"B"} if arguments.get("freeze_input") else {"A", "B"})

    @classmethod
    def start_kinds(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({PRODUCT, INPUT})

    @classmethod
    def restarts(cls, **arguments: Any) -> bool:
        return True

    def update(self) -> Operator:
        update = LowRank(self.B, self.A, self.scale)
        if self.training and self.dropout and self.masks is not None:
            return Dropped(update, self.dropout, self.masks)
        return update

    def load_factors(self, factors: LowRank) -> None:
        self.B.copy_(factors.B)
        self.A.copy_(factors.A)

    def restart(self, site: Site) -> None:
        B, A = self._draw(site, frozen="A" not in self._parameters)
        self.B.copy_(B)
        self.A.copy_(A)
