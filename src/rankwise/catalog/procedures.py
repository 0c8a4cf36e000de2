"""Procedures: methods that own the loop, built from the other pieces."""

from __future__ import annotations

from rankwise.approximations.starting import check_choice
from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.lora import LoRA
from rankwise.procedures.rac_lora import RACLoRA
from rankwise.procedures.relora import ReLoRA
from rankwise.steps.moments import adamw


@entry(
    "procedure",
    title="ReLoRA",
    formula="W ← W + s·B A every T steps, B ← 0, A drawn anew",
    reference=Reference(
        "Lialin et al.",
        "Stack More Layers Differently: High-Rank Training Through Low-Rank Updates",
        2023,
        "2307.05695",
    ),
    trained="r(m + n)",
    cost="one product of factors per layer and restart",
    merges="exact",
    exports="exact at rank K·r after K restarts",
    when="For long training (continued pre-training), with relora_schedule as learning rate; short fine-tuning gains nothing.",
    tiny={"rank": 2, "interval": 2},
)
def relora(
    *,
    rank: int = 128,
    alpha: float | None = 32.0,
    dropout: float = 0.1,
    interval: int = 1000,
    moments: str | float = "reset",
) -> Recipe:
    """Absorbs the update into the weight every `interval` steps and begins again, for a sum of high rank."""
    return Recipe(
        name="relora",
        parameterization=piece(LoRA, rank=rank, alpha=alpha, dropout=dropout),
        step=(piece(adamw),),
        procedure=piece(ReLoRA, interval=interval, moments=moments),
        own=frozenset({"procedure"}),
    )


@entry(
    "procedure",
    title="RAC-LoRA",
    formula="W ← W + s·B A every T steps; one factor drawn anew and frozen, the other ← 0",
    reference=Reference(
        "Malinovsky, Michieli, Hammoud, Ceritli, Elesedy, Ozay, Richtárik",
        "Randomized Asymmetric Chain of LoRA: The First Meaningful Theoretical Framework for Low-Rank Adaptation",
        2024,
        "2410.08305",
    ),
    trained="r·m (side B) or r·n (side A)",
    numbers="rank*(m if side == 'B' else n)",
    flops="2*T*rank*(m+n)",
    cost="one product of factors per layer and block; half of LoRA's optimizer state",
    merges="exact",
    exports="exact at rank T·r after T blocks",
    when="For long training that must reach what full fine-tuning reaches; within one block it is an asymmetric LoRA.",
    tiny={"rank": 2, "interval": 2},
    variants=("rac_lora(rank=2, interval=2, side='A', draw='orthonormal')",),
)
def rac_lora(
    *,
    rank: int = 8,
    alpha: float | None = None,
    interval: int = 100,
    side: str = "B",
    draw: str = "gaussian",
    moments: str | float = "reset",
) -> Recipe:
    """Trains one factor against a frozen random one, absorbs their product every `interval` steps and draws anew."""
    drawn = {"gaussian": "sketch", "orthonormal": "orthonormal"}[check_choice("draw", draw, ("gaussian", "orthonormal"))]
    if check_choice("side", side, ("A", "B")) == "B":
        frozen = piece(LoRA, rank=rank, alpha=alpha, freeze_input=True, input_start=drawn)
    else:
        frozen = piece(LoRA, rank=rank, alpha=alpha, freeze_output=True, output_start=drawn)
    return Recipe(
        name="rac_lora",
        parameterization=frozen,
        step=(piece(adamw),),
        procedure=piece(RACLoRA, interval=interval, moments=moments),
        own=frozenset({"parameterization", "procedure"}),  # with both factors trained it would be ReLoRA
    )
