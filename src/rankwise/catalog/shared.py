"""Parameterizations whose layers share tensors, or draw them from a seed."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.catalog.building import adapter
from rankwise.core.catalog import Reference, entry
from rankwise.core.errors import ArgumentError
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.random_bases import RandomBases
from rankwise.parameterizations.random_basis import RandomBasis
from rankwise.parameterizations.recycled import Recycled
from rankwise.parameterizations.shared_bank import SharedBank
from rankwise.parameterizations.tensor_cores import TensorCores
from rankwise.parameterizations.tied import TiedLoRA
from rankwise.parameterizations.vector_bank import VectorBank

# RandLoRA's inner width, and what forward and backward take where its matrix is made.
_INNER = "(ceil(min(m, n)/rank)*rank)"
_AS_MATRIX = f"(m*n*{_INNER}*(1 if m*n <= T*(m + n) else 2) + min(T*{_INNER}*(m + n), m*n*(T + {_INNER})))"


@entry(
    "parameterization",
    title="VeRA",
    formula="W + diag(b) B diag(d) A, one frozen random pair B, A for all layers",
    reference=Reference("Kopiczko et al.", "VeRA: Vector-based Random Matrix Adaptation", 2023, "2310.11454"),
    trained="m + r",
    cost="2r(m + n) FLOPs per token, at a larger r than LoRA's",
    merges="exact",
    exports="exact at rank r",
    when="When very many adapters must be stored; it needs about ten times LoRA's learning rate.",
    tiny={"rank": 4},
    numbers="m+rank",
    flops="2*T*rank*(m+n)",
)
def vera(
    *,
    rank: int = 256,
    d_initial: float = 0.1,
    dropout: float = 0.0,
    train: str = "both",
    share: bool = True,
    save_projections: bool = False,
) -> Recipe:
    """Trains two vectors per layer around one frozen random pair that all layers share."""
    if train == "d" and d_initial != 0.1:
        raise ArgumentError("with train='d' the vector d starts at 0, so d_initial would have no effect; leave it out")
    chosen = piece(
        SharedBank,
        rank=rank,
        d_initial=d_initial,
        dropout=dropout,
        train=train,
        share=share,
        save_projections=save_projections,
    )
    return adapter(chosen, name="vera")


@entry(
    "parameterization",
    title="NOLA",
    formula="W + s·(Σ β_j B_j/√l)(A₀ + Σ α_i A_i/√k), only α and β trained",
    reference=Reference(
        "Koohpayegani et al.", "NOLA: Compressing LoRA using Linear Combination of Random Basis", 2023, "2310.02556"
    ),
    trained="k + l",
    cost="2r(m + n) FLOPs per token; 2r(kn + lm) and drawing r(kn + lm) numbers once per forward and once per backward",
    merges="exact",
    exports="exact at rank r",
    when="When the file must be a few kilobytes; drawing the matrices is slow (share_bases trades memory for it).",
    tiny={"rank": 2, "bases_A": 5, "bases_B": 7, "chunk": 3},
    numbers="bases_A+bases_B",
    flops="2*T*rank*(m+n) + 2*rank*(bases_A*n+bases_B*m)",
    variants=(
        "nola(rank=2, bases_A=5, bases_B=7, variant='vit')",
        "nola(rank=2, bases_A=5, bases_B=7, share_bases=True)",
    ),
)
def nola(
    *,
    rank: int = 8,
    alpha: float | None = None,
    bases_A: int = 512,
    bases_B: int = 512,
    variant: str = "language",
    chunk: int = 64,
    share_bases: bool = False,
) -> Recipe:
    """Trains how much of each of many seeded random matrices goes into the factors of a LoRA."""
    made = piece(
        RandomBasis,
        rank=rank,
        alpha=alpha,
        bases_A=bases_A,
        bases_B=bases_B,
        variant=variant,
        chunk=chunk,
        share_bases=share_bases,
    )
    return adapter(made, name="nola")


@entry(
    "parameterization",
    title="Tied-LoRA",
    formula="W_l + s·diag(v_l) B diag(u_l) A, A and B shared by the layers of a role",
    reference=Reference(
        "Renduchintala, Konuk, Kuchaiev",
        "Tied-LoRA: Enhancing Parameter Efficiency of LoRA with Weight Tying",
        2023,
        "2311.09578",
    ),
    trained="r(m + n) once per group, r + m per layer",
    cost="2r(m + n) FLOPs per token",
    merges="exact",
    exports="exact at rank r",
    when="When a deep model has many equal layers and LoRA's file is an order too large.",
    tiny={"rank": 2},
    numbers="rank*(m+n) + rank + m",
    flops="2*T*rank*(m+n)",
    variants=("tied_lora(rank=2, train='AB')", "tied_lora(rank=2, train='uv')", "tied_lora(rank=2, train='Au')"),
)
def tied_lora(*, rank: int = 8, alpha: float | None = None, train: str = "ABuv") -> Recipe:
    """One LoRA for all layers of a role, scaled by two vectors of each layer; any of the four parts can be frozen."""
    return adapter(piece(TiedLoRA, rank=rank, alpha=alpha, train=train), name="tied_lora")


@entry(
    "parameterization",
    title="LoTR",
    formula="W_k + (scale/r)·left core_k right, left and right shared by the layers of a shape",
    reference=Reference("Bershatsky et al.", "LoTR: Low Tensor Rank Weight Adaptation", 2024, "2402.01376"),
    trained="r(m + n) once per shape, r² per layer",
    cost="2r(m + n) + 2r² FLOPs per token",
    merges="exact",
    exports="exact at rank r",
    when="As Tied-LoRA, with a full r × r core per layer; its wide start wants small learning rates.",
    tiny={"rank": 2},
    numbers="rank*(m+n) + rank*rank",
    flops="2*T*(rank*(m+n) + rank*rank)",
    variants=("lotr(rank=2, factor_std=0.3)",),
)
def lotr(*, rank: int = 8, scale: float = 1.0, factor_std: float = 1.0) -> Recipe:
    """Two trained factors for all layers of a shape, and a small trained core per layer between them."""
    return adapter(piece(TensorCores, rank=rank, scale=scale, factor_std=factor_std), name="lotr")


@entry(
    "parameterization",
    title="VB-LoRA",
    formula="W + B A − B₀ A₀, pieces of B and A mixed from the top k of h shared vectors",
    reference=Reference(
        "Li, Han, Ji", "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", 2024, "2405.15179"
    ),
    trained="hb once, r·h(m + n)/b per layer; stored compactly hb + r(m + n)/b·(2k − 1)",
    cost="2r(m + n) FLOPs per token, twice that when compensated",
    merges="exact",
    exports="exact at rank r, 2r when compensated",
    when="When many finished adapters must be stored in as little as possible; training takes far more memory.",
    tiny={"rank": 2, "vectors": 5, "length": 4},
    numbers="vectors*length + rank*vectors*(m+n)/length",
    flops="4*T*rank*(m+n)",
    variants=(
        "vblora(rank=1, vectors=6, length=2, top=6, start='paper')",
        "vblora(rank=2, vectors=5, length=2, top=1)",
    ),
)
def vblora(*, rank: int = 4, vectors: int = 256, length: int = 256, top: int = 2, start: str = "compensated") -> Recipe:
    """Mixes the factors of all layers, piece by piece, from one trained bank of vectors."""
    return adapter(piece(VectorBank, rank=rank, vectors=vectors, length=length, top=top, start=start), name="vblora")


@entry(
    "parameterization",
    title="RandLoRA",
    formula="W + s·Σ_j B_j diag(Λ_j) A diag(Γ_j), N = ⌈min(m, n)/r⌉ frozen bases",
    reference=Reference(
        "Albert et al.", "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", 2025, "2502.00987"
    ),
    trained="N(r + min(m, n)), more for smaller r",
    cost="2Nr(m + n) FLOPs per token, or 2mnNr once and no more for long inputs",
    merges="exact",
    exports="not of low rank; the best rank-r substitute with its error",
    when="When the update must have full rank and full fine-tuning's memory is not there; slower than LoRA.",
    tiny={"rank": 3, "alpha": 6.0},
    numbers="ceil(min(m,n)/rank)*(rank+min(m,n))",
    flops=f"2*{_INNER}*(m*n if {_AS_MATRIX} < T*{_INNER}*(2*max(m, n) + 3*min(m, n)) else T*(m + n))",
    variants=(
        "randlora(rank=3, alpha=6.0, pairing='peft')",
        "randlora(rank=2, alpha=6.0, projection='sparse')",
        "randlora(rank=2, alpha=6.0, projection='very_sparse')",
    ),
)
def randlora(
    *, rank: int = 32, alpha: float = 640.0, pairing: str = "paper", projection: str = "dense", dropout: float = 0.0
) -> Recipe:
    """Sums many frozen random low-rank bases, each scaled by two trained diagonals, to full rank."""
    made = piece(RandomBases, rank=rank, alpha=alpha, pairing=pairing, projection=projection, dropout=dropout)
    return adapter(made, name="randlora")


@entry(
    "parameterization",
    title="EigenLoRAx",
    formula="W + E_B C_B C_Aᵀ E_Aᵀ, E the principal directions of earlier adapters",
    reference=Reference(
        "Kaushik et al.",
        "EigenLoRAx: Recycling Adapters to Find Principal Subspaces for Resource-Efficient Adaptation and Inference",
        2025,
        "2502.04700",
    ),
    trained="2K·r",
    cost="2Kr(m + n) FLOPs once per forward, 2r(m + n) per token; K(m + n) frozen numbers per layer",
    merges="exact",
    exports="exact at rank r",
    when="When there are many adapters of one base for related tasks; without them (random directions only) it is a weak LoRA.",
    tiny={"rank": 2, "random_components": 4},
    numbers="2*rank*(random_components + (components + center if adapters else 0))",
    flops="2*T*rank*(m+n) + 2*rank*(m+n)*(random_components + (components + center if adapters else 0))",
    variants=("eigenlorax(rank=2, random_components=4, start='uniform')",),
)
def eigenlorax(
    *,
    adapters: Sequence[str] = (),
    rank: int = 8,
    components: int = 32,
    random_components: int = 0,
    center: bool = True,
    start: str = "zero",
) -> Recipe:
    """Trains coordinates in the subspace that the factors of earlier adapters span."""
    made = piece(
        Recycled,
        adapters=tuple(str(folder) for folder in adapters),
        rank=rank,
        components=components,
        random_components=random_components,
        center=center,
        start=start,
    )
    return adapter(made, name="eigenlorax")
