"""Parameterizations in a frame read off the weight: singular vectors, LDU, skeletons, and both kinds of magnitudes."""

from __future__ import annotations

from rankwise.catalog.building import OWN, adapter
from rankwise.core.catalog import Reference, entry
from rankwise.core.errors import ArgumentError
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.core_magnitude import CoreMagnitude
from rankwise.parameterizations.lower_upper import LowerUpper
from rankwise.parameterizations.nested import NestedCore
from rankwise.parameterizations.singular_values import SingularValues
from rankwise.parameterizations.skeleton import Skeleton
from rankwise.parameterizations.small_core import SmallCore
from rankwise.parameterizations.spectral_rotation import SpectralRotation
from rankwise.parameterizations.two_magnitudes import TwoMagnitudes
from rankwise.steps.stiefel import stiefel_adam

# A diagonal in a frame of r = min(m, n): the product once per forward, or factor by factor, whatever is less work in training.
WHOLE = "m*n*(2*min(m, n) + T) < 2*T*min(m, n)*(m + n)"
DIAGONAL_FLOPS = f"min(m, n)*(2*m*n if {WHOLE} else 2*T*(m + n))"


@entry(
    "parameterization",
    title="LoRA-XS",
    formula="W + s·U_r R Σ_r V_rᵀ, R trained",
    reference=Reference(
        "Bałazy et al.", "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", 2024, "2405.17604"
    ),
    trained="r²",
    cost="2r(m + n) + 2r² FLOPs per token; one SVD per layer at the start",
    merges="exact",
    exports="exact at rank r",
    when="When only a few thousand numbers may be trained; use a large rank, since it costs r².",
    tiny={"rank": 2},
    numbers="rank**2",
    flops="2*T*rank*(m+n) + 2*T*rank**2",
)
def lora_xs(
    *,
    rank: int = 8,
    alpha: float | None = None,
    core_std: float = 1e-5,
    dropout: float = 0.0,
    frames: str = "svd",
    singular_values: str = "input",
    iterations: int | None = None,
) -> Recipe:
    """Trains an r × r core between the leading singular vectors of each weight."""
    if frames == "kaiming" and (singular_values != "input" or iterations is not None):
        raise ArgumentError("frames='kaiming' decomposes nothing, so singular_values and iterations would have no effect")
    chosen = piece(
        SmallCore,
        rank=rank,
        alpha=alpha,
        core_std=core_std,
        dropout=dropout,
        frames=frames,
        singular_values=singular_values,
        iterations=iterations,
    )
    return adapter(chosen, name="lora_xs")


@entry(
    "parameterization",
    title="SVFit",
    formula="W + U_r diag(e) V_rᵀ",
    reference=Reference(
        "Sun et al.",
        "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
        2024,
        "2409.05926",
    ),
    trained="r",
    cost="2r(m + n) FLOPs per token, or 2mnr once per forward on long batches; r(m + n) frozen numbers; one SVD per layer",
    merges="exact",
    exports="exact at rank r",
    when="When only a few hundred numbers per layer may be trained; its frozen frame takes twice the layer's memory.",
    numbers="min(m, n)",
    flops=DIAGONAL_FLOPS,
    variants=("svfit(rank=2)",),
)
def svfit(*, rank: int | None = None) -> Recipe:
    """Trains the singular values of each weight and leaves its singular vectors."""
    return adapter(piece(SingularValues, rank=rank), name="svfit")


@entry(
    "parameterization",
    title="LoLDU",
    formula="W + s·(P L)_r diag(z − z₀) U_r",
    reference=Reference(
        "Shi et al.",
        "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
        2024,
        "2410.13618",
    ),
    trained="r",
    cost="2r(m + n) FLOPs per token, or 2mnr once per forward on long batches; r(m + n) frozen numbers; one LU per layer",
    merges="exact",
    exports="exact at rank r",
    when="Like svfit where an SVD of every layer takes too long; its s = 1/r is small, so it wants a large learning rate.",
    numbers="min(m, n)",
    flops=DIAGONAL_FLOPS,
    variants=(
        "loldu(rank=2)",
        "loldu(rank=2, start='constant')",
        "loldu(rank=2, start='normal')",
        "loldu(rank=2, start='uniform')",
    ),
)
def loldu(*, rank: int | None = None, alpha: float = 1.0, start: str = "lu") -> Recipe:
    """Trains leading pivots of each weight's LDU factorization and leaves the triangular factors."""
    return adapter(piece(LowerUpper, rank=rank, alpha=alpha, start=start), name="loldu")


