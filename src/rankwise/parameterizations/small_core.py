"""LoRA-XS: only a small core between two frozen frames is trained; r² numbers per layer, whatever its size.

    W' = W + s · B R A         B = U_r (m, r), A = Σ_r V_rᵀ (r, n) frozen, from W = U Σ Vᵀ; R (r, r) trained

R starts at N(0, `core_std`²), tiny but not zero, so the first forward is the base to about that size (0 is a valid start too:
R gets a gradient anyway). s = α / r; W keeps all of itself. The update is linear in R, within the r²-dimensional space of
u_i v_jᵀ. `singular_values` says which frame carries Σ: it preconditions R. `frames="kaiming"` takes random frames, as in the
paper's ablation. Signs of the singular vectors are fixed, and the frames are kept in checkpoints: R means nothing under others.
A start B₀ A₀ is held by the thin SVD of the product: orthonormal frames, R = diag(S), as LoRA-SB wants it. FLOPs
2r(m + n) + 2r² per token; exactly LoRA of rank r.

*Differs* from the release: the SVD is exact unless `iterations` asks for the randomized one (the release: 10 power
iterations, and a single one when merging, so that it merges other frames than it trained).

Bałazy, Banaei, Aberer, Tabor: LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, 2024,
arXiv:2405.17604.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.combinators import Dropped
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import Chain, Dense, LowRank, Operator
from rankwise.core.parameterization import PRODUCT, Additive, Facts, Site
from rankwise.core.piece import register
from rankwise.core.queries import SVD, svd
from rankwise.parameterizations.frame import Framed
from rankwise.parameterizations.scaling import scale_of


@register("parameterization")
class SmallCore(Framed, Additive):
    """W' = W + s · B R A, with R trained.

    Args:
        site: the layer.
        rank: r.
        alpha: numerator of s = alpha / r; None means r.
        core_std: standard deviation of R at the start.
        dropout: probability of dropping an input of the update's branch.
        frames: "svd" of the weight, or "kaiming" for random ones.
        singular_values: the frame that carries Σ: "input", "output", or "both" (√Σ each).
        iterations: power iterations of a randomized SVD; None for the exact one.
    """

    facts = Facts(starts_at_base=False)
    frame = {"B": "mr", "A": "rn"}
    A: Tensor
    B: Tensor

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float | None = None,
        core_std: float = 1e-5,
        dropout: float = 0.0,
        frames: str = "svd",
        singular_values: str = "input",
        iterations: int | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ArgumentError(f"dropout is a probability in [0, 1), not {dropout}")
        if frames not in ("svd", "kaiming"):
            raise ArgumentError(f"frames is svd or kaiming, not {frames!r}")
        if singular_values not in ("input", "output", "both"):
            raise ArgumentError(f"singular_values is input, output or both, not {singular_values!r}")
        self.rank, self.scale, self.dropout, self.thin = rank, scale_of("lora", alpha, rank), dropout, site.thin
        self.frames, self.singular_values, self.iterations = frames, singular_values, iterations
        self.hold(site, rank)
        self.R = nn.Parameter(site.normal(rank, rank, std=core_std, purpose="core"))  # (r, r)

    def read(self, site: Site) -> Mapping[str, Tensor]:
        r = self.rank
        if self.frames == "kaiming":
            B = site.uniform(site.m, r, bound=1 / math.sqrt(r), purpose="output frame")
            return {"B": B, "A": site.uniform(r, site.n, bound=1 / math.sqrt(site.n), purpose="input frame")}
        weight = site.weight()
        whole = svd(Dense(weight)) if self.iterations is None else self._randomized(weight, site)
        U, S, Vh = whole.truncated(r)
        power = {"input": 0.0, "both": 0.5, "output": 1.0}[self.singular_values]
        return {"B": U * S**power, "A": S[:, None] ** (1 - power) * Vh}

    def _randomized(self, weight: Tensor, site: Site) -> SVD:
        """The leading triplets from a random range of width r + 8 and `iterations` power iterations."""
        width = min(self.rank + 8, *weight.shape)
        Q = site.normal(site.n, width, purpose="range").to(weight.dtype)  # (n, width)
        for _ in range(self.iterations or 0):
            Q = torch.linalg.qr(weight.t() @ torch.linalg.qr(weight @ Q)[0])[0]
        left = torch.linalg.qr(weight @ Q)[0]  # (m, width)
        return svd(LowRank(left, left.t() @ weight))

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"R"})

    @classmethod
    def start_kinds(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({PRODUCT})

    def update(self) -> Operator:
        update = Chain(self.B, self.R, self.A, scale=self.scale)
        return Dropped(update, self.dropout, self.thin) if self.training and self.dropout and self.thin else update

    def load_factors(self, factors: LowRank) -> None:
        U, S, Vh = svd(LowRank(factors.B, factors.A)).truncated(self.rank)
        self.B.copy_(U)
        self.A.copy_(Vh)
        self.R.copy_(torch.diag(S))

    def restart(self, site: Site) -> None:
        for name, tensor in ({} if site.blank else self.read(site)).items():
            self.get_buffer(name).copy_(tensor)
        self.R.zero_()
