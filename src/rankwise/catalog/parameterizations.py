"""Parameterizations: what is trained beside, or instead of, the frozen weight."""

from __future__ import annotations

from rankwise.core.catalog import Reference, entry
from rankwise.core.recipe import Piece, Recipe, piece
from rankwise.parameterizations.full import Full
from rankwise.parameterizations.lora import LoRA
from rankwise.steps.moments import adamw

OWN = frozenset({"parameterization"})


def adapter(parameterization: Piece, *, name: str) -> Recipe:
    """A recipe that decides the parameterization and leaves the rest at its defaults (AdamW, no start)."""
    return Recipe(name=name, parameterization=parameterization, step=(piece(adamw),), own=OWN)


@entry(
    "parameterization",
    title="LoRA",
    formula="W + s·B A",
    reference=Reference("Hu et al.", "LoRA: Low-Rank Adaptation of Large Language Models", 2021, "2106.09685"),
    trained="r(m + n)",
    cost="2r(m + n) FLOPs per token",
    merges="exact",
    exports="exact at rank r",
    when="The one to try first; tune its learning rate before trying anything else.",
    tiny={"rank": 2},
)
def lora(
    *, rank: int = 8, alpha: float | None = None, dropout: float = 0.0, input_start: str = "kaiming", scale: str = "lora"
) -> Recipe:
    """A trained low-rank correction B A beside each frozen weight."""
    return adapter(piece(LoRA, rank=rank, alpha=alpha, dropout=dropout, input_start=input_start, scale=scale), name="lora")


@entry(
    "parameterization",
    title="rsLoRA",
    formula="W + (α/√r)·B A",
    reference=Reference("Kalajdzievski", "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023, "2312.03732"),
    trained="r(m + n)",
    cost="2r(m + n) FLOPs per token",
    merges="exact",
    exports="exact at rank r, scale folded in",
    when="When the rank is large (64 and up), where LoRA's α/r slows learning down.",
    tiny={"rank": 2},
)
def rslora(*, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> Recipe:
    """LoRA with the scale α/√r, under which learning does not slow down as the rank grows."""
    return adapter(piece(LoRA, rank=rank, alpha=alpha, dropout=dropout, scale="rslora"), name="rslora")


@entry(
    "parameterization",
    title="Full fine-tuning",
    formula="W' trained",
    reference=Reference("—", "the baseline every low-rank method is compared with", 0),
    trained="m·n",
    cost="2mn FLOPs per token in backward",
    merges="exact",
    exports="not of low rank; the best rank-r substitute with its error",
    when="As the upper bar, or under gradient projection (full + galore) when memory for W is there.",
)
def full() -> Recipe:
    """Trains a copy of every targeted weight; what gradient projection works on."""
    return adapter(piece(Full), name="full")
