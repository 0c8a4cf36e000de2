"""Oracles of SVD-LLM: truncation in the metric of the layer's inputs, and the closed-form second pass."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.compression import SVDLLM, compensate, rank_for
from rankwise.core.statistics import LayerStatistics, MomentCollector


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n: int, tokens: int = 60, seed: int = 1) -> Tensor:
    """Correlated inputs, one token a row."""
    return draw(seed, tokens, n) @ (torch.eye(n, dtype=torch.float64) + 0.4 * draw(seed + 1, n, n))


def cut(W: Tensor, X: Tensor, rank: int) -> Tensor:
    """The library's B A for a weight and inputs (tokens, n)."""
    collector = MomentCollector(W.shape[1])
    collector.add(X)
    factors = SVDLLM()(LayerStatistics("layer", W, inputs=collector), rank, generator=torch.Generator().manual_seed(0))
    assert factors.B.shape == (W.shape[0], rank)
    assert factors.A.shape == (rank, W.shape[1])
    return factors.B @ factors.A


def by_cholesky(W: Tensor, C: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B A of the paper, C = S Sᵀ, and all singular values of W S."""
    S = torch.linalg.cholesky(C)
    U, sigma, Vh = torch.linalg.svd(W @ S, full_matrices=False)
    root = sigma[:rank].sqrt()
    A = torch.linalg.solve_triangular(S.T, (root[:, None] * Vh[:rank]).T, upper=True).T
    return (U[:, :rank] * root) @ A, sigma


def by_eigenvectors(W: Tensor, C: Tensor, rank: int) -> Tensor:
    values, Q = torch.linalg.eigh(C)
    F = Q * values.sqrt()
    U, sigma, Vh = torch.linalg.svd(W @ F, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vh[:rank] @ (Q / values.sqrt()).T


@pytest.mark.parametrize(("m", "n"), [(8, 6), (6, 8), (7, 7)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_1_the_output_error_is_the_discarded_part_of_the_spectrum(m, n, rank):
    W, X = draw(0, m, n), inputs(n)
    found = cut(W, X, rank)
    expected, sigma = by_cholesky(W, X.T @ X, rank)
    error = ((W - found) @ X.T).square().sum().item()
    assert error == pytest.approx(sigma[rank:].square().sum().item(), rel=1e-8)
    assert (found - expected).norm() / expected.norm() < 3e-14
    assert (by_eigenvectors(W, X.T @ X, rank) - expected).norm() / expected.norm() < 3e-14
    assert (compensate(W, torch.zeros_like(W), X.T @ X, rank).dense() - found).norm() / found.norm() < 3e-14
    U, values, Vh = torch.linalg.svd(W, full_matrices=False)
    others = [(U[:, :rank] * values[:rank]) @ Vh[:rank]]
    for seed in range(40):  # a random output factor with its best input factor, and neighbors of the solution
        B = draw(seed, m, rank)
        others += [B @ torch.linalg.pinv(B) @ W]
        left = torch.linalg.svd(found).U[:, :rank] + 1e-2 * draw(seed, m, rank)
        others.append(left @ torch.linalg.pinv(left) @ W)
    for other in others:
        assert ((W - other) @ X.T).square().sum().item() >= error * (1 - 1e-12)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_2_white_inputs_give_the_truncated_svd(rank):
    W = draw(0, 8, 5)
    X = torch.linalg.qr(draw(3, 30, 5)).Q
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    assert (cut(W, X, rank) - (U[:, :rank] * sigma[:rank]) @ Vh[:rank]).abs().max() < 1e-10


@pytest.mark.parametrize("rank", [3, 4, 5])
def test_2_a_sufficient_rank_is_exact(rank):
    W = draw(0, 8, 3) @ draw(1, 3, 5)
    assert (cut(W, inputs(5), rank) - W).abs().max() < 1e-10


def model_and_batches() -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(3)
    layers = [nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 9), nn.Tanh(), nn.Linear(9, 7)]
    model = nn.Sequential(*layers).double()
    X = inputs(8, tokens=60) / 5
    return model, [(X[i : i + 20], torch.zeros(20, dtype=torch.long)) for i in range(0, 60, 20)]


def layer_inputs(model: nn.Module, site: str, batches) -> Tensor:
    """What a layer reads, one token a row."""
    seen = []
    hook = model.get_submodule(site).register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    hook.remove()
    return torch.cat(seen)


def test_algorithm_every_layer_is_cut_on_the_dense_models_inputs():
    model, batches = model_and_batches()
    dense = copy.deepcopy(model)
    rw.catalog.svd_llm(model, batches, keep=None, rank=3)
    for site in ("0", "2", "4"):
        X = layer_inputs(dense, site, batches)
        W = dense.get_submodule(site).weight.detach()
        expected, _ = by_cholesky(W, X.T @ X, 3)
        layer = model.get_submodule(site)
        assert (layer.low_rank().dense() - expected).norm() / expected.norm() < 1e-9
        x = draw(5, 4, W.shape[1])
        assert (layer(x) - (x @ expected.T + dense.get_submodule(site).bias)).abs().max() < 1e-9


def test_3_the_second_pass_never_increases_the_error_where_inputs_are_unchanged():
    """The first layer's inputs do not change: the fit is already there. Further layers: least squares, never worse."""
    model, batches = model_and_batches()
    dense, truncated = copy.deepcopy(model), copy.deepcopy(model)
    rw.catalog.svd_llm(truncated, batches, keep=None, rank=3)
    report = rw.catalog.svd_llm(model, batches, keep=None, rank=3, update=True)
    for name in "AB":
        old, new = (m.get_submodule("0").get_submodule(name).weight for m in (truncated, model))
        assert (old - new).abs().max() < 1e-6
    for site in ("0", "2", "4"):
        X, Y = layer_inputs(model, site, batches), layer_inputs(dense, site, batches)
        layer, whole = model.get_submodule(site), dense.get_submodule(site)
        Z = X @ layer.low_rank().A.T
        target = Y @ whole.weight.detach().T  # the dense model's outputs, without their bias
        after = (target - Z @ layer.low_rank().B.T).norm().item()
        before = (target - X @ truncated.get_submodule(site).low_rank().dense().T).norm().item()
        best = (target - Z @ torch.linalg.lstsq(Z, target).solution).norm().item()
        assert after <= before * (1 + 1e-9)
        assert after == pytest.approx(best, rel=1e-9)
        assert report.updated[site] == (pytest.approx(before, rel=1e-8), pytest.approx(after, rel=1e-8))
    assert report.updated["4"][1] < 0.999 * report.updated["4"][0]


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8, 0.95])
def test_4_no_more_numbers_than_asked_for(keep):
    model, batches = model_and_batches()
    dense = copy.deepcopy(model)
    rw.catalog.svd_llm(model, batches, keep=keep)
    for site in ("0", "2", "4"):
        m, n = dense.get_submodule(site).weight.shape
        layer = model.get_submodule(site)
        numbers = layer.A.weight.numel() + layer.B.weight.numel()
        assert numbers <= keep * m * n
        assert numbers + m + n > keep * m * n  # and one rank more would be too many


def test_5_the_size_of_the_inputs_does_not_matter():
    W, X = draw(0, 7, 6), inputs(6)
    for c in (1e-3, 7.0, 1e4):
        assert (cut(W, c * X, 3) - cut(W, X, 3)).abs().max() < 1e-10


@pytest.mark.parametrize(("m", "n", "keep", "rank"), [(4096, 4096, 0.8, 1638), (11008, 4096, 0.8, 2388)])
def test_6_the_rank(m, n, keep, rank):
    assert rank_for(m, n, keep) == rank == math.floor(keep * m * n / (m + n))
