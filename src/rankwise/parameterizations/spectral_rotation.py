"""SODA: the singular values are trained, and the input is turned by a Kronecker product of small rotations.

    W' = U diag(relu(σ + δ)) Vᵀ Qᵀ = (W + U diag(relu(σ + δ) - σ) Vᵀ) Qᵀ,   Q = Q_1 ⊗ Q_2 ⊗ Q_3,   n = n_1 n_2 n_3

W = U Σ Vᵀ (thin, k = min(m, n)); U (m, k), σ (k,), V (n, k) frozen; δ (k,) trained from `start_delta`, Q_i (n_i, n_i) trained
from the identity, kept orthogonal by their own step (`steps.stiefel`). δ = 0 and Q = I is the base to the bit. The singular
values of W' are relu(σ + δ) whatever Q is, and W' W'ᵀ does not depend on Q. Qᵀ meets the input as small products, 2n(n_1 n_2 +
n_3) FLOPs per token, or 2n(n_1 + n_2 + n_3) where n_1 n_2 > 64, indices in C order as in `torch.kron`; the spectrum costs what
SVFit's does. Trained numbers k + n_1² + n_2² + n_3². `decomposition="lq"`: W = L Q_0, L (m, k) lower triangular with a diagonal
≥ 0, which takes the place of σ: U = the first k unit vectors, Vᵀ = Q_0. Full rank; merges exactly.

Where σ + δ ≤ 0 the rectifier stops the gradient: a zero singular value of W moves only with `start_delta` > 0 (1e-3 in the
release, which does not start at the base) or `rectify=False`. Weight decay on Q_i pulls it off the orthogonal group; AdamW
does too.

*Differs*: δ has k entries (the release: m, right for m <= n only); it starts at 0; there is no extra scale on the layer's
output. The trained part of L could not be read off the paper; here its diagonal. Sizes n_i are those of the release for its
layers, else those with the fewest numbers.

Zhang, Wen, Han, Juefei-Xu, Srivastava, Huang, Wang, Tao, Metaxas: Spectrum-Aware Parameter Efficient Fine-Tuning for Diffusion
Models, 2024, arXiv:2405.21050.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.approximations.truncated_svd import truncated_svd
from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.operators import Chain, Operator
from rankwise.core.parameterization import Facts, Site
from rankwise.core.piece import register
from rankwise.parameterizations.frame import Composed, Framed
from rankwise.parameterizations.turned_input import TurnedInput, completed, split_in_three

ROLES = ("Q_1", "Q_2", "Q_3")


@register("parameterization")
class SpectralRotation(Framed):
    """W' = (W + U diag(relu(σ + δ) - σ) Vᵀ) (Q_1 ⊗ Q_2 ⊗ Q_3)ᵀ.

    Args:
        site: the layer.
        factors: (n_1, n_2, n_3) with product n, one of which may be -1 for what is left; None chooses them.
        decomposition: "svd" or "lq".
        rectify: keep the spectrum from falling below 0.
        start_delta: where every entry of δ starts.

    Example:
        >>> handle = rankwise.adapt_(model, rankwise.compose("soda"))
    """

    facts = Facts(additive=False, exact_lora_export=False, layouts=frozenset({"linear", "conv"}))
    frame = {"U": "mr", "S": "r", "Vh": "rn"}
    U: Tensor
    S: Tensor
    Vh: Tensor

    def __init__(
        self,
        site: Site,
        *,
        factors: Sequence[int] | None = None,
        decomposition: str = "svd",
        rectify: bool = True,
        start_delta: float = 0.0,
    ) -> None:
        super().__init__()
        if decomposition not in ("svd", "lq"):
            raise ArgumentError(f"decomposition is svd or lq, not {decomposition!r}")
        self.rank, self.decomposition, self.rectify = min(site.m, site.n), decomposition, rectify
        self.hold(site, self.rank)
        self.delta = nn.Parameter(torch.full_like(self.S, start_delta))  # (k,)
        sizes = split_in_three(site.n) if factors is None else completed(factors, site.n)
        if factors is None and max(sizes) == site.n > 3:
            warnings.warn(
                f"{site.name}: {site.n} inputs is a prime number, so the rotation is one matrix of {site.n**2} numbers; "
                "leave the layer out with where= if that is too many",
                stacklevel=2,
            )
        for role, size in zip(ROLES, sizes, strict=True):
            identity = torch.eye(size, dtype=site.dtype, device=site.device)
            self.register_parameter(role, nn.Parameter(identity))  # (n_i, n_i)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"delta", *ROLES})

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        factors = arguments.get("factors")
        if factors is None:
            return []
        sizes = completed(factors, site.n)
        if len(sizes) == 3 and math.prod(sizes) == site.n and min(sizes) >= 1:
            return []
        remedy = f"use factors={split_in_three(site.n)} or leave factors out, or leave the layer out with where="
        needs, has = f"three factors whose product is n = {site.n}", f"factors is {tuple(factors)}"
        return [Problem(piece=cls.__name__, needs=needs, has=has, remedy=remedy, sites=(site.name,))]

    def read(self, site: Site) -> Mapping[str, Tensor]:
        weight = site.weight()  # (m, n)
        if self.decomposition == "svd":
            return truncated_svd(weight, self.rank)._asdict()
        Q, R = torch.linalg.qr(weight.t())  # (n, k), (k, m): W = Rᵀ Qᵀ
        diagonal = R.diagonal()  # (k,)
        signs = torch.where(diagonal < 0, -1.0, 1.0).to(diagonal)
        unit = torch.eye(site.m, self.rank, dtype=weight.dtype, device=weight.device)  # (m, k)
        return {"U": unit, "S": diagonal.abs(), "Vh": signs[:, None] * Q.t()}

    def forward(self, base: Operator) -> Operator:
        spectrum = self.S + self.delta  # (k,)
        change = (spectrum.relu() if self.rectify else spectrum) - self.S
        return TurnedInput(Composed(base, Chain(self.U, change, self.Vh)), [self.get_parameter(role) for role in ROLES])
