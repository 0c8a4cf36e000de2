"""Perturbations: what moves the trained tensors between backward and the optimizer's step."""

from __future__ import annotations

from rankwise.catalog.parameterizations import lora
from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import Piece, piece
from rankwise.core.recipe import Recipe
from rankwise.perturbations.balance import Balance
from rankwise.perturbations.sharpness import SharpnessAware


def perturbing(perturbation: Piece, *, name: str) -> Recipe:
    """A recipe that decides the perturbation; on LoRA with AdamW unless composed with others."""
    base = lora()
    return Recipe(
        name=name,
        parameterization=base.parameterization,
        step=base.step,
        perturbation=perturbation,
        own=frozenset({"perturbation"}),
    )


@entry(
    "perturbation",
    title="SAM",
    formula="g' = ∇L(w + ρ g/‖g‖)",
    reference=Reference(
        "Foret et al.", "Sharpness-Aware Minimization for Efficiently Improving Generalization", 2020, "2010.01412"
    ),
    cost="a second forward and backward, one copy of the trained tensors",
    when="For few-shot and noisy data, where flat minima pay and twice the time is there; bar is the cheap relative.",
    tiny={"rho": 0.01},
)
def sam(*, rho: float = 0.05, adaptive: bool = False) -> Recipe:
    """Steps with the gradient at the worst point of a small ball around the weights."""
    return perturbing(piece(SharpnessAware, rho=rho, adaptive=adaptive), name="sam")


@entry(
    "perturbation",
    title="BAR",
    formula="B ← (1 ± e) B, A ← (1 ∓ e) A, e = μη",
    reference=Reference(
        "Li, Zhang, He",
        "Implicit Regularization of Sharpness-Aware Minimization for Scale-Invariant Problems",
        2024,
        "2410.14802",
    ),
    cost="two norms and two rescalings per layer, O(r(m + n))",
    when="In place of SAM on LoRA: most of its gain for a few percent of time.",
    variants=("bar(kind='obar')",),
)
def bar(*, kind: str = "nbar", strength: float = 0.5, decay_steps: int | None = None, decay: str = "linear") -> Recipe:
    """Balances the norms of B and A as SAM would, without a second pass."""
    return perturbing(piece(Balance, kind=kind, strength=strength, decay_steps=decay_steps, decay=decay), name="bar")
