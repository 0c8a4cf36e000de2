"""Oracles of EDoRA: DoRA's row magnitudes around LoRA-XS's core, W' = diag(μ / ‖V‖_row) V with V = W + s·U_r R Σ_r V_rᵀ.

The frozen frames are given up to signs, so the tests read them off the update of unit cores R = e_i e_jᵀ.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankwise as rw
from tests.oracles.tools import DOUBLE, adapted, backward, close, fill, grad, linear, put, randn

edora = rw.catalog.edora
M, N, R, ALPHA = 7, 5, 3, 6.0  # s = 2


def build(W=None, **options):
    """(model, handle, parameterization, core, magnitude, W)."""
    layer = linear(M, N)
    if W is not None:
        put(layer.weight, W)
    W = layer.weight.detach().clone()
    model, handle, p = adapted(edora(**{"rank": R, "alpha": ALPHA, **options}), layer)
    return model, handle, p, p.roles()["R"], p.roles()["magnitude"], W


def normalized(V, magnitude):
    return (magnitude / V.norm(dim=1))[:, None] * V


def unit_updates(p, core):
    """(r, r, m, n): the inner update s·b_i a_jᵀ of every unit core."""
    kept, rank, rows = core.detach().clone(), core.shape[0], []
    for k in range(rank * rank):
        put(core, torch.eye(rank * rank, dtype=DOUBLE)[k].reshape(rank, rank))
        rows.append(p.update().dense().detach().clone())
    put(core, kept)
    return torch.stack(rows).reshape(rank, rank, *rows[0].shape)


def test_1_inner_update_is_that_of_lora_xs_to_the_bit():
    _, _, p, core, _, _ = build()
    _, _, q = adapted(rw.catalog.lora_xs(rank=R, alpha=ALPHA), linear(M, N))
    assert torch.equal(core, q.roles()["R"])  # the same seed draws the same core
    for matrix in (core.detach(), randn(R, R, seed=3)):
        put(core, matrix)
        put(q.roles()["R"], matrix)
        assert torch.equal(p.update().dense(), q.update().dense())


def test_1_zero_core_is_the_base():
    x = randn(9, N, seed=1)
    model, _, _, core, magnitude, W = build()
    put(core, 0.0)
    close(model(x), F.linear(x, W, model.layer.bias), 1e-12)
    close(magnitude, W.norm(dim=1), 1e-12)


def test_1_counts():
    # r² + m does not depend on n, so a slim layer stands in for RoBERTa's 768 x 768.
    slim = rw.adapt_(nn.Sequential(nn.Linear(16, 768, bias=False)), edora(rank=16))
    assert slim.trained_numbers == 1024
    square = [rw.adapt_(nn.Sequential(nn.Linear(768, 768)), recipe) for recipe in (rw.catalog.lora(rank=8), rw.catalog.dora())]
    assert [handle.trained_numbers for handle in square] == [12_288, 13_056]


def test_2_row_norms_of_the_merged_weight():
    model, handle, _, _, magnitude, _ = build()
    fill(handle)
    handle.merge_()
    close(model.layer.weight.norm(dim=1), magnitude.abs(), 1e-12)


def test_2_radial_changes_do_nothing():
    W = randn(M, R, seed=1) @ randn(R, N, seed=2)  # rank r
    model, _, _, core, magnitude, _ = build(W)
    put(magnitude, randn(M, seed=3))
    put(core, 0.0)
    before = rw.effective_weights(model)["layer.weight"].detach()
    put(core, 0.4 * torch.eye(R, dtype=DOUBLE))  # V = (1 + s·0.4) W
    close(rw.effective_weights(model)["layer.weight"], before, 1e-10)
    put(core, torch.diag(torch.tensor([0.4, 0.0, -0.2], dtype=DOUBLE)))
    assert (rw.effective_weights(model)["layer.weight"] - before).norm() > 0.01


@pytest.mark.parametrize("detach", [True, False])
def test_3_gradients(detach):
    x, g = randn(11, N, seed=1), randn(11, M, seed=2)
    model, handle, p, core, magnitude, W = build(detach_norm=detach)
    fill(handle)
    units = unit_updates(p, core)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    for i in range(R):  # B = U_r, A = Σ_r V_rᵀ, up to a sign for each pair
        for j in range(R):
            expected = ALPHA / R * S[j] * torch.outer(U[:, i], Vh[j])
            close(units[i, j] * torch.sign((units[i, j] * expected).sum()), expected, 1e-10)
    V = W + torch.einsum("ij,ijmn->mn", core.detach(), units)
    close(model(x), F.linear(x, normalized(V, magnitude.detach()), model.layer.bias), 1e-12)
    G, norms = backward(model, x, g), V.norm(dim=1)
    unit = V / norms[:, None]
    through = G if detach else G - (G * unit).sum(1, keepdim=True) * unit
    weighted = (magnitude.detach() / norms)[:, None] * through
    close(grad(core), torch.einsum("mn,ijmn->ij", weighted, units), 1e-10)
    close(grad(magnitude), (G * V).sum(1) / norms, 1e-10)


def test_4_equals_dora_with_the_core_multiplied_in():
    x = randn(9, N, seed=1)
    model, handle, p, _, magnitude, W = build()
    fill(handle)
    U, S, Vh = torch.linalg.svd(p.update().dense().detach(), full_matrices=False)  # s B R A as one pair of rank r
    other, _, q = adapted(rw.catalog.dora(rank=R), linear(M, N))
    put(q.roles()["B"], U[:, :R] * S[:R])
    put(q.roles()["A"], Vh[:R])
    put(q.roles()["magnitude"], magnitude)
    close(model(x), other(x), 1e-12)
    close(rw.effective_weights(model)["layer.weight"], normalized(W + p.update().dense(), magnitude), 1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_5_start_is_near_and_reproducible(seed):
    layer, std = linear(M, N), 1e-3
    W = layer.weight.detach().clone()
    model, handle, p = adapted(edora(rank=R, alpha=ALPHA, core_std=std), layer, seed=seed)
    core = p.roles()["R"].detach()
    distance = handle.update_of("layer").dense().detach()
    assert 0 < distance.norm() <= 3 * (ALPHA / R) * std * R * torch.linalg.svdvals(W)[0]
    # exactly: the magnitudes are those of W, from before the core was there
    close(p.roles()["magnitude"], W.norm(dim=1), 1e-12)
    V = W + torch.einsum("ij,ijmn->mn", core, unit_updates(p, p.roles()["R"]))
    close(distance, normalized(V, W.norm(dim=1)) - W, 1e-10)
    close(rw.effective_weights(model)["layer.weight"], normalized(V, W.norm(dim=1)), 1e-12)


def test_5_the_spread_of_the_core():
    _, handle, p = adapted(edora(rank=16, core_std=1e-5), linear(20, 16))
    core = p.roles()["R"].detach()
    assert float(core.std()) == pytest.approx(1e-5, rel=0.2)  # 256 numbers: one deviation is 4 %
    assert handle.trained_numbers == 16**2 + 20
