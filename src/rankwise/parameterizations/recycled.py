"""EigenLoRAx: factors in the principal subspace of earlier adapters of the same base; only the coordinates are trained.

    W' = W + B A        B = basis_B coefficients_B,  A = (basis_A coefficients_A)ᵀ

basis_A (n, K), basis_B (m, K) are orthonormal, frozen and each layer's own; coefficients_A and coefficients_B (K, r) are
trained. Of the earlier factors side by side, X = [A_1ᵀ … A_Tᵀ] (n, Σ r_t), scales folded into B, the mean column is taken off
and the `components` leading left singular vectors are kept; then comes the direction of that mean (with it the earlier
adapters are held exactly at K = rank X), then `random_components` random ones, orthogonal to all before, for few or weak
earlier adapters. Without earlier adapters there are random ones alone. "zero" starts coefficients_B at 0, so W' = W;
"uniform", the release's, draws both from U(±½), far from the base. Trained numbers 2 K r; FLOPs 2 K r (m + n) once per forward
and 2r(m + n) per token. Exactly LoRA of rank r. A frozen basis is stored per layer: K (m + n) numbers.

*Differs* from the release: starts at zero; scales are folded in; a mean direction is kept; singular vectors instead of the
eigenvectors of a covariance. Not invariant to the gauge (B M, M⁻¹ A) of the earlier adapters.

Kaushik et al.: EigenLoRAx: Recycling Adapters to Find Principal Subspaces for Resource-Efficient Adaptation and
Inference, 2025, arXiv:2502.04700.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import Additive, Facts, Site
from rankwise.core.piece import register
from rankwise.core.stored import stored_update, stored_updates


@register("parameterization")
class Recycled(Additive):
    """W' = W + basis_B coefficients_B coefficients_Aᵀ basis_Aᵀ.

    Args:
        site: the layer.
        adapters: folders that `handle.save` wrote, of adapters on the same base; `interop.from_peft` brings PEFT's here.
        rank: r.
        components: principal directions kept of the earlier factors.
        random_components: random directions added.
        center: take the mean column off first, and keep its direction.
        start: "zero" or "uniform".
    """

    basis_A: Tensor
    basis_B: Tensor

    def __init__(
        self,
        site: Site,
        *,
        adapters: Sequence[str] = (),
        rank: int = 8,
        components: int = 32,
        random_components: int = 0,
        center: bool = True,
        start: str = "zero",
    ) -> None:
        super().__init__()
        if start not in ("zero", "uniform"):
            raise ArgumentError(f"start is zero or uniform, not {start!r}")
        self.rank, self.start = rank, start
        width = width_of_basis(tuple(adapters), components, random_components, center)
        known = [] if site.blank else stored_updates(adapters, site)
        for letter, size in (("A", site.n), ("B", site.m)):
            columns = [pair.A.t() if letter == "A" else pair.B for pair in known]  # (size, r_t) each
            noise = site.uniform(size, random_components, bound=1.0, purpose=f"directions {letter}").double()
            basis = site.zeros(size, width) if site.blank else _basis(columns, noise, components, center)
            self.register_buffer(f"basis_{letter}", site.cast(basis))  # (size, K)
        self.coefficients_A = nn.Parameter(site.uniform(width, rank, bound=0.5, purpose="A"))  # (K, r)
        zero = start == "zero"
        self.coefficients_B = nn.Parameter(site.uniform(width, rank, bound=0.0 if zero else 0.5, purpose="B"))  # (K, r)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"coefficients_A", "coefficients_B"})

    @classmethod
    def facts_of(cls, **arguments: Any) -> Facts:
        if arguments.get("start", "zero") == "zero":
            return cls.facts
        reason = "both coefficients start at random, as published"
        return dataclasses.replace(cls.facts, starts_at_base=False, expected_failures={"starts_at_base": reason})

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        adapters, components = tuple(arguments.get("adapters", ())), arguments.get("components", 32)
        extra, center = arguments.get("random_components", 0), arguments.get("center", True)
        width, most = width_of_basis(adapters, components, extra, center), min(site.m, site.n)
        found = []
        if not 1 <= width <= most:
            has = f"{width} for a layer of {site.m} × {site.n}"
            found.append((f"1 to min(m, n) = {most} directions", has, "change components and random_components"))
        elif adapters and not site.blank:
            held = sum(stored_update(folder, site).rank for folder in adapters) - bool(center)
            if components > held:
                has = f"components is {components}; the {len(adapters)} adapters have {held} directions here"
                found.append(
                    ("no more components than directions", has, f"use components={held}, and random_components for more")
                )
        return [Problem(piece="eigenlorax", needs=n, has=h, remedy=r, sites=(site.name,)) for n, h, r in found]

    def update(self) -> Operator:
        return LowRank(self.basis_B @ self.coefficients_B, (self.basis_A @ self.coefficients_A).t())

    @torch.no_grad()
    def project_(self, factors: LowRank) -> None:
        """Starts from a known adapter: the coordinates of its factors in the bases."""
        pair = factors.folded()
        self.coefficients_A.copy_(self.basis_A.t() @ pair.A.t().to(self.basis_A.dtype))
        self.coefficients_B.copy_(self.basis_B.t() @ pair.B.to(self.basis_B.dtype))

    def restart(self, site: Site) -> None:
        self.coefficients_A.copy_(site.uniform(*self.coefficients_A.shape, bound=0.5, purpose="A"))
        self.coefficients_B.zero_()


def width_of_basis(adapters: tuple[str, ...], components: int, random_components: int, center: bool) -> int:
    """K: principal directions, that of the mean, and random ones."""
    return random_components + (components + bool(center) if adapters else 0)


def _basis(columns: Sequence[Tensor], noise: Tensor, components: int, center: bool) -> Tensor:
    """(size, K) orthonormal: leading left singular vectors, the mean's direction, random ones."""
    parts = [noise]
    if columns:
        X = torch.cat([column.double() for column in columns], dim=1).to(noise.device)  # (size, Σ r_t)
        mean = X.mean(1, keepdim=True)  # (size, 1)
        U = torch.linalg.svd(X - mean if center else X, full_matrices=False)[0][:, :components]  # (size, components)
        parts = [U, mean, noise] if center else [U, noise]
    return torch.linalg.qr(torch.cat(parts, dim=1))[0]