@entry(
    "parameterization",
    title="PMSS",
    formula="W + s·W[:, J] core W[I, :]",
    reference=Reference("Wang et al.", "PMSS: Pretrained Matrices Skeleton Selection for LLM Fine-tuning", 2024, "2409.16722"),
    trained="r²",
    cost="2r(m + n) + 2r² FLOPs per token; a pivoted QR of W and of Wᵀ per layer, stopped after r columns",
    merges="exact",
    exports="exact at rank r",
    when="For updates of high rank from few numbers; r is meant to be 128 and more, and FLOPs grow with it.",
    tiny={"rank": 2},
    numbers="rank**2",
    flops="2*T*rank*(m+n) + 2*T*rank**2",
    variants=(
        "pmss(rank=2, select='norm')",
        "pmss(rank=2, select='leverage')",
        "pmss(rank=2, select='deim')",
        "pmss(rank=2, select='random')",
        "pmss(rank=2, rescale=True)",
    ),
)
def pmss(*, rank: int = 128, select: str = "qr", rescale: bool = False, scale: float = 1.0) -> Recipe:
    """Trains an r × r core between selected columns and rows of the weight itself."""
    return adapter(piece(Skeleton, rank=rank, select=select, rescale=rescale, scale=scale), name="pmss")


@entry(
    "parameterization",
    title="NoRA (nested)",
    formula="W + s·B_out B A A_out, B_out and A_out frozen",
    reference=Reference(
        "Lin et al.", "NoRA: Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models", 2024, "2408.10280"
    ),
    trained="2rq, outer rank r and inner rank q",
    cost="2q(m + n) FLOPs per token and 2rq(m + n) once per forward; one SVD per layer",
    merges="exact",
    exports="exact at rank q",
    when="Between LoRA and LoRA-XS: fewer numbers than the one, and less of them than r² for a wide outer frame.",
    tiny={"rank": 2, "outer_rank": 4},
    numbers="2*rank*outer_rank",
    flops="2*T*rank*(m+n) + 2*rank*outer_rank*(m+n)",
    variants=(
        "nested_nora(rank=2, outer_rank=4, split='input')",
        "nested_nora(rank=2, outer_rank=4, split='none')",
        "nested_nora(rank=2, outer_rank=4, outer='awsvd')",
        "nested_nora(rank=2, outer_rank=4, compensate=True)",
    ),
)
def nested_nora(
    *,
    rank: int = 8,
    outer_rank: int = 64,
    alpha: float | None = None,
    split: str = "both",
    outer: str = "svd",
    compensate: bool = False,
) -> Recipe:
    """Trains a small LoRA nested between two frozen factors that the SVD of the weight gives."""
    if rank > outer_rank:
        raise ArgumentError(f"rank is that of the inner pair and at most outer_rank; it is {rank}, outer_rank {outer_rank}")
    chosen = piece(NestedCore, rank=rank, outer_rank=outer_rank, alpha=alpha, split=split, outer=outer, compensate=compensate)
    return adapter(chosen, name="nested_nora")


