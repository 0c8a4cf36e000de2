"""Two threads through one layer: the weight itself for adversarial inputs, and beside it a low-rank branch for natural ones.

    adversarial    W' = weight                         weight (m, n) trained, starts at W
    natural        W' = stop(weight) + s · B A         A ~ N(0, 1), B = 0, s = alpha / r; the weight gets no gradient

`entry.thread` chooses, "adversarial" by default: that is the model to deploy, and what `update_of`, `merge_` and a loaded
adapter mean, while the branch is for training only. So the objective of natural images trains B and A, that of attacked images
the weight, and they do not pull at the same numbers. On a linear layer B is (m, r) and A (r, n); on a square kernel k × k B is
(out·k/groups, r·k), A (r·k, in·k) and their product is read in order as the weight; on other kernels B (m, r), A (r, n).
Trained numbers m·n + r(m + n), or m·n + r·k²(out/groups + in). Not of low rank; nothing to export as LoRA.

Not LoRA: merging the branch would put the natural objective's change into the robust model.

Xu, Zhang, Kankanhalli: AutoLoRa: A Parameter-Free Automated Robust Fine-Tuning Framework, 2023, arXiv:2310.01818.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from rankwise.core.combinators import Sum
from rankwise.core.errors import ArgumentError
from rankwise.core.layouts import ConvLayout
from rankwise.core.operators import Dense, LowRank, Operator
from rankwise.core.parameterization import Facts, Parameterization, Site
from rankwise.core.piece import register
from rankwise.parameterizations.reference_conv import Viewed

THREADS = ("natural", "adversarial")


@register("parameterization")
class TwoThreads(Parameterization):
    """W' = weight, or stop(weight) + s · B A.

    Args:
        site: the layer.
        rank: r.
        alpha: numerator of the scale s.
    """

    facts = Facts(
        additive=False,
        exact_lora_export=False,
        layouts=frozenset({"linear", "conv"}),
        expected_failures={"every_tensor_trains": "each thread trains its own tensors; a plain loss goes through one of them"},
    )

    def __init__(self, site: Site, *, rank: int = 8, alpha: float = 1.0) -> None:
        super().__init__()
        self.rank, self.scale, self._thread = rank, alpha / rank, "adversarial"
        self.matrix_shape, self.viewed = (site.m, site.n), False
        rows, inner, columns = site.m, rank, site.n
        layout = site.layout
        if isinstance(layout, ConvLayout) and len(layout.kernel) == 2 and layout.kernel[0] == layout.kernel[1]:
            side = layout.kernel[0]
            self.viewed = site.m * side % layout.groups == 0
            if self.viewed:
                rows, inner, columns = site.m * side // layout.groups, rank * side, layout.channels * layout.groups * side
        self.weight = nn.Parameter(site.cast(site.weight()).contiguous())  # (m, n)
        self.B = nn.Parameter(site.zeros(rows, inner))  # (m, r)
        self.A = nn.Parameter(site.normal(inner, columns))  # (r, n)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"weight", "A", "B"})

    @property
    def thread(self) -> str:
        """Which thread the next forward takes, "natural" or "adversarial"."""
        return self._thread

    @thread.setter
    def thread(self, name: str) -> None:
        if name not in THREADS:
            raise ArgumentError(f"thread is one of {', '.join(THREADS)}, not {name!r}")
        self._thread = name

    def branch(self) -> Operator:
        """The low-rank branch s · B A (m, n)."""
        if self.viewed:
            return Viewed(self.B, self.A, self.matrix_shape, self.scale)
        return LowRank(self.B, self.A, self.scale)

    def forward(self, base: Operator) -> Operator:
        if self._thread == "adversarial":
            return Dense(self.weight)
        return Sum(Dense(self.weight.detach()), self.branch())
