"""DoRA: the length of every weight row is trained by itself, its direction by any additive update.

    W' = diag(μ / ‖V‖_row) V,   V = W + U          μ (m,) trained, starts at ‖W‖_row; U (m, n) the inner update

The inner update is LoRA's s · B A unless `inner` names another additive parameterization, and starts at zero, so W' = W at
the start. The norms are constants for autograd (`detach_norm`), read from the current tensors in every training forward by
the Gram identity of `core.queries.row_norms`: O(m n r) numbers worked, no (m, n) matrix formed. One magnitude per output: a
convolution's norm runs over channels and kernel, an embedding's over the tokens. The bias is never scaled. With dropout,
y = W x + b + (g - 1) ∘ W x̃ + g ∘ U x̃ with g = μ / ‖V‖ and x̃ the thinned input. `direction=False` trains μ alone. A row of
W that is zero stays zero. Trained numbers r(m + n) + m. Not additive and of full rank, so it exports as LoRA only by
truncation.

In eval without gradients g is kept for as long as none of its tensors changes (see `plan.py`).

*Differs* from the paper's wording ("column norms" of the transposed weight): rows of W, as released. The released code forms
B A in every forward.

Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen: DoRA: Weight-Decomposed Low-Rank Adaptation, 2024, arXiv:2402.09353.
"""

from __future__ import annotations

from torch import Tensor, nn

from rankwise.core.combinators import Dropped, RowScale, Sum
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import Facts, Site
from rankwise.core.piece import Piece, register
from rankwise.core.queries import row_norms
from rankwise.parameterizations.inner import build_inner, inner_piece
from rankwise.parameterizations.planned import Planned


@register("parameterization")
class Magnitude(Planned):
    """W' = diag(μ / ‖W + U‖_row) (W + U).

    Args:
        site: the layer.
        inner: an additive parameterization for U; None means LoRA with the arguments below.
        rank: r; None means 8, or what `inner` says.
        alpha, scale: of LoRA's s, without `inner`.
        dropout: probability of dropping an input wherever the result differs from W x.
        detach_norm: treat the norms as constants in backward, as published.
        direction: False trains the magnitudes alone.
    """

    facts = Facts(additive=False, exact_lora_export=False)
    own_roles = frozenset({"magnitude"})

    def __init__(
        self,
        site: Site,
        *,
        inner: Piece | None = None,
        rank: int | None = None,
        alpha: float | None = None,
        scale: str = "lora",
        dropout: float = 0.0,
        detach_norm: bool = True,
        direction: bool = True,
    ) -> None:
        super().__init__(site, dropout=dropout, detach_norm=detach_norm)
        self.n = site.n
        self.inner = build_inner(inner_piece(inner, rank, alpha, scale), site) if direction else None
        if self.inner is not None:
            self.rank, self.scale = self.inner.rank, self.inner.scale
        self.magnitude = nn.Parameter(site.cast(site.weight().square().sum(1).sqrt()))  # (m,)

    def update(self) -> Operator:
        if self.inner is not None:
            return super().update()
        nothing = self.magnitude.new_zeros(self.magnitude.shape[0], 0)  # (m, 0)
        return LowRank(nothing, nothing.new_zeros(0, self.n))

    def forward(self, base: Operator) -> Operator:
        gain = self.kept(base, self._gain)  # (m,)
        if self.training and self.dropout and self.thin is not None:
            changed: Operator = RowScale(base, gain - 1)
            if self.inner is not None:
                changed = Sum(changed, RowScale(self.inner.update(), gain))
            return Sum(base, Dropped(changed, self.dropout, self.thin))
        return RowScale(self.direction(base), gain)

    def _gain(self, base: Operator) -> Tensor:
        """G = μ / ‖V‖ (m,)."""
        return self.gain(self.magnitude, self.direction(base), row_norms)

    def refresh(self, base: Operator) -> None:
        if self.inner is not None:
            self.inner.refresh(base)
        self.magnitude.copy_(row_norms(self.direction(base)))
