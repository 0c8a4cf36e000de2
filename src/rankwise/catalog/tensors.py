"""Parameterizations in tensor form, and projections of one small vector."""

from __future__ import annotations

from rankwise.catalog.building import adapter
from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.subspace import Subspace


@entry(
    "parameterization",
    title="Intrinsic dimension",
    formula="W_l + (P v)_l, one v for all layers",
    reference=Reference("Li et al.", "Measuring the Intrinsic Dimension of Objective Landscapes", 2018, "1804.08838"),
    trained="d for the whole model, with gains one more per layer",
    cost="O(L log L) once per forward and backward, L ≥ D the next power of two; one product with W + (P v)_l per layer",
    merges="exact",
    exports="not of low rank; the best rank-r substitute with its error",
    when="To measure how hard a task is (rankwise intrinsic-dimension), and as the adapter with the fewest numbers of all.",
    tiny={"dimension": 5},
    numbers="dimension + gains",
    flops="sum(2*2**k*(32*(k//5) + (2**(k%5) if k%5 else 0)) for k in (ceil(log2(m*n)), ceil(log2(dimension))))",
    variants=(
        "intrinsic_dimension(dimension=5, projection='dense')",
        "intrinsic_dimension(dimension=5, projection='sparse')",
        "intrinsic_dimension(dimension=5, scope='tensor')",
        "intrinsic_dimension(dimension=5, gains=True)",
    ),
)
def intrinsic_dimension(
    *, dimension: int = 1000, projection: str = "fastfood", scope: str = "model", gains: bool = False
) -> Recipe:
    """Moves all layers together in one random subspace of few dimensions."""
    made = piece(Subspace, dimension=dimension, projection=projection, scope=scope, gains=gains)
    return adapter(made, name="intrinsic_dimension")
