"""Alternating least squares beyond its oracles: refusals, early stopping, precision, more than two Khatri-Rao factors."""

from __future__ import annotations

import math

import pytest
import torch
from tests.oracles.tools import randn

from rankwise.approximations.alternating import als, hadamard_als, nearest_khatri_rao, nearest_kronecker
from rankwise.core.errors import ArgumentError, StatisticsError
from rankwise.parameterizations.khatri_rao import khatri_rao


def test_it_stops_when_nothing_moves_and_is_as_good() -> None:
    T = randn(30, 20, seed=1)
    long = als(T, 3, iterations=2000, tolerance=0.0)
    short = als(T, 3, iterations=2000, tolerance=1e-6)
    best = torch.linalg.svdvals(T)[3:].square().sum()
    assert (short.dense() - T).square().sum() < best * (1 + 1e-6)
    assert (long.dense() - T).square().sum() < best * (1 + 1e-10)


def test_two_ridges_are_one_ridge_of_their_geometric_mean() -> None:
    """‖B‖² l_B + ‖A‖² l_A at its best scaling is 2 √(l_B l_A) times the nuclear norm."""
    T = randn(7, 6, seed=4)
    one = als(T, 4, ridge=0.6, iterations=3000, tolerance=0.0).dense()
    two = als(T, 4, ridge=(0.3, 1.2), iterations=3000, tolerance=0.0).dense()
    assert torch.allclose(one, two, atol=1e-6)


def test_a_rank_deficient_target_needs_no_ridge() -> None:
    T = randn(9, 1, seed=5) @ randn(1, 8, seed=6)
    found = als(T, 4)
    assert found.dense().isfinite().all() and torch.allclose(found.dense(), T, atol=1e-8)
    assert not als(torch.zeros(5, 4, dtype=torch.float64), 2).dense().any()


def test_the_dtype_is_that_of_the_matrix_and_the_default_start_is_the_same_each_time() -> None:
    T = randn(8, 6, seed=7).float()
    state = torch.random.get_rng_state()
    first, second = als(T, 2), als(T, 2)
    assert first.B.dtype is torch.float32 and torch.equal(first.B, second.B)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("sizes", [(2, 3, 4), (3, 2, 2, 2)])
def test_products_of_more_than_two_factors_are_recovered_and_never_worse_than_the_start(sizes: tuple[int, ...]) -> None:
    n, m = 5, math.prod(sizes)
    T = khatri_rao(*[randn(size, n, seed=k) for k, size in enumerate(sizes)])
    found = nearest_khatri_rao(T, sizes)
    assert torch.allclose(khatri_rao(*found), T, atol=1e-8)
    norms = torch.stack([factor.norm(dim=0) for factor in found])
    assert torch.allclose(norms, norms[:1].expand_as(norms), atol=1e-8)
    generic = randn(m, n, seed=9)
    errors = [
        float((khatri_rao(*nearest_khatri_rao(generic, sizes, iterations=count)) - generic).norm()) for count in (1, 5, 50)
    ]
    assert errors[0] >= errors[1] * (1 - 1e-12) >= errors[2] * (1 - 1e-11)
    for k, factor in enumerate(nearest_khatri_rao(generic, sizes, iterations=500)):  # stationary: the factor solves its column
        others = [f for j, f in enumerate(nearest_khatri_rao(generic, sizes, iterations=500)) if j != k]
        tensor = generic.t().reshape(n, *sizes).movedim(k + 1, 1).flatten(2)  # (n, m_k, the rest)
        rest = khatri_rao(*others).t()  # (n, the rest)
        solved = (tensor @ rest[:, :, None]).squeeze(-1) / rest.square().sum(1, keepdim=True)
        assert torch.allclose(solved.t(), factor, atol=1e-5)


def test_zero_columns_stay_zero() -> None:
    T = randn(8, 3, seed=10)
    T[:, 1] = 0
    for sizes in ((2, 4), (2, 2, 2)):
        found = khatri_rao(*nearest_khatri_rao(T, sizes))
        assert found.isfinite().all() and not found[:, 1].any() and found[:, 0].any()


def test_bad_input_is_named() -> None:
    T = randn(6, 4)
    nothing = torch.ones(6, 4, dtype=torch.bool)
    nothing[2] = False
    with pytest.raises(ArgumentError, match="row 2"):
        als(T, 2, observed=nothing)
    assert als(T, 2, observed=nothing, ridge=0.1).dense()[2].abs().max() == 0
    with pytest.raises(ArgumentError, match="mask"):
        als(T, 2, observed=nothing.double())
    with pytest.raises(ArgumentError, match="ranks 1 to 4"):
        als(T, 5)
    with pytest.raises(ArgumentError, match="ridge"):
        als(T, 2, ridge=-1.0)
    with pytest.raises(ArgumentError, match="iterations"):
        hadamard_als(T, 2, 2, iterations=0)
    with pytest.raises(ArgumentError, match="3×2"):
        nearest_kronecker(randn(7, 4), (3, 2))
    with pytest.raises(ArgumentError, match="multiply to 8"):
        nearest_khatri_rao(T, (2, 4))
    T[0, 0] = torch.nan
    for call in (lambda: als(T, 2), lambda: hadamard_als(T, 2, 2), lambda: nearest_khatri_rao(T, (2, 3))):
        with pytest.raises(StatisticsError, match="NaN"):
            call()
    seen = torch.ones(6, 4, dtype=torch.bool)
    seen[0, 0] = False
    assert als(T, 2, observed=seen).dense().isfinite().all()
