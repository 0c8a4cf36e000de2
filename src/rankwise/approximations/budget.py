"""The explained-variance budget of EVA: one total of ranks, given to the layers whose inputs need them.

Layer l has importances ratio_{l,i} = λ_{l,i} / Σ_j λ_{l,j}, descending. Of all pairs (l, i) with i ≤ round(ρ r) the total = r
· layers largest are taken, and r_l is how many of them layer l has. So Σ r_l is exactly the total, no layer gets more than
round(ρ r), and ρ = 1 changes nothing. Ratios, not variances: otherwise layers with large inputs would take everything. Ties
go to the lower component, then to the layer that comes first.

`redistribute` turns the ranks into a recipe. The scale s = α / r of every layer stays what it was: α_l = α r_l / r.

Paischer et al.: Parameter Efficient Fine-tuning via Explained Variance Adaptation, 2024, arXiv:2410.07170.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping

from torch import Tensor

from rankwise.approximations.eva import principal_directions
from rankwise.core.errors import ArgumentError, shorten
from rankwise.core.piece import Piece
from rankwise.core.recipe import Recipe
from rankwise.core.statistics import LayerStatistics


class ExplainedVariance:
    """Ranks by explained variance.

    Args:
        rho: ρ; no layer gets more than round(ρ · total / layers).
        minimum: ranks that every layer keeps, whatever its importances; the paper's is 0.
    """

    def __init__(self, *, rho: float = 2.0, minimum: int = 0) -> None:
        if rho < 1 or minimum < 0:
            raise ArgumentError(f"rho is 1 or more and minimum 0 or more, not {rho} and {minimum}")
        self.rho, self.minimum = rho, minimum

    def __call__(self, spectra: Mapping[str, Tensor], total: int) -> dict[str, int]:
        """Site -> rank.

        Args:
            spectra: site -> (k,) importances, descending.
            total: what the ranks sum to.

        Raises:
            ArgumentError: the layers together cannot hold the total under these limits.
        """
        most = int(self.rho * total / len(spectra) + 0.5)
        room = {site: min(most, importances.numel()) for site, importances in spectra.items()}
        low = {site: min(self.minimum, room[site]) for site in spectra}
        if not sum(low.values()) <= total <= sum(room.values()):
            raise ArgumentError(
                f"{len(spectra)} layers can hold {sum(low.values())} to {sum(room.values())} ranks (minimum={self.minimum}, "
                f"at most {most} each with rho={self.rho:g}), not {total}; raise rho, or lower the rank"
            )
        ranks = dict(low)
        rest = [
            (-float(spectra[site][i]), i, order, site)
            for order, site in enumerate(spectra)
            for i in range(low[site], room[site])
        ]
        for _, _, _, site in sorted(rest)[: total - sum(low.values())]:
            ranks[site] += 1
        return ranks


def redistribute(
    recipe: Recipe,
    statistics: Mapping[str, LayerStatistics],
    *,
    rho: float = 2.0,
    center: bool = True,
    minimum: int = 1,
) -> Recipe:
    """The recipe with ranks moved between layers by explained variance, every layer's scale as it was.

    Args:
        recipe: with a parameterization that has a rank and a scale (lora, rslora, dora).
        statistics: what `collect(model, batches, {Statistic.INPUT_GRAM}, where)` gave.
        rho: ρ of the budget.
        center: as for the start.
        minimum: ranks every layer keeps. With 0, layers may end without a rank; that is an error that names them, so that no
            layer leaves the adapter unseen.

    Raises:
        ArgumentError: the parameterization has no rank or scale to set, or layers got no rank.
    """
    arguments = dict(recipe.parameterization.arguments)
    factory = recipe.parameterization.factory
    defaults = {name: parameter.default for name, parameter in inspect.signature(factory).parameters.items()}
    missing = [name for name in ("rank", "alpha", "scale") if name not in defaults]
    if missing:
        raise ArgumentError(
            f"{recipe.parameterization.name} has no argument {shorten(missing)}, so its ranks cannot be moved between layers "
            "at a constant scale; use lora, rslora or dora"
        )
    if arguments.get("rank", defaults["rank"]) is None:
        raise ArgumentError(
            f"{recipe.parameterization} leaves the rank to the method inside it, so it cannot be moved between layers; use "
            "lora, rslora or dora(rank=…)"
        )
    rank = int(arguments.get("rank", defaults["rank"]))
    spectra = {}
    for site, known in statistics.items():
        values = principal_directions(known, center=center)[0]  # (n,)
        ratios = values / values.sum().clamp_min(1e-300)
        spectra[site] = ratios[: min(known.weight.shape)]  # (k,), the ranks this layer can have
    ranks = ExplainedVariance(rho=rho, minimum=minimum)(spectra, rank * len(spectra))
    empty = [site for site, count in ranks.items() if not count]
    if empty:
        raise ArgumentError(
            f"{len(empty)} of {len(ranks)} layers got no rank ({shorten(empty)}); leave them out with where= in collect and "
            "adapt_, or pass minimum=1"
        )
    alpha, policy = arguments.get("alpha", defaults["alpha"]), str(arguments.get("scale", defaults["scale"]))
    numerator = float(rank if alpha is None else alpha)
    constant = {"lora": numerator / rank, "rslora": numerator / math.sqrt(rank), "constant": numerator}[policy]
    piece = Piece("parameterization", recipe.parameterization.name, {**arguments, "alpha": constant, "scale": "constant"})
    return Recipe(**{**recipe.__dict__, "parameterization": piece, "ranks": {**recipe.ranks, **ranks}})
