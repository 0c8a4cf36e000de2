"""PMSS: a small core between some columns and some rows of the weight itself; high rank for r² numbers.

    W' = W + s · C core R          C = W[:, J] (m, r), R = W[I, :] (r, n) frozen copies; core (r, r) trained, from 0

I and J are chosen once from the frozen weight, without repetition; `select` names the rule (see `approximations.pivots`), "qr"
takes the pivots of QR of Wᵀ and of W. core = 0 is the base to the bit, and ∂L/∂core = s Cᵀ G Rᵀ is not zero there. If the
columns J span those of W and the rows I its rows, core = C⁺ W R⁺ gives C core R = W. C and R have the size of W's entries, so
the step of W' grows with both; `rescale` divides each by its spectral norm. Exactly LoRA of rank r. FLOPs 2r(m + n) + 2r² per
token: at the large r that the method is for, this is its price.

Not CUR sampling with replacement, which can repeat a column. Of a quantized weight, C and R are the dequantized numbers.

*Differs*: the paper's rule of selection, scale and ranks could not be read anywhere; "qr", s = 1 and r = 128 are choices of
this library. A file keeps I, J and the core, r² + 2r numbers; loading reads C and R again off the untouched weight.

Wang, Hu, Xu, Liu, Luan, Wang: PMSS: Pretrained Matrices Skeleton Selection for LLM Fine-tuning, 2024, arXiv:2409.16722.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.approximations.pivots import RULES, select_columns
from rankwise.core.errors import ArgumentError, CheckpointError
from rankwise.core.operators import Chain
from rankwise.core.parameterization import Additive, Site
from rankwise.core.piece import register
from rankwise.parameterizations.frame import Framed


@register("parameterization")
class Skeleton(Framed, Additive):
    """W' = W + s · C core R.

    Args:
        site: the layer.
        rank: r, the number of columns and of rows.
        select: the rule that chooses them: "qr", "norm", "leverage", "deim" or "random".
        rescale: divide C and R by their spectral norms.
        scale: s.

    Example:
        >>> handle = rankwise.adapt_(model, rankwise.compose("pmss(rank=128, rescale=True)"))
    """

    frame = {"row_index": "r", "column_index": "r", "C": "mr", "R": "rn"}
    indices = frozenset({"row_index", "column_index"})
    derived = frozenset({"C", "R"})
    row_index: Tensor
    column_index: Tensor
    C: Tensor
    R: Tensor

    def __init__(self, site: Site, *, rank: int = 128, select: str = "qr", rescale: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        if select not in RULES:
            raise ArgumentError(f"select is one of {', '.join(RULES)}, not {select!r}")
        self.rank, self.scale, self.select, self.rescale = rank, scale, select, rescale
        self.hold(site, rank)
        self.core = nn.Parameter(site.zeros(rank, rank))  # (r, r)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"core"})

    def read(self, site: Site) -> Mapping[str, Tensor]:
        weight = site.weight()  # (m, n)
        rows = select_columns(weight.t(), self.rank, self.select, generator=site.generator("rows"))
        columns = select_columns(weight, self.rank, self.select, generator=site.generator("columns"))
        C, R = self._gathered(weight, rows, columns)
        return {"row_index": rows, "column_index": columns, "C": C, "R": R}

    def _gathered(self, weight: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """C (m, r) and R (r, n)."""
        C, R = weight[:, columns], weight[rows]
        return (_unit(C), _unit(R)) if self.rescale else (C, R)

    def filled(self, weight: Tensor) -> None:
        C, R = self._gathered(weight, self.row_index, self.column_index)
        self.C.copy_(C)
        self.R.copy_(R)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        for name in self.indices:
            given = state_dict.get(prefix + name)
            if given is not None and not torch.equal(given.to(self.C.device), self.get_buffer(name)):
                raise CheckpointError(
                    f"{prefix}{name} of the file selects other rows or columns than this adapter, whose C and R would stay; "
                    "load it with rankwise.load_, or adapt with the same seed and base"
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def update(self) -> Chain:
        return Chain(self.C, self.core, self.R, scale=self.scale)

    def restart(self, site: Site) -> None:
        self.core.zero_()


def _unit(matrix: Tensor) -> Tensor:
    """The matrix with spectral norm 1; zeros stay zeros."""
    norm = torch.linalg.matrix_norm(matrix, 2)
    return matrix / torch.where(norm > 0, norm, 1.0)
