"""Steps on the factors B and A, clipping, and decay by role."""

from __future__ import annotations

from rankwise.catalog.steps import stepping
from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.steps import conef as feedback
from rankwise.steps.moments import sgd


@entry(
    "step",
    title="ConEF",
    formula="p = G + (1 − β)ẽ; step with Q(p); ẽ ← βẽ + (p − Q(p)), kept in a count sketch",
    reference=Reference(
        "Li, Zheng, Raman, Shrivastava, Giannakis",
        "Contractive Error Feedback for Gradient Compression",
        2023,
        "2312.08538",
    ),
    cost="state ratio·mn per matrix instead of mn, hashing O(mn); what is sent is the compressor's, under DDP",
    state="r*max(1, n//5) + m*max(1, r//5)",
    when="When sending gradients is the bottleneck of training on several machines; alone it only shows what that costs.",
    tiny={"start": 2, "share": 0.5},
    variants=(
        "conef(compressor='powersgd', start=2, rank=2)",
        "conef(compressor='top', share=0.5, start=2, memory='exact', smoothing=0.0)",
        "conef(share=0.5, start=2, memory='means', smoothing=0.0)",
    ),
)
def conef(
    *,
    compressor: str = "block",
    share: float = 0.1,
    rank: int = 4,
    ratio: float = 0.2,
    smoothing: float = 0.9,
    memory: str = "sketch",
    start: int = 10,
    seed: int = 0,
) -> Recipe:
    """SGD on compressed gradients whose error is fed back from a count sketch."""
    compressed = piece(
        feedback.conef,
        compressor=compressor,
        share=share,
        rank=rank,
        ratio=ratio,
        smoothing=smoothing,
        memory=memory,
        start=start,
        seed=seed,
    )
    return stepping(compressed, piece(sgd), name="conef")
