"""Training without backward: zeroth-order estimates and rankings."""

from __future__ import annotations

from rankwise.catalog.parameterizations import lora
from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import Piece, piece
from rankwise.core.recipe import Recipe
from rankwise.perturbations.zeroth_order import ZerothOrder
from rankwise.perturbations.zo_rank import RankedZerothOrder
from rankwise.steps.moments import sgd


def estimating(perturbation: Piece, *, name: str) -> Recipe:
    """A recipe that decides how gradients are estimated; on LoRA, and with plain SGD unless a step is composed with it."""
    base = lora()
    return Recipe(
        name=name,
        parameterization=base.parameterization,
        step=(piece(sgd),),
        perturbation=perturbation,
        own=frozenset({"perturbation"}),
    )


@entry(
    "perturbation",
    title="Zeroth order (MeZO, FlatZero)",
    formula="g = (L(x + λu) − L(x − λu))/2λ · u",
    reference=Reference(
        "Zhang, Li, Thekumparampil, Oh, Muehlebach, He", "Zeroth-Order Optimization Finds Flat Minima", 2025, "2506.05454"
    ),
    cost="2 forwards per direction in place of forward and backward; no memory but that of .grad",
    when="Where backward does not fit into memory or does not exist, with few trained numbers and many steps.",
    tiny={"directions": 16},
    variants=(
        "zeroth_order(directions=16, difference='forward')",
        "zeroth_order(directions=16, difference='derivative', distribution='sphere')",
    ),
)
def zeroth_order(
    *,
    smoothing: float = 1e-3,
    directions: int = 1,
    distribution: str = "gaussian",
    difference: str = "central",
    seed: int = 0,
) -> Recipe:
    """Estimates the gradient from losses at two points along random directions, forward passes only."""
    made = piece(
        ZerothOrder, smoothing=smoothing, directions=directions, distribution=distribution, difference=difference, seed=seed
    )
    return estimating(made, name="zeroth_order")


@entry(
    "perturbation",
    title="ZO-RankSGD",
    formula="g = 1/|E| Σ w_i ξ_i from the order of L(x + μξ_i)",
    reference=Reference(
        "Tang, Rybin, Chang",
        "Zeroth-Order Optimization Meets Human Feedback: Provable Learning via Ranking Oracles",
        2023,
        "2303.03751",
    ),
    cost="m forwards per step (1 + l more with the line search); no memory but that of .grad",
    when="Where tries can only be ranked, by a person or a score without slope, and very few numbers are trained.",
    tiny={"candidates": 16},
    variants=("zo_rank(candidates=16, best=5)", "zo_rank(candidates=16, line_search=4)"),
)
def zo_rank(
    *,
    candidates: int = 8,
    best: int | None = None,
    smoothing: float = 1e-2,
    line_search: int = 0,
    shrink: float = 0.5,
    seed: int = 0,
) -> Recipe:
    """Steps along the mean of random tries, weighted by how an oracle ranks them."""
    made = piece(
        RankedZerothOrder,
        candidates=candidates,
        best=best,
        smoothing=smoothing,
        line_search=line_search,
        shrink=shrink,
        seed=seed,
    )
    return estimating(made, name="zo_rank")
