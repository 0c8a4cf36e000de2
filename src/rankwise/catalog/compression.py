"""Compression: whole models into smaller ones, and what wins back the loss."""

from __future__ import annotations

from rankwise.compression.eora import eora
from rankwise.compression.svd_llm import svd_llm
from rankwise.core.catalog import Reference, entry

svd_llm = entry(
    "compression",
    title="SVD-LLM",
    formula="B A = argmin ‖(W − B A) X‖_F at rank ⌊keep·mn/(m + n)⌋",
    reference=Reference(
        "Wang, Zheng, Wan, Zhang",
        "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
        2024,
        "2403.07378",
    ),
    trained="none; r(m + n) numbers are left of mn",
    cost="one pass over calibration data, n² numbers and O(n³ + mn·min(m, n)) per layer",
    merges="not an adapter: the layer is replaced by two",
    exports="exact as a factor pair, the bias on B",
    when="When a model must shrink by 20 to 40 % without training; beyond that, train the factors afterwards.",
)(svd_llm)

eora = entry(
    "compression",
    title="EoRA",
    formula="B A = argmin ‖(W − W_c − B A) X‖_F",
    reference=Reference(
        "Liu et al.",
        "EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
        2024,
        "2410.21271",
    ),
    trained="none needed; r(m + n) if trained further",
    cost="one pass over calibration data per group of layers, O(n³ + mn·min(m, n)) per layer; 2r(m + n) FLOPs per token",
    merges="exact into a dense weight; merging loses a quantized or sparse format",
    exports="exact at rank r, scale 1",
    when="When a pruned or quantized model lost too much and there is no time to train.",
)(eora)
