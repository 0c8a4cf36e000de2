"""Training that finds the ranks on the way and leaves a smaller network."""

from __future__ import annotations

from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.full import Full
from rankwise.parameterizations.nested_factors import NestedFactors
from rankwise.parameterizations.switching import Switching
from rankwise.procedures.cuttlefish import Cuttlefish
from rankwise.procedures.maestro import Maestro
from rankwise.procedures.trp import TRP
from rankwise.steps.moments import adamw

OWN = frozenset({"parameterization", "procedure"})


@entry(
    "procedure",
    title="TRP",
    formula="W ← U_r Σ_r V_rᵀ every T steps;  G ← G + λ U_r V_rᵀ in the step after",
    reference=Reference(
        "Xu, Li, Zhang, Wen, Wang, Qi, Chen, Lin, Xiong",
        "TRP: Trained Rank Pruning for Efficient Deep Neural Networks",
        2020,
        "2004.14566",
    ),
    trained="m·n",
    numbers="m*n",
    flops="0",
    cost="one SVD per layer and interval, O(mn·min(m, n)); a sub-gradient (m, n) kept for one step",
    merges="exact",
    exports="no (full rank between cuts); `deploy_` makes two small layers of each after a cut",
    when="To train a network that factorizes almost without loss; the training itself costs as much as an ordinary one.",
    tiny={"interval": 4, "energy": 0.98},
    variants=(
        "trp(interval=4, matricization='spatial', threshold=0.05)",
        "trp(interval=4, matricization='filter', fraction=0.9, nuclear=0.01)",
    ),
)
def trp(
    *,
    interval: int = 20,
    matricization: str = "channel",
    energy: float = 0.9,
    threshold: float | None = None,
    fraction: float | None = None,
    nuclear: float = 3e-4,
) -> Recipe:
    """Trains at full rank and cuts the weights to low rank every `interval` steps, so that they stay near it."""
    cutting = piece(
        TRP,
        interval=interval,
        matricization=matricization,
        energy=energy,
        threshold=threshold,
        fraction=fraction,
        nuclear=nuclear,
    )
    return Recipe(name="trp", parameterization=piece(Full), step=(piece(adamw),), procedure=cutting, own=OWN)


@entry(
    "procedure",
    title="Cuttlefish",
    formula="W, until sr(W) rests; then B A, B = U_r Σ_r^½, A = Σ_r^½ V_rᵀ with r = ⌈k · sr / sr_0⌉",
    reference=Reference(
        "Wang, Agarwal, U-chupala, Tanaka, Xing, Papailiopoulos",
        "Cuttlefish: Low-Rank Model Training without All the Tuning",
        2023,
        "2305.02538",
    ),
    trained="m·n, then r(m + n)",
    numbers="m*n",
    flops="0",
    cost="one spectral norm per layer and epoch, one SVD per layer at the switch",
    merges="exact",
    exports="no (the weight is replaced); `deploy_` makes two small layers of each at rank r",
    when="To train from scratch without choosing ranks or a switch epoch; small and early layers are better left whole.",
    tiny={"interval": 1, "window": 3, "threshold": 10.0},
    variants=("cuttlefish(interval=2, window=3, threshold=10.0, rule='plain', frobenius_decay=0.01)",),
)
def cuttlefish(
    *,
    interval: int = 100,
    window: int = 15,
    threshold: float = 0.1,
    rule: str = "scaled",
    frobenius_decay: float = 1e-4,
    layers: tuple[str, ...] | None = None,
) -> Recipe:
    """Trains at full rank until the stable ranks rest, then factorizes each layer once at the rank these say."""
    watching = piece(
        Cuttlefish,
        interval=interval,
        window=window,
        threshold=threshold,
        rule=rule,
        frobenius_decay=frobenius_decay,
        layers=layers,
    )
    return Recipe(name="cuttlefish", parameterization=piece(Switching), step=(piece(adamw),), procedure=watching, own=OWN)


@entry(
    "procedure",
    title="Maestro (LoD)",
    formula="B[:, :b] A[:b] with b drawn per step;  + λ Σ_b (‖B[:, b:]‖ + ‖A[b:]‖);  R ← #{‖B[:, b:]‖ ‖A[b:]‖ ≥ ε}",
    reference=Reference(
        "Horváth, Laskaridis, Rajput, Wang",
        "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition",
        2023,
        "2308.14929",
    ),
    trained="R(m + n), R = min(m, n) at the start",
    numbers="min(m, n)*(m+n)",
    flops="2*T*min(m, n)*(m+n)",
    cost="O(R(m + n)) for the penalty; one SVD per layer at the start",
    merges="exact",
    exports="no (the weight is replaced); `deploy_` makes two small layers of each at rank R",
    when="To train one network that contains its smaller ones; begins with up to twice the numbers, λ has to be searched.",
    tiny={"interval": 3, "penalty": 1e-3, "threshold": 0.05},
    variants=(
        "maestro(interval=3, sampler='across_layers', penalty=1e-3)",
        "maestro(interval=3, hierarchical=False, penalty=1e-3)",
    ),
)
def maestro(
    *,
    penalty: float = 1e-6,
    threshold: float = 1e-5,
    interval: int = 100,
    sampler: str = "per_layer",
    hierarchical: bool = True,
    seed: int = 0,
) -> Recipe:
    """Trains factors of full inner rank with prefixes cut at random, so that they order themselves and find their ranks."""
    cutting = piece(
        Maestro,
        penalty=penalty,
        threshold=threshold,
        interval=interval,
        sampler=sampler,
        hierarchical=hierarchical,
        seed=seed,
    )
    return Recipe(name="maestro", parameterization=piece(NestedFactors), step=(piece(adamw),), procedure=cutting, own=OWN)
