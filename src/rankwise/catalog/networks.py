"""Methods that rebuild or meta-train a network: called directly, they return what they made."""

from __future__ import annotations

from rankwise.core.catalog import Reference, entry
from rankwise.procedures import meta_adapter
from rankwise.procedures import relaxed_recursive as relaxed

relaxed_recursive = entry(
    "network",
    title="Relaxed recursive transformer",
    formula="W_l = W'_{l mod K} + B_l A_l, K = L / B layers looped B times",
    reference=Reference(
        "Bae et al.",
        "Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA",
        2024,
        "2410.20672",
    ),
    trained="mn / B + r(m + n) per map and depth: the shared weights as well",
    cost="2r(m + n) FLOPs per token, map and depth over the full-depth model, whose memory for weights is divided by B",
    merges="unroll_() gives the full-depth model",
    exports="exact at rank r per depth, over the shared layers",
    when="When a model must fit into half the memory and text for billions of tokens of training can win back the loss.",
    tiny={"loops": 2, "rank": 2},
)(relaxed.relaxed_recursive)

mirror_meta = entry(
    "network",
    title="MetaMiDA",
    formula="φ = h(z), z ← z - a ∇_φ L_task(φ), z₀ and h learned over tasks",
    reference=Reference(
        "Zhang, Li, Giannakis",
        "Meta-Learning with Versatile Loss Geometries for Fast Adaptation Using Mirror Descent",
        2023,
        "2312.13486",
    ),
    trained="over tasks: z₀ of the adapter's size, and h, whose largest part is the product of embedding sizes of its blocks",
    cost="in meta-training K + 1 passes of h and second derivatives of K steps per task; in adaptation K steps",
    merges="what is adapted is the adapter itself",
    exports="as the adapter",
    when="For many small tasks of one kind, each with a handful of examples; one large task wants ordinary training.",
    tiny={"iterations": 2, "steps": 2},
)(meta_adapter.mirror_meta)
