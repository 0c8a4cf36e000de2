"""Procedures: methods that own the loop, built from the other pieces."""

from __future__ import annotations

from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.lora import LoRA
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
