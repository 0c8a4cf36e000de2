"""Starts that read data, earlier adapters or a quantizer."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.approximations.cora import CoRA
from rankwise.approximations.corda import CorDA
from rankwise.approximations.loftq import LoftQ
from rankwise.approximations.lora_ga import LoRAGA
from rankwise.catalog.building import adapter, starting
from rankwise.catalog.parameterizations import lora, rslora
from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.lora import LoRA


@entry(
    "start",
    title="LoRA-GA",
    formula="G = U S Vᵀ, B = c U_{r+1..2r}, A = c V_{1..r}ᵀ, c = m^¼/γ^½; the base is W − s·B A",
    reference=Reference("Wang, Yu, Li", "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", 2024, "2407.05000"),
    trained="r(m + n)",
    numbers="rank*(m+n)",
    flops="4*T*rank*(m+n)",
    cost="a few full backward passes, streamed layer by layer, and one truncated SVD per layer; offset runs a second pair",
    merges="exact",
    exports="exact at rank 2r against the untouched base",
    when="When a few full backward passes are affordable and the first forward must stay the base's (LoRA-One moves it).",
    tiny={"rank": 2},
    variants=(
        "lora_ga(rank=2, directions='A2rBr', scaling='unit')",
        "lora_ga(rank=2, directions='ArBr', scaling='gd')",
        "lora_ga(rank=2, directions='random', scaling='weightS', mode='absorb')",
    ),
)
def lora_ga(
    *,
    rank: int = 8,
    alpha: float = 16.0,
    gamma: float = 16.0,
    directions: str = "ArB2r",
    scaling: str = "stable",
    mode: str = "offset",
) -> Recipe:
    """Starts the two factors in different directions of the gradient, for a first step of rank 2r."""
    start = piece(LoRAGA, gamma=gamma, directions=directions, scaling=scaling, mode=mode)
    return starting(start, rslora(rank=rank, alpha=alpha), name="lora_ga")


@entry(
    "start",
    title="CorDA",
    formula="W C = U S Vᵀ, s·B A = U_I U_Iᵀ W; the base is W − s·B A",
    reference=Reference(
        "Yang, Li, Zhou, Song, Wu, Nie, Ghanem",
        "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware Parameter-Efficient "
        "Fine-tuning",
        2024,
        "2406.05223",
    ),
    trained="r(m + n)",
    numbers="rank*(m+n)",
    flops="4*T*rank*(m+n)",
    cost="forward passes over probe data, n² numbers per distinct input and one SVD per layer; offset runs a second pair",
    merges="exact",
    exports="exact at rank 2r against the untouched base",
    when="With data whose knowledge must stay (select='smallest'), or to learn the task's own directions (select='largest').",
    tiny={"rank": 2},
    variants=("corda(rank=2, select='smallest')", "corda(rank=2, damping=0.5, mode='absorb')"),
)
def corda(
    *, rank: int = 8, alpha: float | None = None, select: str = "largest", damping: float = 0.01, mode: str = "offset"
) -> Recipe:
    """Trains the part of the weight that chosen data use most, or least, and freezes the rest."""
    return starting(piece(CorDA, select=select, damping=damping, mode=mode), lora(rank=rank, alpha=alpha), name="corda")


@entry(
    "start",
    title="CoRA",
    formula="W + B A, B = g U_r of [M₁ … M_N], A = 0, M_i what earlier adapters did",
    reference=Reference(
        "Xiao, Shen, Bao, Rong, Liu, Wang, Liu",
        "CoRA: Optimizing Low-Rank Adaptation with Common Subspace of Large Language Models",
        2024,
        "2409.02119",
    ),
    trained="r·n, or r(m + n) with freeze=False",
    numbers="rank*(n if freeze else m+n)",
    flops="2*T*rank*(m+n)",
    cost="one decomposition of the sources' factors per layer, O(m (Σ r_i)²)",
    merges="exact",
    exports="exact at rank r",
    when="When adapters of related tasks are at hand; `CoRA.captured` says whether they have anything in common.",
    tiny={"rank": 2, "sources": ("SOURCES",)},
    variants=(
        "cora(rank=2, sources=('SOURCES',), freeze=False)",
        "cora(rank=1, sources=('SOURCES',), source='weight', gain=0.5)",
    ),
)
def cora(
    *,
    sources: Sequence[str],
    rank: int = 8,
    gain: float = 1.0,
    freeze: bool = True,
    source: str = "delta",
    share: str = "per_site",
) -> Recipe:
    """Takes the output factor from the common subspace of earlier adapters of the same base, the update at zero."""
    start = piece(CoRA, sources=tuple(sources), gain=gain, freeze=freeze, source=source, share=share)
    holder = adapter(piece(LoRA, rank=rank, freeze_output=freeze), name="lora")
    return starting(start, holder, name="cora")


@entry(
    "start",
    title="LoftQ",
    formula="W ≈ deq(Q) + s·B A, in turns Q = q(W − s·B A), s·B A = [W − deq(Q)]_r",
    reference=Reference(
        "Li, Yu, Liang, He, Karampatziakis, Chen, Zhao",
        "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models",
        2023,
        "2310.08659",
    ),
    trained="r(m + n)",
    numbers="rank*(m+n)",
    flops="2*T*rank*(m+n)",
    cost="one quantization and one exact SVD per turn and layer, O(T·mn·min(m, n)); simulated keeps W beside deq(Q)",
    merges="exact into a dense weight; a quantized layer is not written",
    exports="exact at rank r on deq(Q); against W the update is of full rank",
    when="When the base will be served in 4 bits or fewer; at 4 bits the gain over plain LoRA on the quantized base is small.",
    tiny={"rank": 2, "bits": 2, "block": 16},
    variants=("loftq(rank=2, iterations=1, block=16)", "loftq(rank=2, quantizer='uniform', bits=3, block=8)"),
)
def loftq(
    *,
    rank: int = 64,
    bits: int | None = None,
    iterations: int = 5,
    block: int = 64,
    quantizer: str | None = None,
    mode: str = "simulated",
) -> Recipe:
    """Quantizes the base (4 bits) and starts at the low-rank part of what that lost, so on purpose away from the base."""
    start = piece(LoftQ, bits=bits, iterations=iterations, block=block, quantizer=quantizer, mode=mode)
    return starting(start, lora(rank=rank), name="loftq")
