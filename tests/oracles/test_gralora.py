"""Oracles of GraLoRA: k x k blocks of W with a LoRA of rank q = r/k each, at the numbers and operations of one LoRA of rank r.

block_A is (k, n/k, r), block_B (k, r, m/k); s = α / (r + hybrid rank). Costs are tested by counters.
"""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import rankwise as rw
from tests.oracles.tools import DOUBLE, One, adapted, backward, close, fill, grad, linear, put, randn

gralora = rw.catalog.gralora
M, N, R, BLOCKS, ALPHA = 12, 8, 4, 2, 6.0


def count_flops(function):
    """Floating-point operations of the matrix products of a call, products added in place included."""

    def product(total, left, right, *, out_shape=None, **_):
        return 2 * left[-2] * left[-1] * right[-1] * (left[0] if len(left) == 3 else 1)

    in_place = {torch.ops.aten.addmm_: product, torch.ops.aten.baddbmm_: product}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, torch.no_grad():
        result = function()
    return counter.get_total_flops(), result


def update(roles, scale):
    """The update from its definition, block by block."""
    A, B = roles["block_A"], roles["block_B"]
    k, wide, r = A.shape
    tall, q = B.shape[2], r // k
    rows = []
    for j in range(k):  # outputs
        row = [(A[i][:, j * q : (j + 1) * q] @ B[j][i * q : (i + 1) * q, :]).t() for i in range(k)]
        assert all(block.shape == (tall, wide) for block in row)
        rows.append(torch.cat(row, 1))
    delta = torch.cat(rows)
    return scale * (delta + roles["B"] @ roles["A"] if "B" in roles else delta)


def generic(m=M, n=N, *, rank=R, blocks=BLOCKS, **options):
    """(model, handle, roles, W) at a generic point; s = α / (r + hybrid rank)."""
    layer = linear(m, n)
    W = layer.weight.detach().clone()
    model, handle, p = adapted(gralora(rank=rank, alpha=ALPHA, blocks=blocks, **options), layer)
    fill(handle)
    return model, handle, p.roles(), W


@pytest.mark.parametrize("hybrid", [0, 2])
def test_start(hybrid):
    layer, x, g = linear(M, N), randn(9, N, seed=1), randn(9, M, seed=2)
    base = layer(x).detach()
    model, _, p = adapted(gralora(rank=R, alpha=ALPHA, blocks=BLOCKS, hybrid_rank=hybrid), layer)
    roles = p.roles()
    assert torch.equal(model(x), base)
    shapes = {"block_A": (2, 4, 4), "block_B": (2, 4, 6)} | ({"A": (2, N), "B": (M, 2)} if hybrid else {})
    assert {role: tuple(tensor.shape) for role, tensor in roles.items()} == shapes
    assert not roles["block_B"].any() and roles["block_A"].abs().max() <= 1 / 4**0.5  # U(±1/√(n/k))
    assert roles["block_A"].abs().max() > 0.8 / 4**0.5
    backward(model, x, g)
    assert grad(roles["block_B"]).abs().min() > 0


@pytest.mark.parametrize("hybrid", [0, 2])
@pytest.mark.parametrize("shape", [(9,), (2, 3), (2, 2, 3), (0,), ()])
def test_1_block_formula(shape, hybrid):
    x = randn(*shape, N, seed=1)
    model, handle, roles, W = generic(hybrid_rank=hybrid)
    delta = update(roles, ALPHA / (R + hybrid))
    close(handle.update_of("layer").dense(), delta, 1e-12)
    close(model(x), F.linear(x, W + delta, model.layer.bias), 1e-12)


@pytest.mark.parametrize("hybrid", [0, 2])
def test_1_equals_peft(hybrid):
    peft = pytest.importorskip("peft")
    x = randn(9, N, seed=1)
    model, handle, roles, _ = generic(hybrid_rank=hybrid)
    other = One(linear(M, N))
    config = peft.GraloraConfig(r=R, alpha=ALPHA, gralora_k=BLOCKS, hybrid_r=hybrid, target_modules=["layer"])
    peft.inject_adapter_in_model(config, other)
    put(other.layer.gralora_A["default"], roles["block_A"])
    put(other.layer.gralora_B["default"], roles["block_B"])
    if hybrid:
        put(other.layer.gralora_A_general["default"].weight, roles["A"])
        put(other.layer.gralora_B_general["default"].weight, roles["B"])
    close(model(x), other(x), 1.4e-7)
    close(handle.update_of("layer").dense(), other.layer.get_delta_weight("default").detach(), 4e-8)


def test_2_one_block_is_lora():
    x = randn(9, N, seed=1)
    model, _, roles, _ = generic(blocks=1)
    other, _, q = adapted(rw.catalog.lora(rank=R, alpha=ALPHA), linear(M, N))
    put(q.roles()["B"], roles["block_B"][0].t())
    put(q.roles()["A"], roles["block_A"][0].t())
    close(model(x), other(x), 1e-12)


