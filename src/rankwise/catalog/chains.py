"""Long and parallel chains of low-rank updates, and robust training."""

from __future__ import annotations

from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.sampled_triplets import Triplets
from rankwise.procedures.sst import SST
from rankwise.steps.moments import adamw
from rankwise.steps.warmup import restarting_warmup


@entry(
    "procedure",
    title="SST",
    formula="U diag(S) Vᵀ instead of W; all of S by uᵀG v, r sampled u and v by G v and Gᵀu; an SVD every k/r samples",
    reference=Reference(
        "Zhao, Zhang, Li, Liu, Cannistraci",
        "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks",
        2024,
        "2405.15481",
    ),
    trained="r(m + n) + min(m, n)",
    numbers="rank*(m+n) + min(m, n)",
    cost="k(m + n + 1) numbers kept in place of mn; an SVD of O(mnk) per k/r intervals",
    merges="the weight is replaced",
    exports="not of low rank: all singular values move",
    when="For pretraining, or tuning at full rank, with optimizer state for few numbers; small layers gain nothing.",
    tiny={"rank": 2, "interval": 2, "warmup": 1},
    variants=("sst(rank=3, interval=3, warmup=0, iterations=1)",),
)
def sst(*, rank: int = 64, interval: int = 200, warmup: int = 20, iterations: int | None = None) -> Recipe:
    """Trains all singular values of a weight, and a sampled few of its singular vectors at a time."""
    rise = (piece(restarting_warmup, interval=interval, warmup=warmup),) if warmup else ()
    return Recipe(
        name="sst",
        parameterization=piece(Triplets, rank=rank),
        step=(piece(adamw), *rise),
        procedure=piece(SST, interval=interval, iterations=iterations),
        own=frozenset({"parameterization", "procedure", "step"} if warmup else {"parameterization", "procedure"}),
    )
