"""Oracles of EoRA: the companion of a compressed layer that minimizes the error of its outputs."""

import copy

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.approximations.weighted_svd import weighted_svd
from rankwise.compression import compensate

SIZES = [(8, 6), (6, 8), (7, 7)]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n: int, tokens: int = 60) -> Tensor:
    """Correlated inputs, one token a row."""
    return draw(1, tokens, n) @ (torch.eye(n, dtype=torch.float64) + 0.4 * draw(2, n, n))


def rounded(W: Tensor) -> Tensor:
    """A crude quantizer: multiples of a half."""
    return (2 * W).round() / 2


def by_root(D: Tensor, F: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B = U√S, A = √S Vᵀ F⁻¹, and all singular values of D F."""
    U, S, Vh = torch.linalg.svd(D @ F, full_matrices=False)
    B, A = U[:, :rank] * S[:rank].sqrt(), S[:rank].sqrt()[:, None] * Vh[:rank] @ torch.linalg.pinv(F)
    return B @ A, S


def eigen_root(C: Tensor, floor: float = 0.0) -> Tensor:
    values, Q = torch.linalg.eigh(C)
    return Q * values.clamp(min=floor).sqrt()


def output_error(D: Tensor, update: Tensor, X: Tensor) -> float:
    return ((D - update) @ X.T).square().sum().item()


@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_1_the_error_is_the_discarded_part_of_the_spectrum(m, n, rank):
    W, X = draw(0, m, n), inputs(n)
    D = W - rounded(W)
    factors = compensate(W, rounded(W), X.T @ X, rank)
    assert factors.B.shape == (m, rank)
    assert factors.A.shape == (rank, n)
    assert factors.scale == 1.0
    expected, S = by_root(D, eigen_root(X.T @ X), rank)
    update = factors.B @ factors.A
    assert (update - expected).abs().max() < 1e-10
    assert output_error(D, update, X) == pytest.approx(S[rank:].square().sum().item(), abs=1e-10, rel=1e-10)


@pytest.mark.parametrize(("m", "n"), SIZES)
def test_2_every_square_root_gives_the_same_product(m, n):
    W, X, rank = draw(0, m, n), inputs(n), 3
    D, C = W - rounded(W), X.T @ X
    library = compensate(W, rounded(W), C, rank)
    orthogonal = torch.linalg.qr(draw(8, n, n)).Q
    roots = [torch.linalg.cholesky(C), eigen_root(C), eigen_root(C) @ orthogonal, X.T]
    for F in roots:
        assert (by_root(D, F, rank)[0] - library.dense()).abs().max() < 3e-14
        assert (weighted_svd(D, F, rank).dense() - library.dense()).abs().max() < 3e-14


@pytest.mark.parametrize(("m", "n"), SIZES)
def test_3_white_inputs_and_a_sufficient_rank(m, n):
    W = draw(0, m, n)
    D = W - rounded(W)
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    plain = (U[:, :2] * S[:2]) @ Vh[:2]
    for C in (torch.eye(n, dtype=torch.float64), 5 * torch.eye(n, dtype=torch.float64), None):
        assert (compensate(W, rounded(W), C, 2).dense() - plain).abs().max() < 1e-12
    low = draw(4, m, 2) @ draw(5, 2, n)
    for rank in (2, 3, 5):
        assert (compensate(W, W - low, inputs(n).T @ inputs(n), rank).dense() - low).abs().max() < 1e-10


@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_4_never_worse_than_the_plain_svd_nor_than_random_pairs(m, n, rank):
    W, X = draw(0, m, n), inputs(n)
    D = W - rounded(W)
    best = output_error(D, compensate(W, rounded(W), X.T @ X, rank).dense(), X)
    plain = output_error(D, compensate(W, rounded(W), None, rank).dense(), X)
    assert best < plain * (1 - 1e-3)
    solution = compensate(W, rounded(W), X.T @ X, rank)
    for seed in range(50):
        B, A = draw(seed, m, rank), draw(seed + 100, rank, n)
        others = [B @ A, B @ torch.linalg.pinv(B) @ D, D @ torch.linalg.pinv(A) @ A]
        others.append((solution.B + 0.01 * B) @ (solution.A + 0.01 * A))
        assert all(output_error(D, other, X) >= best * (1 - 1e-12) for other in others)


@pytest.mark.parametrize("tokens", [3, 5])
def test_5_fewer_tokens_than_inputs(tokens):
    m, n, rank = 8, 9, 2
    W, X = draw(0, m, n), inputs(n, tokens)
    D, C = W - rounded(W), X.T @ X
    update = compensate(W, rounded(W), C, rank).dense()
    S = torch.linalg.svdvals(D @ X.T)
    least = S[rank:].square().sum().item()
    assert torch.linalg.matrix_rank(update, rtol=1e-10) <= rank
    assert output_error(D, update, X) == pytest.approx(least, rel=1e-9)
    by_pseudo_inverse, _ = by_root(D, X.T, rank)
    assert output_error(D, by_pseudo_inverse, X) == pytest.approx(least, rel=1e-9)
    assert ((update - by_pseudo_inverse) @ X.T).abs().max() < 1e-9
    top = torch.linalg.eigvalsh(C)[-1].item()
    floored, _ = by_root(D, eigen_root(C, floor=1e-6 * top), rank)
    assert output_error(D, floored, X) == pytest.approx(least, rel=1e-3)
    assert ((update - floored) @ X.T).norm() / (update @ X.T).norm() < 1e-3
    blind = torch.linalg.svd(X).Vh[tokens:]  # inputs that no token has: whatever D does there is irrelevant
    other = W + draw(7, m, n - tokens) @ blind
    assert ((compensate(other, rounded(W), C, rank).dense() - update) @ X.T).abs().max() < 1e-9


def test_6_nothing_to_compensate():
    W, X = draw(0, 8, 6), inputs(6)
    factors = compensate(W, W, X.T @ X, 3)
    assert torch.equal(factors.B @ factors.A, torch.zeros(8, 6, dtype=torch.float64))


def models() -> tuple[nn.Sequential, nn.Sequential, list[tuple[Tensor, Tensor]]]:
    """A dense model, a compressed one and calibration batches."""
    torch.manual_seed(3)
    dense = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 9), nn.Tanh(), nn.Linear(9, 7)).double()
    compressed = copy.deepcopy(dense)
    for module in compressed:
        if isinstance(module, nn.Linear):
            module.weight.data = (4 * module.weight.data).round() / 4
    X = inputs(8)
    return dense, compressed, [(X[i : i + 20], torch.zeros(20, dtype=torch.long)) for i in range(0, 60, 20)]


@pytest.mark.parametrize("sequential", [True, False])
def test_algorithm_layer_by_layer(sequential):
    """Inputs come from the compressed model, behind the layers compensated before (or all at once, uncompensated)."""
    dense, compressed, batches = models()
    untouched = copy.deepcopy(compressed)
    handle = rw.catalog.eora(compressed, dense, batches, rank=2, sequential=sequential)
    X = torch.cat([x for x, _ in batches])
    for site in ("0", "2", "4"):
        W, Wc = dense.get_submodule(site).weight.detach(), untouched.get_submodule(site).weight.detach()
        bias = dense.get_submodule(site).bias.detach()
        expected, _ = by_root(W - Wc, eigen_root(X.T @ X), 2)
        assert (handle.update_of(site).dense() - expected).abs().max() < 1e-9
        assert torch.equal(compressed.get_submodule(site).weight, Wc)
        Y = X @ (Wc + expected if sequential else Wc).T + bias
        X = Y if site == "4" else Y.tanh()
    factors = handle.low_rank_of("0")
    assert factors is not None
    assert factors.B.shape == (10, 2)
    if sequential:
        x = torch.cat([x for x, _ in batches])
        assert (compressed(x) - X).abs().max() < 1e-9
        assert (compressed(x) - dense(x)).norm() < (untouched(x) - dense(x)).norm()
