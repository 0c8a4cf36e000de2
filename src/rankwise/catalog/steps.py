"""Steps: how gradients become updates."""

from __future__ import annotations

from rankwise.catalog.parameterizations import lora
from rankwise.core.catalog import Reference, entry
from rankwise.core.recipe import Piece, Recipe, piece
from rankwise.steps import moments


def stepping(*steps: Piece, name: str) -> Recipe:
    """A recipe that decides the chain of steps; on LoRA unless composed with another parameterization."""
    return Recipe(name=name, parameterization=lora().parameterization, step=steps, own=frozenset({"step"}))


@entry(
    "step",
    title="AdamW",
    formula="p ← p − η (m̂/(√v̂ + ε) + λ p)",
    reference=Reference("Loshchilov, Hutter", "Decoupled Weight Decay Regularization", 2017, "1711.05101"),
    cost="2 state numbers per trained number",
    when="The default.",
)
def adamw(*, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> Recipe:
    """Adam with decoupled weight decay; vectors are not decayed."""
    return stepping(piece(moments.adamw, weight_decay=weight_decay, betas=betas, eps=eps), name="adamw")


@entry(
    "step",
    title="SGD",
    formula="p ← p − η g",
    reference=Reference("Robbins, Monro", "A Stochastic Approximation Method", 1951),
    cost="no state; 1 number per trained number with momentum",
    when="For experiments, and under a preconditioner (scaled_gd), which makes it competitive on factors.",
)
def sgd(*, momentum: float = 0.0, weight_decay: float = 0.0) -> Recipe:
    """Plain gradient descent, with heavy-ball momentum if asked for."""
    return stepping(piece(moments.sgd, momentum=momentum, weight_decay=weight_decay), name="sgd")
