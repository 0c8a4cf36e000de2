"""Parameterizations with masks, sparse parts, or one adapter per example."""

from __future__ import annotations

from rankwise.catalog.building import adapter
from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.lora_dropout import LoRADropout


@entry(
    "parameterization",
    title="LoRA under dropout",
    formula="W + s·B A, M ∘ the branch in training",
    reference=Reference(
        "Yeh et al.",
        "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
        2023,
        "2309.14859",
    ),
    trained="r(m + n)",
    cost="2r(m + n) FLOPs per token, and the mask",
    merges="exact",
    exports="exact at rank r",
    when="When LoRA overfits a small set: input dropout for language, rank or module dropout for images.",
    tiny={"rank": 2, "probability": 0.0},
    numbers="rank*(m+n)",
    flops="2*T*rank*(m+n)",
    variants=(
        "lora_dropout(rank=2, probability=0.0, kind='rank')",
        "lora_dropout(rank=2, probability=0.0, kind='row', granularity='sample')",
        "lora_dropout(rank=2, probability=0.0, kind='output', rescale=False)",
        "lora_dropout(rank=2, probability=0.0, kind='module', granularity='token')",
    ),
)
def lora_dropout(
    *,
    rank: int = 8,
    alpha: float | None = None,
    kind: str = "input",
    probability: float = 0.1,
    rescale: bool = True,
    granularity: str = "call",
) -> Recipe:
    """LoRA whose inputs, ranks, rows, outputs or whole branch are dropped at random in training."""
    chosen = piece(
        LoRADropout,
        rank=rank,
        alpha=alpha,
        kind=kind,
        probability=probability,
        rescale=rescale,
        granularity=granularity,
    )
    return adapter(chosen, name="lora_dropout")
