"""Oracles of LoRA: W' = W + s·B A, s = α/r, B = 0 at the start."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankwise as rw
from tests.oracles.tools import adapted, backward, close, fill, grad, linear, put, randn

lora = rw.catalog.lora


@pytest.mark.parametrize(("alpha", "start"), [(5.0, "kaiming"), (None, "kaiming"), (5.0, "orthonormal")])
def test_1_start_and_first_gradients(alpha, start):
    layer, x, g = linear(7, 5), randn(11, 5, seed=1), randn(11, 7, seed=2)
    base = layer(x).detach()
    model, _, p = adapted(lora(rank=2, alpha=alpha, input_start=start), layer)
    model.eval()
    assert torch.equal(model(x), base)
    G, s = backward(model, x, g), 1.0 if alpha is None else alpha / 2
    assert torch.equal(grad(p.roles()["A"]), torch.zeros(2, 5, dtype=torch.float64))
    close(grad(p.roles()["B"]), s * G @ p.roles()["A"].t(), 1e-10)


def test_1_first_gradients_in_float32():
    x, g = randn(11, 5, seed=1).float(), randn(11, 7, seed=2).float()
    model, _, p = adapted(lora(rank=2, alpha=5.0), linear(7, 5, dtype=torch.float32))
    G = backward(model, x, g)
    close(grad(p.roles()["B"]), 2.5 * G @ p.roles()["A"].t(), 1e-5)


def test_1_gradients_at_a_generic_point():
    x, g = randn(11, 5, seed=1), randn(11, 7, seed=2)
    model, handle, p = adapted(lora(rank=2, alpha=5.0), linear(7, 5))
    fill(handle)
    G, B, A = backward(model, x, g), p.roles()["B"], p.roles()["A"]
    close(grad(B), 2.5 * G @ A.t(), 1e-10)
    close(grad(A), 2.5 * B.t() @ G, 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_2_merge_equals_forward_and_unmerge_restores(dtype, tolerance):
    layer = linear(7, 5, dtype=dtype)
    W, b, x = layer.weight.detach().clone(), layer.bias.detach().clone(), randn(9, 5, seed=1, dtype=dtype)
    model, handle, p = adapted(lora(rank=2, alpha=3.0), layer)
    fill(handle)
    before = model(x).detach()
    roles = p.roles()
    handle.merge_()
    close(F.linear(x, layer.weight, b), before, tolerance)
    close(model(x), before, tolerance)
    close(layer.weight, W + 1.5 * roles["B"] @ roles["A"], tolerance)
    handle.unmerge_()
    assert (layer.weight - W).norm() <= 1e-6 * W.norm()


def test_3_gauge_and_rank():
    x = randn(9, 6, seed=1)
    model, handle, p = adapted(lora(rank=3, alpha=2.0), linear(8, 6))
    fill(handle)
    before, B, A = model(x).detach(), p.roles()["B"], p.roles()["A"]
    M = randn(3, 3, seed=9)
    put(B, B @ M)
    put(A, torch.linalg.inv(M) @ A)
    close(model(x), before, 1e-10)
    values = torch.linalg.svdvals(handle.update_of("layer").dense().float())
    assert values[3] < 1e-6 * values[0] and values[2] > 1e-3 * values[0]


def test_4_least_squares_reaches_the_closed_form():
    X, Y = randn(40, 8, seed=1) * torch.linspace(0.5, 1.5, 8, dtype=torch.float64), randn(40, 8, seed=2)
    layer = linear(8, 8, bias=False)
    W = layer.weight.detach().clone()
    P = torch.linalg.cholesky(X.t() @ X)
    E = (Y.t() - W @ X.t()) @ X @ torch.linalg.inv(X.t() @ X)
    U, S, Vh = torch.linalg.svd(E @ P)
    best = (U[:, :2] * S[:2]) @ Vh[:2] @ torch.linalg.inv(P)

    def loss_of(D):
        return float((X @ (W + D).t() - Y).square().sum())

    model, handle, p = adapted(lora(rank=2), layer)
    assert p.scale == 1.0
    # the closed form is a stationary point of the true problem: alternating least squares cannot leave it
    B, A = U[:, :2] * S[:2], Vh[:2] @ torch.linalg.inv(P)
    Z = X @ A.t()
    close(torch.linalg.lstsq(Z, Y - X @ W.t()).solution.t(), B, 1e-8)
    # and no better rank-2 map is found by training
    optimizer = torch.optim.LBFGS(list(p.roles().values()), lr=1, max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (model(X) - Y).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    reached, closed = loss_of(handle.update_of("layer").dense().detach()), loss_of(best)
    assert -1e-9 * closed <= reached - closed <= 1e-3 * closed


@pytest.mark.parametrize(("m", "n"), [(6, 4), (4, 6), (5, 5)])
def test_5_full_rank_reaches_anything(m, n):
    r, D = min(m, n), randn(m, n, seed=3)
    _, handle, p = adapted(lora(rank=r), linear(m, n))
    assert handle.trained_numbers == r * (m + n)
    eye = torch.eye(r, dtype=torch.float64)
    put(p.roles()["B"], D if n == r else eye)
    put(p.roles()["A"], eye if n == r else D)
    close(handle.update_of("layer").dense(), D, 1e-12)


def test_6_convolution_is_the_reshaped_update_and_the_chain_of_two():
    geometry = {"stride": 2, "padding": 1, "dilation": 2}
    layer, x = nn.Conv2d(3, 6, 3, **geometry).double(), randn(2, 3, 9, 8, seed=1)
    base = layer(x).detach()
    model, handle, p = adapted(lora(rank=2, alpha=3.0), layer)
    fill(handle)
    B, A = p.roles()["B"], p.roles()["A"]
    branch = model(x) - base
    dense = F.conv2d(x, 1.5 * (B @ A).reshape(6, 3, 3, 3), **geometry)
    chain = 1.5 * F.conv2d(F.conv2d(x, A.reshape(2, 3, 3, 3), **geometry), B.reshape(6, 2, 1, 1))
    close(branch, dense, 1e-10)
    close(chain, dense, 1e-10)
    close(handle.update_of("layer").dense(), 1.5 * B @ A, 1e-12)


def embedding(rows=11, width=5, **options):
    layer = nn.Embedding(rows, width, **options).double()
    put(layer.weight, randn(rows, width, seed=4))
    return layer


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_embedding_starts_at_the_table_with_the_zero_in_a(alpha):
    layer = embedding(200, 60)
    tokens = torch.tensor([[3, 0, 3], [7, 10, 1]])
    base = layer(tokens).detach()
    model, _, p = adapted(lora(rank=4, alpha=alpha), layer)
    A, B = p.roles()["A"], p.roles()["B"]
    assert torch.equal(model(tokens), base)
    assert A.shape == (4, 200) and not A.any() and B.shape == (60, 4)
    assert float(B.std()) == pytest.approx(1.0, rel=0.15) and abs(float(B.mean())) < 0.2  # N(0, 1)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 1, 3)])
def test_embedding_looks_up_columns_of_a(shape):
    layer = embedding()
    table = layer.weight.detach().clone()
    model, handle, p = adapted(lora(rank=2, alpha=3.0), layer)
    fill(handle)
    A, B = p.roles()["A"], p.roles()["B"]
    tokens = torch.tensor([3, 0, 3, 7, 10, 1]).reshape(shape)
    close(model(tokens), F.embedding(tokens, table) + 1.5 * F.embedding(tokens, A.t()) @ B.t(), 1e-12)
    close(handle.update_of("layer").dense(), 1.5 * B @ A, 1e-12)  # ΔTᵀ, as (m, n) = (width, rows)
    g = randn(*shape, 5, seed=3)
    (model(tokens) * g).sum().backward()
    G = torch.zeros(11, 5, dtype=torch.float64).index_add(0, tokens.flatten(), g.reshape(-1, 5)).t()  # dL/dT, transposed
    close(grad(A), 1.5 * B.t() @ G, 1e-12)
    close(grad(B), 1.5 * G @ A.t(), 1e-12)
    unseen = [k for k in range(11) if k not in tokens]
    assert unseen and not grad(A)[:, unseen].any()
    before = model(tokens).detach()
    handle.merge_()
    close(layer.weight, table + 1.5 * (B @ A).t(), 1e-12)
    close(model(tokens), before, 1e-12)
    handle.unmerge_()
    assert torch.equal(layer.weight, table)


def test_embedding_gives_the_padding_token_no_gradient():
    layer = embedding(padding_idx=3)
    model, handle, p = adapted(lora(rank=2), layer)
    fill(handle)
    tokens = torch.tensor([3, 0, 3, 7])
    model(tokens).sum().backward()
    assert not grad(p.roles()["A"])[:, 3].any() and grad(p.roles()["A"])[:, [0, 7]].any(0).all()


def reference_delta(B, A, shape, scale):
    """View of B A (out·k/groups, in·k) as (out, in/groups, k, k), entry by entry."""
    flat = (scale * B @ A).flatten()
    expected, position = torch.zeros(shape, dtype=torch.float64), 0
    for o in range(shape[0]):
        for i in range(shape[1]):
            for a in range(shape[2]):
                for b in range(shape[3]):
                    expected[o, i, a, b] = flat[position]
                    position += 1
    return expected


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1, "dilation": 2}])
def test_the_second_convolution_convention(groups, geometry):
    layer, x = nn.Conv2d(4, 6, 3, groups=groups, **geometry).double(), randn(2, 4, 9, 8, seed=1)
    W, bias, base = layer.weight.detach().clone(), layer.bias.detach().clone(), layer(x).detach()
    model, handle, p = adapted(lora(rank=2, alpha=3.0, conv="reference"), layer)
    A, B = p.roles()["A"], p.roles()["B"]
    assert A.shape == (2 * 3, 4 * 3) and B.shape == (6 // groups * 3, 2 * 3)
    assert torch.equal(model(x), base) and not B.any() and A.abs().max() > 0
    fill(handle)
    delta = reference_delta(B, A, (6, 4 // groups, 3, 3), 1.5)
    close(model(x), F.conv2d(x, W + delta, bias, groups=groups, **geometry), 1e-10)
    close(handle.update_of("layer").dense(), delta.reshape(6, -1), 1e-12)
    twin_B, twin_A = (tensor.detach().clone().requires_grad_() for tensor in (B, A))
    y = F.conv2d(x, W + 1.5 * (twin_B @ twin_A).view(W.shape), bias, groups=groups, **geometry)
    g = randn(*y.shape, seed=2)
    (y * g).sum().backward()
    (model(x) * g).sum().backward()
    close(grad(B), grad(twin_B), 1e-10)
    close(grad(A), grad(twin_A), 1e-10)
    handle.merge_()
    close(layer.weight, W + delta, 1e-12)


def test_the_second_convolution_convention_has_a_larger_rank():
    """As (out·k, in·k) the product has rank r·k; as the layer's matrix (out, in·k²) it has r·k², where that fits."""
    layer = nn.Conv2d(8, 32, 3).double()
    _, handle, p = adapted(lora(rank=1, conv="reference"), layer)
    fill(handle)
    assert int(torch.linalg.matrix_rank(p.roles()["B"] @ p.roles()["A"])) == 3
    assert int(torch.linalg.matrix_rank(handle.update_of("layer").dense())) == 9
    _, factor, _ = adapted(lora(rank=1), nn.Conv2d(8, 32, 3).double())
    fill(factor)
    assert int(torch.linalg.matrix_rank(factor.update_of("layer").dense())) == 1


