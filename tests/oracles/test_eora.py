"""EoRA against its spec (arXiv:2410.21271)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rankwise
from rankwise.compression.eora import compensate
from tests.oracles.tools_training import SITE, layer_model, normal, orthonormal, relative, truncated, with_spectrum

M, N, RANK, TOKENS = 8, 6, 2, 50
W = normal(0, M, N)
COMPRESSED = torch.where(W.abs() > 0.6, W, torch.zeros_like(W))
D = W - COMPRESSED
X = normal(1, TOKENS, N) @ torch.diag(torch.tensor([3.0, 2, 1, 0.5, 0.2, 0.1], dtype=torch.float64)) @ normal(2, N, N)
GRAM = X.T @ X


def companion(dense: Tensor, compressed: Tensor, gram: Tensor | None, rank: int = RANK) -> Tensor:
    """B A."""
    return compensate(dense, compressed, gram, rank).dense()


def by_the_paper(difference: Tensor, root: Tensor, rank: int) -> Tensor:
    """SVD_r(D Q') Q'⁻¹ with C = Q' Q'ᵀ."""
    return truncated(difference @ root, rank) @ torch.linalg.inv(root)


def lost(product: Tensor, rows: Tensor = X) -> float:
    return float((((D - product) @ rows.T) ** 2).sum())


def eigen_root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_1_error_is_the_discarded_spectrum(rank: int) -> None:
    sigma = torch.linalg.svdvals(D @ eigen_root(GRAM))
    found = companion(W, COMPRESSED, GRAM, rank)
    assert int(torch.linalg.matrix_rank(found)) == rank
    assert abs(lost(found) / float((sigma[rank:] ** 2).sum()) - 1) < 1e-10


def test_2_every_root_of_the_gram_gives_the_same() -> None:
    root, found = eigen_root(GRAM), companion(W, COMPRESSED, GRAM)
    for other in (root, torch.linalg.cholesky(GRAM), root @ orthonormal(3, N, N)):
        assert relative(found, by_the_paper(D, other, RANK)) < 1e-9


def test_3_identity_gives_the_plain_svd() -> None:
    eye = torch.eye(N, dtype=torch.float64)
    assert relative(companion(W, COMPRESSED, eye), truncated(D, RANK)) < 1e-12
    assert relative(companion(W, COMPRESSED, None), truncated(D, RANK)) < 1e-12


@pytest.mark.parametrize("rank", [2, 3, 6])
def test_3_enough_rank_gives_the_difference(rank: int) -> None:
    difference = with_spectrum(4, M, N, [1.0, 0.3])
    assert relative(companion(W, W - difference, GRAM, rank), difference) < 1e-9


def test_4_never_worse_than_the_plain_svd_or_random_factors() -> None:
    found = lost(companion(W, COMPRESSED, GRAM))
    assert found < lost(truncated(D, RANK)) * 0.999
    for seed in range(100):
        B = normal(100 + seed, M, RANK)
        best_A = torch.linalg.lstsq(B, D).solution  # the best partner of a random B
        assert lost(B @ best_A) >= found
        assert lost(B @ normal(300 + seed, RANK, N)) >= found


@pytest.mark.parametrize("tokens", [3, 4, 5])
def test_5_fewer_tokens_than_features(tokens: int) -> None:
    rows = X[:tokens]
    gram = rows.T @ rows
    sigma = torch.linalg.svdvals(D @ eigen_root(gram))
    expected = float((sigma[RANK:] ** 2).sum())
    found = companion(W, COMPRESSED, gram)
    assert torch.isfinite(found).all()
    assert abs(lost(found, rows) / expected - 1) < 1e-8
    # the pseudo-inverse form has the same error; what the null space sees is free
    by_pinv = truncated(D @ eigen_root(gram), RANK) @ torch.linalg.pinv(eigen_root(gram), rtol=1e-7)
    assert abs(lost(by_pinv, rows) / expected - 1) < 1e-8
    assert relative(found @ rows.T, by_pinv @ rows.T) < 1e-8
    # eigenvalue flooring, as in the release, to 1e-3
    values, vectors = torch.linalg.eigh(gram)
    floored = vectors * values.clamp(min=1e-6 * float(values.max())).sqrt()
    assert abs(lost(by_the_paper(D, floored, RANK), rows) / lost(found, rows) - 1) < 1e-3


def test_6_nothing_to_compensate() -> None:
    found = companion(W, W, GRAM)
    assert float(found.abs().max()) < 1e-14


def test_export_is_an_adapter_on_the_compressed_model() -> None:
    """y = W_c x + B A x, scale 1, rank r, from calibration batches."""
    model, dense = layer_model(COMPRESSED), layer_model(W)
    rows = [(part, torch.zeros(len(part), dtype=torch.long)) for part in X.split(10)]
    handle = rankwise.catalog.eora(model, dense, rows, rank=RANK)
    expected = by_the_paper(D, eigen_root(GRAM), RANK)
    assert relative(handle.update_of(SITE).dense(), expected) < 1e-8
    assert relative(model(X), X @ (COMPRESSED + expected).T) < 1e-8
    assert torch.equal(model.get_parameter("layer.weight").detach(), COMPRESSED)
    exported = handle.low_rank_of(SITE)
    assert exported is not None
    assert exported.rank == RANK


def test_algorithm_calibrates_behind_what_is_compensated_already() -> None:
    """Sequential: the second layer's Gram is that of the compressed and compensated first layer's outputs."""
    first, second = normal(10, 7, N), normal(11, M, 7)
    rough = [torch.round(weight) for weight in (first, second)]
    model, dense = layer_model(rough[0], second=rough[1]), layer_model(first, second=second)
    rows = [(part, torch.zeros(len(part), dtype=torch.long)) for part in X.split(10)]
    handle = rankwise.catalog.eora(model, dense, rows, rank=RANK)
    one = by_the_paper(first - rough[0], eigen_root(GRAM), RANK)
    hidden = X @ (rough[0] + one).T
    sigma_root = eigen_root(hidden.T @ hidden)
    difference = second - rough[1]
    two = handle.update_of("second").dense().detach()
    found = float((((difference - two) @ hidden.T) ** 2).sum())
    sigma = torch.linalg.svdvals(difference @ sigma_root)
    assert relative(handle.update_of(SITE).dense(), one) < 1e-8
    assert abs(found / float((sigma[RANK:] ** 2).sum()) - 1) < 1e-6
