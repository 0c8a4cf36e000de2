"""EVA: the input factor starts at the principal directions of the layer's own inputs.

    Σ (x − x̄)(x − x̄)ᵀ = V diag(λ) Vᵀ (n, n)          A₀ = V_rᵀ (r, n)          B₀ = 0

over the tokens of the task's data, padding left out. The update is zero, so the first forward equals the base to the bit. Of
all rank-r projections A₀ᵀA₀ loses the least variance of the inputs: Σ_{i>r} λ_i. `whiten` divides row i by the square root of
the i-th singular value of the inputs, λ_i^¼. How many ranks each layer gets out of one total is a `Budget` (`budget.py`), for
which the explained-variance ratios λ_i / Σ λ are the importances.

*Differs*: the release updates an incremental decomposition batch by batch until its directions stand still; here the moments of
all batches are summed exactly and decomposed once, so order and size of batches do not matter. `center=False` gives the
uncentered form of the paper's text; the release centers.

Paischer, Hauzenberger, Schmied, Alkin, Deisenroth, Hochreiter: Parameter Efficient Fine-tuning via Explained Variance
Adaptation, 2024, arXiv:2410.07170.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.approximations.truncated_svd import check_rank, column_signs
from rankwise.core.errors import StatisticsError
from rankwise.core.operators import LowRank
from rankwise.core.parameterization import INPUT
from rankwise.core.piece import register
from rankwise.core.statistics import LayerStatistics, Statistic


def principal_directions(statistics: LayerStatistics, *, center: bool = True) -> tuple[Tensor, Tensor]:
    """λ (n,) descending, those below rounding set to 0, and the directions (n, n) as columns, largest entry positive."""
    moments = statistics.require_inputs()
    second = moments.covariance() if center else moments.gram  # (n, n)
    if not torch.isfinite(second).all():
        raise StatisticsError(f"{statistics.site}: the inputs hold NaN or infinity; look at the probe batches")
    values, vectors = torch.linalg.eigh((second + second.t()) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    # Centering cancels: what it leaves of a constant input is rounding of the uncentered moment, not variance.
    noise = torch.finfo(values.dtype).eps * values.numel() * float(moments.gram.diagonal().sum())
    return torch.where(values > noise, values, torch.zeros_like(values)), vectors * column_signs(vectors)


@register("start")
class EVA:
    """A = the r leading principal directions of the inputs, B = 0.

    Args:
        whiten: divide each direction by the square root of its singular value.
        center: about the mean; False takes the uncentered second moment.
    """

    needs: frozenset[Statistic] = frozenset({Statistic.INPUT_GRAM})
    kind: str = INPUT
    shifted: bool = False
    mode: str = "offset"

    def __init__(self, *, whiten: bool = False, center: bool = True) -> None:
        self.whiten, self.center = whiten, center

    def __call__(self, statistics: LayerStatistics, rank: int, *, generator: torch.Generator, scale: float = 1.0) -> LowRank:
        """Factors (0, A), A orthonormal rows unless whitened.

        Raises:
            StatisticsError: the inputs vary in fewer than r directions.
        """
        W = statistics.weight  # (m, n)
        check_rank(rank, *W.shape)
        values, vectors = principal_directions(statistics, center=self.center)
        varied = int((values > 0).sum())
        if varied < rank:
            raise StatisticsError(
                f"{statistics.site}: rank {rank} asks for {rank} principal directions, but the inputs collected vary in only "
                f"{varied} of {values.numel()}; collect more batches, lower the rank, or leave the layer out of where="
            )
        A = vectors[:, :rank].t().contiguous()  # (r, n)
        if self.whiten:
            A = A / values[:rank].pow(0.25)[:, None]
        return LowRank(W.new_zeros(W.shape[0], rank), A.to(W))
