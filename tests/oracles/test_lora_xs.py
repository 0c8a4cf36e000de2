"""Oracles of LoRA-XS: W' = W + s·B R A with B = U_r, A = Σ_r V_rᵀ frozen and R (r, r) trained."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankwise as rw
from rankwise.core.errors import RankwiseError
from tests.oracles.tools import adapted, backward, close, fill, grad, linear, put, randn

lora_xs = rw.catalog.lora_xs
EYE = torch.eye(3, dtype=torch.float64)


@pytest.mark.parametrize(("rank", "sites", "count"), [(25, 96, 60_000), (16, 96, 24_576), (64, 224, 917_504)])
def test_1_counts(rank, sites, count):
    # r² per layer whatever its size, so the sites of the published models are stood in for by layers of r x r; 8 of them are
    # built, as many as show that the count is the sum.
    model = nn.Sequential(*[nn.Linear(rank, rank, bias=False) for _ in range(8)])
    assert rw.adapt_(model, lora_xs(rank=rank)).trained_numbers * sites == count * 8


def test_2_start_is_small_and_zero_is_the_base():
    layer, x = linear(7, 5), randn(9, 5, seed=1)
    base = layer(x).detach()
    model, handle, p = adapted(lora_xs(rank=3, alpha=6.0), layer)
    (R,) = p.roles().values()
    assert 0 < R.abs().max() < 6e-5  # N(0, 1e-5²)
    close(handle.update_of("layer").dense(), 2 * p.B @ R @ p.A, 1e-12)
    close(model(x) - base, 2 * x @ (p.B @ R @ p.A).t(), 1e-8)  # a difference of outputs 10⁵ times larger
    put(R, 0.0)
    assert torch.equal(model(x), base)


def test_2_the_standard_deviation_is_core_std():
    _, _, p = adapted(lora_xs(rank=16, core_std=1e-3), linear(16, 16))
    assert float(p.roles()["R"].detach().std()) == pytest.approx(1e-3, rel=0.2)  # 256 numbers: one deviation is 4 %


def test_3_gradient_and_frames():
    layer, x, g = linear(7, 5), randn(11, 5, seed=1), randn(11, 7, seed=2)
    U, S, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    model, handle, p = adapted(lora_xs(rank=3, alpha=6.0), layer)
    close(p.B.t() @ p.B, EYE, 1e-6)
    close(p.A @ p.A.t(), torch.diag(S[:3] ** 2), 1e-10)
    close(p.B @ p.A, (U[:, :3] * S[:3]) @ Vh[:3], 1e-10)
    fill(handle)
    G, (R,) = backward(model, x, g), p.roles().values()
    close(grad(R), 2 * p.B.t() @ G @ p.A.t(), 1e-12)
    for i in range(3):
        for j in range(3):
            sign = torch.sign(U[:, i] @ p.B[:, i]) * torch.sign(U[:, j] @ p.B[:, j])  # the frames are given up to signs
            assert float(grad(R)[i, j]) == pytest.approx(float(sign * 2 * S[j] * U[:, i] @ G @ Vh[j]), rel=1e-9)


def test_4_limits():
    layer = linear(7, 5)
    put(layer.weight, randn(7, 3, seed=1) @ randn(3, 5, seed=2))  # rank 3
    W = layer.weight.detach().clone()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    model, handle, p = adapted(lora_xs(rank=3, alpha=6.0), layer)
    (R,) = p.roles().values()
    put(R, 0.3 * EYE)
    close(rw.effective_weights(model)["layer.weight"], (1 + 2 * 0.3) * W, 1e-10)
    t = torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64)
    put(R, torch.diag(t))
    handle.merge_()
    close(model.layer.weight, (U[:, :3] * (S[:3] * (1 + 2 * t))) @ Vh[:3], 1e-10)


def test_4_below_the_rank_only_leading_singular_values_move():
    layer = linear(7, 5)
    U, S, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    model, handle, p = adapted(lora_xs(rank=3), layer)
    t = torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64)
    put(p.roles()["R"], torch.diag(t))
    handle.merge_()
    close(model.layer.weight, (U * (S * torch.cat([1 + t, torch.ones(2, dtype=torch.float64)]))) @ Vh, 1e-10)


def test_5_convex_and_training_reaches_the_closed_form():
    X, Y, layer = randn(50, 8, seed=1), randn(50, 8, seed=2), linear(8, 8, bias=False)
    W = layer.weight.detach().clone()
    model, _, p = adapted(lora_xs(rank=3, alpha=6.0), layer)
    (R,) = p.roles().values()
    # vec stacks columns: vec(B R A X) = ((A X)ᵀ ⊗ B) vec(R)
    system = torch.kron((X @ p.A.t()).contiguous(), p.B.contiguous())
    best = torch.linalg.pinv(system) @ (Y.t() - W @ X.t()).t().reshape(-1) / 2.0
    best = best.reshape(3, 3).t()
    rate, smallest = (torch.linalg.eigvalsh(system.t() @ system)[[-1, 0]] * 8).tolist()
    for _ in range(int(30 * rate / smallest)):
        R.grad = None
        (model(X) - Y).square().sum().backward()
        put(R, R - grad(R) / rate)
    reached = float((model(X) - Y).detach().square().sum())
    closed = float((F.linear(X, W + 2 * p.B @ best @ p.A) - Y).square().sum())
    assert abs(reached - closed) <= 1e-8 * closed
    close(R, best, 1e-8)


@pytest.mark.parametrize("flip", [False, True])
def test_6_signs_of_the_frames_cannot_change_a_stored_adapter(tmp_path, monkeypatch, flip):
    layer, x = linear(7, 5), randn(9, 5, seed=1)
    fresh = copy.deepcopy(layer)
    model, handle, p = adapted(lora_xs(rank=3), layer)
    fill(handle)
    (R,) = p.roles().values()
    signs = torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64))
    # the gauge itself: other signs with R conjugated give the same update, with R as it is another one
    close((p.B @ signs) @ (signs @ R @ signs) @ (signs @ p.A), handle.update_of("layer").dense(), 1e-12)
    assert ((p.B @ signs) @ R @ (signs @ p.A) - handle.update_of("layer").dense()).norm() > 0.1
    expected = model(x).detach()
    handle.save(tmp_path / "saved")
    if flip:  # a library whose decomposition returns the other signs
        original = torch.linalg.svd

        def flipped(*arguments, **options):
            U, S, Vh = original(*arguments, **options)
            signs = (-1.0) ** torch.arange(len(S), dtype=S.dtype)  # all of them at once would cancel in B R A
            return U * signs, S, signs[:, None] * Vh

        monkeypatch.setattr(torch.linalg, "svd", flipped)
    other = type(model)(fresh)
    try:
        rw.load_(other, tmp_path / "saved")
    except RankwiseError:
        assert flip  # refusing is right only where the frames are not those of the training
        return
    close(other(x), expected, 1e-12)


def test_6_another_base_is_detected(tmp_path):
    _, handle, _ = adapted(lora_xs(rank=3), linear(7, 5))
    fill(handle)
    handle.save(tmp_path / "saved")
    other = nn.ModuleDict({"layer": linear(7, 5, seed=1)})
    with pytest.raises(RankwiseError):
        rw.load_(other, tmp_path / "saved")
