"""LoHa: the update is the product, entry by entry, of two low-rank matrices, so that its rank can reach r².

    W' = W + s · (B₁ A₁) ∘ (B₂ A₂)          B₁, B₂ (m, r), A₁, A₂ (r, n), all trained; s = alpha / r

A₂ starts at zero, so W' = W; the others start kaiming-uniform U(±1/√fan_in) ("zero"), or, as LyCORIS has it, B₁ as
N(0, 0.1²), the A's as N(0, 1) and B₂ at zero ("lycoris"). `tucker` gives each factor of a convolution with a kernel larger
than one its Tucker form, B_c = P_cᵀ and A_c[a, (i, kernel)] = Σ_b T_c[a, b, kernel] Q_c[b, i], with T (r, r, kernel…),
P (r, m), Q (r, in/groups); Q₂ starts at zero. Elsewhere the kernel is flattened into n. Trained numbers 2r(m + n).

It is exactly LoRA of rank r²: row by row the products of B₁ and B₂ make (m, r²), column by column those of A₁ and A₂ make
(r², n). That form or the matrix itself is applied, whichever is fewer operations over forward and backward (`factored`); no
(m, n) matrix is kept in either. s is alpha / r and not alpha / r². Weight decay acts on four factors of a product, and so
far more strongly than its number says.

*Differs* from PEFT and LyCORIS: dropout thins inputs; rows and branches are dropped by lora_dropout's kinds. Embeddings work.

Hyeon-Woo, Ye-Bin, Oh: FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning, 2021,
arXiv:2108.06098. As an adapter: Yeh et al.: Navigating Text-To-Image Customization (LyCORIS), 2023, arXiv:2309.14859.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.combinators import Dropped
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import Additive, Site
from rankwise.core.piece import register
from rankwise.parameterizations.hadamard_product import HadamardProduct
from rankwise.parameterizations.scaling import scale_of

STARTS = ("zero", "lycoris")


@register("parameterization")
class LoHa(Additive):
    """W' = W + s · (B₁ A₁) ∘ (B₂ A₂).

    Args:
        site: the layer.
        rank: r.
        alpha: numerator of the scale s; None means r.
        tucker: Tucker factors in convolutions whose kernel is larger than one.
        start: "zero" (A₂ = 0) or "lycoris" (B₂ = 0), both W' = W.
        dropout: probability of dropping an input of the update's branch.
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float | None = None,
        tucker: bool = False,
        start: str = "zero",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if start not in STARTS:
            raise ArgumentError(f"start is one of {', '.join(STARTS)}, not {start!r}")
        if not 0.0 <= dropout < 1.0:
            raise ArgumentError(f"dropout is a probability in [0, 1), not {dropout}")
        self.rank, self.scale, self.start = rank, scale_of("lora", alpha, rank), start
        self.dropout, self.thin = dropout, site.thin
        self.tucker = tucker and math.prod(site.shape[2:]) > 1
        for role, factor in self._draw(site).items():
            self.register_parameter(role, nn.Parameter(factor))

    def _draw(self, site: Site) -> dict[str, Tensor]:
        """The factors by role, with (B₁ A₁) ∘ (B₂ A₂) = 0."""
        r, lycoris = self.rank, self.start == "lycoris"
        shapes: dict[str, tuple[int, ...]]
        shapes = {"P": (r, site.m), "Q": (r, site.shape[1])} if self.tucker else {"B": (site.m, r), "A": (r, site.n)}
        if self.tucker:
            shapes["T"] = (r, r, *site.shape[2:])
        stds, zero = {"B": 0.1, "P": 0.1, "T": 0.1}, ("B2", "P2") if lycoris else ("A2", "Q2")
        factors = {}
        for letter, shape in shapes.items():
            for role in (f"{letter}1", f"{letter}2"):
                if role in zero:
                    factors[role] = site.zeros(*shape)
                elif lycoris:
                    factors[role] = site.normal(*shape, std=stds.get(letter, 1.0), purpose=role)
                else:
                    factors[role] = site.uniform(*shape, bound=1 / math.sqrt(math.prod(shape[1:])), purpose=role)
        return factors

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        """Those of a layer without Tucker factors."""
        return frozenset() if arguments.get("tucker") else frozenset({"B1", "A1", "B2", "A2"})

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """B₁ (m, r), A₁ (r, n), B₂, A₂, Tucker factors multiplied out."""
        named: dict[str, Tensor] = dict(self.named_parameters())
        if not self.tucker:
            return named["B1"], named["A1"], named["B2"], named["A2"]
        B1, B2 = named["P1"].t(), named["P2"].t()  # (m, r)
        A1, A2 = (torch.einsum("ab...,bi->ai...", named[f"T{c}"], named[f"Q{c}"]) for c in (1, 2))
        return B1, A1.flatten(1), B2, A2.flatten(1)  # A (r, in/groups · kernel)

    def update(self) -> Operator:
        update = HadamardProduct(*self.factors(), self.scale)
        return Dropped(update, self.dropout, self.thin) if self.training and self.dropout and self.thin else update

    def factored(self) -> LowRank:
        """The exact pair of rank r²."""
        return HadamardProduct(*self.factors(), self.scale).factored()

    def restart(self, site: Site) -> None:
        for role, factor in self._draw(site).items():
            getattr(self, role).copy_(factor)
