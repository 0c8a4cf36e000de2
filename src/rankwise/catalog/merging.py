"""Mergers: several updates into one. Ready callables `(updates, weights) -> Operator`; `iteris` takes a model and data."""

from __future__ import annotations

from rankwise import merging
from rankwise.core.catalog import Reference, entry

cat = entry(
    "merging",
    title="Concatenation",
    formula="B' = [B_1 … B_N], A' = [w_1 s_1 A_1; …]: B' A' = Σ w_i D_i",
    reference=Reference("—", "the definition of the sum in factors", 0),
    cost="no FLOPs",
    merges="exact",
    exports="exact at rank Σ r_i",
    when="When the merged adapter must be the sum to the last bit and its rank does not matter; the reference of the shelf.",
)(merging.cat)

svd = entry(
    "merging",
    title="Small-core SVD",
    formula="B' A' = the best rank-r' approximation of Σ w_i D_i, from a Σr × Σr core",
    reference=Reference("Eckart, Young", "The Approximation of One Matrix by Another of Lower Rank", 1936),
    cost="(m + n)(Σr)² + (Σr)³ FLOPs per site",
    merges="exact at r' >= Σ r_i, else with error √(Σ_{k>r'} σ_k²)",
    exports="exact at rank r'",
    when="The default: the sum at the rank you can afford, with its error.",
    tiny={"rank": 2},
)(merging.svd)

linear = entry(
    "merging",
    title="Linear combination",
    formula="Σ w_i D_i, truncated to the common rank",
    reference=Reference("Wortsman et al.", "Model soups: averaging weights of multiple fine-tuned models", 2022, "2203.05482"),
    cost="(m + n)(Σr)² + (Σr)³ FLOPs per site",
    merges="with the truncation error reported",
    exports="exact at the common rank",
    when="To average runs of one recipe and keep its rank; not in factor space, where cross terms enter (compat='peft').",
)(merging.linear)

task_arithmetic = entry(
    "merging",
    title="Task arithmetic",
    formula="λ Σ w_i D_i",
    reference=Reference("Ilharco et al.", "Editing Models with Task Arithmetic", 2022, "2212.04089"),
    cost="no FLOPs with factors; N·m·n without",
    merges="exact",
    exports="exact at rank Σ r_i where the updates have factors",
    when="To add or, with negative weights, take away what adapters have learned; sweep λ on held-out data.",
    tiny={"scale": 0.5},
)(merging.task_arithmetic)

iteris = entry(
    "merging",
    title="IterIS",
    formula="argmin_D Σ λ_i ‖D_i X_i - D X̃_i‖², X̃ measured again after each solve",
    reference=Reference("Chen et al.", "IterIS: Iterative Inference-Solving Alignment for LoRA Merging", 2025, "2411.15231"),
    cost="per iteration: two forwards per sample, Σ T_i n² + n³ FLOPs per site",
    merges="its own regression, exactly",
    exports="exact at rank Σ r_i",
    when="When the sum interferes and you have some 50 unlabeled samples per task and at least n tokens of each.",
)(merging.iteris)
