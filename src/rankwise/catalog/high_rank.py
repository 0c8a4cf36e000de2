"""Parameterizations whose update has a high rank for few numbers: products of factors, frequencies, blocks, sparse entries."""

from __future__ import annotations

from rankwise.catalog.building import adapter
from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.c3a import C3A
from rankwise.parameterizations.fourierft import FourierFT
from rankwise.parameterizations.gralora import GraLoRA
from rankwise.parameterizations.hira import HiRA
from rankwise.parameterizations.loha import LoHa
from rankwise.parameterizations.lokr import LoKr
from rankwise.parameterizations.shira import SHiRA


@entry(
    "parameterization",
    title="LoHa (FedPara)",
    formula="W + s·(B₁ A₁) ∘ (B₂ A₂)",
    reference=Reference(
        "Hyeon-Woo, Ye-Bin, Oh",
        "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
        2021,
        "2108.06098",
    ),
    trained="2r(m + n)",
    cost="2r²(m + n) FLOPs per token as LoRA of rank r², or 4mnr per forward to make the matrix, whichever is less",
    merges="exact",
    exports="exact at rank r²",
    when="When a change of high rank must come from few numbers, as in image models; tune alpha, four factors multiply.",
    tiny={"rank": 2},
    numbers="2*rank*(m+n)",
    flops="2*T*rank**2*(m+n) if 6*T*rank**2*(m+n) < 2*T*m*n + 16*m*n*rank else 4*m*n*rank",
    variants=("loha(rank=2, tucker=True)", "loha(rank=2, start='lycoris')", "loha(rank=4, alpha=3)"),
)
def loha(
    *, rank: int = 8, alpha: float | None = None, tucker: bool = False, start: str = "zero", dropout: float = 0.0
) -> Recipe:
    """The product, entry by entry, of two low-rank matrices: rank up to r² from the numbers of rank 2r."""
    return adapter(piece(LoHa, rank=rank, alpha=alpha, tucker=tucker, start=start, dropout=dropout), name="loha")


@entry(
    "parameterization",
    title="LoKr",
    formula="W + s·C ⊗ D,  D or D = D_B D_A",
    reference=Reference(
        "Yeh et al.",
        "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
        2023,
        "2309.14859",
    ),
    trained="m₁n₁ + r(m₂ + n₂), or m₁n₁ + m₂n₂ where r is at least half of max(m₂, n₂)",
    cost="2·min(n₁ρ + m₁n₁m₂, m₁n₁n₂ + m₁ρ) FLOPs per token, ρ = r(m₂ + n₂) or m₂n₂",
    merges="exact",
    exports="exact at rank min(m₁, n₁)·r",
    when="When the file must be tiny: a full-rank change from a few hundred numbers per layer, cheap to apply.",
    tiny={"rank": 2, "factor": 2},
    numbers="factor**2 + rank*(m+n)//factor",
    flops="2*T*(rank*(m+n) + factor*min(m,n))",
    variants=(
        "lokr(rank=1, decompose_both=True)",
        "lokr(rank=100, alpha=1, full_scale='one')",
        "lokr(rank=1, factor=2, tucker=True, zero='D')",
    ),
)
def lokr(
    *,
    rank: int = 8,
    alpha: float | None = None,
    factor: int = -1,
    decompose_both: bool = False,
    full_scale: str = "alpha_over_r",
    tucker: bool = False,
    zero: str = "C",
) -> Recipe:
    """A Kronecker product of a small and a large factor, the large one of low rank where that is smaller."""
    chosen = piece(
        LoKr,
        rank=rank,
        alpha=alpha,
        factor=factor,
        decompose_both=decompose_both,
        full_scale=full_scale,
        tucker=tucker,
        zero=zero,
    )
    return adapter(chosen, name="lokr")


@entry(
    "parameterization",
    title="HiRA",
    formula="W ∘ (1 + B A)",
    reference=Reference(
        "Huang et al.", "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", 2025
    ),
    trained="r(m + n)",
    cost="2mnr FLOPs per forward; backward makes the full gradient of W once",
    merges="exact",
    exports="not of low rank: it has the rank of W; the best rank-r substitute with its error",
    when="When LoRA's rank is too low and the base is fixed: the update has W's own rank; needs a large learning rate.",
    tiny={"rank": 2},
    numbers="rank*(m+n)",
    flops="2*m*n*rank",
)
def hira(*, rank: int = 32) -> Recipe:
    """Multiplies each weight, entry by entry, with one plus a low-rank matrix, so the update has the rank of the weight."""
    return adapter(piece(HiRA, rank=rank), name="hira")


