"""The closed-form update of SVD-LLM: each layer's second factor fitted to what the dense model gives.

    B <- argmin Σ ‖y − b − B z‖²          z = A x (r,) in the compressed model, y (m,) in the dense one

From the moments Σ z zᵀ (r, r) and Σ z yᵀ (r, m), so that nothing grows with the number of tokens. Both models see the same
batch: the dense layers are put back for one forward, the compressed ones for the next. Padded tokens do not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankwise.compression.compress import replace
from rankwise.compression.factorized import Factorized
from rankwise.compression.order import run, watched
from rankwise.core.errors import StatisticsError
from rankwise.core.statistics import MomentCollector, kept_rows, token_mask
from rankwise.core.targets import Target


def fit_second_factors(
    model: nn.Module,
    group: Mapping[str, tuple[Target, Factorized]],
    dense: Mapping[str, Target],
    compressed: Mapping[str, Factorized],
    batches: Sequence[Any],
) -> dict[str, tuple[float, float]]:
    """Least squares for B of the layers of one group: site -> ‖y − b − B z‖_F before and after."""
    moments: dict[str, list[MomentCollector]] = {}
    square: dict[str, float] = dict.fromkeys(group, 0.0)
    for batch in batches:
        mask = token_mask(batch)
        wanted: dict[str, list[Tensor]] = {site: [] for site in group}
        try:
            for site in dense:
                replace(model, compressed[site], dense[site].module)
            _record(model, {site: target.module for site, (target, _) in group.items()}, wanted, batch)
        finally:
            for site in dense:
                replace(model, dense[site].module, compressed[site])
        got: dict[str, list[Tensor]] = {site: [] for site in group}
        _record(model, {site: pair.A for site, (_, pair) in group.items()}, got, batch)
        for site, (target, pair) in group.items():
            for y, z in zip(wanted[site], got[site], strict=True):
                _add(moments, square, site, target, pair.rank, y, z, mask)
    return {site: _solve(target, pair, moments[site], square[site]) for site, (target, pair) in group.items()}


def _record(model: nn.Module, modules: Mapping[str, nn.Module], into: Mapping[str, list[Tensor]], batch: Any) -> None:
    hooks = watched(modules, lambda site, _, output: into[site].append(output.detach()))
    try:
        run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()


def _add(
    moments: dict[str, list[MomentCollector]],
    square: dict[str, float],
    site: str,
    target: Target,
    rank: int,
    y: Tensor,
    z: Tensor,
    mask: Tensor | None,
) -> None:
    """Adds Σ z zᵀ, Σ z yᵀ and Σ ‖y‖² of one call; a grouped convolution has them once per group."""
    bias = getattr(target.module, "bias", None)
    outputs = kept_rows(target.layout.output_rows(y), y, mask).double()  # (tokens, m)
    hidden = kept_rows(target.layout.output_rows(z), z, mask).double()  # (tokens, groups · r)
    outputs = outputs if bias is None else outputs - bias.detach().double()
    groups = hidden.shape[1] // rank
    parts = moments.setdefault(site, [MomentCollector(rank, target.m // groups) for _ in range(groups)])
    for part, z_group, y_group in zip(parts, hidden.chunk(groups, 1), outputs.chunk(groups, 1), strict=True):
        part.add(z_group, y_group)
    square[site] += float(outputs.square().sum())


@torch.no_grad()
def _solve(target: Target, pair: Factorized, parts: Sequence[MomentCollector], square: float) -> tuple[float, float]:
    weight = cast(Tensor, pair.B.weight)
    old = weight.flatten(1).double().cpu().clone()  # (m, r)
    # The minimum-norm change from the cut's B: directions of z that no token shows keep what they had.
    new = torch.cat(
        [
            B + (part.cross.t() - B @ part.gram) @ torch.linalg.pinv(part.gram, hermitian=True, rtol=1e-12)
            for part, B in zip(parts, old.chunk(len(parts)), strict=True)
            if part.cross is not None
        ]
    )
    if not torch.isfinite(new).all():
        raise StatisticsError(f"{target.name}: the fit of the second factor is not finite; look at the calibration data")
    weight.copy_(new.reshape(weight.shape))
    return _error(old, parts, square), _error(new, parts, square)


def _error(B: Tensor, parts: Sequence[MomentCollector], square: float) -> float:
    """‖y − B z‖_F = √(Σ‖y‖² − 2⟨B, Σ y zᵀ⟩ + ⟨B Σ z zᵀ, B⟩)."""
    total = square
    for part, rows in zip(parts, B.chunk(len(parts)), strict=True):
        if part.cross is not None:
            total += float(((rows @ part.gram - 2 * part.cross.t()) * rows).sum())
    return max(total, 0.0) ** 0.5
