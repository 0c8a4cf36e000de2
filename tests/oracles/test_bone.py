"""Oracles of Bone / MiSS: "miss" and "mini" add a shared shard, "bat" maps every block of the weight affinely."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankwise as rw
from tests.oracles.tools import adapted, backward, close, fill, grad, linear, put, randn

bone = rw.catalog.bone
MODES = [{"mode": "miss"}, {"mode": "mini", "width": 4}, {"mode": "bat"}, {"mode": "bat", "axis": "col"}]
AXES = ("row", "col")


def build(m=8, n=12, rank=4, layer=None, generic=True, size=1.0, **options):
    """(model, handle, D, W, b)."""
    layer = layer or linear(m, n)
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    model, handle, p = adapted(bone(rank=rank, **options), layer)
    if generic:
        fill(handle, size=size)
    (D,) = p.roles().values()
    return model, handle, D, W, b


def delta(handle):
    return handle.update_of("layer").dense().detach()


def by_hand(W, D, r, axis):
    """W_ij D + D, block by block."""
    result = torch.empty_like(W)
    for i in range(W.shape[0] // r):
        for j in range(W.shape[1] // r):
            rows, columns = slice(i * r, (i + 1) * r), slice(j * r, (j + 1) * r)
            own = D[i if axis == "row" else j]
            result[rows, columns] = W[rows, columns] @ own + own
    return result


@pytest.mark.parametrize("options", MODES)
def test_1_start_is_the_base(options):
    layer, x = linear(8, 12), randn(9, 12, seed=1)
    base = layer(x).detach()
    model, handle, D, *_ = build(layer=layer, generic=False, **options)
    assert torch.equal(model(x), base)
    assert torch.equal(D, torch.zeros_like(D)) and torch.equal(delta(handle), torch.zeros(8, 12, dtype=torch.float64))


def test_1_counts():
    with torch.device("meta"):
        layers = [nn.Linear(4096, 4096, bias=False) for _ in range(3)]
    recipes = (bone(rank=64), bone(rank=64, mode="mini", width=64))
    assert [adapted(r, layer)[1].trained_numbers for r, layer in zip(recipes, layers, strict=False)] == [262_144, 4096]
    assert rw.catalog.lora(rank=32).parameterization.arguments["rank"] * (4096 + 4096) == 262_144  # LoRA at r = 32
    assert build(mode="bat", axis="row")[2].shape == (2, 4, 4)  # m r numbers
    assert build(mode="bat", axis="col")[2].shape == (3, 4, 4)  # n r numbers


@pytest.mark.parametrize("n", [12, 10, 4, 5])
def test_2_miss_is_lora_with_a_tiled_identity(n):
    model, handle, D, W, b = build(n=n)
    x = randn(9, n, seed=1)
    tiled = torch.eye(4, dtype=torch.float64).repeat(1, n // 4 + 1)[:, :n]
    assert D.shape == (4, 8)
    close(model(x), F.linear(x, W + D.t() @ tiled, b), 1e-12)
    close(delta(handle), (D.t() @ tiled).detach(), 1e-12)
    narrow = handle.low_rank_of("layer")
    assert narrow is not None and narrow.rank <= 4
    close(narrow.dense(), D.t() @ tiled, 1e-12)
    padded = F.pad(x, (0, -n % 4)).reshape(9, -1, 4).sum(1)  # S(x)
    close(model(x), F.linear(x, W, b) + padded @ D, 1e-12)


@pytest.mark.parametrize("n", [12, 10])
def test_3_miss_repeats_columns(n):
    D = delta(build(n=n)[1])
    assert int(torch.linalg.matrix_rank(D)) == 4
    close(D[:, 4:], D[:, : n - 4], 1e-12)


def test_3_mini_repeats_rows_too():
    _, handle, D0, *_ = build(mode="mini", width=4)
    assert D0.shape == (4, 4)
    expected = torch.tensor([[float(D0[c % 4, o % 4].detach()) for c in range(12)] for o in range(8)], dtype=torch.float64)
    close(delta(handle), expected, 1e-12)
    assert int(torch.linalg.matrix_rank(expected)) <= 4


def test_3_mini_at_full_width_is_miss():
    _, ours, D0, *_ = build(mode="mini", width=8)
    _, miss, D, *_ = build()
    put(D, D0)
    close(delta(ours), delta(miss), 1e-12)


def test_3_miss_at_rank_n_is_a_dense_update():
    _, handle, D, *_ = build(m=12, n=8, rank=8)
    close(delta(handle), D.detach().t(), 1e-12)


@pytest.mark.parametrize("axis", AXES)
def test_3_bat_has_full_rank(axis):
    assert int(torch.linalg.matrix_rank(delta(build(mode="bat", axis=axis)[1]))) == 8


@pytest.mark.parametrize("axis", AXES)
def test_4_bat_blocks(axis):
    model, handle, D, W, b = build(mode="bat", axis=axis)
    expected = by_hand(W, D.detach(), 4, axis)
    close(delta(handle), expected, 1e-12)
    x = randn(9, 12, seed=1)
    close(model(x), F.linear(x, W + expected, b), 1e-12)


def test_4_bat_axes_agree_on_one_block():
    _, row, D, *_ = build(m=4, n=4, mode="bat", axis="row")
    _, col, E, *_ = build(m=4, n=4, mode="bat", axis="col")
    put(E, D)
    close(delta(row), delta(col), 1e-12)


@pytest.mark.parametrize("axis", AXES)
def test_4_bat_on_a_zero_weight_and_with_multiples_of_the_identity(axis):
    layer = linear(8, 12)
    put(layer.weight, 0.0)
    _, handle, D, *_ = build(layer=layer, mode="bat", axis=axis)
    blocks = D.detach()
    tiled = torch.cat([blocks.reshape(8, 4)] * 3, 1) if axis == "row" else torch.cat([torch.cat(list(blocks), 1)] * 2, 0)
    close(delta(handle), tiled, 1e-12)
    _, handle, D, W, _ = build(mode="bat", axis=axis)
    put(D, 0.3 * torch.eye(4, dtype=torch.float64))
    close(delta(handle), 0.3 * W + 0.3 * torch.eye(4, dtype=torch.float64).repeat(2, 3), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("axis", AXES)
def test_5_bat_merge_and_unmerge(axis, dtype, tolerance):
    model, handle, D, W, _ = build(layer=linear(8, 12, dtype=dtype), mode="bat", axis=axis)
    put(D, 0.45 * D.detach() / torch.linalg.matrix_norm(D.detach(), 2).max())
    assert torch.linalg.matrix_norm(D.detach(), 2).max() < 0.5
    handle.merge_()
    merged, undone = model.layer.weight.detach().clone(), torch.empty_like(W)
    for i in range(2):  # W_ij = (W'_ij - D)(I + D)⁻¹
        for j in range(3):
            rows, columns = slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4)
            own = D.detach()[i if axis == "row" else j]
            undone[rows, columns] = (merged[rows, columns] - own) @ torch.linalg.inv(torch.eye(4, dtype=dtype) + own)
    close(undone, W, tolerance)
    handle.unmerge_()
    close(model.layer.weight, W, tolerance)
    assert (merged - W).norm() > 0.1


@pytest.mark.parametrize("n", [12, 10])
def test_6_gradient_of_miss(n):
    model, _, D, *_ = build(n=n)
    x, g = randn(9, n, seed=1), randn(9, 8, seed=2)
    backward(model, x, g)
    close(grad(D), F.pad(x, (0, -n % 4)).reshape(9, -1, 4).sum(1).t() @ g, 1e-10)


@pytest.mark.parametrize("axis", AXES)
def test_6_gradient_of_bat(axis):
    model, _, D, W, _ = build(mode="bat", axis=axis)
    G = backward(model, randn(9, 12, seed=1), randn(9, 8, seed=2))
    expected = torch.zeros_like(D)
    for i in range(2):
        for j in range(3):
            rows, columns = slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4)
            expected[i if axis == "row" else j] += (W[rows, columns].t() + torch.eye(4, dtype=torch.float64)) @ G[rows, columns]
    close(grad(D), expected.detach(), 1e-10)
