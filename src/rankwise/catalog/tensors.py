"""Parameterizations in tensor form, and projections of one small vector."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.catalog.building import adapter
from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.dota import DoTA
from rankwise.parameterizations.khatri_rao import LoKH
from rankwise.parameterizations.subspace import Subspace

_CORES = (
    "for a, b, c in [even_factors(m, 3)] for d, e, f in [even_factors(n, 3)] "
    "for R in [min(rank, a*d, b*c*e*f)] for S in [min(rank, R*b*e, c*f)] "
    "for F in [2*a*d*R + 3*a*d*R*b*e*S + 2*a*d*b*e*S*c*f] for C in [2*a*d*R*e*f + 3*R*b*e*S*a*f + 2*S*c*f*a*b]"
)


@entry(
    "parameterization",
    title="DoTA",
    formula="W + MPO(T) − MPO(T⁰), MPO(T)[i, j] = T_1[i_1, j_1] … T_N[i_N, j_N]",
    reference=Reference("Hu et al.", "DoTA: Weight-Decomposed Tensor Adaptation for Large Language Models", 2024, "2412.20891"),
    trained="Σ_k R_{k-1} m_k n_k R_k",
    cost="a matrix made once, or core by core up to 3 Σ_k 2 R_{k-1} R_k m_k n_k m_1…m_{k-1} n_{k+1}…n_N FLOPs per token",
    merges="exact",
    exports="not of low rank in general: by truncation only",
    when="To train a part of W of full rank with few numbers; PiSSA is the simpler relative, and the better tested.",
    tiny={"rank": 2},
    numbers=f"[a*d*R + R*b*e*S + S*c*f {_CORES}][0]",
    flops=f"[2*F if 3*T*C >= 4*F + T*m*n else 2*T*C {_CORES}][0]",
    variants=("dota(rank=3, balanced=True)",),
)
def dota(
    *,
    rank: int = 8,
    row_factors: Sequence[int] | Sequence[Sequence[int]] | None = None,
    column_factors: Sequence[int] | Sequence[Sequence[int]] | None = None,
    balanced: bool = False,
) -> Recipe:
    """A chain of small cores, cut out of the weight by its tensor-train decomposition, trained over the frozen rest."""
    rows = None if row_factors is None else tuple(row_factors)
    columns = None if column_factors is None else tuple(column_factors)
    return adapter(piece(DoTA, rank=rank, row_factors=rows, column_factors=columns, balanced=balanced), name="dota")


@entry(
    "parameterization",
    title="LoKH",
    formula="W + s·F_1 ⊙ … ⊙ F_q, column by column",
    reference=Reference("Lu", "Low-Rank Approximation, Adaptation, and Other Tales", 2024, "2408.05883"),
    trained="n(m_1 + … + m_q), m_1 … m_q = m",
    cost="the matrix F_1 ⊙ … ⊙ F_q once per forward and backward, and its gradient, 2mn FLOPs per token",
    merges="exact",
    exports="not of low rank in general: by truncation only",
    when="When the change must have full rank and 2n√m numbers may be trained; its paper never tried it, so prefer loha.",
    tiny={"factors": 2},
    numbers="n*sum(even_factors(m, factors))",
    flops="0",
    variants=("lowrank_tales(factors=3)", "lowrank_tales(alpha=0.5)"),
)
def lowrank_tales(*, factors: int = 2, alpha: float = 1.0) -> Recipe:
    """A column-wise Kronecker product of small factors: full rank, each input with its own small tensors."""
    return adapter(piece(LoKH, factors=factors, alpha=alpha), name="lowrank_tales")


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
