"""LoRA under dropout of any kind: which axis is masked, how often a mask is drawn, and whether the rest is rescaled.

    kind      the branch s · B A x in training     mask
    input     s · B A (M ∘ x)                      per number of x, shared by layers that read x
    rank      s · B (M ∘ A x)                      r channels
    row       M ∘ (s · B A x)                      m outputs, rows of the update
    output    M ∘ (s · B A x)                      per number of the output
    module    M · (s · B A x)                      one coin for the whole branch

M is 0 with probability p, else 1 / (1 - p) (`rescale`), so that the mean over masks is the branch that acts in eval; with
rescale=False it is 1, and eval is stronger than training by 1 / (1 - p). The divisor is 1 - p and not the mean of the mask,
which is 0/0 when all rows drop. `granularity` says how often M of rank, row and module is drawn: once per call, per sample
(first dimension) or per token. Starts as LoRA does, W' = W; p = 0 is LoRA itself; p = 1 trains nothing. Masks come from the
adapter's own stream: they repeat under gradient checkpointing and replays, and no global generator moves. In eval and in
`dense()` there is no mask. Exactly LoRA of rank r.

*Differs* from LyCORIS and PEFT: rescale is on for every kind; they leave module dropout unscaled, and LoHa divides by the mean.

Srivastava et al.: Dropout, JMLR 2014. Kinds after Yeh et al. (LyCORIS), 2023, arXiv:2309.14859, and kohya's scripts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.combinators import Dropped
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import INPUT, PRODUCT, Additive, Site
from rankwise.core.piece import register
from rankwise.parameterizations.lora import LoRA
from rankwise.parameterizations.masked_branch import MaskedBranch

KINDS = ("input", "rank", "row", "output", "module")
GRANULARITIES = ("call", "sample", "token")


@register("parameterization")
class LoRADropout(Additive):
    """W' = W + s · B A, the branch under dropout in training.

    Args:
        site: the layer.
        rank: r.
        alpha: numerator of the scale s; None means r.
        kind: what is dropped: input, rank, row, output or module.
        probability: p.
        rescale: divide what stays by 1 - p.
        granularity: how often a mask of rank, row or module is drawn: call, sample or token.
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float | None = None,
        kind: str = "input",
        probability: float = 0.1,
        rescale: bool = True,
        granularity: str = "call",
    ) -> None:
        super().__init__()
        if kind not in KINDS or granularity not in GRANULARITIES:
            raise ArgumentError(f"kind is one of {', '.join(KINDS)}, granularity one of {', '.join(GRANULARITIES)}")
        if granularity != "call" and kind in ("input", "output"):
            raise ArgumentError(f"kind={kind!r} draws for every number, so granularity={granularity!r} would have no effect")
        if not 0.0 <= probability <= 1.0:
            raise ArgumentError(f"probability is in [0, 1], not {probability}")
        drawn = LoRA(site, rank=rank, alpha=alpha)
        self.B, self.A = nn.Parameter(drawn.B.detach()), nn.Parameter(drawn.A.detach())  # (m, r), (r, n)
        self.rank, self.scale = rank, drawn.scale
        self.kind, self.probability, self.granularity = kind, probability, granularity
        self.kept = 1.0 if rescale else 1.0 - probability  # what a mask of mean one is multiplied with
        self.thin, self.mask = site.thin, site.mask

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"A", "B"})

    @classmethod
    def start_kinds(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({PRODUCT, INPUT})

    @classmethod
    def narrows(cls, **arguments: Any) -> bool:
        return True

    def _draw(self, x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        assert self.mask is not None
        mask = self.mask(x, shape, self.probability, dtype)
        return mask if self.kept == 1.0 else mask * self.kept

    def update(self) -> Operator:
        update = LowRank(self.B, self.A, self.scale)
        if not self.training or not self.probability or self.thin is None:
            return update
        if self.kind == "input":
            return Dropped(update, self.probability, self.thin, self.kept)
        return MaskedBranch(update, self.kind, self.granularity, self._draw)

    def load_factors(self, factors: LowRank) -> None:
        self.B.copy_(factors.B)
        self.A.copy_(factors.A)

    def restart(self, site: Site) -> None:
        drawn = LoRA(site, rank=self.rank)
        self.load_factors(LowRank(drawn.B.detach(), drawn.A.detach()))
