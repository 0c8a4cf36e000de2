import pytest
import torch

from rankwise.approximations.truncated_svd import truncated_svd
from rankwise.approximations.weighted_svd import root_of, weighted_spectrum, weighted_svd, weighted_truncation
from rankwise.core.errors import ArgumentError, StatisticsError


def matrices(m=7, n=6, tokens=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    D = torch.randn(m, n, generator=g, dtype=torch.float64)
    X = torch.randn(n, tokens, generator=g, dtype=torch.float64) * torch.linspace(0.1, 3, n, dtype=torch.float64)[:, None]
    return D, X


def classical(D, F, rank):
    """The textbook formula with an explicit inverse of F."""
    U, S, Vh = torch.linalg.svd(D @ F, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank] @ torch.linalg.inv(F)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_agrees_with_the_inverse_formula_and_every_root(rank):
    D, X = matrices()
    C = X @ X.t()
    want = classical(D, torch.linalg.cholesky(C), rank)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    for F, gram in [(C, True), (root_of(C), False), (torch.linalg.cholesky(C) @ Q, False), (X, False)]:
        torch.testing.assert_close(weighted_svd(D, F, rank, gram=gram).dense(), want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tokens", [3, 40])
def test_error_identity_also_for_singular_grams(tokens):
    D, X = matrices(tokens=tokens)
    for rank in (1, 2, 4):
        cut = weighted_truncation(D, X @ X.t(), rank, gram=True)
        measured = ((D - cut.factors.dense()) @ X).square().sum()
        tail = torch.linalg.svdvals(D @ X)[rank:].square().sum()
        torch.testing.assert_close(measured, tail, rtol=1e-8, atol=1e-12)
        assert abs(cut.discarded - float(tail)) <= 1e-8 * max(float(tail), 1e-4)
        assert cut.factors.rank == rank


def test_unseen_directions_get_the_ranks_that_data_leave_over():
    D, X = matrices(tokens=2)  # D F has rank 2
    cut = weighted_svd(D, X @ X.t(), 4, gram=True)
    rest = D - weighted_svd(D, X @ X.t(), 2, gram=True).dense()
    assert ((D - cut.dense()) @ X).norm() < 1e-10
    want = torch.linalg.svdvals(rest)[2:].square().sum()  # two more ranks, spent as well as the plain norm allows
    torch.testing.assert_close((D - cut.dense()).square().sum(), want)
    torch.testing.assert_close(weighted_svd(D, X @ X.t(), 6, gram=True).dense(), D)


def test_no_other_product_is_better():
    D, X = matrices()
    best = ((D - weighted_svd(D, X, 2).dense()) @ X).norm()
    g = torch.Generator().manual_seed(5)
    for _ in range(100):
        B = torch.randn(7, 2, generator=g, dtype=torch.float64)
        A = torch.linalg.lstsq((B.t() @ B), B.t() @ D).solution  # the best A for this B
        assert ((D - B @ A) @ X).norm() >= best - 1e-10


def test_splits_move_singular_values_without_changing_the_product():
    D, X = matrices()
    S = weighted_spectrum(D, X)[:3]
    balanced, left, right = (weighted_svd(D, X, 3, split=split) for split in ("balanced", "left", "right"))
    torch.testing.assert_close(balanced.dense(), left.dense())
    torch.testing.assert_close(balanced.dense(), right.dense())
    torch.testing.assert_close(balanced.B.norm(dim=0), S.sqrt())
    torch.testing.assert_close((balanced.A @ X).norm(dim=1), S.sqrt())
    torch.testing.assert_close(left.B.norm(dim=0), S)
    torch.testing.assert_close(right.B.t() @ right.B, torch.eye(3, dtype=torch.float64))


def test_diagonal_weights_are_a_diagonal_gram():
    D, _ = matrices()
    d = torch.linspace(0.2, 2, 6, dtype=torch.float64)
    torch.testing.assert_close(weighted_svd(D, d, 2).dense(), weighted_svd(D, torch.diag(d * d), 2, gram=True).dense())


def test_zero_matrix_gives_a_zero_product_with_one_live_factor():
    cut = weighted_svd(torch.zeros(5, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64), 2)
    assert not cut.dense().any()
    assert torch.isfinite(cut.B).all()
    assert cut.B.norm() > 0


def test_refusals_say_what_was_found():
    D, X = matrices()
    with pytest.raises(ArgumentError, match="rank is 7, but a matrix of 7×6"):
        weighted_svd(D, X, 7)
    with pytest.raises(ArgumentError, match="balanced, left, right"):
        weighted_svd(D, X, 2, split="both")
    with pytest.raises(StatisticsError, match="5 inputs do not fit a matrix with 6"):
        weighted_svd(D, torch.eye(5, dtype=torch.float64), 2)
    with pytest.raises(StatisticsError, match="has none below 0"):
        weighted_svd(D, -torch.eye(6, dtype=torch.float64), 2, gram=True)
    with pytest.raises(StatisticsError, match="NaN"):
        weighted_svd(D * float("nan"), X, 2)


def test_randomized_way_is_near_the_exact_one_and_repeatable():
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(120, 100, generator=g, dtype=torch.float64))[0] for _ in range(2))
    S = 1.0 / torch.arange(1, 101, dtype=torch.float64)
    M = U * S @ V.t()
    first, again = (truncated_svd(M, 4, iterations=4, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    exact = truncated_svd(M, 4)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    torch.testing.assert_close(first.S, exact.S, rtol=1e-6, atol=0)
    torch.testing.assert_close(first.U, exact.U, rtol=0, atol=1e-2)  # signs agree as well
    loose = truncated_svd(M, 4, iterations=0, generator=torch.Generator().manual_seed(3))
    assert (loose.S - exact.S).abs().max() > (first.S - exact.S).abs().max()
    with pytest.raises(ArgumentError, match="iterations is a number of passes"):
        truncated_svd(M, 4, iterations=-1)
