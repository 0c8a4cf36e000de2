"""Parameterizations that multiply the weight: rotations, reflections, gains."""

from __future__ import annotations

from rankwise.catalog.building import adapter
from rankwise.core.catalog import Reference, entry
from rankwise.core.errors import ArgumentError
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.boft import BOFT
from rankwise.parameterizations.delora import DeLoRA
from rankwise.parameterizations.hra import Householder
from rankwise.parameterizations.ia3 import IA3
from rankwise.parameterizations.oft import OFT
from rankwise.parameterizations.road import RoAd


@entry(
    "parameterization",
    title="OFT",
    formula="W Dᵀ,  D block-diagonal, R_i = (I - Q_i)(I + Q_i)⁻¹",
    reference=Reference(
        "Qiu et al.", "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", 2023, "2306.07280 (OFTv2: 2506.19847)"
    ),
    trained="n(b - 1)/2",
    numbers="n*(block-1)//2",
    flops="2*T*n*block",
    cost="2nb FLOPs per token; one batched inverse of n/b blocks per step",
    merges="exact",
    exports="not of low rank; the best rank-r substitute with its error",
    when="When the base must be forgotten as little as possible: lengths and angles of the weight's rows stay as they are.",
    tiny={"block": 4},
    variants=(
        "oft(block=4, cayley='neumann')",
        "oft(block=2, cayley='neumann', terms=2)",
        "oft(block=4, share_blocks=True)",
        "oft(block=4, side='output')",
        "oft(block=4, constrain=0.5)",
    ),
)
def oft(
    *,
    block: int = 32,
    cayley: str = "exact",
    terms: int = 5,
    share_blocks: bool = False,
    side: str = "input",
    constrain: float | None = None,
    dropout: float = 0.0,
) -> Recipe:
    """Rotates the inputs of each layer block by block, so that lengths and angles of the weight's rows are kept."""
    if cayley == "exact" and terms != 5:
        raise ArgumentError("cayley='exact' is no series, so terms would have no effect; leave it out, or use cayley='neumann'")
    chosen = piece(
        OFT,
        block=block,
        cayley=cayley,
        terms=terms,
        share_blocks=share_blocks,
        side=side,
        constrain=constrain,
        dropout=dropout,
    )
    return adapter(chosen, name="oft")


@entry(
    "parameterization",
    title="BOFT",
    formula="diag(s) W Rᵀ,  R = F_{N-1} … F_0,  F_i = P_i D_i P_iᵀ",
    reference=Reference(
        "Liu et al.", "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", 2023, "2311.06243"
    ),
    trained="N n b + m",
    numbers="factors*n*block+m",
    flops="2*T*n*block*2**(factors-1) + (2*n*block**2*factors*2**(factors-1) if factors > 1 else 0)",
    cost="2nb 2^(N-1) FLOPs per token, or 2nbN and gathers for wide blocks; one batched inverse of N n/b blocks per step",
    merges="exact",
    exports="not of low rank; the best rank-r substitute with its error",
    when="When OFT's blocks are too narrow: N levels of small blocks mix all coordinates. Slower than OFT.",
    tiny={"block": 2, "factors": 2},
    variants=("boft(block=4)",),
)
def boft(*, block: int = 4, factors: int = 1, dropout: float = 0.0) -> Recipe:
    """Rotates the inputs of each layer by a product of permuted small blocks, and scales every output."""
    return adapter(piece(BOFT, block=block, factors=factors, dropout=dropout), name="boft")


@entry(
    "parameterization",
    title="HRA",
    formula="W H,  H = Π (I - 2 û_i û_iᵀ)",
    reference=Reference(
        "Yuan et al.",
        "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
        2024,
        "2405.17484",
    ),
    trained="n r",
    numbers="n*rank",
    flops="4*T*n*rank + 4*n*rank**2",
    cost="4nr FLOPs per token and 4nr² per step",
    merges="exact",
    exports="exact at rank r, with factors that depend on W",
    when="When an orthogonal change is wanted that is also of low rank: half of LoRA's numbers at the same rank.",
    tiny={"rank": 4},
)
def hra(*, rank: int = 8, gram_schmidt: bool = False, start: str = "paired") -> Recipe:
    """Reflects the inputs of each layer at r trained directions: orthogonal, and of low rank as a change."""
    return adapter(piece(Householder, rank=rank, gram_schmidt=gram_schmidt, start=start), name="hra")


@entry(
    "parameterization",
    title="(IA)³",
    formula="diag(l) W and l ∘ bias,  or W diag(l)",
    reference=Reference(
        "Liu et al.",
        "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
        2022,
        "2205.05638",
    ),
    trained="m, or n on the input side",
    numbers="m",
    flops="0",
    cost="one product per output, or input",
    merges="exact, bias too",
    exports="not of low rank; the scaled bias is no LoRA",
    when="When almost nothing may be trained or stored; sensitive to its learning rate, about ten times LoRA's.",
    variants=("ia3(side='input')",),
)
def ia3(*, side: str = "output", input_layers: tuple[str, ...] = ()) -> Recipe:
    """Scales every output of a layer, or every input of those named, by one trained factor."""
    return adapter(piece(IA3, side=side, input_layers=input_layers), name="ia3")


@entry(
    "parameterization",
    title="RoAd",
    formula="R W and R bias,  R of 2 × 2 rotations with gains",
    reference=Reference(
        "Liao, Monz",
        "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability",
        2024,
        "2409.00119",
    ),
    trained="m, 2m or 4m (variants 1, 2, 4)",
    numbers="m*variant",
    flops="0",
    cost="four products per output",
    merges="exact, bias too",
    exports="not of low rank; the rotated bias is no LoRA",
    when="When one batch has to serve very many adapters: each costs a few products per output, no matrix product.",
    tiny={"group": 2},
    variants=("road(variant=2, group=4)", "road(variant=4, group=4)"),
)
def road(*, variant: int = 1, group: int = 64) -> Recipe:
    """Rotates and scales pairs of a layer's outputs, bias included."""
    return adapter(piece(RoAd, variant=variant, group=group), name="road")


@entry(
    "parameterization",
    title="DeLoRA",
    formula="W + (B Ξ A - B₀ Ξ₀ A₀) diag(w),  Ξ_i = λ / (r ‖A_i‖ ‖B_i‖)",
    reference=Reference("Bini, Girrbach, Akata", "Decoupling Angles and Strength in Low-rank Adaptation", 2025, "2503.18225"),
    trained="r(m + n) + 1",
    numbers="rank*(m+n)+1",
    flops="4*T*rank*(m+n)",
    cost="4r(m + n) FLOPs per token, half of it with start='zero'",
    merges="exact",
    exports="exact at rank 2r",
    when="When training is long or its learning rate uncertain: the update's norm is bounded, whatever the factors do.",
    tiny={"rank": 2},
    variants=("delora(rank=2, strength=0.1, start='zero')", "delora(rank=2, weight_norms=False)"),
)
def delora(
    *, rank: int = 8, strength: float = 15.0, weight_norms: bool = True, start: str = "paper", dropout: float = 0.0
) -> Recipe:
    """LoRA whose rank-one terms are normalized, with one trained strength per layer that bounds the update."""
    chosen = piece(DeLoRA, rank=rank, strength=strength, weight_norms=weight_norms, start=start, dropout=dropout)
    return adapter(chosen, name="delora")
