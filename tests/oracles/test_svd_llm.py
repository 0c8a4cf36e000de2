"""SVD-LLM against its spec (arXiv:2403.07378)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.compression.compress import compress_, rank_for
from rankwise.compression.factorized import Factorized
from rankwise.compression.svd_llm import SVDLLM
from tests.oracles.tools_training import (
    SITE,
    drawn,
    layer_model,
    normal,
    orthonormal,
    relative,
    statistics_of,
    truncated,
    with_spectrum,
)

M, N, RANK, TOKENS = 8, 6, 3, 40
W = normal(0, M, N)
X = normal(1, TOKENS, N) @ torch.diag(torch.tensor([3.0, 2, 1, 0.5, 0.2, 0.1], dtype=torch.float64)) @ normal(2, N, N)


def truncation(weight: Tensor, rows: Tensor, rank: int = RANK) -> Tensor:
    """B A."""
    return SVDLLM()(statistics_of(weight, inputs=[rows]), rank, generator=drawn(0), scale=1.0).dense()


def by_the_paper(weight: Tensor, rows: Tensor, rank: int, root: Tensor | None = None) -> Tensor:
    """U_r Σ_r V_rᵀ S⁻¹ from the SVD of W S, C = S Sᵀ."""
    S = torch.linalg.cholesky(rows.T @ rows) if root is None else root
    return truncated(weight @ S, rank) @ torch.linalg.inv(S)


def lost(weight: Tensor, product: Tensor, rows: Tensor) -> float:
    return float((((weight - product) @ rows.T) ** 2).sum())


def test_1_output_error_is_the_discarded_spectrum_and_the_least() -> None:
    found = truncation(W, X)
    sigma = torch.linalg.svdvals(W @ torch.linalg.cholesky(X.T @ X))
    error = lost(W, found, X)
    assert abs(error / float((sigma[RANK:] ** 2).sum()) - 1) < 1e-8
    assert relative(found, by_the_paper(W, X, RANK)) < 1e-9
    assert lost(W, truncated(W, RANK), X) > error * 1.001
    for seed in range(100):
        noise = 10 ** (-3 + seed % 4) * normal(100 + seed, M, N)
        assert lost(W, truncated(found + noise, RANK), X) >= error * (1 - 1e-12)


def test_1_every_root_of_the_gram_gives_the_same() -> None:
    values, vectors = torch.linalg.eigh(X.T @ X)
    eigen = vectors * values.sqrt()
    turned = eigen @ orthonormal(3, N, N)
    for root in (eigen, turned):
        assert relative(truncation(W, X), by_the_paper(W, X, RANK, root)) < 1e-9


def test_2_white_inputs_give_the_plain_svd() -> None:
    white = orthonormal(4, TOKENS, N)
    assert relative(truncation(W, white), truncated(W, RANK)) < 1e-12


@pytest.mark.parametrize("rank", [2, 4, 6])
def test_2_enough_rank_is_exact(rank: int) -> None:
    weight = with_spectrum(5, M, N, [2.0, 1.0])
    assert relative(truncation(weight, X, rank), weight) < 1e-10


def deep(seed: int) -> nn.Sequential:
    return layer_model(normal(seed, 10, N), second=normal(seed + 1, 9, 10), third=normal(seed + 2, M, 9))


def batches(rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in rows.split(20)]


def test_3_second_fit_of_b_is_a_no_op_on_the_same_inputs() -> None:
    models = [layer_model(W), layer_model(W)]
    for model, update in zip(models, (False, True), strict=True):
        rankwise.catalog.svd_llm(model, batches(X), keep=None, rank=RANK, update=update)
    assert relative(models[1](X), models[0](X)) < 1e-6


def test_3_second_fit_never_loses() -> None:
    """Behind compressed layers: each layer's output error against the dense model, on the compressed model's own inputs."""
    model = deep(10)
    report = rankwise.catalog.svd_llm(model, batches(X), keep=None, rank=4, update=True)
    assert set(report.updated) == {SITE, "second", "third"}
    for before, after in report.updated.values():
        assert after <= before * (1 + 1e-9)
    assert report.updated["third"][1] < report.updated["third"][0] * 0.999


def test_3_second_fit_is_the_least_squares_answer() -> None:
    """y ≈ B z with z = A x from the compressed model's inputs: the last B of a chain equals lstsq."""
    dense, model = deep(20), deep(20)
    rankwise.catalog.svd_llm(model, batches(X), keep=None, rank=4, update=True)
    with torch.no_grad():
        h = model[1](model[0](X))
        last = model[2]
        assert isinstance(last, Factorized)
        pair = last.low_rank()
        best = torch.linalg.lstsq(h @ pair.A.T, dense(X)).solution.T
    assert relative(pair.B, best) < 1e-6


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_4_no_more_numbers_than_kept(keep: float) -> None:
    model = layer_model(normal(30, 12, 10), second=normal(31, 16, 12))
    report = rankwise.catalog.svd_llm(model, batches(normal(32, TOKENS, 10)), keep=keep)
    assert len(report.layers) == 2
    for layer in report.layers:
        assert layer.rank * (layer.m + layer.n) <= keep * layer.m * layer.n
        assert (layer.rank + 1) * (layer.m + layer.n) > keep * layer.m * layer.n
    assert sum(p.numel() for p in model.parameters()) == sum(layer.rank * (layer.m + layer.n) for layer in report.layers)
    assert sum(p.numel() for p in model.parameters()) <= keep * (120 + 192)


@pytest.mark.parametrize("c", [1e-3, 7.0, 1e3])
def test_5_scale_of_the_inputs_drops_out(c: float) -> None:
    assert relative(truncation(W, c * X), truncation(W, X)) < 1e-10


def test_6_rank_formula() -> None:
    assert rank_for(4096, 4096, 0.8) == 1638
    assert rank_for(11008, 4096, 0.8) == 2388


def test_export_keeps_the_bias_and_the_reported_error() -> None:
    model = nn.Sequential()
    model.add_module(SITE, nn.Linear(N, M, dtype=torch.float64))
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(W)
        layer.bias.copy_(normal(40, M))
    bias = layer.bias.detach().clone()
    statistics = rankwise.collect(model, batches(X), SVDLLM().needs)
    report = compress_(model, SVDLLM(), rank=RANK, statistics=statistics)
    assert relative(model(X), X @ by_the_paper(W, X, RANK).T + bias) < 1e-9
    sigma = torch.linalg.svdvals(W @ torch.linalg.cholesky(X.T @ X))
    assert report.layers[0].error == pytest.approx(float((sigma[RANK:] ** 2).sum() ** 0.5), rel=1e-8)
    assert report.layers[0].predicted == pytest.approx(report.layers[0].error, rel=1e-8)