@entry(
    "parameterization",
    title="GraLoRA",
    formula="W + s·[(A_i part j)(B_j part i)]ᵀ in block (j, i) of k × k",
    reference=Reference(
        "Jung et al.", "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning", 2025, "2505.20355"
    ),
    trained="(r + hybrid_rank)(m + n)",
    cost="2(r + hybrid_rank)(m + n) FLOPs per token",
    merges="exact",
    exports="exact at rank k·r + hybrid_rank",
    when="At large ranks, or where a few input channels dominate: LoRA's cost at k times the rank.",
    tiny={"rank": 4, "blocks": 2},
    numbers="(rank + hybrid_rank)*(m+n)",
    flops="2*T*(rank + hybrid_rank)*(m+n)",
    variants=("gralora(rank=4, blocks=4)", "gralora(rank=2, alpha=3, blocks=2, hybrid_rank=2)"),
)
def gralora(*, rank: int = 32, alpha: float = 64.0, blocks: int = 2, hybrid_rank: int = 0, dropout: float = 0.0) -> Recipe:
    """A grid of k × k small low-rank blocks: the numbers of LoRA at k times its rank."""
    chosen = piece(GraLoRA, rank=rank, alpha=alpha, blocks=blocks, hybrid_rank=hybrid_rank, dropout=dropout)
    return adapter(chosen, name="gralora")


@entry(
    "parameterization",
    title="FourierFT",
    formula="W + (a/mn)·Σ c_k cos(2π(p_k o/m + q_k i/n))",
    reference=Reference("Gao et al.", "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", 2024, "2405.03003"),
    trained="n_f (frequencies)",
    cost="two Fourier transforms per token and 8 n_f FLOPs, or LoRA of rank 2n_f where that is less",
    merges="exact",
    exports="exact at rank min(2n_f, m, n)",
    when="When a file of a thousand numbers per layer is the point; its learning rate must be searched over decades.",
    tiny={"frequencies": 2},
    numbers="frequencies",
    flops="4*T*frequencies*(m+n) if 4*frequencies*(m+n) < 15*(m*log2(m) + n*log2(n)) else 0",
    variants=("fourierft(frequencies=20, location_seed=5)",),
)
def fourierft(*, frequencies: int = 1000, scale: float = 150.0, location_seed: int = 777) -> Recipe:
    """A few waves at fixed random frequencies, whose amplitudes are trained."""
    return adapter(piece(FourierFT, frequencies=frequencies, scale=scale, location_seed=location_seed), name="fourierft")


@entry(
    "parameterization",
    title="C3A",
    formula="W + circ(kernel)/n in blocks of b × b",
    reference=Reference("Chen et al.", "Parameter-Efficient Fine-Tuning via Circular Convolution", 2024, "2407.19342"),
    trained="mn/b",
    cost="about 2.5(m + n)·log₂ b + 4mn/b FLOPs per token; below b = 16 the matrix, 2mn",
    merges="exact",
    exports="not of low rank; the best rank-r substitute with its error",
    when="When LoRA lacks rank and memory is short: full rank from mn/b numbers, at a hundred times LoRA's learning rate.",
    tiny={"block": 4},
    numbers="m*n//block",
    flops="2*T*m*n if block < 16 else 0",
    variants=("c3a(block=2)",),
)
def c3a(*, block: int = 256) -> Recipe:
    """A block-circulant update, applied by Fourier transforms."""
    return adapter(piece(C3A, block=block), name="c3a")


@entry(
    "parameterization",
    title="SHiRA",
    formula="W + scatter(v at K fixed entries)",
    reference=Reference("Bhardwaj et al.", "Sparse High Rank Adapters", 2024, "2406.13175"),
    trained="K = r(m + n)",
    cost="a copy of W per forward and backward, and K numbers added",
    merges="exact, in K entries",
    exports="not of low rank; the best rank-r substitute with its error",
    when="When adapters are switched or summed often: a switch overwrites K entries, and two adapters rarely meet.",
    tiny={"rank": 2},
    numbers="rank*(m+n)",
    flops="0",
    variants=(
        "shira(rank=2, mask='structured')",
        "shira(rank=2, mask='magnitude')",
        "shira(rank=2, mask='gradient')",
        "shira(rank=2, mask='snip')",
    ),
)
def shira(*, rank: int = 32, mask: str = "random") -> Recipe:
    """Trains a fixed sparse set of the weight's entries."""
    return adapter(piece(SHiRA, rank=rank, mask=mask), name="shira")
