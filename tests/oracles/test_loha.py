"""Oracles of LoHa: W' = W + s·(B₁ A₁) ∘ (B₂ A₂), s = α/r, an exact LoRA of rank r²; the Tucker form on convolutions.

A 1 x 1 convolution is trained in the flat form, so oracle 6 is tested on a larger kernel of which one tap is alive.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankwise as rw
from tests.oracles.tools import DOUBLE, One, adapted, backward, close, fill, grad, linear, put, randn

loha = rw.catalog.loha
M, N, R, ALPHA = 12, 8, 3, 5.0
SCALE = ALPHA / R
FLAT = ("B1", "A1", "B2", "A2")


def product(roles, scale=SCALE):
    """The update from its definition, differentiable."""
    return scale * (roles["B1"] @ roles["A1"]) * (roles["B2"] @ roles["A2"])


def tucker(T, P, Q):
    """Σ_ab T[a, b, …] P[a, o] Q[b, i]: (out, in, kernel…)."""
    return torch.einsum("ab...,ao,bi->oi...", T, P, Q)


def generic(layer=None, *, size=1.0, **options):
    """(model, handle, roles, W) at a generic point."""
    layer = linear(M, N) if layer is None else layer
    W = layer.weight.detach().clone()
    model, handle, p = adapted(loha(**{"rank": R, "alpha": ALPHA, **options}), layer)
    fill(handle, size=size)
    return model, handle, p.roles(), W


def reference(layer, roles, names, **options):
    """PEFT's update for the same trained tensors."""
    peft = pytest.importorskip("peft")
    model = One(layer)
    peft.inject_adapter_in_model(peft.LoHaConfig(r=R, alpha=ALPHA, target_modules=["layer"], **options), model)
    for name, role in names.items():
        put(getattr(model.layer, name)["default"], roles[role])
    return model.layer.get_delta_weight("default").detach()


def test_1_start():
    layer, x = linear(M, N), randn(9, N, seed=1)
    base = layer(x).detach()
    model, handle, p = adapted(loha(rank=R, alpha=ALPHA), layer)
    roles = p.roles()
    assert set(roles) == set(FLAT)
    assert {role: tuple(tensor.shape) for role, tensor in roles.items()} == dict(
        zip(FLAT, [(M, R), (R, N), (M, R), (R, N)], strict=True)
    )
    assert torch.equal(handle.update_of("layer").dense(), torch.zeros(M, N, dtype=DOUBLE))
    assert torch.equal(model(x), base)
    alive = [role for role in FLAT if roles[role].abs().max() > 0]
    assert len(alive) == 3  # one factor alone is zero, so that it can leave
    backward(model, x, randn(9, M, seed=2))
    (dead,) = set(FLAT) - set(alive)
    assert grad(roles[dead]).abs().min() > 0
    assert handle.trained_numbers == 2 * R * (M + N)


def test_1_default_scale_is_one():
    _, handle, p = adapted(loha(rank=R), linear(M, N))
    fill(handle)
    close(handle.update_of("layer").dense(), product(p.roles(), 1.0), 1e-12)


