"""Schedules: which ranks live, decided while training runs."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.core.catalog import Reference, entry
from rankwise.core.errors import ArgumentError
from rankwise.core.piece import Piece, piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.lora import LoRA
from rankwise.schedules.adalora import AdaLoRA
from rankwise.schedules.roselora import RoseLoRA
from rankwise.schedules.sora import SoRA
from rankwise.steps.moments import adamw


def scheduling(schedule: Piece, parameterization: Piece, *, name: str) -> Recipe:
    """A recipe that decides the schedule; the parameterization and AdamW are its defaults."""
    return Recipe(
        name=name, parameterization=parameterization, step=(piece(adamw),), schedule=schedule, own=frozenset({"schedule"})
    )


@entry(
    "schedule",
    title="AdaLoRA",
    formula="W + (s/r)·B diag(g) A, gᵢ ← 0 outside of a falling budget",
    reference=Reference("Zhang et al.", "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023, "2303.10512"),
    trained="r(m + n + 1)",
    cost="2 numbers per trained number, 4r²(m + n) FLOPs per layer and step",
    merges="exact",
    exports="exact at the rank that is left",
    when="When layers differ much in what they need and the run is long enough to find out (thousands of steps).",
    tiny={"rank": 3, "target_rank": 1, "total_steps": 8, "warmup_steps": 1, "final_steps": 2},
)
def adalora(
    *,
    rank: int = 12,
    target_rank: int = 8,
    total_steps: int,
    warmup_steps: int = 0,
    final_steps: int = 0,
    interval: int = 1,
    orthogonality: float = 0.1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> Recipe:
    """Prunes the least important ranks of all layers together, down to a target on average."""
    if target_rank >= rank:
        raise ArgumentError(f"adalora(rank={rank}, target_rank={target_rank}) would prune nothing; use a larger rank")
    schedule = piece(
        AdaLoRA,
        target_rank=target_rank,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        final_steps=final_steps,
        interval=interval,
        orthogonality=orthogonality,
        beta1=beta1,
        beta2=beta2,
    )
    gated = {"rank": rank, "alpha": alpha, "form": "svd", "dropout": dropout}
    return scheduling(schedule, Piece("parameterization", "GatedLoRA", gated), name="adalora")


@entry(
    "schedule",
    title="SoRA",
    formula="W + (α/r)·B diag(g) A, g ← sign(g) max(|g| − ξ, 0)",
    reference=Reference("Ding et al.", "Sparse Low-rank Adaptation of Pre-trained Language Models", 2023, "2311.11696"),
    trained="r(m + n + 1)",
    cost="none worth counting",
    merges="exact",
    exports="exact at the number of gates that are not zero",
    when="To find out how few ranks do; one threshold to tune instead of a budget and a length.",
    tiny={"rank": 3, "threshold": 0.01},
)
def sora(
    *,
    rank: int = 8,
    threshold: float | Sequence[float] = 3e-4,
    mode: str = "constant",
    l1: float = 0.0,
    rung_steps: int | None = None,
    alpha: float | None = 16.0,
    dropout: float = 0.0,
    compat: str | None = None,
) -> Recipe:
    """Shrinks a gate per rank after every step; what reaches zero can be cut away."""
    steps = threshold if isinstance(threshold, int | float) else tuple(threshold)
    schedule = piece(SoRA, threshold=steps, mode=mode, l1=l1, rung_steps=rung_steps, compat=compat)
    gated = {"rank": rank, "alpha": alpha, "form": "sora", "dropout": dropout}
    return scheduling(schedule, Piece("parameterization", "GatedLoRA", gated), name="sora")


@entry(
    "schedule",
    title="RoseLoRA",
    formula="W + (α/r)·B A, a share τ left of each row of A and column of B",
    reference=Reference(
        "Wang et al.",
        "RoseLoRA: Row and Column-wise Sparse Low-rank Adaptation of Pre-trained Language Model for Knowledge Editing and "
        "Fine-tuning",
        2024,
        "2406.10777",
    ),
    trained="r(m + n), of which τ r(m + n) are not zero at the end",
    numbers="rank*(m+n)",
    flops="2*T*rank*(m+n)",
    cost="1 number and 1 byte per trained number, and a selection per row and column after each step; no FLOPs saved",
    merges="exact",
    exports="exact at rank r, with sparse factors",
    when="When an update must leave most of the weight as it is (knowledge editing); the share τ is what to tune.",
    tiny={"rank": 2, "keep": 0.5, "begin": 1, "end": 4},
    variants=("roselora(rank=2, keep=0.5, begin=1, end=4, clamp=0.5)",),
)
def roselora(
    *,
    keep: float = 0.05,
    begin: int = 3,
    end: int = 20,
    smoothing: float = 0.8,
    clamp: float | None = None,
    rank: int = 8,
    alpha: float | None = 32.0,
    dropout: float = 0.0,
) -> Recipe:
    """Prunes the least important entries in every row of A and every column of B, so that the update itself is sparse."""
    schedule = piece(RoseLoRA, keep=keep, begin=begin, end=end, smoothing=smoothing, clamp=clamp)
    return scheduling(schedule, piece(LoRA, rank=rank, alpha=alpha, dropout=dropout), name="roselora")
