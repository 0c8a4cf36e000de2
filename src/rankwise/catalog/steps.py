"""Steps: how gradients become updates."""

from __future__ import annotations

from rankwise.catalog.parameterizations import full, lora
from rankwise.catalog.spectral import soda
from rankwise.core.catalog import Reference, entry
from rankwise.core.errors import ArgumentError
from rankwise.core.piece import Piece, piece
from rankwise.core.recipe import Recipe
from rankwise.core.step import MOMENTS
from rankwise.steps import galore as projections
from rankwise.steps import moments, ratio, stiefel
from rankwise.steps import reflora as refactored
from rankwise.steps import scaled_gd as scaled


def stepping(*steps: Piece, name: str) -> Recipe:
    """A recipe that decides the chain of steps; on LoRA unless composed with another parameterization."""
    return Recipe(name=name, parameterization=lora().parameterization, step=steps, own=frozenset({"step"}))


@entry(
    "step",
    title="AdamW",
    formula="p ← p − η (m̂/(√v̂ + ε) + λ p)",
    reference=Reference("Loshchilov, Hutter", "Decoupled Weight Decay Regularization", 2017, "1711.05101"),
    cost="2 state numbers per trained number",
    state="2*r*(m + n)",
    when="The default.",
)
def adamw(*, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, bits: int = 32) -> Recipe:
    """Adam with decoupled weight decay; vectors are not decayed. With 8 bits its means take a quarter of the bytes."""
    step = piece(moments.adamw, weight_decay=weight_decay, betas=betas, eps=eps, bits=bits)
    return stepping(step, name="adamw")


@entry(
    "step",
    title="SGD",
    formula="p ← p − η g",
    reference=Reference("Robbins, Monro", "A Stochastic Approximation Method", 1951),
    cost="no state; 1 number per trained number with momentum",
    state="0",
    when="For experiments, and under a preconditioner (scaled_gd), which makes it competitive on factors.",
)
def sgd(*, momentum: float = 0.0, weight_decay: float = 0.0) -> Recipe:
    """Plain gradient descent, with heavy-ball momentum if asked for."""
    return stepping(piece(moments.sgd, momentum=momentum, weight_decay=weight_decay), name="sgd")


ratio_of_rates = ratio.lora_plus  # its argument has the module's name


