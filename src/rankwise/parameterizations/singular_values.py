"""SVFit: the singular vectors of the weight stay, its largest singular values are trained; r numbers per layer.

    W' = W + U_r diag(e) V_rᵀ = U diag(σ + e) Vᵀ          U_r (m, r), V_r (n, r) frozen from W = U Σ Vᵀ; e (r,) trained, from 0

σ_i + e_i may become negative; there is no scale and no rectifier. e = 0 is the base to the bit. r is min(m, n) unless `rank`
says less. ∂L/∂e_i = u_iᵀ G v_i: coordinates of one layer do not interact in a least-squares problem, and the left and right
Gram matrices of W' commute with those of W. Exactly LoRA of rank r. FLOPs 2r(m + n) per token, or 2mnr once per forward where
the batch is long (see `frame.Composed`). Frozen r(m + n) numbers: for r = n twice the layer again.

Adam moves small and large singular values by equal amounts, so the relative change of small ones is large. Not SODA, which
also turns the vectors.

*Differs* from the paper's wording, which stores the residual W - U_r diag(σ_r) V_rᵀ and trains σ_r: the increment form is the
same function, rewrites no weight and loses nothing in half precision. The share of "information" that chooses r in the paper
is not defined there precisely enough to be offered; r is given.

Sun, Wei, Wu, Shi, He, Ma, Xie, Yang: SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values,
2024, arXiv:2409.05926.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rankwise.approximations.truncated_svd import truncated_svd
from rankwise.core.operators import Chain, Operator
from rankwise.core.parameterization import Additive, Site
from rankwise.core.piece import register
from rankwise.parameterizations.frame import Composed, Framed


@register("parameterization")
class SingularValues(Framed, Additive):
    """W' = W + U diag(e) Vᵀ.

    Args:
        site: the layer.
        rank: r, the number of singular values that are trained; None means all.

    Example:
        >>> handle = rankwise.adapt_(model, rankwise.compose("svfit"))
    """

    frame = {"U": "mr", "S": "r", "Vh": "rn"}
    U: Tensor
    S: Tensor
    Vh: Tensor

    def __init__(self, site: Site, *, rank: int | None = None) -> None:
        super().__init__()
        self.rank = min(site.m, site.n) if rank is None else rank
        self.hold(site, self.rank)
        self.increment = nn.Parameter(site.zeros(self.rank))  # (r,)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"increment"})

    def read(self, site: Site) -> Mapping[str, Tensor]:
        return truncated_svd(site.weight(), self.rank)._asdict()

    def update(self) -> Chain:
        return Chain(self.U, self.increment, self.Vh)

    def forward(self, base: Operator) -> Operator:
        return Composed(base, self.update())

    def restart(self, site: Site) -> None:
        self.increment.zero_()
