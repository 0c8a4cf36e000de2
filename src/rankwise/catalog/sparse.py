"""Parameterizations with masks, sparse parts, or one adapter per example."""

from __future__ import annotations

from rankwise.catalog.building import OWN, adapter
from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.hadamard_gates import HadamardGates
from rankwise.parameterizations.lora_dropout import LoRADropout
from rankwise.parameterizations.masked import Masked
from rankwise.parameterizations.projected_vectors import ProjectedVectors
from rankwise.parameterizations.sltrain import SLTrain, SparsePlusLowRank
from rankwise.schedules.aflora import AFLoRA
from rankwise.steps.moments import adamw


@entry(
    "parameterization",
    title="SLTrain",
    formula="s·B A + S instead of W, S sparse at fixed random places",
    reference=Reference(
        "Han et al.",
        "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
        2024,
        "2406.02214",
    ),
    trained="r(m + n) + ⌊density·mn⌋",
    cost="2mnr FLOPs per forward to make the matrix, and again in backward",
    merges="the weight is replaced (keep_base: exact)",
    exports="not of low rank: the sparse part has full rank",
    when="To train a model from scratch with half the optimizer state; with keep_base to fine-tune at a rank above LoRA's.",
    tiny={"rank": 2, "density": 0.25},
    numbers="rank*(m+n) + density*m*n//1",
    flops="2*m*n*rank",
    variants=("sltrain(rank=2, density=0.25, keep_base=True)",),
)
def sltrain(*, rank: int = 128, alpha: float = 32.0, density: float = 0.03, keep_base: bool = False) -> Recipe:
    """A low-rank matrix plus a few entries at random places, trained from scratch in place of each weight."""
    return adapter(piece(SparsePlusLowRank if keep_base else SLTrain, rank=rank, alpha=alpha, density=density), name="sltrain")


@entry(
    "parameterization",
    title="AFLoRA",
    formula="W + diag(v) B diag(u) A, B and A frozen one by one",
    reference=Reference(
        "Liu et al.",
        "AFLoRA: Adaptive Freezing of Low Rank Adaptation in Parameter Efficient Fine-Tuning of Large Models",
        2024,
        "2403.13269",
    ),
    trained="r(m + n) + r + m, r + m at the end and where m = n",
    cost="2r(m + n) FLOPs per token; 3 numbers per projection entry until it is frozen",
    merges="exact",
    exports="exact at rank r",
    when="When what is trained should shrink as training goes on; needs the length of the run, and ten times LoRA's rate.",
    tiny={"rank": 2, "total_steps": 8, "epochs": 8, "final_epochs": 2, "interval": 2},
    numbers="(rank*(m+n) if m != n or train_square else 0) + rank + m",
    flops="2*T*rank*(m+n)",
    variants=("aflora(rank=2, total_steps=8, epochs=8, final_epochs=2, interval=2, train_square=True, keep=0.5)",),
)
def aflora(
    *,
    rank: int = 4,
    total_steps: int,
    epochs: int,
    warmup_epochs: int = 1,
    final_epochs: int = 14,
    interval: int = 10,
    smoothing: float = 0.85,
    uncertainty_smoothing: float = 0.95,
    keep: float = 0.0,
    train_square: bool = False,
) -> Recipe:
    """Two projections with a trained vector after each; projections that have stopped learning are frozen for good."""
    schedule = piece(
        AFLoRA,
        total_steps=total_steps,
        epochs=epochs,
        warmup_epochs=warmup_epochs,
        final_epochs=final_epochs,
        interval=interval,
        smoothing=smoothing,
        uncertainty_smoothing=uncertainty_smoothing,
        keep=keep,
    )
    return Recipe(
        name="aflora",
        parameterization=piece(ProjectedVectors, rank=rank, train_square=train_square),
        step=(piece(adamw),),
        schedule=schedule,
        own=OWN | {"schedule"},
    )


@entry(
    "parameterization",
    title="Fast LoRA",
    formula="W ∘ (B A)",
    reference=Reference("Wen, Chaudhuri", "Batched Low-Rank Adaptation of Foundation Models", 2023, "2312.05677"),
    trained="r(m + n)",
    numbers="rank*(m+n)",
    flops="2*T*m*n*(rank-1)",
    cost="r runs of the frozen layer in place of one: nothing extra at r = 1",
    merges="exact",
    exports="not of low rank: the weight is multiplied entry by entry",
    when="When every row of a batch has its own adapter and r = 1 suffices; LoRA where one adapter serves the whole batch.",
    tiny={"rank": 2},
    variants=("batched_flora", "batched_flora(rank=2, mode='residual')"),
)
def batched_flora(*, rank: int = 1, mode: str = "replace", alpha: float | None = None) -> Recipe:
    """Multiplies the weight entry by entry with B A, which lets every row of a batch have its own adapter."""
    return adapter(piece(HadamardGates, rank=rank, mode=mode, alpha=alpha), name="batched_flora")


@entry(
    "parameterization",
    title="CapaBoost",
    formula="W + s Σ_i (B ∘ M_i)(A ∘ N_i),  fixed random masks",
    reference=Reference(
        "Song et al.",
        "Increasing Model Capacity for Free: A Simple Strategy for Parameter Efficient Fine-tuning",
        2024,
        "2407.01320",
    ),
    trained="r(m + n)",
    numbers="rank*(m+n)",
    flops="2*T*branches*rank*(m+n)",
    cost="2dr(m + n) FLOPs per token; ρ times that where zeros are skipped",
    merges="exact",
    exports="exact at rank d r",
    when="When a higher rank is wanted for the trained numbers of a lower one, and FLOPs do not matter.",
    tiny={"rank": 2},
    variants=("capaboost(rank=2, masks='nm', branches=3)", "capaboost(rank=4, density=1.0, branches=1)"),
)
def capaboost(
    *,
    rank: int = 8,
    alpha: float = 16.0,
    branches: int = 2,
    density: float = 0.5,
    masks: str = "uniform",
    dropout: float = 0.0,
) -> Recipe:
    """Adds several randomly masked copies of one pair of factors, so that the rank grows without trained numbers."""
    chosen = piece(Masked, rank=rank, alpha=alpha, branches=branches, density=density, masks=masks, dropout=dropout)
    return adapter(chosen, name="capaboost")


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
