"""Long and parallel chains of low-rank updates, and robust training."""

from __future__ import annotations

from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.two_threads import TwoThreads
from rankwise.procedures.robust import AutoLoRaRobust
from rankwise.steps.moments import sgd


@entry(
    "procedure",
    title="AutoLoRa (robust)",
    formula="λ₁ CE(f_{W + s·BA}(x)) + (1 - λ₁) CE(f_W(x')) + λ₂ KL(natural ‖ adversarial), λ₁ = 1 - S, λ₂ = scale · S",
    reference=Reference(
        "Xu, Zhang, Kankanhalli",
        "AutoLoRa: A Parameter-Free Automated Robust Fine-Tuning Framework",
        2023,
        "2310.01818",
    ),
    trained="mn + r(m + n), of which mn are deployed",
    numbers="m*n + rank*(m+n)",
    cost="attack_steps forwards and backwards for the attack, then two of each",
    merges="exact, the weight alone; the branch is dropped",
    exports="not of low rank: every weight is trained",
    when="To make a pretrained image model hold against small changes of its pixels; text cannot be attacked so.",
    tiny={"rank": 2, "attack_steps": 2},
    variants=("autolora_robust(rank=2, attack_steps=2, update_every=2)",),
)
def autolora_robust(
    *,
    rank: int = 8,
    alpha: float = 1.0,
    step_size: float = 2 / 255,
    radius: float = 8 / 255,
    attack_steps: int = 10,
    scale: float = 6.0,
    update_every: int | None = None,
) -> Recipe:
    """Natural images train a low-rank branch, attacked ones the weights, under loss weights that set themselves."""
    return Recipe(
        name="autolora_robust",
        parameterization=piece(TwoThreads, rank=rank, alpha=alpha),
        step=(piece(sgd, momentum=0.9, weight_decay=2e-4),),
        procedure=piece(
            AutoLoRaRobust,
            step_size=step_size,
            radius=radius,
            attack_steps=attack_steps,
            scale=scale,
            update_every=update_every,
        ),
        own=frozenset({"parameterization", "procedure"}),
    )
