"""LoKr: the update is a Kronecker product of a small and a large factor, the large one of low rank if that is smaller.

    W' = W + s · C ⊗ D,   (C ⊗ D)[a m₂ + b, c n₂ + d] = C[a, c] D[b, d]       C (m₁, n₁), D (m₂, n₂), m = m₁m₂, n = n₁n₂

`split` finds (m₁, m₂) and (n₁, n₂); in a convolution it splits the channels, and n₂ counts kernel entries too, so C acts on
channels alone. D is one matrix where r >= max(m₂, channels₂) / 2, else D_B (m₂, r) D_A (r, n₂), or with `tucker` and a kernel
larger than one T (r, r, kernel…), P (r, m₂), Q (r, channels₂): D[o, i, kernel] = Σ T[a, b, kernel] P[a, o] Q[b, i]. C is one
matrix, or with `decompose_both` and r < max(m₁, n₁) / 2 C_B (m₁, r) C_A (r, n₁). So the names of the trained tensors differ
between layers. `zero` says which factor starts at zero, so that W' = W: "C" (C or C_B) or "D" (D, D_A or Q, as LyCORIS has
it); the others start kaiming-uniform U(±1/√fan_in). s = alpha / r; with `full_scale="one"` it is 1 where both factors are
whole, as LyCORIS has it, else alpha / r there too. Applied factor by factor in the cheaper order, without an (m, n) matrix.
rank(update) = rank(C) rank(D); exactly LoRA of that rank, whole factors counting with their shorter side. Trained numbers
m₁n₁ + r(m₂ + n₂), or m₁n₁ + m₂n₂.

*Differs* from LyCORIS, whose unmerged path and merge of a saved file apply the scale differently: here both are W + s · C ⊗ D;
and which swaps a factor larger than dim / factor, where PEFT and this do not. Embeddings work.

Yeh et al.: Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation, 2023, arXiv:2309.14859.
Edalati et al.: KronA: Parameter Efficient Tuning with Kronecker Adapter, 2022, arXiv:2212.10650.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.errors import ArgumentError
from rankwise.core.operators import Operator
from rankwise.core.parameterization import Additive, Site
from rankwise.core.piece import register
from rankwise.core.structured import Kronecker
from rankwise.parameterizations.scaling import scale_of


def split(dim: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers with product dim: (factor, dim / factor) where that is whole, else the most square split up to factor."""
    if factor > 0 and dim % factor == 0:
        return factor, dim // factor
    most = dim if factor < 0 else factor
    small = max(p for p in range(1, math.isqrt(dim) + 1) if dim % p == 0 and p <= most)
    return small, dim // small


@register("parameterization")
class LoKr(Additive):
    """W' = W + s · C ⊗ D.

    Args:
        site: the layer.
        rank: r; a large one (LyCORIS writes 100000) leaves D whole everywhere.
        alpha: numerator of the scale s; None means r.
        factor: size of the small factors, where it divides; -1 for the most square split.
        decompose_both: a low rank for C too, where that is smaller.
        full_scale: where both factors are whole, s is "alpha_over_r" or "one".
        tucker: Tucker factors of D in convolutions whose kernel is larger than one.
        zero: the factor that starts at zero, "C" or "D".
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float | None = None,
        factor: int = -1,
        decompose_both: bool = False,
        full_scale: str = "alpha_over_r",
        tucker: bool = False,
        zero: str = "C",
    ) -> None:
        super().__init__()
        if rank < 1 or factor == 0 or factor < -1:
            raise ArgumentError(f"rank is at least 1 and factor at least 1, or -1; they are {rank} and {factor}")
        if full_scale not in ("one", "alpha_over_r") or zero not in ("C", "D"):
            raise ArgumentError(f"full_scale is one or alpha_over_r, zero is C or D, not {full_scale!r} and {zero!r}")
        self.rank, self.scale, self.zero = rank, scale_of("lora", alpha, rank), zero
        kernel = site.shape[2:]
        (m1, m2), (n1, n2) = split(site.m, factor), split(site.shape[1], factor)
        whole_C = not (decompose_both and rank < max(m1, n1) / 2)
        whole_D = rank >= max(m2, n2) / 2
        self.shapes: dict[str, tuple[int, ...]] = {"C": (m1, n1)} if whole_C else {"C_B": (m1, rank), "C_A": (rank, n1)}
        if whole_D:
            self.shapes["D"] = (m2, n2, *kernel)
        elif tucker and math.prod(kernel) > 1:
            self.shapes |= {"T": (rank, rank, *kernel), "P": (rank, m2), "Q": (rank, n2)}
        else:
            self.shapes |= {"D_B": (m2, rank), "D_A": (rank, n2 * math.prod(kernel))}
        if whole_C and whole_D and full_scale == "one":
            self.scale = 1.0
        for role, tensor in self._draw(site).items():
            self.register_parameter(role, nn.Parameter(tensor))

    def _draw(self, site: Site) -> dict[str, Tensor]:
        """The factors by role, with C ⊗ D = 0."""
        zeros = {"C", "C_B"} if self.zero == "C" else {"D", "D_A", "Q"}
        return {
            role: site.zeros(*shape)
            if role in zeros
            else site.uniform(*shape, bound=1 / math.sqrt(math.prod(shape[1:])), purpose=role)
            for role, shape in self.shapes.items()
        }

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        """Those that every layer has; the others depend on its sizes."""
        return frozenset() if arguments.get("decompose_both") else frozenset({"C"})

    @classmethod
    def width_of(cls, m: int, n: int, **arguments: Any) -> int | None:
        return None  # a rank above the sizes of D leaves it whole

    def left(self) -> Tensor | tuple[Tensor, Tensor]:
        """C (m₁, n₁), or its two factors."""
        named: dict[str, Tensor] = dict(self.named_parameters())
        return named["C"] if "C" in named else (named["C_B"], named["C_A"])

    def right(self) -> Tensor | tuple[Tensor, Tensor]:
        """D (m₂, n₂), kernel flattened, or its two factors."""
        named: dict[str, Tensor] = dict(self.named_parameters())
        if "D" in named:
            return named["D"].flatten(1)
        if "D_B" in named:
            return named["D_B"], named["D_A"]
        expanded = torch.einsum("ab...,bi->ai...", named["T"], named["Q"])  # (r, n₂, kernel…)
        return named["P"].t(), expanded.flatten(1)

    def update(self) -> Operator:
        return Kronecker(self.left(), self.right(), self.scale)

    def restart(self, site: Site) -> None:
        for role, tensor in self._draw(site).items():
            getattr(self, role).copy_(tensor)
