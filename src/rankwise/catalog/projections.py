"""Full-rank training with moments in a subspace of the gradient: everything through the one projector."""

from __future__ import annotations

from rankwise.catalog.parameterizations import full
from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.steps import flora_grad as flora


@entry(
    "step",
    title="Flora",
    formula="U = G/√V; W ← W − η ((1 − β)U + β RᵀC), C ← βC + (1 − β)RU, R drawn again every κ steps",
    reference=Reference("Hao, Cao, Mou", "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", 2024, "2402.03293"),
    cost="state max(m, n) r + m + n instead of 2mn, R never stored; two products O(m n r) and the random numbers of R per step",
    state="max(m, n)*r + m + n",
    when="When state must be smallest and no decomposition is wanted; r below about a hundredth of the side is mostly noise.",
    tiny={"rank": 4, "interval": 20},
    variants=("flora_grad(rank=4, interval=20, base='sgd')", "flora_grad(rank=4, interval=20, scale_parameter=True)"),
    trained="m·n",
    numbers="m*n",
    merges="exact",
    exports="not of low rank; the best rank-r substitute with its error",
)
def flora_grad(
    *,
    rank: int = 128,
    interval: int = 1000,
    momentum: float = 0.9,
    decay_rate: float = -0.8,
    clip: float = 1.0,
    base: str = "adafactor",
    scale_parameter: bool = False,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> Recipe:
    """Trains whole weights by Adafactor with momentum under a random projection that is drawn again from its seed."""
    step = piece(
        flora.flora_grad,
        rank=rank,
        interval=interval,
        momentum=momentum,
        decay_rate=decay_rate,
        clip=clip,
        base=base,
        scale_parameter=scale_parameter,
        weight_decay=weight_decay,
        seed=seed,
    )
    return Recipe(name="flora_grad", parameterization=full().parameterization, step=(step,), own=frozenset({"step"}))
