"""Full-rank training with moments in a subspace of the gradient: everything through the one projector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rankwise.catalog.parameterizations import full
from rankwise.catalog.steps import single_step
from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.core.step import Step
from rankwise.steps import apollo as scaled_gradient
from rankwise.steps import coap as correlation
from rankwise.steps import fira as residual
from rankwise.steps import flora_grad as flora
from rankwise.steps import galore_plus as heads_and_places
from rankwise.steps import online_subspace as online

GALORE_STATE = "min(m, n)*r + 2*max(m, n)*r"
COMMON: dict[str, Any] = {
    "trained": "m·n",
    "numbers": "m*n",
    "merges": "exact",
    "exports": "not of low rank; the best rank-r substitute with its error",
}


def projecting(factory: Callable[..., Step], arguments: Mapping[str, Any], name: str = "") -> Recipe:
    """A recipe that trains whole weights with one projected step; `inner`, a recipe, becomes the piece it is made of."""
    name = name or factory.__name__
    inner = None if arguments["inner"] is None else single_step(arguments["inner"], name)
    step = piece(factory, **{**arguments, "inner": inner})
    return Recipe(name=name, parameterization=full().parameterization, step=(step,), own=frozenset({"step"}))


@entry(
    "step",
    title="Fira",
    formula="W ← W − η (α P N + S), S = (G − α P R) diag(‖N_:j‖/‖R_:j‖), R = PᵀG, N = Adam(R)",
    reference=Reference(
        "Chen, Feng, Li, Lai, Yue, Yuan, Wang",
        "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
        2024,
        "2410.01623",
    ),
    cost="state min(m, n) r + 2 max(m, n) r + 1 instead of 2mn; GaLore's decomposition, and one more product of m·n·r",
    state=GALORE_STATE,
    when="Instead of GaLore, whose state it needs: what GaLore drops is used as well.",
    tiny={"rank": 2, "refresh": 3},
    variants=(
        "fira(rank=2, refresh=3, scaling='matrix')",
        "fira(rank=2, refresh=3, alpha_mode='clean', limit=None)",
        "fira(rank=2, refresh=3, inner=sgd(momentum=0.5))",
    ),
    **COMMON,
)
def fira(
    *,
    rank: int = 128,
    scale: float = 0.25,
    refresh: int = 200,
    side: str = "std",
    limit: float | None = 1.01,
    scaling: str = "column",
    alpha_mode: str = "code",
    weight_decay: float = 0.0,
    inner: Recipe | None = None,
) -> Recipe:
    """GaLore, with the gradient outside its subspace scaled as Adam scales it inside, and that part's growth limited."""
    return projecting(residual.fira, locals())


APOLLO = Reference(
    "Zhu, Zhang, Cong, Liu, Park, Chandra, Long, Pan, Wang, Lee",
    "APOLLO: SGD-like Memory, AdamW-level Performance",
    2024,
    "2412.05270",
)


@entry(
    "step",
    title="APOLLO",
    formula="W ← W − η √scale G diag(‖N_:j‖/‖R_:j‖), R = PᵀG, N = Adam(R), P random",
    reference=APOLLO,
    cost="state 2 max(m, n) r + 2 instead of 2mn; P is drawn again at every step; one product of m·n·r, no decomposition",
    state="2*max(m, n)*r",
    when="To train whole weights with the least state; every channel moves against its own gradient.",
    tiny={"rank": 2, "refresh": 3},
    variants=(
        "apollo(rank=2, refresh=3, granularity='tensor', limit=None)",
        "apollo(rank=2, refresh=3, basis='svd')",
        "apollo(rank=2, refresh=3, inner=sgd(momentum=0.5))",
    ),
    **COMMON,
)
def apollo(
    *,
    rank: int = 128,
    scale: float = 1.0,
    refresh: int = 200,
    granularity: str = "channel",
    limit: float | None = 1.01,
    scale_front: bool = False,
    basis: str = "random",
    weight_decay: float = 0.0,
    inner: Recipe | None = None,
    seed: int = 0,
) -> Recipe:
    """Scales each channel of the raw gradient as Adam would scale a random projection of it."""
    return projecting(scaled_gradient.apollo, locals())


@entry(
    "step",
    title="APOLLO-Mini",
    formula="W ← W − η √scale (‖N‖/‖R‖) G, R = pᵀG, N = Adam(R), p random",
    reference=APOLLO,
    cost="state 2 max(m, n) + 2 instead of 2mn; one product of m·n",
    state="2*max(m, n)",
    when="When not even APOLLO's state fits; one factor per weight, so nothing tells its channels apart.",
    tiny={"scale": 1.0, "refresh": 3},
    **COMMON,
)
def apollo_mini(
    *,
    scale: float = 128.0,
    refresh: int = 200,
    limit: float | None = 1.01,
    scale_front: bool = False,
    weight_decay: float = 0.0,
    inner: Recipe | None = None,
    seed: int = 0,
) -> Recipe:
    """APOLLO with rank 1 and one factor for the whole weight."""
    return projecting(scaled_gradient.apollo, {**locals(), "rank": 1, "granularity": "tensor"}, "apollo_mini")


