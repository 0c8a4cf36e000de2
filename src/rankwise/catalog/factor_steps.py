"""Steps on the factors B and A, clipping, and decay by role."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.approximations.starting import check_choice
from rankwise.catalog.parameterizations import lora
from rankwise.catalog.steps import stepping
from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.steps import allora as rows
from rankwise.steps import clipping, decay, moments
from rankwise.steps import conef as feedback
from rankwise.steps import lora_pro as full_gradient


@entry(
    "step",
    title="ALLoRA",
    formula="rows of the update's gradient ∘ 1/√(‖s(BA)_i‖ + 1/η²)",
    reference=Reference("Huang, Balestriero", "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", 2024, "2410.09692"),
    cost="O(r²(m + n)) per forward and a branch twice as wide in training; no state",
    state="2*r*(m + n)",
    when="A cheap option for short runs with SGD; under Adam most of it cancels.",
    variants=("allora(scale_input_grad=True)",),
)
def allora(*, eta_squared: float = 10.0, scale_input_grad: bool = False) -> Recipe:
    """AdamW with gradients rescaled per output row, so that rows leave zero fast and slow down as they grow."""
    scaling = piece(rows.allora, eta_squared=eta_squared, scale_input_grad=scale_input_grad)
    return Recipe(
        name="allora",
        parameterization=lora(alpha=None).parameterization,
        step=(scaling, piece(moments.adamw)),
        own=frozenset({"step"}),
    )


@entry(
    "step",
    title="LoRA-Pro",
    formula="min over d_B, d_A of ‖s(B d_A + d_B A) − G‖, Adam on that in (m, n)",
    reference=Reference(
        "Wang, Liang, He, Wang, Tan", "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", 2024, "2407.18242"
    ),
    cost="O(rmn + r³) per layer and step; moments (m, n) of full size; none with variant='sgd'",
    state="2*m*n",
    when="When LoRA trails full fine-tuning and the memory of full moments is there; variant='sgd' is free of it.",
    variants=("lora_pro(variant='sgd')",),
)
def lora_pro(
    *,
    variant: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    damping: float = 1e-8,
    momentum: float = 0.0,
) -> Recipe:
    """Moves B and A so that their product follows the step of full fine-tuning as closely as it can."""
    if check_choice("variant", variant, ("adamw", "sgd")) == "sgd":
        return stepping(
            piece(full_gradient.lora_pro_gradient, damping=damping), piece(moments.sgd, momentum=momentum), name="lora_pro"
        )
    return stepping(piece(full_gradient.lora_pro, betas=betas, eps=eps, damping=damping), name="lora_pro")


@entry(
    "step",
    title="Gradient-norm clipping",
    formula="g ← g min(1, c/‖g‖)",
    reference=Reference(
        "Pascanu, Mikolov, Bengio", "On the difficulty of training Recurrent Neural Networks", 2012, "1211.5063"
    ),
    cost="one norm; 3 counters per tensor",
    state="2*r*(m + n)",
    when="Against rare huge gradients; mode='effective' bounds what the step does to W, however BA is factored.",
    variants=(
        "theory_gradient_clipping(mode='per_role')",
        "theory_gradient_clipping(mode='effective')",
        "theory_gradient_clipping(quantile=0.9)",
    ),
)
def theory_gradient_clipping(*, max_norm: float = 1.0, mode: str = "global", quantile: float | None = None) -> Recipe:
    """AdamW behind a limit on the gradient's norm: of everything, per role, or of the change of W."""
    limiting = piece(clipping.clip, max_norm=max_norm, mode=mode, quantile=quantile)
    return stepping(limiting, piece(moments.adamw), name="theory_gradient_clipping")


@entry(
    "step",
    title="Decoupled weight decay by role",
    formula="p ← p − ηλ p on the chosen roles",
    reference=Reference("Loshchilov, Hutter", "Decoupled Weight Decay Regularization", 2017, "1711.05101"),
    cost="none",
    state="2*r*(m + n)",
    when="To decay one factor and not the other, or beside a step that has no decay of its own; vectors only if asked for.",
    variants=("decoupled_weight_decay(roles=('B',))",),
)
def decoupled_weight_decay(*, weight_decay: float = 0.01, roles: Sequence[str] | None = None, vectors: bool = False) -> Recipe:
    """AdamW with decay of chosen roles only; vectors are left alone unless asked for."""
    names = None if roles is None else list(roles) if not isinstance(roles, str) else roles
    decaying = piece(decay.decoupled_weight_decay, weight_decay=weight_decay, roles=names, vectors=vectors)
    return stepping(piece(moments.adamw), decaying, name="decoupled_weight_decay")


@entry(
    "step",
    title="ConEF",
    formula="p = G + (1 − β)ẽ; step with Q(p); ẽ ← βẽ + (p − Q(p)), kept in a count sketch",
    reference=Reference(
        "Li, Zheng, Raman, Shrivastava, Giannakis",
        "Contractive Error Feedback for Gradient Compression",
        2023,
        "2312.08538",
    ),
    cost="state ratio·mn per matrix instead of mn, hashing O(mn); what is sent is the compressor's, under DDP",
    state="r*max(1, n//5) + m*max(1, r//5)",
    when="When sending gradients is the bottleneck of training on several machines; alone it only shows what that costs.",
    tiny={"start": 2, "share": 0.5},
    variants=(
        "conef(compressor='powersgd', start=2, rank=2)",
        "conef(compressor='top', share=0.5, start=2, memory='exact', smoothing=0.0)",
        "conef(share=0.5, start=2, memory='means', smoothing=0.0)",
    ),
)
def conef(
    *,
    compressor: str = "block",
    share: float = 0.1,
    rank: int = 4,
    ratio: float = 0.2,
    smoothing: float = 0.9,
    memory: str = "sketch",
    start: int = 10,
    seed: int = 0,
) -> Recipe:
    """SGD on compressed gradients whose error is fed back from a count sketch."""
    compressed = piece(
        feedback.conef,
        compressor=compressor,
        share=share,
        rank=rank,
        ratio=ratio,
        smoothing=smoothing,
        memory=memory,
        start=start,
        seed=seed,
    )
    return stepping(compressed, piece(moments.sgd), name="conef")