@entry(
    "parameterization",
    title="BoRA",
    formula="H diag(μ_col / ‖H‖_col),  H = diag(μ_row / ‖V‖_row) V,  V = W + s·B A",
    reference=Reference("Wang et al.", "BoRA: Bi-dimensional Weight-Decomposed Low-Rank Adaptation", 2024, "2412.06441"),
    trained="r(m + n) + m + n",
    cost="2r(m + n) FLOPs per token, and 4mnr for the norms once per forward, with a squared copy of the weight for a moment",
    merges="exact",
    exports="not of low rank: rows and columns are scaled; the best rank-r substitute with its error",
    when="When DoRA helps and inputs, too, should be weighed anew; twice DoRA's cost for the norms.",
    tiny={"rank": 2},
    numbers="rank*(m+n) + m + n",
    flops="2*T*rank*(m+n) + 2*m*n*(2*rank + 1) + 4*rank*rank*(m+n)",
    variants=("bora(rank=2, order='column')", "bora(rank=2, detach_norm=False)"),
)
def bora(
    *,
    rank: int = 8,
    alpha: float | None = None,
    scale: str = "lora",
    dropout: float = 0.0,
    detach_norm: bool = True,
    order: str = "row",
) -> Recipe:
    """Trains the lengths of weight rows and columns by themselves, and the direction by LoRA."""
    chosen = piece(TwoMagnitudes, rank=rank, alpha=alpha, scale=scale, dropout=dropout, detach_norm=detach_norm, order=order)
    return adapter(chosen, name="bora")


@entry(
    "parameterization",
    title="EDoRA",
    formula="diag(μ / ‖V‖_row) V,  V = W + s·U_r R Σ_r V_rᵀ",
    reference=Reference(
        "Nasiri, Garraghan",
        "EDoRA: Efficient Weight-Decomposed Low-Rank Adaptation via Singular Value Decomposition",
        2025,
        "2501.12067",
    ),
    trained="r² + m",
    cost="2r(m + n) + 2r² FLOPs per token, and 2mnr for the norms once per forward; one SVD per layer",
    merges="exact",
    exports="not of low rank: the rows are scaled; the best rank-r substitute with its error",
    when="DoRA at LoRA-XS's price; at small ranks most of what it trains are the m magnitudes.",
    tiny={"rank": 2},
    numbers="rank**2 + m",
    flops="2*T*rank*(m+n) + 2*T*rank**2 + 2*m*n*rank + 2*rank*rank*(m+n) + 2*rank*rank*n",
    variants=("edora(rank=2, detach_norm=False)",),
)
def edora(
    *,
    rank: int = 16,
    alpha: float | None = 16.0,
    core_std: float = 1e-5,
    dropout: float = 0.0,
    detach_norm: bool = True,
) -> Recipe:
    """Trains the length of every weight row, and its direction by an r × r core between singular vectors."""
    chosen = piece(CoreMagnitude, rank=rank, alpha=alpha, core_std=core_std, dropout=dropout, detach_norm=detach_norm)
    return adapter(chosen, name="edora")


@entry(
    "parameterization",
    title="SODA",
    formula="U diag(relu(σ + δ)) Vᵀ (Q_1 ⊗ Q_2 ⊗ Q_3)ᵀ, Q_i orthogonal",
    reference=Reference(
        "Zhang et al.", "Spectrum-Aware Parameter Efficient Fine-Tuning for Diffusion Models", 2024, "2405.21050"
    ),
    trained="min(m, n) + n_1² + n_2² + n_3², n = n_1 n_2 n_3",
    cost="2n(n_1 n_2 + n_3) FLOPs per token (per output on long batches) beside svfit's; one SVD per layer",
    merges="exact",
    exports="not of low rank; the best rank-r substitute with its error",
    when="To personalize a diffusion model, where inputs should turn without the spectrum growing; needs its own step.",
    numbers="min(m, n) + 3*ceil(n**(1/3))**2",
    flops=f"{DIAGONAL_FLOPS} + 2*n*ceil(n**(1/3))*(1 + ceil(n**(1/3)))*(m if {WHOLE} else T)",
    variants=("soda(decomposition='lq')", "soda(rectify=False)"),
)
def soda(
    *,
    factors: tuple[int, int, int] | None = None,
    decomposition: str = "svd",
    rectify: bool = True,
    start_delta: float = 0.0,
) -> Recipe:
    """Trains singular values and a Kronecker-structured rotation of the inputs, by a step that keeps it a rotation."""
    chosen = piece(SpectralRotation, factors=factors, decomposition=decomposition, rectify=rectify, start_delta=start_delta)
    return Recipe(name="soda", parameterization=chosen, step=(piece(stiefel_adam),), own=OWN | {"step"})
