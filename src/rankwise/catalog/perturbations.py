"""Perturbations: what moves the trained tensors between backward and the optimizer's step."""

from __future__ import annotations

from rankwise.catalog.parameterizations import lora
from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import Piece, piece
from rankwise.core.recipe import Recipe
from rankwise.perturbations.balance import Balance
from rankwise.perturbations.ggpo import GradientGuidedNoise
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


@entry(
    "perturbation",
    title="LoRA-GGPO",
    formula="y = (W' + E) x, E_ij ~ N(0, σ²/n (‖W'_i‖² + β ‖Ĝ_i‖²))",
    reference=Reference(
        "Chang, Guo, Chang, Wu",
        "LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided Perturbation Optimization",
        2025,
        "2502.14538",
    ),
    cost="x Eᵀ: the frozen layer's FLOPs once more, one pass; 2mn random numbers per layer and step, m floats of state",
    when="For flatness with one pass, where the frozen layers are not what training waits for; bar costs far less.",
    tiny={"sigma": 0.01},
    variants=("lora_ggpo(sigma=0.01, variant='kohya')",),
)
def lora_ggpo(*, sigma: float = 0.03, beta: float = 0.01, variant: str = "paper", seed: int = 0) -> Recipe:
    """Trains under random noise on the whole weight, larger on rows where weight and gradient are large."""
    made = piece(GradientGuidedNoise, sigma=sigma, beta=beta, variant=variant, seed=seed)
    return perturbing(made, name="lora_ggpo")