@entry(
    "step",
    title="LoRA+",
    formula="η_A = η, η_B = ratio·η",
    reference=Reference("Hayou, Ghosh, Yu", "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024, "2402.12354"),
    cost="none",
    state="2*r*(m + n)",
    when="Cheap to try on any pair B, A; halve the learning rate first.",
)
def lora_plus(*, ratio: float = 16.0) -> Recipe:
    """AdamW in which B, and trained vectors, learn `ratio` times as fast as A."""
    return stepping(piece(moments.adamw), piece(ratio_of_rates, ratio=ratio), name="lora_plus")


@entry(
    "step",
    title="ScaledGD (Riemannian-preconditioned LoRA)",
    formula="g_A ← (BᵀB + λI)⁻¹ g_A, g_B ← g_B (AAᵀ + λI)⁻¹",
    reference=Reference(
        "Xu, Shen, Chi, Ma",
        "The Power of Preconditioning in Overparameterized Low-Rank Matrix Sensing",
        2023,
        "2302.01186",
    ),
    cost="O(r²(m + n) + r³) per layer and step, no state",
    state="2*r*(m + n)",
    when="With SGD, where it is worth most, or when the right learning rate is hard to find.",
)
def scaled_gd(*, damping: float = 1e-6, normalized: bool = False, sequential: bool = False) -> Recipe:
    """AdamW on gradients preconditioned by the inverse Gram of the other factor, so that the factorization drops out."""
    preconditioner = piece(scaled.scaled_gd, damping=damping, normalized=normalized, sequential=sequential)
    return stepping(preconditioner, piece(moments.adamw), name="scaled_gd")


@entry(
    "step",
    title="RefLoRA",
    formula="g_A ← S⁻¹ g_A, g_B ← g_B S, S = (AAᵀ)⁻¹ # BᵀB",
    reference=Reference(
        "Zhang, Li, Giannakis", "RefLoRA: Refactored Low-Rank Adaptation for Efficient Fine-Tuning of Large Models", 2025
    ),
    cost="O(r²(m + n) + r³) per layer and step; 1 counter per factor",
    state="2*r*(m + n)",
    when="When the factors drift out of balance; a small effect at a small cost.",
    tiny={"warmup": 2},
)
def reflora(*, warmup: int = 100, interval: int = 1, variant: str = "matrix") -> Recipe:
    """AdamW with every step taken as from the best-balanced factorization of the current update."""
    refactoring = piece(refactored.reflora, warmup=warmup, interval=interval, variant=variant)
    return stepping(refactoring, piece(moments.adamw), name="reflora")


@entry(
    "step",
    title="GaLore",
    formula="W ← W − η·scale·P Adam(PᵀG)",
    reference=Reference(
        "Zhao, Zhang, Chen, Wang, Anandkumar, Tian",
        "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
        2024,
        "2403.03507",
    ),
    trained="m·n",
    cost="state min(m, n) r + 2 max(m, n) r instead of 2mn; a decomposition of the gradient every `refresh` steps",
    merges="exact",
    exports="not of low rank; the best rank-r substitute with its error",
    state="min(m, n)*r + 2*max(m, n)*r",
    when="To train whole weights when their moments do not fit into memory.",
    tiny={"rank": 2, "refresh": 3},
)
def galore(
    *,
    rank: int = 128,
    scale: float = 0.25,
    refresh: int = 200,
    side: str = "std",
    weight_decay: float = 0.0,
    inner: Recipe | None = None,
) -> Recipe:
    """Trains whole weights with moments kept in a low-rank subspace of the gradient; `inner` (default adamw) runs there."""
    within = None if inner is None else single_step(inner, "galore")
    projected = piece(
        projections.galore, rank=rank, scale=scale, refresh=refresh, side=side, weight_decay=weight_decay, inner=within
    )
    return Recipe(name="galore", parameterization=full().parameterization, step=(projected,), own=frozenset({"step"}))


@entry(
    "step",
    title="Stiefel-Adam",
    formula="X ← retract(X − η X D), D = Y/(√P + ε) skew, from S − Sᵀ with S = XᵀG",
    reference=Reference(
        "Kong, Wang, Tao",
        "Momentum Stiefel Optimizer, with Applications to Suitably-Orthogonal Attention, and Optimal Transport",
        2022,
        "2205.14173",
    ),
    cost="2 state numbers per trained number; a few products of tiny matrices per step",
    state="2*numbers",
    when="For soda, whose rotations a plain Adam would take off the orthogonal group.",
    variants=("stiefel_adam(retraction='cayley')", "stiefel_adam(retraction='exponential')"),
)
def stiefel_adam(
    *, betas: tuple[float, float] = (0.9, 0.99), epsilon: float = 1e-5, retraction: str = "newton_schulz"
) -> Recipe:
    """Adam along the orthogonal group for the rotations Q_1, Q_2, Q_3, and AdamW for the rest."""
    step = piece(stiefel.stiefel_adam, betas=betas, epsilon=epsilon, retraction=retraction)
    return Recipe(name="stiefel_adam", parameterization=soda().parameterization, step=(step,), own=frozenset({"step"}))


def single_step(recipe: Recipe, name: str) -> Piece:
    """The one step of a recipe that is given as `inner` to a projection.

    Raises:
        ArgumentError: it has several steps, or one that makes no update.
    """
    if len(recipe.step) != 1 or recipe.step[0].build().stage != MOMENTS:
        raise ArgumentError(f"{name}: inner is one step that makes the update (adamw, sgd), not {recipe.name!r}")
    return recipe.step[0]
