"""Methods that rebuild the network: called directly, they return the new one."""

from __future__ import annotations

from rankwise.core.catalog import Reference, entry
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
