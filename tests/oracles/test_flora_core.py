"""Oracles of FLoRA's core space: ΔW = s·core ×₁ P_out ×₂ P_in ×₃ P_kernel…"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankwise as rw
from tests.oracles.tools import adapted, backward, close, fill, grad, linear, put, randn

flora_core = rw.catalog.flora_core
KERNEL = ("P_kernel0", "P_kernel1")
FACTORS = ("P_out", "P_in", *KERNEL)


def conv(out=8, channels=6, **geometry):
    layer = nn.Conv2d(channels, out, 3, **geometry).double()
    with torch.no_grad():
        for k, tensor in enumerate(layer.parameters()):
            tensor.copy_(randn(*tensor.shape, seed=30 + k))
    return layer


def tucker(core, *factors):
    """One contraction over all modes, as (out, in, kh, kw)."""
    return torch.einsum("abcd,oa,ib,hc,wd->oihw", core, *factors)


def built(rank=3, kernel_rank=2, scale=1.0, layer=None, generic=True):
    model, handle, p = adapted(flora_core(rank=rank, kernel_rank=kernel_rank, scale=scale), layer or conv())
    if generic:
        fill(handle)
    roles = p.roles()
    return model, handle, roles["core"], [roles[name] for name in FACTORS]


def unequal():
    """J = (4, 3, 2, 2) as in the specification: a core of equal ranks with one slice of the input mode closed."""
    model, handle, core, factors = built(rank=4)
    with torch.no_grad():
        core[:, 3] = 0
    return model, handle, core, factors


def tensor_of(handle):
    return handle.update_of("layer").dense().detach().reshape(8, 6, 3, 3)


@pytest.mark.parametrize("make", [built, unequal])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_1_update_is_one_einsum(make, scale):
    _, handle, core, factors = make() if make is unequal else make(scale=scale)
    factor = 1.0 if make is unequal else scale
    close(tensor_of(handle), (factor * tucker(core, *factors)).detach(), 1e-12)
    stepwise = core  # mode products one after the other; each moves its mode to the end, so four restore the order
    for P in factors:
        stepwise = torch.tensordot(stepwise, P, dims=([0], [1]))
    close(tensor_of(handle), (factor * stepwise).detach(), 1e-12)


def test_2_mode_ranks():
    _, handle, *_ = unequal()
    D = tensor_of(handle)
    found = [int(torch.linalg.matrix_rank(D.movedim(k, 0).reshape(D.shape[k], -1), rtol=1e-10)) for k in range(4)]
    assert found == [4, 3, 2, 2]


@pytest.mark.parametrize("mode", range(4))
def test_2_gauge_of_every_mode(mode):
    _, handle, core, factors = built()
    before, size = tensor_of(handle), core.shape[mode]
    M = randn(size, size, seed=9)
    put(core, torch.tensordot(core.detach(), M, dims=([mode], [1])).movedim(-1, mode))
    put(factors[mode], factors[mode] @ torch.linalg.inv(M))
    close(tensor_of(handle), before, 1e-10)


def test_3_start_and_first_gradients():
    layer, x = conv(), randn(2, 6, 7, 5, seed=1)
    base = layer(x).detach()
    model, _, core, factors = built(layer=layer, scale=4.0, generic=False)
    assert torch.equal(model(x), base)
    g = randn(*base.shape, seed=2)
    (model(x) * g).sum().backward()
    W = layer.weight.detach().clone().requires_grad_()
    (F.conv2d(x, W) * g).sum().backward()
    for P in factors:
        assert torch.equal(grad(P), torch.zeros_like(P))
    close(grad(core), 4 * torch.einsum("oihw,oa,ib,hc,wd->abcd", W.grad, *[P.detach() for P in factors]), 1e-10)
    for P in factors:  # kaiming-normal with a = √3 and fan_in J: N(0, 1/(2 J))
        assert float(P.detach().abs().max()) < 5 / math.sqrt(2 * P.shape[1])


def test_3_spread_of_the_factors():
    _, _, _, factors = built(rank=16, layer=nn.Conv2d(128, 128, 3).double(), generic=False)
    for P in factors[:2]:  # 2048 numbers: one deviation of the spread is 1.6 %
        assert float(P.detach().std()) == pytest.approx(1 / math.sqrt(32), rel=0.08)


def test_3_count():
    def trained(recipe):
        return adapted(recipe, nn.Conv2d(128, 128, 7, bias=False))[1].trained_numbers

    assert trained(flora_core(rank=16, kernel_rank=2)) == 1024 + 2048 + 2048 + 14 + 14 == 5148
    assert trained(rw.catalog.lora(rank=16)) == 16 * (128 + 6272) == 102_400


def test_4_identity_core_is_lora():
    layer, x = linear(7, 5), randn(9, 5, seed=1)
    base = layer(x).detach()
    model, handle, p = adapted(flora_core(rank=3, scale=2.0), layer)
    fill(handle)
    roles = p.roles()
    put(roles["core"], torch.eye(3, dtype=torch.float64))
    plain, _, q = adapted(rw.catalog.lora(rank=3, alpha=6.0), linear(7, 5))
    put(q.roles()["B"], roles["P_out"])
    put(q.roles()["A"], roles["P_in"].t())
    close(model(x), plain(x), 1e-12)
    assert (model(x) - base).norm() > 0.1
    g = randn(9, 7, seed=2)
    backward(model, x, g)
    backward(plain, x, g)
    close(grad(roles["P_out"]), grad(q.roles()["B"]), 1e-10)
    close(grad(roles["P_in"]), grad(q.roles()["A"]).t(), 1e-10)


def test_5_full_kernel_modes_contain_flattened_lora():
    # J_in = in = 6 asks for rank 6; the two last output directions are closed, so that the rank is 4.
    _, handle, core, (P_out, P_in, *kernel) = built(rank=6, kernel_rank=3)
    B, A = randn(8, 4, seed=11), randn(4, 6 * 9, seed=12)
    with torch.no_grad():
        P_out.zero_()[:, :4] = B
        P_in.copy_(torch.eye(6))
        for P in kernel:
            P.copy_(torch.eye(3))
        core.zero_()[:4] = A.reshape(4, 6, 3, 3)
    close(handle.update_of("layer").dense(), B @ A, 1e-12)


def test_5_one_direction_per_kernel_mode_is_separable():
    _, handle, *_ = built(kernel_rank=1)
    kernels = tensor_of(handle).reshape(48, 9)
    values = torch.linalg.svdvals(kernels)
    assert values[1] < 1e-12 * values[0]  # every kernel is a multiple of one kernel
    spatial = torch.linalg.svdvals(kernels[0].reshape(3, 3))
    assert spatial[1] < 1e-12 * spatial[0]  # which is an outer product


@pytest.mark.parametrize("groups", [1, 2])
def test_6_chain_of_convolutions_equals_the_dense_one(groups):
    geometry = {"stride": 2, "padding": 1, "dilation": 2}
    layer, x = conv(groups=groups, **geometry), randn(2, 6, 9, 8, seed=1)
    base = layer(x).detach()
    model, handle, core, (P_out, P_in, P_h, P_w) = built(layer=layer, scale=2.0)
    assert P_in.shape[0] == 6 // groups
    branch, dense = model(x) - base, 2 * tucker(core, P_out, P_in, P_h, P_w)
    close(branch, F.conv2d(x, dense, groups=groups, **geometry), 1e-10)
    if groups == 1:
        z = F.conv2d(x, P_in.t()[:, :, None, None])
        z = F.conv2d(z, torch.einsum("abcd,hc,wd->abhw", core, P_h, P_w), **geometry)
        close(branch, 2 * F.conv2d(z, P_out[:, :, None, None]), 1e-10)
    before = model(x).detach()
    handle.merge_()
    close(model(x), before, 1e-10)
