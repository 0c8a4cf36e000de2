"""Long and parallel chains of low-rank updates, and robust training."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.lora import LoRA
from rankwise.parameterizations.parallel_heads import ParallelHeads
from rankwise.parameterizations.sampled_triplets import Triplets
from rankwise.parameterizations.two_threads import TwoThreads
from rankwise.procedures.cola import ChainOfLoRA
from rankwise.procedures.lte import LoRATheExplorer
from rankwise.procedures.robust import AutoLoRaRobust
from rankwise.procedures.sst import SST
from rankwise.steps.moments import adamw, sgd
from rankwise.steps.warmup import restarting_warmup


@entry(
    "procedure",
    title="COLA (chain of LoRA)",
    formula="W ← W + s·B A every T steps, B ← 0, A drawn anew, a fresh optimizer",
    reference=Reference(
        "Xia, Qin, Hazan", "Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning", 2024, "2401.04151"
    ),
    trained="r(m + n)",
    cost="one product of factors per layer and knot",
    merges="exact",
    exports="exact at rank Σ r_k over the stages",
    when="For fine-tuning in two or three stages when one LoRA of that rank falls short; give the rate a schedule per stage.",
    tiny={"rank": 3, "interval": 2},
    variants=("cola(rank=3, interval=2, ranks=(2, 1))",),
)
def cola(
    *, rank: int = 8, alpha: float | None = 16.0, dropout: float = 0.0, interval: int = 200, ranks: Sequence[int] | None = None
) -> Recipe:
    """Fine-tunes a chain of LoRAs, each merged before the next begins at zero with a fresh optimizer."""
    return Recipe(
        name="cola",
        parameterization=piece(LoRA, rank=rank, alpha=alpha, dropout=dropout),
        step=(piece(adamw),),
        procedure=piece(ChainOfLoRA, interval=interval, ranks=None if ranks is None else tuple(ranks)),
        own=frozenset({"procedure"}),
    )


@entry(
    "procedure",
    title="LTE (LoRA-the-Explorer)",
    formula="y = (W + D̄ + D_h − D_h^m) x per share h of the batch; D̄ ← mean_h s·B_h A_h every T steps",
    reference=Reference(
        "Huh, Cheung, Bernstein, Isola, Agrawal",
        "Training Neural Networks from Scratch with Parallel Low-Rank Adapters",
        2024,
        "2402.16828",
    ),
    trained="H r(m + n)",
    numbers="heads*rank*(m + n)",
    flops="2*T*(min(heads*rank*(m + n), m*n) + 2*rank*(m + n))",
    cost="the main update, and twice a LoRA of rank r, per token; H r(m + n) numbers sent per merge instead of mn per step",
    merges="exact, between merges of the heads the last one's",
    exports="exact at rank H·r without reset",
    when="To pretrain on machines with slow links, each with heads of its own; on one machine AdamW on full weights is better.",
    tiny={"rank": 2, "heads": 1, "alpha": 4.0, "interval": 2},
    variants=(
        "lte(rank=2, heads=2, alpha=4.0, interval=2)",
        "lte(rank=2, heads=2, alpha=4.0, interval=2, reset=True)",
    ),
)
def lte(*, rank: int = 32, heads: int = 32, alpha: float = 4096.0, interval: int = 10, reset: bool = False) -> Recipe:
    """Trains parallel low-rank heads on shares of the batch and averages them into the main weight every few steps."""
    return Recipe(
        name="lte",
        parameterization=piece(ParallelHeads, rank=rank, heads=heads, alpha=alpha),
        step=(piece(adamw),),
        procedure=piece(LoRATheExplorer, interval=interval, reset=reset),
        own=frozenset({"parameterization", "procedure"}),
    )


@entry(
    "procedure",
    title="AutoLoRa (robust)",
    formula="λ₁ CE(f_{W + s·BA}(x)) + (1 - λ₁) CE(f_W(x')) + λ₂ KL(natural ‖ adversarial), λ₁ = 1 - S, λ₂ = scale · S",
    reference=Reference(
        "Xu, Zhang, Kankanhalli",
        "AutoLoRa: A Parameter-Free Automated Robust Fine-Tuning Framework",
        2023,
        "2310.01818",
    ),
    trained="mn + r(m + n), of which mn are deployed",
    numbers="m*n + rank*(m+n)",
    cost="attack_steps forwards and backwards for the attack, then two of each",
    merges="exact, the weight alone; the branch is dropped",
    exports="not of low rank: every weight is trained",
    when="To make a pretrained image model hold against small changes of its pixels; text cannot be attacked so.",
    tiny={"rank": 2, "attack_steps": 2},
    variants=("autolora_robust(rank=2, attack_steps=2, update_every=2)",),
)
def autolora_robust(
    *,
    rank: int = 8,
    alpha: float = 1.0,
    step_size: float = 2 / 255,
    radius: float = 8 / 255,
    attack_steps: int = 10,
    scale: float = 6.0,
    update_every: int | None = None,
) -> Recipe:
    """Natural images train a low-rank branch, attacked ones the weights, under loss weights that set themselves."""
    return Recipe(
        name="autolora_robust",
        parameterization=piece(TwoThreads, rank=rank, alpha=alpha),
        step=(piece(sgd, momentum=0.9, weight_decay=2e-4),),
        procedure=piece(
            AutoLoRaRobust,
            step_size=step_size,
            radius=radius,
            attack_steps=attack_steps,
            scale=scale,
            update_every=update_every,
        ),
        own=frozenset({"parameterization", "procedure"}),
    )


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
