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
    variants=("sam(rho=0.1, adaptive=True)", "sam(rho=0.01, over='factors')"),
)
def sam(*, rho: float = 0.05, adaptive: bool = False, over: str = "all") -> Recipe:
    """Steps with the gradient at the worst point of a small ball around the weights."""
    return perturbing(piece(SharpnessAware, rho=rho, adaptive=adaptive, over=over), name="sam")


@entry(
    "perturbation",
    title="VaSSO",
    formula="g' = ∇L(w + ρ d/‖d‖), d ← (1 - θ) d + θ g",
    reference=Reference(
        "Li, Giannakis",
        "Enhancing Sharpness-Aware Optimization Through Variance Suppression",
        2023,
        "2309.15639",
    ),
    cost="a second forward and backward, two copies of the trained tensors",
    when="In place of SAM where batches are small or labels noisy; a smaller theta averages over more batches.",
    tiny={"rho": 0.01, "theta": 0.4},
)
def vasso(*, rho: float = 0.05, theta: float = 0.9, over: str = "all") -> Recipe:
    """SAM along a running average of gradients, so that one noisy batch cannot choose its own adversary."""
    return perturbing(piece(SharpnessAware, rho=rho, direction="average", theta=theta, over=over), name="vasso")


_PRECONDITIONED = Reference(
    "Zhang, Li, Giannakis",
    "Preconditioned Sharpness-Aware Minimization: Unifying Analysis and a Novel Learning Algorithm",
    2025,
    "2501.06603",
)


@entry(
    "perturbation",
    title="infoSAM",
    formula="g' = ∇L(w + ρ C g/‖C g‖), C = diag(v)^(-p/2), v the variance of g over steps",
    reference=_PRECONDITIONED,
    cost="a second forward and backward, three copies of the trained tensors",
    when="In place of SAM where a few entries carry most of the gradient's noise; with equal noise it is SAM.",
    tiny={"rho": 0.01},
)
def infosam(
    *,
    rho: float = 0.05,
    smoothing: float = 0.9,
    power: float = 2.0,
    damping: float = 1e-3,
    condition: float = 1e3,
    over: str = "all",
) -> Recipe:
    """SAM whose step weighs every entry by how little its gradient is noise."""
    chosen = piece(
        SharpnessAware,
        rho=rho,
        direction="noise",
        smoothing=smoothing,
        power=power,
        damping=damping,
        condition=condition,
        over=over,
    )
    return perturbing(chosen, name="infosam")


@entry(
    "perturbation",
    title="preSAM",
    formula="g' = ∇L(w + ρ D (D C h)/‖D C h‖)",
    reference=_PRECONDITIONED,
    cost="a second forward and backward, one to four copies of the trained tensors",
    when="To combine a direction with a metric that no paper has (an average in ASAM's ball, say), or for Fisher SAM.",
    tiny={"rho": 0.01, "direction": "average", "metric": "weights"},
    variants=("presam(rho=0.001, metric='fisher')", "presam(rho=0.001, direction='noise', metric='fisher')"),
)
def presam(
    *,
    rho: float = 0.05,
    direction: str = "gradient",
    metric: str = "none",
    theta: float = 0.9,
    smoothing: float = 0.9,
    power: float = 2.0,
    damping: float = 1e-3,
    condition: float = 1e3,
    over: str = "all",
) -> Recipe:
    """The template of SAM's relatives: a direction of ascent, a metric of the ball, and the tensors that it spans."""
    chosen = piece(
        SharpnessAware,
        rho=rho,
        direction=direction,
        metric=metric,
        theta=theta,
        smoothing=smoothing,
        power=power,
        damping=damping,
        condition=condition,
        over=over,
    )
    return perturbing(chosen, name="presam")


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
    variants=("lora_ggpo(sigma=0.01, beta=0.0001, variant='kohya')",),
)
def lora_ggpo(*, sigma: float = 0.03, beta: float = 0.01, variant: str = "paper", seed: int = 0) -> Recipe:
    """Trains under random noise on the whole weight, larger on rows where weight and gradient are large."""
    made = piece(GradientGuidedNoise, sigma=sigma, beta=beta, variant=variant, seed=seed)
    return perturbing(made, name="lora_ggpo")
