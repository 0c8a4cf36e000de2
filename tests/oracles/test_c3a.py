"""Oracles of C3A: W' = W + a block-circulant update, entry (i b + p, j b + q) = w[i, j, (q - p) mod b] / n."""

import re

import pytest
import torch
import torch.nn.functional as F

import rankwise as rw
from tests.oracles.tools import DOUBLE, One, adapted, backward, close, fill, grad, linear, put, randn

c3a = rw.catalog.c3a
M, N, BLOCK = 12, 8, 4


def circulant(kernel, sign=1):
    """The update from its definition, entry by entry and differentiable."""
    rows, columns, b = kernel.shape
    p, q = torch.arange(b)[:, None], torch.arange(b)[None, :]
    blocks = kernel[:, :, sign * (q - p) % b]  # (i, j, p, q)
    return blocks.permute(0, 2, 1, 3).reshape(rows * b, columns * b) / (columns * b)


def generic(m=M, n=N, block=BLOCK, *, dtype=DOUBLE):
    """(model, handle, kernel, W) at a generic point."""
    layer = linear(m, n, dtype=dtype)
    W = layer.weight.detach().clone()
    model, handle, p = adapted(c3a(block=block), layer)
    fill(handle)
    return model, handle, p.roles()["kernel"], W


def test_1_formula():
    x = randn(2, 3, N, seed=1)
    model, handle, kernel, W = generic()
    assert kernel.shape == (M // BLOCK, N // BLOCK, BLOCK) and handle.trained_numbers == M * N // BLOCK
    delta = torch.zeros(M, N, dtype=DOUBLE)
    for o in range(M):
        for i in range(N):
            delta[o, i] = kernel[o // BLOCK, i // BLOCK, (i % BLOCK - o % BLOCK) % BLOCK] / N
    close(circulant(kernel), delta, 1e-15)
    close(handle.update_of("layer").dense(), delta, 1e-12)
    close(model(x), F.linear(x, W + delta, model.layer.bias), 1e-12)
    assert (circulant(kernel, -1) - delta).norm() > 0.1 * delta.norm()  # (p - q) is another map


def test_1_equals_peft():
    peft = pytest.importorskip("peft")
    x = randn(9, N, seed=1)
    model, handle, kernel, _ = generic()
    other = One(linear(M, N))
    peft.inject_adapter_in_model(peft.C3AConfig(block_size=BLOCK, target_modules=["layer"]), other)
    put(other.layer.c3a_kernel["default"], kernel)
    rounding = torch.finfo(torch.float32).eps  # it transforms in float32
    close(model(x), other(x), rounding)
    close(handle.update_of("layer").dense(), other.layer.get_delta_weight("default").detach(), rounding)


def test_2_blocks_of_size_one_are_dense():
    _, handle, kernel, _ = generic(block=1)
    close(handle.update_of("layer").dense(), kernel[:, :, 0] / N, 1e-12)


def test_2_one_block_commutes_with_the_cyclic_shift():
    _, handle, _, _ = generic(6, 6, 6)
    delta, shift = handle.update_of("layer").dense().detach(), torch.eye(6, dtype=DOUBLE).roll(1, 0)
    close(delta @ shift, shift @ delta, 1e-12)
    assert delta[0].unique().numel() == 6


@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize(
    ("m", "n", "block"), [(M, N, 4), (15, 10, 5), (14, 21, 7), (6, 6, 6), (64, 32, 32), (9, 9, 9), (4, 6, 2)]
)
def test_3_fft_is_the_dense_map(m, n, block, tokens):
    for dtype, tolerance in ((DOUBLE, 1e-12), (torch.float32, 1e-6)):
        x = randn(tokens, n, seed=1, dtype=dtype)
        model, handle, kernel, W = generic(m, n, block, dtype=dtype)
        delta = circulant(kernel)
        close(model(x), F.linear(x, W + delta, model.layer.bias), tolerance)
        close(handle.update_of("layer").dense(), delta, tolerance)


def test_4_eigenvalues_are_the_fourier_transform():
    _, handle, kernel, _ = generic(7, 7, 7)
    found = torch.linalg.eigvals(handle.update_of("layer").dense().detach())
    expected = torch.fft.fft(kernel[0, 0].detach()) / 7
    distances = (found[:, None] - expected[None, :]).abs()
    assert distances.min(0).values.max() < 1e-12 and distances.min(1).values.max() < 1e-12


def test_5_starts_at_the_base_to_the_bit():
    for dtype in (DOUBLE, torch.float32):
        layer, x = linear(M, N, dtype=dtype), randn(9, N, seed=1, dtype=dtype)
        base = layer(x).detach()
        model, _, p = adapted(c3a(block=BLOCK), layer)
        assert torch.equal(p.roles()["kernel"], torch.zeros(3, 2, 4, dtype=dtype))
        assert torch.equal(model(x), base)


def test_6_two_active_adapters_read_the_same_input():
    model, x = One(linear(M, N)), randn(9, N, seed=1)
    W, bias = model.layer.weight.detach().clone(), model.layer.bias.detach()
    handles = [rw.adapt_(model, c3a(block=b), where=["layer"], name=name) for name, b in (("one", 4), ("two", 2))]
    deltas = []
    for k, handle in enumerate(handles):
        fill(handle, seed=10 + k)
        deltas.append(circulant(handle.parameterization("layer").roles()["kernel"].detach()))
    rw.activate_(model, {"one": 1.0, "two": 1.0})
    y = model(x).detach()
    close(y, F.linear(x, W + deltas[0] + deltas[1], bias), 1e-12)
    for handle in handles:
        handle.merge_()
    close(F.linear(x, model.layer.weight, bias), y, 1e-12)
    close(model(x), y, 1e-12)


@pytest.mark.parametrize(("m", "n", "block"), [(M, N, 4), (15, 10, 5), (4, 6, 1), (6, 6, 6)])
def test_7_gradients(m, n, block):
    x, g = randn(11, n, seed=1), randn(11, m, seed=2)
    model, _, kernel, W = generic(m, n, block)
    x.requires_grad_(True)
    backward(model, x, g)
    copy, plain = kernel.detach().clone().requires_grad_(True), x.detach().clone().requires_grad_(True)
    (F.linear(plain, W + circulant(copy), model.layer.bias) * g).sum().backward()
    close(grad(kernel), grad(copy), 1e-10)
    close(grad(x), grad(plain), 1e-10)


@pytest.mark.parametrize("block", [4, 2])
def test_8_rolling_every_input_block_rolls_every_output_block(block):
    x = randn(9, N, seed=1)
    model, _, _, W = generic(block=block)

    def rolled(rows, shift):
        return rows.reshape(len(rows), -1, block).roll(shift, -1).reshape(rows.shape)

    def branch(rows):
        return model(rows) - F.linear(rows, W, model.layer.bias)

    for shift in range(1, block):
        close(branch(rolled(x, shift)), rolled(branch(x), shift), 1e-12)


def test_blocks_that_do_not_divide_are_refused_with_those_that_do():
    with pytest.raises(rw.RankwiseError) as caught:
        adapted(c3a(block=5), linear(M, 18))
    message = str(caught.value)
    assert all(re.search(rf"\b{b}\b", message) for b in (2, 3, 6))  # the divisors of gcd(12, 18)


def test_merging():
    x = randn(9, N, seed=1)
    model, handle, _, W = generic()
    before = model(x).detach()
    handle.merge_()
    close(F.linear(x, model.layer.weight, model.layer.bias), before, 1e-12)
    handle.unmerge_()
    assert torch.equal(model.layer.weight, W)
