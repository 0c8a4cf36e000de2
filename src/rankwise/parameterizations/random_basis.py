"""NOLA: each factor of LoRA is a trained combination of random matrices that a seed gives, so that its size costs nothing.

    A = A₀ + 1/√k Σ_i coefficients_A[i] A_i        A_i (r, n) ~ U(±1)        W' = W + s · B A
    B =      1/√l Σ_j coefficients_B[j] B_j        B_j (m, r) ~ U(±1)

Only coefficients_A (k,) and coefficients_B (l,) are trained, k + l numbers per layer whatever m, n and r are; take the largest
r that time allows. A₀ ~ U(±1/√n) is frozen and drawn from the seed, the coefficients start at zero: W' = W, and only
coefficients_B has a gradient at first. s = α / r. `variant="vit"` has no A₀ and no 1/√k, draws U(±1/√fan_in) with fan_in n and
r, and starts all coefficients at 1/k and 1/l, beside the base. FLOPs 2r(kn + lm) once per forward and 2r(m + n) per token.
Exactly LoRA of rank r. The matrices are drawn again in every forward and backward, `chunk` at a time; `share_bases` keeps one
set for all layers in memory, (k, r, n) and (l, m, r) numbers per width, which saves the drawing. In eval without gradients the
factors are kept until the coefficients change. A checkpoint holds the coefficients, the seed and a hash of what it gives.

*Differs* from the release: private CPU generators, 2¹⁶ levels whatever device and dtype; s = α / r with α = r in both variants.

Koohpayegani et al.: NOLA: Compressing LoRA using Linear Combination of Random Basis, 2023, arXiv:2310.02556.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.bank import Bank
from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import Additive, Facts, Site
from rankwise.core.piece import register
from rankwise.core.transforms import transformed
from rankwise.parameterizations.generated import all_blocks, combine
from rankwise.parameterizations.plan import Plan, can_plan
from rankwise.parameterizations.scaling import scale_of

PROBE = 16  # numbers of each stream whose hash a checkpoint keeps


@register("parameterization")
class RandomBasis(Additive):
    """W' = W + s · B A, both factors combined from seeded random matrices.

    Args:
        site: the layer.
        rank: r.
        alpha: numerator of s = alpha / r; None means r.
        bases_A: k, how many matrices A is combined from.
        bases_B: l, how many B is.
        variant: "language" or "vit".
        chunk: how many matrices are in memory at once.
        share_bases: one set for all layers, kept in memory.
    """

    bank: Bank
    start_A: Tensor | None

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float | None = None,
        bases_A: int = 512,
        bases_B: int = 512,
        variant: str = "language",
        chunk: int = 64,
        share_bases: bool = False,
    ) -> None:
        super().__init__()
        if variant not in ("language", "vit"):
            raise ArgumentError(f"variant is language or vit, not {variant!r}")
        self.rank, self.scale, self.chunk, self.share_bases = rank, scale_of("lora", alpha, rank), chunk, share_bases
        object.__setattr__(self, "bank", site.bank)  # a child of the model's root already
        self.vit, self.plans = variant == "vit", {"A": Plan(), "B": Plan()}
        self.sizes = {"A": (bases_A, rank, site.n), "B": (bases_B, site.m, rank)}  # (k, r, n), (l, m, r)
        self.seeds = {letter: _seed(site, letter) for letter in "AB"}
        for letter, (count, _, _) in self.sizes.items():
            start = site.zeros(count) + (1 / count if self.vit else 0.0)  # (k,) or (l,)
            self.register_parameter(f"coefficients_{letter}", nn.Parameter(start))
        frozen = None if self.vit else site.uniform(rank, site.n, bound=1 / math.sqrt(site.n), purpose="start_A")  # (r, n)
        self.register_buffer("start_A", frozen, persistent=False)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"coefficients_A", "coefficients_B"})

    @classmethod
    def facts_of(cls, **arguments: Any) -> Facts:
        if arguments.get("variant", "language") == "language":
            return cls.facts
        reason = "all coefficients start at 1/k and 1/l, as published"
        return dataclasses.replace(cls.facts, starts_at_base=False, expected_failures={"starts_at_base": reason})

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        bad = [f"{key}={arguments[key]}" for key in ("bases_A", "bases_B", "chunk") if arguments.get(key, 1) < 1]
        needs, has = "at least one matrix for each factor and chunk", ", ".join(bad)
        return [Problem(piece="nola", needs=needs, has=has, remedy="use 1 or more", sites=(site.name,))] if bad else []

    @classmethod
    def shared(cls, sites: Sequence[Site], **arguments: Any) -> Bank | None:
        """The matrices themselves where they are shared, else a few numbers of the stream, for the hash."""
        first, rank, vit = sites[0], arguments.get("rank", 8), arguments.get("variant") == "vit"
        tensors = {"probe": first.cast(all_blocks(_seed(first, "A"), 1, 1, PROBE, 1.0))}  # (1, 1, PROBE)
        tensors["start_probe"] = first.uniform(PROBE, bound=1.0, purpose="start_A")  # (PROBE,)
        if arguments.get("share_bases", False):
            k, count = arguments.get("bases_A", 512), arguments.get("bases_B", 512)
            sizes = {f"A_{s.n}": (k, rank, s.n) for s in sites} | {f"B_{s.m}": (count, s.m, rank) for s in sites}
            for name, size in sizes.items():
                tensors[name] = first.cast(all_blocks(_seed(first, name), *size, _bound(size, vit)))  # (k, r, n), (l, m, r)
        return Bank(tensors, seed=first.seed)

    def basis(self, letter: str) -> Tensor:
        """The random matrices of A, (k, r, n), or of B, (l, m, r)."""
        size = self.sizes[letter]
        if self.share_bases:
            return self.bank[f"A_{size[2]}" if letter == "A" else f"B_{size[1]}"]
        return all_blocks(self.seeds[letter], *size, _bound(size, self.vit)).to(getattr(self, f"coefficients_{letter}"))

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (m, r) and A (r, n)."""
        return self._factor("B"), self._factor("A")

    def _factor(self, letter: str) -> Tensor:
        size, plan, coefficients = self.sizes[letter], self.plans[letter], getattr(self, f"coefficients_{letter}")
        changing = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or not can_plan([coefficients])
        if not changing and (kept := plan.find([coefficients])) is not None:
            return kept
        if self.share_bases or transformed():  # which cannot look into the opaque node
            factor = torch.tensordot(coefficients, self.basis(letter), dims=1)
        else:
            factor = combine(coefficients, self.seeds[letter], size[1], size[2], _bound(size, self.vit), self.chunk)
        factor = factor if self.vit else factor / math.sqrt(size[0])
        factor = factor + self.start_A if letter == "A" and self.start_A is not None else factor
        plan.drop() if changing else plan.keep([coefficients], factor)
        return factor

    def update(self) -> Operator:
        return LowRank(*self.factors(), self.scale)


def _seed(site: Site, purpose: str) -> int:
    return site.generator(purpose).initial_seed()


def _bound(size: tuple[int, int, int], vit: bool) -> float:
    """Entries are uniform within ±1, or ±1/√fan_in."""
    return 1 / math.sqrt(size[2]) if vit else 1.0
