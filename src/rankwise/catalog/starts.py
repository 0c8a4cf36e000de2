"""Starts: where the factors begin, read off the weight, its gradient or its inputs."""

from __future__ import annotations

from rankwise.approximations.eva import EVA
from rankwise.approximations.lora_one import LoRAOne
from rankwise.approximations.lora_sb import LoRASB
from rankwise.approximations.mica import MiCA
from rankwise.approximations.milora import MiLoRA
from rankwise.approximations.nystrom_nora import NystromNoRA
from rankwise.approximations.olora import OLoRA
from rankwise.approximations.orthogonal_start import OrthogonalStart
from rankwise.approximations.pissa import PiSSA
from rankwise.catalog.building import adapter, starting
from rankwise.catalog.parameterizations import lora, rslora
from rankwise.core.catalog import Reference, entry
from rankwise.core.compose import make
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.lora import LoRA
from rankwise.steps.moments import adamw
from rankwise.steps.scaled_gd import scaled_gd


@entry(
    "start",
    title="PiSSA",
    formula="s·B A = [W]_r; the base is W − s·B A",
    reference=Reference(
        "Meng, Wang, Zhang",
        "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
        2024,
        "2404.02948",
    ),
    trained="r(m + n)",
    cost="one SVD per layer, O(mn·min(m, n)) or O(mnr·iterations); offset runs a second frozen pair, absorb does not",
    merges="exact",
    exports="exact at rank 2r against the untouched base",
    when="When LoRA starts too slowly and the data matter enough to let the principal part of the weight move.",
    tiny={"rank": 2},
    variants=("pissa(rank=2, mode='absorb')",),
)
def pissa(*, rank: int = 8, mode: str = "offset", iterations: int | None = None) -> Recipe:
    """Trains the best rank-r part of the weight itself and freezes the rest."""
    return starting(piece(PiSSA, mode=mode, iterations=iterations), lora(rank=rank), name="pissa")


@entry(
    "start",
    title="LoRA-One",
    formula="B A = −[G]_r / (γ σ₁(G))",
    reference=Reference(
        "Zhang, Liu, Chen",
        "LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models, Provably and Efficiently",
        2025,
        "2502.01235",
    ),
    trained="r(m + n)",
    cost="a few full backward passes, streamed layer by layer, and one truncated SVD per layer",
    merges="exact",
    exports="exact at rank r",
    when="When one backward pass through the full weights is affordable: it often saves the first hundred steps.",
    tiny={"rank": 2, "gamma": 16.0},
    variants=("lora_one(rank=2, gamma=16.0, preconditioned=True)",),
)
def lora_one(
    *,
    rank: int = 8,
    alpha: float = 16.0,
    gamma: float = 128.0,
    normalize_by_sigma1: bool = True,
    preconditioned: bool = False,
) -> Recipe:
    """Starts at one low-rank step along the full gradient, on purpose away from the base.

    With `preconditioned`, AdamW sees gradients times the inverse Gram of the other factor (λ = 1e-6), as in the paper's theory.
    """
    start = piece(LoRAOne, gamma=gamma, normalize_by_sigma1=normalize_by_sigma1)
    recipe = starting(start, rslora(rank=rank, alpha=alpha), name="lora_one")
    if not preconditioned:
        return recipe
    chain = (piece(scaled_gd, damping=1e-6), piece(adamw))
    return Recipe(**{**recipe.__dict__, "step": chain, "own": recipe.own | {"step"}})


@entry(
    "start",
    title="Nyström start (NoRA)",
    formula="A = σ Ω W / s, B = 0",
    reference=Reference(
        "Li, Zhang, Mokhtari, He", "On the Crucial Role of Initialization for Matrix Factorization", 2024, "2410.18965"
    ),
    trained="r(m + n)",
    cost="one product O(rmn) per layer, no decomposition",
    merges="exact",
    exports="exact at rank r",
    when="The cheapest start that knows the weight; best together with scaled_gd.",
    tiny={"rank": 2, "sigma": 0.5},
)
def nystrom_nora(*, rank: int = 8, alpha: float | None = None, sigma: float = 0.02) -> Recipe:
    """Starts the input factor as a random sketch of the weight's rows, the update at zero."""
    return starting(piece(NystromNoRA, sigma=sigma), lora(rank=rank, alpha=alpha), name="nystrom_nora")


@entry(
    "start",
    title="EVA",
    formula="A = V_rᵀ of Σ (x − x̄)(x − x̄)ᵀ, B = 0",
    reference=Reference(
        "Paischer, Hauzenberger, Schmied, Alkin, Deisenroth, Hochreiter",
        "Parameter Efficient Fine-tuning via Explained Variance Adaptation",
        2024,
        "2410.07170",
    ),
    trained="r(m + n); Σ r_l(m_l + n_l) with a redistributed budget",
    cost="forward passes over probe data, n² numbers and one eigendecomposition O(n³) per distinct input",
    merges="exact",
    exports="exact at rank r",
    when="When the inputs of the task differ from pretraining; costs no gradient.",
    tiny={"rank": 2},
)
def eva(*, rank: int = 8, whiten: bool = False, center: bool = True, alpha: float | None = None) -> Recipe:
    """Starts the input factor at the principal directions of the layer's inputs, the update at zero."""
    return starting(piece(EVA, whiten=whiten, center=center), lora(rank=rank, alpha=alpha), name="eva")


