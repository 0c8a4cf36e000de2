"""SVD-LLM: truncate the weight where the layer's outputs on data lose least, then fit the second factor to the dense outputs.

    C = Σ x xᵀ = S Sᵀ (n, n)          W S = U Σ Vᵀ          B A = U_r Σ_r V_rᵀ S⁻¹          ‖(W − B A) X‖² = Σ_{i>r} Σ_i²

B (m, r) and A (r, n) share the singular values evenly; r = ⌊keep · mn / (m + n)⌋ in every layer. All layers are cut on the
moments of the dense model in one pass. With `update`, layers are then gone through in the order they run: with z = A x on the
inputs x of the compressed model and y the outputs of the dense one, B <- argmin Σ ‖y − b − B z‖². On unchanged inputs that is
a fixed point of the cut. `keep` is the part that stays; the release's "ratio" is the part removed.

The parameter update that follows in the paper is LoRA on the children named B, merged, then on those named A: two calls of
`adapt_` with where= these layers.

In a grouped convolution one A serves all groups, and C is pooled over their inputs: then the cut is the best for the pooled
inputs, not for each group's own, while `update` fits every group's rows of B to its own.

*Differs*: no Cholesky factor is inverted, so C may be singular (see `weighted_svd`).

Wang, Zheng, Wan, Zhang: SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression, 2024,
arXiv:2403.07378.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace as with_fields
from typing import Any, cast

import torch
from torch import nn

from rankwise.approximations.weighted_svd import weighted_svd
from rankwise.compression.compress import choose, compress_
from rankwise.compression.factorized import Factorized
from rankwise.compression.order import as_list, execution_groups
from rankwise.compression.report import CompressionReport
from rankwise.compression.second_factor import fit_second_factors
from rankwise.core.operators import LowRank
from rankwise.core.parameterization import PRODUCT
from rankwise.core.statistics import LayerStatistics, Statistic, collect_at
from rankwise.core.targets import Where


class SVDLLM:
    """B A = argmin ‖(W − B A) X‖_F on the collected inputs X. An approximation, for `compress_`."""

    needs: frozenset[Statistic] = frozenset({Statistic.INPUT_GRAM})
    kind: str = PRODUCT
    shifted: bool = False
    mode: str = "offset"

    def __call__(self, statistics: LayerStatistics, rank: int, *, generator: torch.Generator, scale: float = 1.0) -> LowRank:
        """Factors (B, A) with scale · B A the best rank-r weight on the data."""
        pair = weighted_svd(statistics.weight, statistics.require_inputs().gram, rank, gram=True)
        return LowRank(pair.B / scale, pair.A)


def svd_llm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    keep: float | None = 0.8,
    rank: int | None = None,
    where: Where = "all-linear",
    skip: Sequence[str] = (),
    update: bool = False,
) -> CompressionReport:
    """Compresses a model in place, layer by layer, where its outputs on the batches lose least.

    Args:
        model: any module.
        batches: calibration data, as for `rankwise.collect`; gone through once, and twice per group of layers with `update`.
        keep: part of each weight's numbers to keep.
        rank: the same rank for every layer instead; pass keep=None with it.
        where: as for `adapt_`.
        skip: names of layers to leave as they are.
        update: fit each B to the dense model's outputs afterwards; worth it when little is kept.
    """
    data = as_list(batches)
    targets, _ = choose(model, where, skip)
    statistics = collect_at(model, targets, data, SVDLLM.needs)
    report = compress_(model, SVDLLM(), keep=keep, rank=rank, statistics=statistics, where=where, skip=skip)
    if not update:
        return report
    made = {site: cast(Factorized, model.get_submodule(site)) for site in targets}
    errors: dict[str, tuple[float, float]] = {}
    for group in execution_groups(model, made, data[0]):
        errors |= fit_second_factors(model, {site: (targets[site], made[site]) for site in group}, targets, made, data)
    return with_fields(report, updated=errors)