@entry(
    "step",
    title="COAP",
    formula="W ← W − η N Q, Q ← Q − ρ clip(dJ/dQ), J = mse(G QᵀQ, G) (1 − mean cos(M Q, G))",
    reference=Reference(
        "Xiao, Sang, Zhi, Liu, Yan, Zhang, Luo, Yuan",
        "COAP: Memory-Efficient Training with Correlation-Aware Gradient Projection",
        2024,
        "2412.00071",
    ),
    cost="GaLore's state; a correction of O(m n r) every `refresh` steps, a sketch of the same order every recompute·refresh",
    state=GALORE_STATE,
    when="Instead of GaLore where its decompositions take too long, or the subspace moves between them.",
    tiny={"rank": 2, "scale": 0.25, "refresh": 2, "recompute": 3},
    variants=(
        "coap(rank=2, refresh=2, recompute=2, restore=True)",
        "coap(rank=2, refresh=2, recompute=2, inner=sgd(momentum=0.5))",
    ),
    **COMMON,
)
def coap(
    *,
    rank: int = 128,
    scale: float = 1.0,
    refresh: int = 32,
    recompute: int = 5,
    rate: float = 0.1,
    clip: float = 1.0,
    restore: bool = False,
    weight_decay: float = 0.0,
    inner: Recipe | None = None,
    seed: int = 0,
) -> Recipe:
    """GaLore with a basis that follows the momentum by small corrections, and is made anew from a sketch now and then."""
    return projecting(correlation.coap, locals())


@entry(
    "step",
    title="Online Subspace Descent",
    formula="W ← W − η α P Adam(PᵀG), P ← P − η_P Adam(d/dP ‖G' − P PᵀG'‖²), G' = G/‖G‖",
    reference=Reference(
        "Liang, Liu, Chen, Liu", "Memory-Efficient LLM Training with Online Subspace Descent", 2024, "2408.12857"
    ),
    cost="GaLore's state + 2 min(m, n) r; two more products of m·n·r per step, one decomposition at the first step only",
    state=GALORE_STATE + " + 2*min(m, n)*r",
    when="Instead of GaLore where its decompositions take too long; needs more state than COAP.",
    tiny={"rank": 2, "interval": 100},
    variants=(
        "online_subspace_descent(rank=2, interval=100, projector='sgd', penalty=0.1)",
        "online_subspace_descent(rank=2, interval=100, inner=sgd(momentum=0.5))",
    ),
    **COMMON,
)
def online_subspace_descent(
    *,
    rank: int = 128,
    scale: float = 0.25,
    interval: int = 200,
    penalty: float = 0.0,
    projector: str = "adamw",
    rate: float | None = None,
    weight_decay: float = 0.0,
    inner: Recipe | None = None,
) -> Recipe:
    """GaLore with a basis that is learned online by an optimizer of its own, one step per training step."""
    return projecting(online.online_subspace_descent, locals())


@entry(
    "step",
    title="GaLore+",
    formula="W ← W − η α N Q, Q from one head by a randomized range finder; the moments of G itself at a few places",
    reference=Reference(
        "Liao, Li, Xu, Li, Liu, He",
        "GaLore+: Boosting Low-Rank Adaptation for LLMs with Cross-Head Projection",
        2024,
        "2412.19820",
    ),
    cost="GaLore's state + 3 density·m·n (m·n more during the warm-up); a refresh costs O((m/heads) n r)",
    state=GALORE_STATE + " + 3*(m*n//10)",
    when="Instead of GaLore where its decompositions take too long; the sparse correction is worth little in practice.",
    tiny={"rank": 2, "refresh": 3, "density": 0.1, "warmup": 1},
    variants=(
        "galore_plus(rank=2, refresh=3, density=0.0)",
        "galore_plus(rank=2, refresh=3, heads=2, density=1.0, scale=1.0)",
        "galore_plus(rank=2, refresh=3, heads=4, density=0.2, warmup=0, inner=sgd(momentum=0.5))",
    ),
    **COMMON,
)
def galore_plus(
    *,
    rank: int = 32,
    scale: float = 0.25,
    refresh: int = 200,
    side: str = "std",
    heads: int = 1,
    head_layers: tuple[str, ...] = (),
    iterations: int = 2,
    oversampling: int = 8,
    density: float = 0.012,
    warmup: int | None = None,
    weight_decay: float = 0.0,
    inner: Recipe | None = None,
    seed: int = 0,
) -> Recipe:
    """GaLore with randomized bases, shared by the heads of a layer, and full moments at the places that lose most."""
    return projecting(heads_and_places.galore_plus, locals())


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
    **COMMON,
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