@entry(
    "start",
    title="LoRA-SB",
    formula="B R A = [−η₀ sign(G)]_r",
    reference=Reference(
        "Ponkshe, Singhal, Gorbunov, Tumanov, Horvath, Vepakomma",
        "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
        2024,
        "2411.19557",
    ),
    trained="r² (on lora_xs); r(m + n) on lora",
    cost="a few full backward passes, streamed layer by layer, and one truncated SVD per layer",
    merges="exact",
    exports="exact at rank r",
    when="When the adapter must be tiny (r² numbers per layer) and a probe of about a thousandth of the data is there.",
    tiny={"rank": 2, "learning_rate": 1e-2},
)
def lora_sb(*, rank: int = 8, learning_rate: float = 1e-4) -> Recipe:
    """Starts LoRA-XS at the best approximation of full fine-tuning's first Adam step, on purpose away from the base."""
    return starting(piece(LoRASB, learning_rate=learning_rate), make("lora_xs", rank=rank, alpha=float(rank)), name="lora_sb")


@entry(
    "start",
    title="OLoRA",
    formula="W = Q R, B = Q[:, :r], A = R[:r]; the base is W − s·B A",
    reference=Reference("Büyükakyüz", "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024, "2406.01775"),
    trained="r(m + n)",
    numbers="rank*(m+n)",
    flops="4*T*rank*(m+n)",
    cost="a QR of r columns per layer, O(mnr); offset runs a second frozen pair, absorb does not",
    merges="exact",
    exports="exact at rank 2r against the untouched base",
    when="When PiSSA's SVD takes too long; which part of the weight it trains depends on the order of the inputs.",
    tiny={"rank": 2},
    variants=("olora(rank=2, mode='absorb')",),
)
def olora(*, rank: int = 8, mode: str = "offset") -> Recipe:
    """Starts at orthonormal columns of the weight by a QR decomposition and freezes the rest."""
    return starting(piece(OLoRA, mode=mode), lora(rank=rank), name="olora")


@entry(
    "start",
    title="MiLoRA",
    formula="s·B A = U_I S_I V_Iᵀ, the r smallest components of W; the base is W − s·B A",
    reference=Reference(
        "Wang, Li, Wang, Chen, Chen",
        "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning",
        2024,
        "2406.09044",
    ),
    trained="r(m + n)",
    numbers="rank*(m+n)",
    flops="4*T*rank*(m+n)",
    cost="one exact SVD per layer, O(mn·min(m, n)); offset runs a second frozen pair, absorb does not",
    merges="exact",
    exports="exact at rank 2r against the untouched base",
    when="When pretrained knowledge must be disturbed least; the factors start small, so it wants a higher learning rate.",
    tiny={"rank": 2},
    variants=(
        "milora(rank=2, select='middle')",
        "milora(rank=2, select='random')",
        "milora(rank=2, select='largest', mode='absorb')",
    ),
)
def milora(*, rank: int = 8, alpha: float | None = None, select: str = "smallest", mode: str = "offset") -> Recipe:
    """Trains the smallest singular part of the weight itself and freezes the rest."""
    return starting(piece(MiLoRA, select=select, mode=mode), lora(rank=rank, alpha=alpha), name="milora")


@entry(
    "start",
    title="MiCA",
    formula="W + B A, B = U_{last r} of W frozen, A = 0",
    reference=Reference("PEFT contributors", 'init_lora_weights="mica" of the PEFT library', 2026),
    trained="r·n",
    numbers="rank*n",
    flops="2*T*rank*(m+n)",
    cost="one exact SVD per layer, O(mn·min(m, n))",
    merges="exact",
    exports="exact at rank r",
    when="When half of LoRA's numbers must do and the outputs that pretraining uses least are where the task may go.",
    tiny={"rank": 2},
)
def mica(*, rank: int = 8) -> Recipe:
    """Freezes the output factor at the directions that the weight uses least, the update at zero."""
    frozen = adapter(piece(LoRA, rank=rank, freeze_output=True), name="lora")
    return starting(piece(MiCA), frozen, name="mica")


@entry(
    "start",
    title="Orthogonal start",
    formula="A = σ(X Q₁)ᵀ, B = σ Y Q₂ with Q₂ Q₁ᵀ = 0, so B A = 0",
    reference=Reference("Datta", "Rethink LoRA initialisation (web log; PEFT pull request 2498)", 2025),
    trained="r(m + n)",
    numbers="rank*(m+n)",
    flops="2*T*rank*(m+n)",
    cost="random numbers, no decomposition",
    merges="exact",
    exports="exact at rank r",
    when="When LoRA's first steps are wasted on a zero factor and no data shall be read; the gain reported is one run.",
    tiny={"rank": 2},
    variants=("orthogonal_start(rank=3, std=0.3)",),
)
def orthogonal_start(*, rank: int = 8, alpha: float | None = None, std: float = 0.1) -> Recipe:
    """Starts both factors away from zero with a product of zero, so that both learn from the first step."""
    return starting(piece(OrthogonalStart, std=std), lora(rank=rank, alpha=alpha), name="orthogonal_start")
