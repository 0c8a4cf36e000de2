"""Oracles of the merge baselines cat, svd, linear and task arithmetic on updates D_i = s_i B_i A_i."""

import math

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.core.operators import Dense, LowRank
from tests.oracles.tools import close, fill, randn

catalog = rw.catalog
M, N = 9, 7


def update(seed, r=2, scale=1.0):
    return LowRank(randn(M, r, seed=seed), randn(r, N, seed=seed + 50), scale)


MIXED = [update(0, 1, 0.5), update(1, 3, 2.0), update(2, 2, 1.0)]
WEIGHTS = [0.3, -1.2, 0.7]


def total(updates, weights):
    return sum(w * u.scale * (u.B @ u.A) for u, w in zip(updates, weights, strict=True))


def test_1_cat_equals_the_weighted_sum_of_the_adapters_forward():
    x, recipes = randn(11, N, seed=8), [catalog.lora(rank=1, alpha=3.0), catalog.rslora(rank=4), catalog.lora_fa(rank=2)]
    base = nn.Sequential(nn.Linear(N, M)).double()
    frozen, branches, updates = base(x).detach(), [], []
    for k, recipe in enumerate(recipes):
        handle = rw.adapt_(base, recipe, where=["0"], name=f"task{k}", seed=k)
        fill(handle, seed=20 + k)
        branches.append(base(x).detach() - frozen)
        updates.append(handle.update_of("0"))
        handle.detach_()
    merged = catalog.cat(updates, WEIGHTS)
    close(x @ merged.dense().t(), sum(w * y for w, y in zip(WEIGHTS, branches, strict=True)), 1e-10)
    assert merged.scale == 1.0 and merged.rank == 1 + 4 + 2


def test_1_cat_factors_and_rank():
    merged = catalog.cat(MIXED, WEIGHTS)
    close(merged.dense(), total(MIXED, WEIGHTS), 1e-12)
    assert merged.B.shape == (M, 6) and merged.A.shape == (6, N)
    assert int(torch.linalg.matrix_rank(catalog.cat(MIXED[:2], [1, 1]).dense())) <= 4


@pytest.mark.parametrize("rank", [None, 6, 7])
def test_2_svd_at_full_rank_is_cat(rank):
    merged = catalog.svd(MIXED, WEIGHTS, rank=rank)
    close(merged.dense(), catalog.cat(MIXED, WEIGHTS).dense(), 1e-10)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_2_svd_error_is_the_tail_and_it_is_the_dense_decomposition(rank):
    D = total(MIXED, WEIGHTS)
    U, S, Vh = torch.linalg.svd(D)
    merged = catalog.svd(MIXED, WEIGHTS, rank=rank)
    assert merged.rank == rank
    assert float((merged.dense() - D).norm()) == pytest.approx(float(S[rank:].square().sum().sqrt()), rel=1e-4)
    close(merged.dense(), (U[:, :rank] * S[:rank]) @ Vh[:rank], 1e-10)


def test_2_svd_puts_the_singular_values_on_b():
    merged = catalog.svd(MIXED, WEIGHTS, rank=3)
    S = torch.linalg.svdvals(total(MIXED, WEIGHTS))[:3]
    close(merged.folded().A @ merged.folded().A.t(), torch.eye(3, dtype=torch.float64), 1e-10)
    close(merged.folded().B.t() @ merged.folded().B, torch.diag(S**2), 1e-10)


@pytest.mark.parametrize("compat", [None, "peft"])
@pytest.mark.parametrize("weight", [0.7, -0.7])
def test_3_linear_of_one_adapter_is_the_adapter(compat, weight):
    one = update(3, 2, 1.5)
    close(catalog.linear([one], [weight], compat=compat).dense(), weight * one.dense(), 1e-10)


def test_3_linear_in_factor_space_has_the_cross_terms():
    one, two = update(3), update(4)
    defect = catalog.linear([one, two], [1, -1], compat="peft").dense() - catalog.cat([one, two], [1, -1]).dense()
    close(defect, two.B @ one.A - one.B @ two.A, 1e-6)
    assert defect.norm() > 1
    same = catalog.linear([one, one], [1, -1], compat="peft").dense()
    assert same.norm() < 1e-12
    shared = LowRank(two.B, one.A)  # a shared A with equal weights of 1: the cross terms are products B_i A again
    close(catalog.linear([one, shared], [1, 1], compat="peft").dense(), (one.B + shared.B) @ (2 * one.A), 1e-12)


def test_3_linear_in_factor_space_for_general_weights_and_scales():
    updates, weights = [update(3, 2, 0.5), update(4, 2, 2.0)], [0.6, -0.9]
    factors = [w * u.scale for u, w in zip(updates, weights, strict=True)]
    B = sum(math.sqrt(abs(f)) * u.B for f, u in zip(factors, updates, strict=True))
    A = sum(math.copysign(math.sqrt(abs(f)), f) * u.A for f, u in zip(factors, updates, strict=True))
    close(catalog.linear(updates, weights, compat="peft").dense(), B @ A, 1e-12)


def test_3_linear_by_default_has_no_cross_terms():
    one, two = update(3), update(4)
    U, S, Vh = torch.linalg.svd(total([one, two], [1, -1]))
    close(catalog.linear([one, two], [1, -1]).dense(), (U[:, :2] * S[:2]) @ Vh[:2], 1e-10)


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_7_task_arithmetic_is_the_scaled_sum(scale):
    # The half of oracle 7 that speaks of task arithmetic; KnOTS is not built yet.
    merged = catalog.task_arithmetic(MIXED, scale=scale)
    close(merged.dense(), scale * total(MIXED, [1, 1, 1]), 1e-12)
    dense = [Dense(randn(M, N, seed=k)) for k in range(2)]
    close(
        catalog.task_arithmetic(dense, [1.0, -2.0], scale=scale).dense(), scale * (dense[0].matrix - 2 * dense[1].matrix), 1e-12
    )
