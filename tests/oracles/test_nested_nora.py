"""Oracles of Nested NoRA: W' = W + s·B_outer (B A) A_outer, outer pair frozen from an SVD of W, inner pair trained, s = α/q.

The activation statistics of the "awsvd" outer pair are the root mean squares of the input channels, from `rankwise.collect`.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankwise as rw
from tests.oracles.tools import DOUBLE, One, adapted, backward, close, fill, grad, linear, put, randn

nora = rw.catalog.nested_nora
M, N = 9, 7


def build(m=M, n=N, **options):
    """(model, handle, parameterization, B, A, W): the inner pair."""
    layer = linear(m, n)
    W = layer.weight.detach().clone()
    model, handle, p = adapted(nora(**options), layer)
    return model, handle, p, p.roles()["B"], p.roles()["A"], W


def test_1_start_and_first_gradients():
    x, g = randn(11, N, seed=1), randn(11, M, seed=2)
    model, handle, p, B, A, W = build(rank=2, outer_rank=4)
    assert torch.equal(model(x), F.linear(x, W, model.layer.bias))
    assert set(handle.blocks()["layer"]) == {"A", "B"}  # the outer pair is frozen
    assert A.shape == (2, 4) and B.shape == (4, 2) and p.outer_B.shape == (M, 4) and p.outer_A.shape == (4, N)
    assert A.abs().min() > 0 and A.abs().max() <= 1 / 4**0.5  # U(±1/√r), r inputs
    backward(model, x, g)
    assert torch.equal(grad(A), torch.zeros(2, 4, dtype=DOUBLE)) and grad(B).abs().min() > 0


def test_1_counts():
    # 2 r q whatever the layer's size, so a slim layer stands in for 4096 x 4096; LoRA's r (m + n) on the published size.
    _, handle, *_ = build(64, 64, rank=8, outer_rank=64)
    assert handle.trained_numbers == 1024
    lora = rw.adapt_(nn.Sequential(nn.Linear(4096, 4096, bias=False, device="meta")), rw.catalog.lora(rank=8))
    assert lora.trained_numbers == 65_536


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_1_gradients_are_those_of_lora_on_the_compressed_gradient(alpha):
    x, g, s = randn(11, N, seed=1), randn(11, M, seed=2), 1.0 if alpha is None else alpha / 2
    model, handle, p, B, A, W = build(rank=2, outer_rank=4, alpha=alpha)
    fill(handle)
    close(model(x), F.linear(x, W + s * p.outer_B @ B @ A @ p.outer_A, model.layer.bias), 1e-12)
    compressed = p.outer_B.t() @ backward(model, x, g) @ p.outer_A.t()
    close(grad(B), s * compressed @ A.t(), 1e-10)
    close(grad(A), s * B.t() @ compressed, 1e-10)


@pytest.mark.parametrize("split", ["both", "input", "none"])
def test_1_outer_pair(split):
    _, _, p, _, _, W = build(rank=2, outer_rank=4, split=split)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    power = {"both": (1.0, 1.0), "input": (0.0, 2.0), "none": (0.0, 0.0)}[split]  # of the Grams
    close(p.outer_B.t() @ p.outer_B, torch.diag(S[:4] ** power[0]), 1e-10)
    close(p.outer_A @ p.outer_A.t(), torch.diag(S[:4] ** power[1]), 1e-10)
    middle = torch.diag(S[:4]) if split == "none" else torch.eye(4, dtype=DOUBLE)
    close(p.outer_B @ middle @ p.outer_A, (U[:, :4] * S[:4]) @ Vh[:4], 1e-10)


def test_2_rank_and_spaces():
    _, handle, p, B, A, _ = build(rank=2, outer_rank=4)
    fill(handle)
    delta = handle.update_of("layer").dense().detach()
    values = torch.linalg.svdvals(delta)
    assert values[2] < 1e-12 * values[0] < values[1]
    outer_B, outer_A = p.outer_B, p.outer_A
    close(outer_B @ torch.linalg.pinv(outer_B) @ delta, delta, 1e-10)
    close(delta @ torch.linalg.pinv(outer_A) @ outer_A, delta, 1e-10)
    pair = handle.low_rank_of("layer")
    assert pair is not None and pair.rank == 2  # q, not r
    close(pair.dense(), outer_B @ B @ A @ outer_A, 1e-12)


def test_3_with_the_inner_input_factor_one_it_is_lora_xs():
    x, g = randn(11, N, seed=1), randn(11, M, seed=2)
    model, handle, p, B, A, _ = build(rank=3, outer_rank=3, split="input")
    fill(handle)
    put(A, torch.eye(3, dtype=DOUBLE))
    other, _, q = adapted(rw.catalog.lora_xs(rank=3), linear(M, N))
    R = q.roles()["R"]
    left, right = q.B.t() @ p.outer_B, p.outer_A @ torch.linalg.pinv(q.A)  # signs, where the two took others
    close(left.abs(), torch.eye(3, dtype=DOUBLE), 1e-10)
    close(right, left, 1e-10)
    put(R, left @ B.detach() @ right)
    close(model(x), other(x), 1e-12)
    backward(model, x, g)
    backward(other, x, g)
    close(left @ grad(B) @ right, grad(R), 1e-10)


def test_4_square_outer_factors_reach_every_lora():
    _, handle, p, B, A, _ = build(6, 6, rank=2, outer_rank=6)
    B0, A0 = randn(6, 2, seed=3), randn(2, 6, seed=4)
    put(B, torch.linalg.solve(p.outer_B, B0))
    put(A, A0 @ torch.linalg.inv(p.outer_A))
    close(handle.update_of("layer").dense(), B0 @ A0, 1e-10)


def test_5_gauge():
    x, mix = randn(11, N, seed=1), randn(2, 2, seed=9)
    model, handle, _, B, A, _ = build(rank=2, outer_rank=4)
    fill(handle)
    before = model(x).detach()
    put(B, B @ mix)
    put(A, torch.linalg.inv(mix) @ A)
    close(model(x), before, 1e-12)


def activation_aware(W, x, rank):
    """The outer pair of nested_nora(outer="awsvd") collected on the rows x, as (parameterization, needs)."""
    layer = linear(*W.shape)
    put(layer.weight, W)
    model, recipe = One(layer), nora(rank=2, outer_rank=rank, outer="awsvd")
    statistics = rw.collect(model, [(x, torch.zeros(len(x), dtype=torch.long))], recipe.needs, where=["layer"])
    return rw.adapt_(model, recipe, where=["layer"], statistics=statistics).parameterization("layer"), recipe.needs


def test_6_the_activation_aware_pair_is_the_best_for_weighted_inputs():
    W, rank = randn(16, 12, seed=1), 5
    channels = torch.logspace(-0.5, 0.5, 12, dtype=DOUBLE)[torch.randperm(12, generator=torch.Generator().manual_seed(2))]
    x = randn(200, 12, seed=3) * channels
    p, needs = activation_aware(W, x, rank)
    assert needs == {rw.Statistic.INPUT_GRAM}
    size = x.square().mean(0).sqrt()
    U, S, Vh = torch.linalg.svd(W * size, full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank] / size
    # A small constant added to the statistics moves the pair by its own size and the error only by its square.
    close(p.outer_B @ p.outer_A, best, 1e-3)
    error = float(((W - p.outer_B @ p.outer_A) * size).norm())
    assert error == pytest.approx(float(S[rank:].norm()), rel=1e-8)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    plain = float(((W - (U[:, :rank] * S[:rank]) @ Vh[:rank]) * size).norm())
    assert error < 0.95 * plain


def test_6_the_activation_aware_pair_is_split_evenly():
    W, x = randn(16, 12, seed=1), randn(200, 12, seed=3) * torch.linspace(0.5, 2, 12, dtype=DOUBLE)
    p, _ = activation_aware(W, x, 5)
    size = x.square().mean(0).sqrt()
    S = torch.linalg.svdvals(W * size)[:5]
    # Σ^(1/2) on both sides, up to the common factor that a normalization of the statistics leaves free
    left, right = p.outer_B.t() @ p.outer_B, (p.outer_A * size) @ (p.outer_A * size).t()
    close(left / left.trace(), torch.diag(S / S.sum()), 1e-3)
    close(right / right.trace(), torch.diag(S / S.sum()), 1e-3)


def test_6_with_equal_channels_it_is_the_plain_decomposition():
    W = randn(16, 12, seed=1)
    x = (torch.randint(0, 2, (50, 12), generator=torch.Generator().manual_seed(3)) * 2 - 1).to(DOUBLE)  # root mean squares 1
    p, _ = activation_aware(W, x, 5)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    close(p.outer_B @ p.outer_A, (U[:, :5] * S[:5]) @ Vh[:5], 1e-8)


def test_compensation_starts_at_the_base_with_both_inner_factors_alive():
    x, g = randn(11, N, seed=1), randn(11, M, seed=2)
    model, handle, p, B, A, W = build(rank=2, outer_rank=4, compensate=True)
    assert B.abs().min() > 0 and A.abs().min() > 0
    close(model(x), F.linear(x, W, model.layer.bias), 1e-12)
    B0, A0 = B.detach().clone(), A.detach().clone()
    backward(model, x, g)
    assert grad(A).norm() > 0 and grad(B).norm() > 0
    fill(handle)
    delta = p.outer_B @ (B @ A - B0 @ A0) @ p.outer_A
    close(handle.update_of("layer").dense(), delta, 1e-10)
    close(model(x), F.linear(x, W + delta, model.layer.bias), 1e-10)