@pytest.mark.parametrize(("m", "n", "rank", "blocks"), [(24, 16, 4, 2), (12, 8, 4, 4), (20, 12, 2, 2), (12, 12, 6, 3)])
def test_3_rank(m, n, rank, blocks):
    _, handle, _, _ = generic(m, n, rank=rank, blocks=blocks)
    delta = handle.update_of("layer").dense().detach()
    assert torch.linalg.matrix_rank(delta, rtol=1e-10) == min(blocks * rank, m, n)
    tiles = delta.reshape(blocks, m // blocks, blocks, n // blocks).transpose(1, 2).flatten(0, 1)
    assert torch.linalg.matrix_rank(tiles, rtol=1e-10).tolist() == [rank // blocks] * blocks**2


def test_4_as_many_blocks_as_ranks_leave_rank_one_each():
    _, handle, _, _ = generic(rank=4, blocks=4)
    tiles = handle.update_of("layer").dense().detach().reshape(4, 3, 4, 2).transpose(1, 2).flatten(0, 1)
    assert torch.linalg.matrix_rank(tiles, rtol=1e-10).tolist() == [1] * 16


@pytest.mark.parametrize("hybrid", [0, 2])
def test_5_export_as_lora(hybrid):
    _, handle, roles, _ = generic(24, 16, hybrid_rank=hybrid)
    pair = handle.low_rank_of("layer")
    assert pair is not None and pair.rank <= BLOCKS * R + hybrid
    close(pair.dense(), update(roles, ALPHA / (R + hybrid)), 1e-12)


def test_6_outliers_stay_local():
    x, g = randn(9, N, seed=1), randn(9, M, seed=2)
    x[:, :4] = 0.0  # the first block of inputs
    model, _, roles, _ = generic()
    backward(model, x, g)
    assert torch.equal(grad(roles["block_A"])[0], torch.zeros(4, R, dtype=DOUBLE))
    assert grad(roles["block_A"])[1].abs().min() > 0
    before = model(x).detach()
    put(roles["block_A"][0], randn(4, R, seed=9))  # feeds nothing
    assert torch.equal(model(x), before)
    put(roles["block_A"][1], randn(4, R, seed=9))
    assert (model(x) - before).norm() > 0.1
    # an outlier in one block reaches the other blocks' gradient not at all, where LoRA's whole B would see it
    loud = x.clone()
    loud[:, 0] = 1e3
    quiet = grad(roles["block_A"])[1].clone()
    model, _, roles, _ = generic()
    backward(model, loud, g)
    close(grad(roles["block_A"])[1], quiet, 1e-12)


def test_7_counts_and_operations_are_those_of_lora():
    tokens, x = 50, randn(50, N, seed=1)
    model, handle, _, _ = generic()
    other, reference, _ = adapted(rw.catalog.lora(rank=R), linear(M, N))
    assert handle.trained_numbers == reference.trained_numbers == R * (M + N)
    assert generic(hybrid_rank=2)[1].trained_numbers == (R + 2) * (M + N)
    for network in (model, other):
        assert count_flops(lambda network=network: network(x))[0] == 2 * tokens * (M * N + R * (M + N))


@pytest.mark.parametrize(
    ("m", "n", "rank", "blocks", "valid"),
    [(12, 8, 4, 3, (2, 4)), (10, 8, 4, 4, (2,)), (12, 8, 6, 4, (2,))],
)
def test_8_blocks_that_do_not_divide_are_refused_with_those_that_do(m, n, rank, blocks, valid):
    with pytest.raises(rw.RankwiseError) as caught:
        generic(m, n, rank=rank, blocks=blocks)
    assert all(re.search(rf"\b{k}\b", str(caught.value)) for k in valid)  # divisors of m, n and r


def test_gradients():
    x, g = randn(11, N, seed=1), randn(11, M, seed=2)
    model, _, roles, W = generic(hybrid_rank=2)
    x.requires_grad_(True)
    backward(model, x, g)
    copies = {role: tensor.detach().clone().requires_grad_(True) for role, tensor in roles.items()}
    plain = x.detach().clone().requires_grad_(True)
    (F.linear(plain, W + update(copies, ALPHA / (R + 2)), model.layer.bias) * g).sum().backward()
    for role, tensor in roles.items():
        close(grad(tensor), grad(copies[role]), 1e-10)
    close(grad(x), grad(plain), 1e-10)


def test_merging():
    x = randn(9, N, seed=1)
    model, handle, _, W = generic()
    before = model(x).detach()
    handle.merge_()
    close(F.linear(x, model.layer.weight, model.layer.bias), before, 1e-12)
    handle.unmerge_()
    assert torch.equal(model.layer.weight, W)
