"""Oracles of IterIS: D* = argmin Σ λ_i ‖D_i X_i - D X̃_i‖², on one linear layer (where X̃ = X) and on a chain."""

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.core.operators import LowRank
from tests.oracles.tools import DOUBLE, close, linear, randn

iteris = rw.catalog.iteris
M, N, T = 6, 5, 30


def update(seed, m=M, n=N, r=2, scale=0.7):
    return LowRank(randn(m, r, seed=seed), randn(r, n, seed=seed + 50), scale)


def pairs(X):
    return [(X, torch.zeros(len(X), dtype=torch.long))]


def merged(updates, inputs, **options):
    options = {"alpha": 0.0, "max_iterations": 1, "weight": "none"} | options
    result = iteris(nn.Sequential(linear(M, N)), [{"0": u} for u in updates], [pairs(X) for X in inputs], **options)
    return result.operators["0"]


@pytest.mark.parametrize("alpha", [1e-7, 1e-2, 1.0])
@pytest.mark.parametrize("weight", ["full", "delta", "none"])
def test_1_one_adapter_or_equal_ones_come_back(alpha, weight):
    D, X = update(1), [randn(T, N, seed=k) for k in (2, 3)]
    for updates, inputs in (([D], X[:1]), ([D, D], X)):
        found = merged(updates, inputs, alpha=alpha, weight=weight).dense()
        assert (found - D.dense()).abs().max() <= 1e-10


def objective(D, updates, inputs):
    return sum(float(((u.dense() - D) @ X.t()).square().sum()) for u, X in zip(updates, inputs, strict=True))


def test_2_stationary():
    updates, inputs = [update(1), update(2)], [randn(T, N, seed=k) for k in (3, 4)]
    D = merged(updates, inputs).dense()
    least = objective(D, updates, inputs)
    for seed in range(50):
        assert objective(D + 1e-3 * randn(M, N, seed=seed), updates, inputs) >= least
    gradient = sum(2 * (D - u.dense()) @ X.t() @ X for u, X in zip(updates, inputs, strict=True))
    assert gradient.norm() <= 1e-8 * sum((u.dense() @ X.t() @ X).norm() for u, X in zip(updates, inputs, strict=True))


def isotropic(c, seed):
    return torch.linalg.qr(randn(T, N, seed=seed))[0] * c**0.5


def test_3_isotropic_inputs_give_the_weighted_average():
    updates, c = [update(1), update(2)], (2.0, 5.0)
    found = merged(updates, [isotropic(c_i, k) for k, c_i in enumerate(c)]).dense()
    assert (found - (2 * updates[0].dense() + 5 * updates[1].dense()) / 7).abs().max() <= 1e-10


def test_4_one_iteration_is_regmean_of_the_updates():
    updates, inputs = [update(1), update(2)], [randn(T, N, seed=k) for k in (3, 4)]
    grams = [X.t() @ X for X in inputs]
    regmean = sum(u.dense() @ G for u, G in zip(updates, grams, strict=True)) @ torch.linalg.inv(sum(grams))
    close(merged(updates, inputs).dense(), regmean, 1e-10)


def test_5_a_chain_settles_layer_by_layer():
    def chain():
        return nn.Sequential(linear(5, 5, seed=0), nn.Tanh(), linear(5, 5, seed=1), nn.Tanh(), linear(5, 5, seed=2))

    sites = ("0", "2", "4")
    adapters = [{site: update(10 * task + k, 5, 5) for k, site in enumerate(sites)} for task in (1, 2)]
    found = []
    for solves in range(1, 5):
        batches = [pairs(randn(T, 5, seed=k)) for k in (3, 4)]
        result = iteris(chain(), adapters, batches, alpha=1e-7, max_iterations=solves)
        found.append([result.operators[site].dense() for site in sites])
    for k in range(3):
        assert all(torch.equal(found[solves][k], found[k][k]) for solves in range(k, 4))
    assert not torch.equal(found[0][1], found[1][1])


def test_6_factored_export():
    updates, inputs = [update(1, r=1), update(2, r=2)], [randn(T, N, seed=k) for k in (3, 4)]
    operator = merged(updates, inputs, alpha=1e-3)
    R = sum(
        u.dense() @ (G + 1e-3 * G.norm() * torch.eye(N, dtype=DOUBLE))
        for u, G in zip(updates, (X.t() @ X for X in inputs), strict=True)
    )
    C = sum(G + 1e-3 * G.norm() * torch.eye(N, dtype=DOUBLE) for G in (X.t() @ X for X in inputs))
    close(operator.dense(), R @ torch.linalg.inv(C), 1e-10)
    assert isinstance(operator, LowRank) and operator.rank <= 3 < N


def test_7_delta_weights_absorb_the_size_of_the_features():
    updates, inputs = [update(1), update(2)], [randn(T, N, seed=k) for k in (3, 4)]
    plain = merged(updates, inputs, weight="delta").dense()
    close(merged(updates, [10 * inputs[0], inputs[1]], weight="delta").dense(), plain, 1e-10)
    assert (merged(updates, [10 * inputs[0], inputs[1]]).dense() - merged(updates, inputs).dense()).norm() > 0.1
