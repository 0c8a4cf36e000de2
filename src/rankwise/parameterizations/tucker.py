"""FLoRA (core space): an update in Tucker form, one factor per mode of the weight, so that kernels keep their shape.

    W' = W + s · core ×₁ P_out ×₂ P_in ×₃ P_kernel0 ×₄ P_kernel1 …     core (j_out, j_in, j_k…), P_mode (size, j), all trained

A linear layer has two modes: s · P_out core P_inᵀ. The core starts at zero, so W' = W; P_mode ~ N(0, 1 / (2 j)), and only
the core has a gradient at first. s is a plain constant, not divided by a rank. j_out = j_in = r and j_k = `kernel_rank`,
never more than the mode's own size (a 1×1 kernel has j_k = 1). In a grouped convolution the input mode is in/groups.
Trained numbers ∏ j + Σ size · j. Exactly LoRA of rank j_out on the flattened matrix. A convolution runs as three small
ones: down to j_in channels, the kernel between j_in and j_out, up to the outputs. It has a start of its own: the A of
another start is no Tucker form of a kernel.

Not the federated FLoRA, nor Fast LoRA, which share the name.

*Differs* from the release: an embedding has two modes like a linear layer (the release adds one vector to every token), and
groups work.

Si et al.: FLoRA: Low-Rank Core Space for N-dimension, 2024, arXiv:2405.14739.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from rankwise.core.combinators import Dropped
from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.operators import Operator
from rankwise.core.parameterization import Additive, Site
from rankwise.core.piece import register
from rankwise.core.structured import Tucker


@register("parameterization")
class TuckerCore(Additive):
    """W' = W + s · core ×₁ P_out ×₂ P_in ×₃ P_kernel….

    Args:
        site: the layer.
        rank: size of the core in the output and input modes.
        kernel_rank: its size in every kernel mode.
        scale: s.
        dropout: probability of dropping an input of the update's branch.
    """

    def __init__(self, site: Site, *, rank: int = 8, kernel_rank: int = 2, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ArgumentError(f"dropout is a probability in [0, 1), not {dropout}")
        self.rank, self.scale, self.dropout, self.thin = rank, scale, dropout, site.thin
        wanted = (rank, rank, *(kernel_rank for _ in site.shape[2:]))
        widths = tuple(min(size, j) for size, j in zip(site.shape, wanted, strict=True))
        self.modes = ("P_out", "P_in", *(f"P_kernel{k}" for k in range(len(site.shape) - 2)))
        self.core = nn.Parameter(site.zeros(*widths))  # (j_out, j_in, j_k…)
        for name, size, j in zip(self.modes, site.shape, widths, strict=True):
            self.register_parameter(name, nn.Parameter(self._drawn(site, name, size, j)))  # (size, j)

    @staticmethod
    def _drawn(site: Site, name: str, size: int, j: int) -> Tensor:
        return site.normal(size, j, std=1 / math.sqrt(2 * j), purpose=name)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        """What every layer has; a convolution adds P_kernel0, P_kernel1, …."""
        return frozenset({"core", "P_out", "P_in"})

    @classmethod
    def width_of(cls, m: int, n: int, **arguments: Any) -> int | None:
        return arguments.get("rank", 8)

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        kernel_rank = arguments.get("kernel_rank", 2)
        if kernel_rank >= 1:
            return []
        return [
            Problem(
                piece="flora_core",
                needs="kernel_rank of at least 1",
                has=f"it is {kernel_rank}",
                remedy="use kernel_rank=1 for kernels of one shape, or more",
                sites=(site.name,),
            )
        ]

    def update(self) -> Operator:
        update = Tucker(self.core, *(getattr(self, name) for name in self.modes), scale=self.scale)
        return Dropped(update, self.dropout, self.thin) if self.training and self.dropout and self.thin else update

    def restart(self, site: Site) -> None:
        self.core.zero_()
        for name in self.modes:
            factor: Tensor = getattr(self, name)
            factor.copy_(self._drawn(site, name, *factor.shape))