def test_the_second_convolution_convention_needs_square_kernels():
    with pytest.raises(rw.RankwiseError, match=r"square|kernel"):
        adapted(lora(rank=1, conv="reference"), nn.Conv2d(4, 6, (3, 5)).double())


@pytest.mark.parametrize("fused", [(True, False, True), (True, True, True), (False, True), (False, False, False, True)])
def test_fused_projections(fused):
    blocks, enabled, width = len(fused), sum(fused), 4
    layer, x = linear(blocks * width, 5), randn(9, 5, seed=1)
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    base = layer(x).detach()
    model, handle, p = adapted(lora(rank=2, alpha=3.0, fused=fused), layer)
    A, B = p.roles()["fused_A"], p.roles()["fused_B"]
    assert A.shape == (2 * enabled, 5) and B.shape == (width * enabled, 2)
    assert handle.trained_numbers == 2 * enabled * (5 + width)
    assert torch.equal(model(x), base) and not B.any()
    assert 0 < float(A.abs().max()) <= 5**-0.5
    fill(handle)
    expected, k = torch.zeros(blocks * width, 5, dtype=torch.float64), 0
    for block, on in enumerate(fused):
        if on:
            rows = slice(block * width, (block + 1) * width)
            expected[rows] = 1.5 * B[k * width : (k + 1) * width] @ A[2 * k : 2 * k + 2]
            k += 1
    close(handle.update_of("layer").dense(), expected.detach(), 1e-12)
    close(model(x), F.linear(x, W + expected.detach(), b), 1e-12)
    G = backward(model, x, randn(9, blocks * width, seed=2))
    used = [block for block, on in enumerate(fused) if on]
    for k, block in enumerate(used):
        g, rows, ranks = G[block * width : (block + 1) * width], slice(k * width, (k + 1) * width), slice(2 * k, 2 * k + 2)
        close(grad(B)[rows], 1.5 * g @ A[ranks].t(), 1e-12)
        close(grad(A)[ranks], 1.5 * B[rows].t() @ g, 1e-12)
    before = model(x).detach()
    handle.merge_()
    close(layer.weight, W + expected.detach(), 1e-12)
    close(model(x), before, 1e-12)
    pair = handle.low_rank_of("layer")
    assert pair is not None and pair.rank <= 2 * enabled


@pytest.mark.parametrize("fused", [(True, False), (False, False, False)])
def test_fused_projections_that_do_not_fit_are_refused(fused):
    with pytest.raises(rw.RankwiseError):
        adapted(lora(rank=2, fused=fused), linear(15, 5))
