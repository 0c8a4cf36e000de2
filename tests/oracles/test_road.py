"""Oracles of RoAd: y = R (W x + b), R rotating and scaling pairs of outputs; group size g pairs p with p + g/2 in a group."""

import pytest
import torch
import torch.nn.functional as F

import rankwise as rw
from tests.oracles.tools import One, adapted, backward, central_difference, close, fill, grad, linear, put, randn

road = rw.catalog.road
M, N, G = 12, 5, 6


def pairs(m, g):
    """(a, c) of every pair, in the order of the angles of variant 1."""
    return [(first + p, first + p + g // 2) for first in range(0, m, g) for p in range(g // 2)]


def rotation(angle, gain, variant, m, g):
    """R (m, m), entry by entry."""
    rows = []
    zero = torch.zeros((), dtype=angle.dtype)
    for k, (a, c) in enumerate(pairs(m, g)):
        if variant == 1:
            cos = {a: gain[k] * torch.cos(angle[k]), c: gain[k] * torch.cos(angle[k])}
            sin = {a: gain[k] * torch.sin(angle[k]), c: gain[k] * torch.sin(angle[k])}
        elif variant == 2:
            cos = {i: gain[i] * torch.cos(angle[i]) for i in (a, c)}
            sin = {i: gain[i] * torch.sin(angle[i]) for i in (a, c)}
        else:  # laid out (m/g, 2, g): in each group first the set of the cosines, then that of the sines
            t, s = angle.reshape(m // g, 2, g), gain.reshape(m // g, 2, g)
            cos = {i: s[i // g, 0, i % g] * torch.cos(t[i // g, 0, i % g]) for i in (a, c)}
            sin = {i: s[i // g, 1, i % g] * torch.sin(t[i // g, 1, i % g]) for i in (a, c)}
        rows += [(a, {a: cos[a], c: -sin[a]}), (c, {a: sin[c], c: cos[c]})]
    ordered = dict(rows)
    return torch.stack([torch.stack([ordered[i].get(j, zero) for j in range(m)]) for i in range(m)])


def begin(variant=1, group=G, layer=None):
    model, handle, p = adapted(road(variant=variant, group=group), layer or linear(M, N))
    fill(handle)
    return model, handle, p.roles()["angle"], p.roles()["gain"]


def effective_rotation(handle, W):
    """R, from a square invertible weight."""
    return (W + handle.update_of("layer").dense()) @ torch.linalg.inv(W)


@pytest.mark.parametrize("variant", [1, 2, 4])
@pytest.mark.parametrize("group", [2, 4, 6, 12])
@pytest.mark.parametrize("bias", [True, False])
def test_1_by_definition(variant, group, bias):
    layer, x = linear(M, N, bias=bias), randn(7, N, seed=1)
    z, W = layer(x).detach(), layer.weight.detach().clone()
    model, handle, angle, gain = begin(variant, group, layer=layer)
    size = {1: M // 2, 2: M, 4: 2 * M}[variant]
    assert angle.shape == gain.shape == (size,) and handle.trained_numbers == 2 * size
    R = rotation(angle, gain, variant, M, group)
    close(model(x), z @ R.t(), 1e-12)  # the bias is rotated too
    close(W + handle.update_of("layer").dense(), R @ W, 1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", [1, 2, 4])
@pytest.mark.parametrize("merged", [False, True])
def test_1_peft_gives_the_same(variant, merged):
    peft = pytest.importorskip("peft")
    config = peft.RoadConfig(variant=f"road_{variant}", group_size=G, target_modules=["layer"])
    reference = peft.get_peft_model(One(linear(M, N)), config).double().eval()
    model, handle, angle, gain = begin(variant)
    for name, value in (("road_theta", angle), ("road_alpha", gain)):
        (theirs,) = [tensor for key, tensor in reference.named_parameters() if name in key]
        assert theirs.shape == value.shape
        put(theirs, value)
    if merged:
        reference = reference.merge_and_unload()
        handle.merge_()
    x = randn(7, N, seed=1)
    close(model(x), reference(x), 1e-7)


@pytest.mark.parametrize(("m", "group"), [(12, 5), (12, 8), (7, 7)])
def test_1_odd_groups_and_groups_that_do_not_divide_are_refused(m, group):
    with pytest.raises(rw.RankwiseError):
        adapted(road(group=group), linear(m, N))


def test_2_without_gain_it_is_orthogonal():
    layer, x = linear(M, M), randn(7, M, seed=1)
    z, W = layer(x).detach(), layer.weight.detach().clone()
    model, handle, _, gain = begin(1, layer=layer)
    put(gain, 1.0)
    R = effective_rotation(handle, W)
    close(R @ R.t(), torch.eye(M, dtype=torch.float64), 1e-10)
    close(model(x).norm(dim=1), z.norm(dim=1), 1e-12)
    assert float((model(x) - z).norm()) > 0.1 * float(z.norm())


def test_3_variants_contain_one_another():
    x = randn(7, N, seed=1)
    one, _, angle, gain = begin(1)
    two, _, angle2, gain2 = begin(2)
    for small, large in ((angle, angle2), (gain, gain2)):
        for k, (a, c) in enumerate(pairs(M, G)):
            put(large[a], small[k])
            put(large[c], small[k])
    close(two(x), one(x), 1e-12)
    put(angle2, randn(M, seed=7))
    put(gain2, randn(M, seed=8))
    four, _, angle4, gain4 = begin(4)
    for small, large in ((angle2, angle4), (gain2, gain4)):
        put(large, small.reshape(M // G, 1, G).expand(-1, 2, -1).flatten())
    close(four(x), two(x), 1e-12)
    assert not torch.allclose(two(x), one(x))


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_4_start_is_the_base_to_the_bit(variant):
    layer, x, g = linear(M, N), randn(7, N, seed=1), randn(7, M, seed=2)
    base = layer(x).detach()
    model, _, p = adapted(road(variant=variant, group=G), layer)
    assert not p.roles()["angle"].any() and torch.equal(p.roles()["gain"], torch.ones_like(p.roles()["gain"]))
    assert torch.equal(model(x), base)
    backward(model, x, g)
    assert all(grad(tensor).any() for tensor in p.roles().values())


def test_5_one_after_the_other_adds_angles_and_multiplies_gains():
    x = randn(7, N, seed=1)
    _, handle, angle, gain = begin(1)
    handle.merge_()
    first, second_layer = handle.targets["layer"].module, linear(M, N)
    put(second_layer.weight, first.weight)
    put(second_layer.bias, first.bias)
    chained, other, _, _ = begin(1, layer=second_layer)
    fill(other, seed=50)
    roles = other.parameterization("layer").roles()
    model, _, total_angle, total_gain = begin(1)
    put(total_angle, angle + roles["angle"])
    put(total_gain, gain * roles["gain"])
    close(model(x), chained(x), 1e-12)


@pytest.mark.parametrize("variant", [2, 4])
def test_6_without_angles_it_is_ia3(variant):
    x = randn(7, N, seed=1)
    model, _, angle, gain = begin(variant)
    put(angle, 0.0)
    ia3, _, p = adapted(rw.catalog.ia3(), linear(M, N))
    cosines = gain if variant == 2 else gain.reshape(M // G, 2, G)[:, 0].flatten()
    put(p.roles()["gain"], cosines)
    close(model(x), ia3(x), 1e-12)


@pytest.mark.parametrize("variant", [1, 2, 4])
@pytest.mark.parametrize("tokens", [None, 3])
def test_7_a_mixed_batch_is_a_loop_over_adapters(variant, tokens):
    layer = linear(M, N)
    model = One(layer)
    for k, name in enumerate("abc"):
        fill(rw.adapt_(model, road(variant=variant, group=G), name=name), seed=20 + 11 * k)
    rows = ["b", "a", None, "b", "c"]
    x = randn(*((5, N) if tokens is None else (5, tokens, N)), seed=1)
    alone = []
    for k, name in enumerate(rows):
        rw.activate_(model, name)
        alone.append(model(x[k : k + 1]).detach())
    rw.activate_(model, rows)
    close(model(x), torch.cat(alone), 1e-6)
    assert not torch.allclose(alone[0], alone[3]) and (alone[0] - alone[1]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_8_merging_and_back(variant, bias):
    layer, x = linear(M, N, bias=bias), randn(7, N, seed=1)
    stored = [tensor.detach().clone() for tensor in layer.parameters()]
    model, handle, _, _ = begin(variant, layer=layer)
    before = model(x).detach()
    handle.merge_()
    close(F.linear(x, layer.weight, layer.bias), before, 1e-10)
    close(model(x), before, 1e-10)
    handle.unmerge_()
    for tensor, value in zip((layer.weight, layer.bias) if bias else (layer.weight,), stored, strict=True):
        assert torch.equal(tensor, value)


@pytest.mark.parametrize(("group", "expected"), [(2, lambda k: (2 * k, 2 * k + 1)), (M, lambda k: (k, k + M // 2))])
def test_9_the_group_only_permutes_the_pairs(group, expected):
    W = randn(M, M, seed=4)
    layer = linear(M, M)
    put(layer.weight, W)
    _, handle, angle, gain = begin(1, group, layer=layer)
    R = effective_rotation(handle, W)
    found = sorted({tuple(sorted((i, j))) for i in range(M) for j in range(M) if i != j and abs(float(R[i, j])) > 1e-9})
    assert found == sorted(expected(k) for k in range(M // 2))
    # with neighbors as pairs it is the same map of permuted coordinates
    order = [i for pair in pairs(M, group) for i in pair]
    neighbors = rotation(angle, gain, 1, M, 2)
    close(R[order][:, order], neighbors, 1e-10)


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_9_gradients(variant):
    layer, x, g = linear(4, N), randn(7, N, seed=1), randn(7, 4, seed=2)
    z = layer(x).detach()
    model, _, angle, gain = begin(variant, 4, layer=layer)
    t, s = angle.detach().clone(), gain.detach().clone()
    backward(model, x, g)
    close(grad(angle), central_difference(lambda v: float((g * (z @ rotation(v, s, variant, 4, 4).t())).sum()), t), 1e-7)
    close(grad(gain), central_difference(lambda v: float((g * (z @ rotation(t, v, variant, 4, 4).t())).sum()), s), 1e-7)
