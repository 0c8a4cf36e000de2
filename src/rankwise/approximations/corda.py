"""CorDA: train the part of the weight that data use most, or least, by the singular components of W times the covariance.

    C = Σ x xᵀ / T (n, n)          C_d = C + d·mean(diag C) I          W C_d = U S Vᵀ
    B₀ = U_I (S_I/s)^½ (m, r)          A₀ = (s S_I)^−½ U_Iᵀ W (r, n)          s·B₀ A₀ = U_I U_Iᵀ W

I are the r "largest" components, with data of the task to learn (instruction-previewed in the paper), or the r "smallest", with
data whose knowledge is to be kept. The frozen base is W − s·B₀ A₀, so the first forward equals the base. The largest minimize
‖(W − B A) C_d‖_F over rank r. B₀ has orthogonal columns, A₀ not. The size of C does not matter for the product, nor do order
and size of batches; padding does not count. The damping d matters where inputs have fewer directions than features. Needs
one eval pass over probe data, n² numbers per distinct input and one SVD per layer; exact at rank 2r against W in both modes.
With C = I it is PiSSA or MiLoRA.

*Differs*: since S Vᵀ C_d⁻¹ = Uᵀ W, nothing is inverted, so d stays as given, where the release doubles it until its inverse is
good enough. Tokens count alike; the release divides every sample by its own maximum, which inputs that are all negative turn
into a factor of any size. Singular values of zero among those chosen are refused, because they would never train.

Yang, Li, Zhou, Song, Wu, Nie, Ghanem: CorDA: Context-Oriented Decomposition Adaptation of Large Language Models
for Task-Aware Parameter-Efficient Fine-tuning, 2024, arXiv:2406.05223.
"""

from __future__ import annotations

import torch

from rankwise.approximations.starting import check_choice, check_mode, chosen, refuse_dead, triplets_of
from rankwise.approximations.truncated_svd import column_signs
from rankwise.core.errors import ArgumentError, StatisticsError
from rankwise.core.operators import LowRank
from rankwise.core.parameterization import PRODUCT
from rankwise.core.piece import register
from rankwise.core.statistics import LayerStatistics, Statistic


@register("start")
class CorDA:
    """s·B A = U_I U_Iᵀ W with U of W C_d.

    Args:
        select: "largest" components of the data's, or "smallest".
        damping: d, added to C in units of the mean of its diagonal.
        mode: "offset" keeps W and subtracts the frozen start; "absorb" rewrites W to the residual.
    """

    needs: frozenset[Statistic] = frozenset({Statistic.INPUT_GRAM})
    kind: str = PRODUCT
    shifted: bool = False

    def __init__(self, *, select: str = "largest", damping: float = 0.01, mode: str = "offset") -> None:
        if damping < 0:
            raise ArgumentError(f"damping is 0 or more, not {damping}")
        self.select = check_choice("select", select, ("largest", "smallest"))
        self.damping, self.mode = damping, check_mode(mode)

    def __call__(self, statistics: LayerStatistics, rank: int, *, generator: torch.Generator, scale: float = 1.0) -> LowRank:
        """Factors (B, A), columns of B orthogonal with BᵀB = diag(S_I)/s.

        Raises:
            StatisticsError: the inputs are all zero, or singular values among those chosen are.
        """
        W, moments = statistics.weight, statistics.require_inputs()  # (m, n)
        C = moments.gram / max(moments.count, 1)  # (n, n), float64
        level = C.diagonal().mean()
        if not level > 0:
            raise StatisticsError(
                f"{statistics.site}: the inputs collected are all zero or not finite; look at the probe batches"
            )
        damped = C + self.damping * level * torch.eye(C.shape[0], dtype=C.dtype, device=C.device)
        wide = W.to(C)
        U, S, _ = triplets_of(wide @ damped, rank, f"{statistics.site}: weight or inputs")
        index = chosen(self.select, S.numel(), rank, generator)  # (r,)
        remedy = "raise damping, collect more inputs than the layer has features, lower the rank"
        refuse_dead(S[index], S[0], max(W.shape), statistics.site, remedy=remedy)
        B = U[:, index] * column_signs(U[:, index])  # (m, r)
        root = (S[index] / scale).sqrt()  # (r,)
        A = B.t() @ wide / (scale * root)[:, None]  # (r, n)
        return LowRank((B * root).to(W), A.to(W))
