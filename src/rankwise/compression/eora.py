"""EoRA: give a compressed layer a low-rank companion that wins back as much of its output as rank r can, without training.

    D = W − W_c (m, n)          C = Σ x xᵀ = Q' Q'ᵀ          B A = argmin_{rank r} ‖(D − B A) X‖_F          y = W_c x + B A x

W is the dense weight and W_c the pruned, quantized or otherwise changed one, taken dequantized. The inputs x are those of the
compressed model. Sequentially (the paper's way) they come through the layers compensated before: layers are gone through in
the order they run, those that read the same tensor at once, with one pass over the data each. The error left is
Σ_{i>r} σ_i(D Q')². The companion is an ordinary LoRA adapter with scale 1, to be trained further or exported at rank r;
merging it into W_c would lose the compressed format.

*Differs*: an unweighted mean over the data, where the release weighs the last samples most; and C is neither floored nor
inverted (see `weighted_svd`).

Liu et al.: EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation, 2024, arXiv:2410.21271.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.approximations.weighted_svd import weighted_svd
from rankwise.compression.order import as_list, execution_groups
from rankwise.core.adapt import adapt_
from rankwise.core.errors import TargetError, shorten
from rankwise.core.handle import Handle
from rankwise.core.operators import LowRank
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.core.statistics import Statistic, collect_at
from rankwise.core.targets import Where, find_targets
from rankwise.parameterizations.lora import LoRA
from rankwise.steps.moments import adamw


def compensate(dense: Tensor, compressed: Tensor, gram: Tensor | None, rank: int) -> LowRank:
    """The best rank-r companion of one compressed layer.

    Args:
        dense: W (m, n).
        compressed: W_c (m, n), dequantized.
        gram: C = Σ x xᵀ (n, n) over inputs of the compressed model; None for the plain SVD of W − W_c.
        rank: r.
    """
    wide = torch.promote_types(torch.promote_types(dense.dtype, compressed.dtype), torch.float32)
    return weighted_svd(dense.detach().to(wide) - compressed.detach().to(wide), gram, rank, gram=gram is not None)


def eora(
    model: nn.Module,
    dense: nn.Module | Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    rank: int = 128,
    where: Where = "all-linear",
    sequential: bool = True,
    name: str = "eora",
) -> Handle:
    """Puts a compensating adapter onto a compressed model and returns its handle.

    Args:
        model: the compressed model, with the same layers as the dense one.
        dense: the dense model, or site -> W (m, n).
        batches: calibration data, as for `rankwise.collect`.
        rank: r.
        where: layers to compensate.
        sequential: measure each layer's inputs behind the layers compensated before it, one pass per group of layers; False
            measures all in one pass.
        name: of the adapter.

    Raises:
        TargetError: the dense model lacks a layer, or has it in another shape.
    """
    data = as_list(batches)
    targets, _ = find_targets(model, where)
    weights = _dense_weights(dense, {site: (target.m, target.n) for site, target in targets.items()})
    recipe = Recipe(name=f"eora(rank={rank})", parameterization=piece(LoRA, rank=rank, alpha=float(rank)), step=(piece(adamw),))
    handle = adapt_(model, recipe, where, name=name)  # B A = 0 so far
    modules = {site: target.module for site, target in handle.targets.items()}
    try:
        groups = execution_groups(model, modules, data[0]) if sequential else [list(modules)]
        for group in groups:
            found = collect_at(model, {site: handle.targets[site] for site in group}, data, {Statistic.INPUT_GRAM})
            for site in group:
                compressed = handle.targets[site].matrix()
                factors = compensate(weights[site].to(compressed.device), compressed, found[site].require_inputs().gram, rank)
                with torch.no_grad():
                    handle.parameterization(site).load_factors(factors)
    except BaseException:
        handle.detach_()
        raise
    return handle


def _dense_weights(dense: nn.Module | Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    if isinstance(dense, nn.Module):
        known = dict(dense.named_modules())
        missing = [site for site in shapes if site not in known]
        if not missing:
            found, _ = find_targets(dense, lambda name, _: name in shapes)
            dense = {site: target.matrix() for site, target in found.items()}
    else:
        missing = [site for site in shapes if site not in dense]
    if missing:
        raise TargetError(
            f"the dense weights lack {shorten(missing)}; give those of the model before it was compressed, or set where="
        )
    weights = {site: dense[site] for site in shapes}  # type: ignore[index]
    for site, weight in weights.items():
        if tuple(weight.shape) != shapes[site]:
            m, n = shapes[site]
            raise TargetError(f"{site} is {m}×{n} in the compressed model, but its dense weight is {tuple(weight.shape)}")
    return weights