def test_1_equals_peft():
    _, handle, roles, _ = generic()
    names = {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"}
    close(handle.update_of("layer").dense(), reference(linear(M, N), roles, names), 6e-8)  # it keeps s in float32
    close(handle.update_of("layer").dense(), product(roles), 1e-12)


def test_1_tucker_convolution_equals_peft():
    layer, x = nn.Conv2d(4, 6, 3, padding=1, stride=2).to(DOUBLE), randn(2, 4, 7, 7, seed=1)
    model, handle, roles, W = generic(layer, tucker=True)
    shapes = {"P1": (R, 6), "Q1": (R, 4), "T1": (R, R, 3, 3)}
    shapes |= {name.replace("1", "2"): shape for name, shape in shapes.items()}
    assert {role: tuple(tensor.shape) for role, tensor in roles.items()} == shapes
    names = {"hada_w1_a": "P1", "hada_w1_b": "Q1", "hada_t1": "T1", "hada_w2_a": "P2", "hada_w2_b": "Q2", "hada_t2": "T2"}
    other = reference(nn.Conv2d(4, 6, 3, padding=1, stride=2).to(DOUBLE), roles, names, use_effective_conv2d=True)
    delta = SCALE * tucker(roles["T1"], roles["P1"], roles["Q1"]) * tucker(roles["T2"], roles["P2"], roles["Q2"])
    close(delta, other, 6e-8)  # it keeps s in float32
    close(handle.update_of("layer").dense(), delta.flatten(1), 1e-12)
    close(model(x), F.conv2d(x, W + delta, model.layer.bias, padding=1, stride=2), 1e-12)


@pytest.mark.parametrize("with_tucker", [False, True])
def test_1_convolution_starts_at_the_base(with_tucker):
    layer, x = nn.Conv2d(4, 6, 3, groups=2).to(DOUBLE), randn(2, 4, 7, 7, seed=1)
    base = layer(x).detach()
    model, handle, p = adapted(loha(rank=R, alpha=ALPHA, tucker=with_tucker), layer)
    assert torch.equal(model(x), base)
    fill(handle)
    roles = p.roles()
    if with_tucker:
        assert roles["Q1"].shape == (R, 2)  # in / groups
        delta = SCALE * tucker(roles["T1"], roles["P1"], roles["Q1"]) * tucker(roles["T2"], roles["P2"], roles["Q2"])
    else:
        delta = product(roles).reshape(6, 2, 3, 3)
    close(model(x), F.conv2d(x, layer.weight + delta, layer.bias, groups=2), 1e-12)


def test_2_exact_lora_of_the_squared_rank():
    _, handle, roles, _ = generic(linear(12, 12))
    delta, pair = product(roles).detach(), handle.low_rank_of("layer")
    assert pair is not None and pair.rank == R**2
    close(pair.dense(), delta, 1e-12)
    # the row-wise Khatri-Rao identity itself
    Bk = (roles["B1"][:, :, None] * roles["B2"][:, None, :]).flatten(1)
    Ak = (roles["A1"][:, None, :] * roles["A2"][None, :, :]).flatten(0, 1)
    close(SCALE * Bk @ Ak, delta, 1e-12)
    assert torch.linalg.matrix_rank(handle.update_of("layer").dense().detach(), rtol=1e-10) == 9


def test_2_rank_is_limited_by_the_sides():
    _, handle, _, _ = generic(linear(12, 7))
    assert torch.linalg.matrix_rank(handle.update_of("layer").dense().detach(), rtol=1e-10) == 7


def test_3_rank_one():
    _, handle, roles, _ = generic(rank=1)
    b, a = roles["B1"] * roles["B2"], roles["A1"] * roles["A2"]
    close(handle.update_of("layer").dense(), ALPHA * b @ a, 1e-12)


def test_3_with_a_second_product_of_ones_it_is_lora():
    x = randn(9, N, seed=1)
    model, _, roles, _ = generic()
    put(roles["B2"], 1.0)
    put(roles["A2"], torch.eye(R, 1, dtype=DOUBLE).expand(R, N))  # first row 1, the rest 0
    other, _, q = adapted(rw.catalog.lora(rank=R, alpha=ALPHA), linear(M, N))
    put(q.roles()["B"], roles["B1"])
    put(q.roles()["A"], roles["A1"])
    close(model(x), other(x), 1e-12)


@pytest.mark.parametrize("tokens", [1, 11, 400])
def test_4_gradients(tokens):
    x, g = randn(tokens, N, seed=1), randn(tokens, M, seed=2)
    model, _, roles, W = generic()
    x.requires_grad_(True)
    backward(model, x, g)
    copies = {role: tensor.detach().clone().requires_grad_(True) for role, tensor in roles.items()}
    plain = x.detach().clone().requires_grad_(True)
    (F.linear(plain, W + product(copies), model.layer.bias) * g).sum().backward()
    for role in FLAT:
        close(grad(roles[role]), grad(copies[role]), 1e-10)
    close(grad(x), grad(plain), 1e-10)


def test_4_gradients_from_their_formulas():
    x, g = randn(11, N, seed=1), randn(11, M, seed=2)
    model, _, roles, _ = generic()
    G = SCALE * backward(model, x, g)
    for one, two in (("1", "2"), ("2", "1")):
        masked = G * (roles[f"B{two}"] @ roles[f"A{two}"]).detach()
        close(grad(roles[f"B{one}"]), masked @ roles[f"A{one}"].detach().t(), 1e-10)
        close(grad(roles[f"A{one}"]), roles[f"B{one}"].detach().t() @ masked, 1e-10)


def test_5_gauge():
    x = randn(9, N, seed=1)
    model, _, roles, _ = generic()
    before = model(x).detach()
    put(roles["B1"], 7.0 * roles["B1"])
    put(roles["B2"], roles["B2"] / 7.0)
    close(model(x), before, 1e-12)
    flip = torch.tensor([1.0, -1.0, 1.0], dtype=DOUBLE)
    put(roles["B1"], roles["B1"] * flip)
    assert (model(x) - before).norm() > 0.1
    put(roles["A1"], flip[:, None] * roles["A1"])
    close(model(x), before, 1e-12)


def test_6_tucker_with_one_live_tap_is_the_flat_form():
    layer = nn.Conv2d(4, 6, 3, bias=False).to(DOUBLE)
    _, handle, roles, _ = generic(layer, tucker=True)
    for role in ("T1", "T2"):
        tap = roles[role].detach()[:, :, 1, 1].clone()
        put(roles[role], 0.0)
        put(roles[role][:, :, 1, 1], tap)
    found = handle.update_of("layer").dense().detach().reshape(6, 4, 3, 3)
    small, other, flat = adapted(loha(rank=R, alpha=ALPHA, tucker=True), nn.Conv2d(4, 6, 1, bias=False).to(DOUBLE))
    assert set(flat.roles()) == set(FLAT)  # no Tucker form on a 1 x 1 kernel
    for k in "12":
        put(flat.roles()[f"B{k}"], roles[f"P{k}"].t() @ roles[f"T{k}"][:, :, 1, 1])
        put(flat.roles()[f"A{k}"], roles[f"Q{k}"])
    close(found[:, :, 1, 1], other.update_of("layer").dense(), 1e-12)
    assert found.norm() == pytest.approx(float(found[:, :, 1, 1].norm()))
    x = randn(2, 4, 5, 5, seed=1)
    close(small(x), F.conv2d(x, small.layer.weight + found[:, :, 1:2, 1:2]), 1e-12)


@pytest.mark.parametrize("tokens", [0, 1, 2, 13, 150, 700])
def test_7_every_route_gives_the_same_output(tokens):
    # r² (m + n) < m n, so few tokens may take the Khatri-Rao factors and many the dense update.
    m, n = 40, 48
    model, handle, roles, W = generic(linear(m, n), rank=2)
    x = randn(tokens, n, seed=1)
    delta = ALPHA / 2 * (roles["B1"] @ roles["A1"]) * (roles["B2"] @ roles["A2"])
    expected = F.linear(x, W + delta, model.layer.bias)
    y = model(x)
    assert y.shape == (tokens, m)
    close(y, expected, 1e-10)
    with torch.no_grad():
        close(model.eval()(x), expected, 1e-10)
    close(handle.update_of("layer").dense(), delta, 1e-12)


def test_merging():
    x = randn(9, N, seed=1)
    model, handle, _, W = generic()
    before = model(x).detach()
    handle.merge_()
    close(F.linear(x, model.layer.weight, model.layer.bias), before, 1e-12)
    handle.unmerge_()
    assert torch.equal(model.layer.weight, W)
