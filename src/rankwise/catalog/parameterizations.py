"""Parameterizations: what is trained beside, or instead of, the frozen weight."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.catalog.building import OWN, adapter
from rankwise.core.catalog import Reference, entry
from rankwise.core.errors import ArgumentError
from rankwise.core.piece import Piece, piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.block_affine import BlockAffine
from rankwise.parameterizations.full import Full
from rankwise.parameterizations.fused_projections import FusedLoRA
from rankwise.parameterizations.gated import GatedLoRA
from rankwise.parameterizations.lora import LoRA
from rankwise.parameterizations.magnitude import Magnitude
from rankwise.parameterizations.reference_conv import ReferenceConvLoRA
from rankwise.parameterizations.shard_share import ShardShare
from rankwise.parameterizations.tucker import TuckerCore


@entry(
    "parameterization",
    title="LoRA",
    formula="W + s·B A",
    reference=Reference("Hu et al.", "LoRA: Low-Rank Adaptation of Large Language Models", 2021, "2106.09685"),
    trained="r(m + n)",
    cost="2r(m + n) FLOPs per token",
    merges="exact",
    exports="exact at rank r",
    when="The one to try first; tune its learning rate before trying anything else.",
    tiny={"rank": 2},
    numbers="rank*(m+n)",
    flops="2*T*rank*(m+n)",
    variants=(
        "lora(rank=2, input_start='orthonormal')",
        "lora(rank=2, conv='reference')",
        "lora(rank=1, fused=(True, False, True, False))",
    ),
)
def lora(
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    input_start: str = "kaiming",
    scale: str = "lora",
    conv: str = "factor",
    fused: Sequence[bool] | None = None,
) -> Recipe:
    """A trained low-rank correction B A beside each frozen weight."""
    if conv not in ("factor", "reference"):
        raise ArgumentError(
            f"conv is 'factor' (down to r channels, up pointwise) or 'reference' (the first release), not {conv!r}"
        )
    if (conv == "reference" or fused is not None) and input_start != "kaiming":
        raise ArgumentError("conv='reference' and fused= start A as LoRA does; leave out input_start")
    if conv == "reference" and fused is not None:
        raise ArgumentError("conv='reference' is for convolutions and fused= for projections in one weight; use one of them")
    if conv == "reference":
        return adapter(piece(ReferenceConvLoRA, rank=rank, alpha=alpha, dropout=dropout, scale=scale), name="lora")
    if fused is not None:
        blocks = tuple(map(bool, fused))
        return adapter(piece(FusedLoRA, enabled=blocks, rank=rank, alpha=alpha, dropout=dropout, scale=scale), name="lora")
    return adapter(piece(LoRA, rank=rank, alpha=alpha, dropout=dropout, input_start=input_start, scale=scale), name="lora")


@entry(
    "parameterization",
    title="rsLoRA",
    formula="W + (α/√r)·B A",
    reference=Reference("Kalajdzievski", "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023, "2312.03732"),
    trained="r(m + n)",
    cost="2r(m + n) FLOPs per token",
    merges="exact",
    exports="exact at rank r, scale folded in",
    when="When the rank is large (64 and up), where LoRA's α/r slows learning down.",
    tiny={"rank": 2},
    numbers="rank*(m+n)",
    flops="2*T*rank*(m+n)",
)
def rslora(*, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> Recipe:
    """LoRA with the scale α/√r, under which learning does not slow down as the rank grows."""
    return adapter(piece(LoRA, rank=rank, alpha=alpha, dropout=dropout, scale="rslora"), name="rslora")


@entry(
    "parameterization",
    title="LoRA-FA",
    formula="W + s·B A, A frozen",
    reference=Reference("Zhu et al.", "Asymmetry in Low-Rank Adapters of Foundation Models", 2024, "2402.16842"),
    trained="r·m",
    cost="2r(m + n) FLOPs per token; no input kept for backward",
    merges="exact",
    exports="exact at rank r",
    when="When activation memory is short: twice the rank of LoRA for the same trained numbers.",
    tiny={"rank": 2},
    numbers="rank*m",
    flops="2*T*rank*(m+n)",
    variants=("lora_fa(rank=2, correct=True)",),
)
def lora_fa(
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    input_start: str = "orthonormal",
    train: str = "B",
    correct: bool = False,
    damping: float = 1e-8,
) -> Recipe:
    """LoRA with a frozen random A, so that only B is trained."""
    if train not in ("A", "B"):
        raise ArgumentError(f"lora_fa trains B, or A as the control of the paper; train={train!r} is neither")
    if damping != 1e-8 and not correct:
        raise ArgumentError("damping is that of the corrected gradient; say correct=True, or leave it out")
    if train == "A":
        if input_start != "orthonormal" or correct:
            raise ArgumentError("with train='A' A starts at 0 and B is orthonormal; leave out input_start and correct")
        return adapter(piece(LoRA, rank=rank, alpha=alpha, dropout=dropout, freeze_output=True), name="lora_fa")
    chosen = piece(
        LoRA,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        input_start=input_start,
        freeze_input=True,
        correct=damping if correct else None,
    )
    return adapter(chosen, name="lora_fa")


@entry(
    "parameterization",
    title="DoRA",
    formula="diag(μ / ‖V‖_row) V,  V = W + s·B A",
    reference=Reference("Liu et al.", "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, "2402.09353"),
    trained="r(m + n) + m",
    cost="2r(m + n) + 2m FLOPs per token, and 2mnr for the norms once per forward",
    merges="exact",
    exports="not of low rank: the rows are scaled; the best rank-r substitute with its error",
    when="When LoRA at the same rank falls short of full fine-tuning; often matches it at half the rank.",
    tiny={"rank": 2},
    numbers="rank*(m+n)+m",
    flops="2*T*rank*(m+n) + 2*m*n*rank + 2*rank*rank*(m+n)",
    variants=(
        "dora(inner=vera(rank=2))",
        "dora(inner=lora_xs(rank=2))",
        "dora(rank=2, detach_norm=False)",
    ),
)
def dora(
    *,
    rank: int | None = None,
    alpha: float | None = None,
    scale: str = "lora",
    dropout: float = 0.0,
    detach_norm: bool = True,
    inner: Recipe | Piece | None = None,
    direction: bool = True,
) -> Recipe:
    """Trains the length of every weight row by itself, and its direction by LoRA (rank 8) or another additive method."""
    if isinstance(inner, Recipe):
        others = sorted(inner.own - OWN)
        if others or "parameterization" not in inner.own:
            raise ArgumentError(
                f"inner= takes a parameterization; {inner.name} decides {', '.join(others) or 'none'}. "
                f"Compose instead: 'dora + {inner.name}'"
            )
        inner = inner.parameterization
    if not direction and (inner is not None or rank is not None or alpha is not None or scale != "lora"):
        raise ArgumentError("direction=False trains the magnitudes alone, so inner, rank, alpha and scale would have no effect")
    chosen = piece(
        Magnitude,
        inner=inner,
        rank=8 if rank is None and inner is None and direction else rank,
        alpha=alpha,
        scale=scale,
        dropout=dropout,
        detach_norm=detach_norm,
        direction=direction,
    )
    return adapter(chosen, name="dora")


@entry(
    "parameterization",
    title="FLoRA (core space)",
    formula="W + s·core ×₁ P_out ×₂ P_in ×₃ P_kernel…",
    reference=Reference("Si et al.", "FLoRA: Low-Rank Core Space for N-dimension", 2024, "2405.14739"),
    trained="∏ j + Σ size·j over the modes",
    cost="2r(m + n) + 2r² FLOPs per token on a linear layer; three small convolutions on a convolution",
    merges="exact",
    exports="exact at rank r",
    when="For convolutions, where it keeps the kernel's shape with far fewer numbers than LoRA.",
    tiny={"rank": 3},
    numbers="rank**2 + rank*(m+n)",
    flops="2*T*rank*(m+n) + 2*T*rank**2",
)
def flora_core(*, rank: int = 8, kernel_rank: int = 2, scale: float = 1.0, dropout: float = 0.0) -> Recipe:
    """A Tucker update with a small core and one factor per mode of the weight, kernels included."""
    return adapter(piece(TuckerCore, rank=rank, kernel_rank=kernel_rank, scale=scale, dropout=dropout), name="flora_core")


@entry(
    "parameterization",
    title="Bone / MiSS",
    formula="miss: W + Dᵀ [I I …];  bat: W_ij (I + D_i) + D_i by blocks",
    reference=Reference(
        "Kang",
        "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models",
        2024,
        "2409.15371",
    ),
    trained="r·m (miss), r·q (mini), r·m or r·n (bat)",
    cost="n + 2rm FLOPs per token (miss); 2mnr per forward (bat by rows)",
    merges="exact",
    exports="exact at rank r (miss, mini); bat is not of low rank",
    when="miss: half of LoRA's FLOPs at the same rank, with full fine-tuning's learning rate; bat when quality matters more.",
    tiny={"rank": 3},
    numbers="rank*m",
    flops="2*T*rank*m",
    variants=(
        "bone(mode='mini', rank=4, width=4)",
        "bone(mode='bat', rank=4, axis='row')",
        "bone(mode='bat', rank=4, axis='col')",
    ),
)
def bone(*, rank: int = 64, mode: str = "miss", axis: str = "row", width: int | None = None, dropout: float = 0.0) -> Recipe:
    """One small matrix shared over blocks of the weight, added to them (miss, mini) or applied through them (bat)."""
    if mode not in ("miss", "mini", "bat"):
        raise ArgumentError(f"mode is miss, mini or bat, not {mode!r}")
    unused = [
        name
        for name, given, used in (
            ("axis", axis != "row", mode == "bat"),
            ("width", width is not None, mode == "mini"),
            ("dropout", dropout > 0, mode != "bat"),
        )
        if given and not used
    ]
    if unused:
        raise ArgumentError(f"bone(mode={mode!r}) has no use for {', '.join(unused)}: axis is for bat, width for mini")
    if mode == "bat":
        return adapter(piece(BlockAffine, rank=rank, axis=axis), name="bone")
    repeat = (64 if width is None else width) if mode == "mini" else None
    return adapter(piece(ShardShare, rank=rank, width=repeat, dropout=dropout), name="bone")


@entry(
    "parameterization",
    title="Gated LoRA",
    formula="W + s·B diag(gate) A",
    reference=Reference("Zhang et al.", "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023, "2303.10512"),
    trained="r(m + n + 1)",
    cost="2r(m + n) FLOPs per token",
    merges="exact",
    exports="exact at rank r",
    when="Under a schedule that closes ranks (adalora, sora); alone it is LoRA with one number more per rank.",
    tiny={"rank": 2},
    numbers="rank*(m+n+1)",
    flops="2*T*rank*(m+n)",
    variants=("gated_lora(rank=2, form='sora')",),
)
def gated_lora(*, rank: int = 8, alpha: float | None = None, form: str = "svd", dropout: float = 0.0) -> Recipe:
    """LoRA with a gate on every rank, started as in AdaLoRA ("svd") or SoRA ("sora")."""
    return adapter(piece(GatedLoRA, rank=rank, alpha=alpha, form=form, dropout=dropout), name="gated_lora")


@entry(
    "parameterization",
    title="Full fine-tuning",
    formula="W' trained",
    reference=Reference("—", "the baseline every low-rank method is compared with", 0),
    trained="m·n",
    cost="2mn FLOPs per token in backward",
    merges="exact",
    exports="not of low rank; the best rank-r substitute with its error",
    when="As the upper bar, or under gradient projection (full + galore) when memory for W is there.",
    numbers="m*n",
    flops="0",
)
def full() -> Recipe:
    """Trains a copy of every targeted weight; what gradient projection works on."""
    return adapter(piece(Full), name="full")
