"""Layers that are of low rank from the start, trained on their manifold."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.core.catalog import Reference, entry
from rankwise.core.errors import ArgumentError
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.factored import Factored
from rankwise.parameterizations.integrated import Integrated, IntegratedBeside
from rankwise.parameterizations.tucker_integrated import TuckerIntegrated
from rankwise.procedures.dlrt import DLRT
from rankwise.steps import condlr as conditioned
from rankwise.steps.moments import sgd

INTEGRATED = frozenset({"parameterization", "procedure"})


@entry(
    "procedure",
    title="DLRT",
    formula="U S Vᵀ instead of W; bases orth [U | G V], orth [V | Gᵀ U], a step of S between them, cut to tolerance·‖S‖",
    reference=Reference(
        "Schotthöfer, Zangrando, Kusch, Ceruti, Tudisco",
        "Low-rank lottery tickets: finding efficient low-rank neural networks via matrix differential equations",
        2022,
        "2205.13571",
    ),
    trained="2R(m + n) + 4R², R = max_rank; r(m + n) + r² at a fixed rank",
    numbers="2*max_rank*(m+n) + 4*max_rank**2",
    cost="2 forward-backwards per step, a QR of O((m + n) r²) and an SVD of O(r³) per layer",
    merges="the weight is replaced (keep_base: exact)",
    exports="the weight is replaced; exact at rank r with keep_base",
    when="To train a network from scratch, or to shrink one, when its ranks are not known and small singular values matter.",
    tiny={"rank": 2, "max_rank": 3, "tolerance": 0.02},
    variants=(
        "dlrt(rank=2, tolerance=0.02, keep_base=True)",
        "dlrt(rank=3, adaptive=False, start='random')",
        "dlrt(rank=4, tolerance=0.01, absolute=True, frozen_bases_after=5)",
    ),
)
def dlrt(
    *,
    rank: int = 16,
    tolerance: float = 0.1,
    adaptive: bool = True,
    absolute: bool = False,
    min_rank: int = 2,
    max_rank: int | None = None,
    keep_base: bool = False,
    start: str = "svd",
    frozen_bases_after: int | None = None,
) -> Recipe:
    """Trains layers of low rank on their manifold, and finds the rank of each on the way."""
    if not adaptive and (absolute or max_rank is not None):
        raise ArgumentError(
            "dlrt: with adaptive=False the rank stays; absolute and max_rank say how it changes, leave them out"
        )
    layer = IntegratedBeside if keep_base else Integrated
    return Recipe(
        name="dlrt",
        parameterization=piece(layer, rank=rank, max_rank=max_rank, adaptive=adaptive, start=start),
        step=(piece(sgd),),
        procedure=piece(DLRT, tolerance=tolerance, absolute=absolute, min_rank=min_rank, frozen_bases_after=frozen_bases_after),
        own=INTEGRATED,
    )


@entry(
    "procedure",
    title="CondLR",
    formula="U S Vᵀ instead of W; dU = c (I − UUᵀ) G V Sᵀ, dV = c (I − VVᵀ) Gᵀ U S, retracted, cond(S) ≤ τ",
    reference=Reference(
        "Savostianova, Zangrando, Ceruti, Tudisco",
        "Robust low-rank training via approximate orthonormal constraints",
        2023,
        "2306.01485",
    ),
    trained="r(m + n) + r²",
    numbers="rank*(m+n) + rank**2",
    cost="two QRs of O((m + n) r²) and, for tau > 1, an SVD of O(r³) per layer and step",
    state="0; one number per trained number with momentum",
    merges="the weight is replaced",
    exports="the weight is replaced",
    when="To train a small network that should stand small changes of its inputs; the rank has to be chosen beforehand.",
    tiny={"rank": 2},
    variants=("condlr(rank=3, tau=1.5, retraction='polar', momentum=0.3)", "condlr(compression=0.4, tau=1e6)"),
)
def condlr(
    *,
    rank: int | None = None,
    compression: float = 0.5,
    tau: float = 1.0,
    retraction: str = "qr",
    momentum: float = 0.0,
) -> Recipe:
    """Trains layers of a fixed low rank whose singular values stay within a factor tau of each other."""
    if rank is not None and compression != 0.5:
        raise ArgumentError(f"condlr: rank={rank} and compression={compression} both say how wide layers are; give one")
    return Recipe(
        name="condlr",
        parameterization=piece(Factored, rank=rank, compression=compression),
        step=(piece(conditioned.condlr, tau=tau, retraction=retraction, momentum=momentum),),
        own=frozenset({"parameterization", "step"}),
    )


@entry(
    "procedure",
    title="TDLRT",
    formula="C ×₀ U₀ ×₁ U₁ instead of a kernel; bases orth [U_i | ∇K_i], a step of C between them, cut mode by mode",
    reference=Reference(
        "Zangrando, Schotthöfer, Ceruti, Kusch, Tudisco",
        "Rank-adaptive spectral pruning of convolutional layers during training",
        2023,
        "2305.19059",
    ),
    trained="∏ 2R_i + Σ 2R_i d_i, R_i = d_i/2",
    cost="2 forward-backwards per step, d + 1 chains of small convolutions in the first, a QR and an SVD per mode",
    merges="the weight is replaced",
    exports="the weight is replaced",
    when="In place of dlrt for convolutions: input channels are compressed as well, and the kernel runs on few of them.",
    tiny={"ranks": 2, "tolerance": 0.02, "min_rank": 2},
    variants=("tucker_dlrt(min_rank=1, tolerance=0.05, max_rank=4, modes=(0, 1, 2), start='random')",),
)
def tucker_dlrt(
    *,
    ranks: int | Sequence[int] | None = None,
    tolerance: float = 0.1,
    min_rank: int = 3,
    max_rank: int | None = None,
    modes: Sequence[int] = (0, 1),
    start: str = "svd",
) -> Recipe:
    """Trains convolutions in Tucker form on their manifold, and finds the rank of each mode on the way."""
    return Recipe(
        name="tucker_dlrt",
        parameterization=piece(TuckerIntegrated, ranks=ranks, max_rank=max_rank, modes=tuple(modes), start=start),
        step=(piece(sgd),),
        procedure=piece(DLRT, tolerance=tolerance, min_rank=min_rank),
        own=INTEGRATED,
    )
