"""Oracles of (IA)³: one gain per output, y = l ∘ (W x + b), bias and all, or one per input, y = W (l ∘ x) + b."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankwise as rw
from tests.oracles.tools import One, adapted, backward, close, fill, grad, linear, put, randn

ia3 = rw.catalog.ia3


def begin(side="output", layer=None):
    model, handle, p = adapted(ia3(side=side), layer if layer is not None else linear(7, 5))
    fill(handle)
    return model, handle, p.roles()["gain"]


def convolution(groups=2, bias=True):
    layer = nn.Conv2d(4, 6, 3, padding=1, groups=groups, bias=bias).double()
    for k, tensor in enumerate(layer.parameters()):
        put(tensor, randn(*tensor.shape, seed=40 + k))
    return layer


def image():
    return randn(2, 4, 5, 6, seed=1)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("bias", [True, False])
def test_1_by_definition(side, bias):
    layer, x = linear(7, 5, bias=bias), randn(9, 5, seed=1)
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone() if bias else 0.0
    model, handle, gain = begin(side, layer)
    assert gain.shape == ((7,) if side == "output" else (5,)) and handle.trained_numbers == gain.numel()
    close(model(x), gain * (x @ W.t() + b) if side == "output" else (gain * x) @ W.t() + b, 1e-12)
    matrix = torch.diag(gain - 1) @ W if side == "output" else W @ torch.diag(gain - 1)
    close(handle.update_of("layer").dense(), matrix, 1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("side", ["output", "input"])
def test_1_peft_gives_the_same_to_the_bit(side):
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if side == "input" else [])
    reference = peft.get_peft_model(One(linear(7, 5)), config).double().eval()
    model, _, gain = begin(side)
    (theirs,) = [tensor for key, tensor in reference.named_parameters() if "ia3_l" in key]
    put(theirs, gain[:, None] if side == "output" else gain[None])
    x = randn(9, 5, seed=1)
    assert torch.equal(model(x), reference(x))


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("conv", [False, True])
def test_2_ones_are_the_base_to_the_bit(side, conv):
    layer, x = (convolution(), image()) if conv else (linear(7, 5), randn(9, 5, seed=1))
    base = layer(x).detach()
    model, _, p = adapted(ia3(side=side), layer)
    assert torch.equal(p.roles()["gain"], torch.ones_like(p.roles()["gain"]))
    assert torch.equal(model(x), base)
    (model(x) * randn(*base.shape, seed=2)).sum().backward()
    assert grad(p.roles()["gain"]).abs().min() > 0


@pytest.mark.parametrize("side", ["output", "input"])
def test_2_one_after_the_other_is_the_product(side):
    x = randn(9, 5, seed=1)
    _, handle, first = begin(side)
    handle.merge_()
    merged = handle.targets["layer"].module
    second_layer = linear(7, 5)
    put(second_layer.weight, merged.weight)
    put(second_layer.bias, merged.bias)
    second = randn(first.numel(), seed=9)
    chained, _, gain = begin(side, second_layer)
    put(gain, second)
    model, _, product = begin(side)
    put(product, first * second)
    close(chained(x), model(x), 1e-12)
    put(product, second * first)
    close(chained(x), model(x), 1e-12)


def test_3_a_closed_output_still_learns():
    layer, x, g = linear(7, 5), randn(9, 5, seed=1), randn(9, 7, seed=2)
    z = layer(x).detach()
    model, _, gain = begin(layer=layer)
    put(gain, gain * (torch.arange(7) != 3))
    y = model(x)
    assert not y[:, 3].any() and y[:, [0, 1, 2, 4, 5, 6]].all()
    backward(model, x, g)
    close(grad(gain), (g * z).sum(0), 1e-12)
    assert grad(gain)[3] != 0


def test_3_gradient_of_the_input_side():
    model, _, gain = begin("input")
    x, g, W = randn(9, 5, seed=1), randn(9, 7, seed=2), model.layer.weight.detach()
    G = backward(model, x, g)
    close(grad(gain), (G * W).sum(0), 1e-12)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("conv", [False, True])
def test_4_merging_and_back_after_a_zero(side, bias, conv):
    layer = convolution(bias=bias) if conv else linear(7, 5, bias=bias)
    x = image() if conv else randn(9, 5, seed=1)
    stored = [tensor.detach().clone() for tensor in layer.parameters()]
    model, handle, gain = begin(side, layer)
    put(gain, gain * (torch.arange(gain.numel()) != 1))
    before = model(x).detach()
    handle.merge_()
    close(F.conv2d(x, layer.weight, layer.bias, 1, 1, 1, 2) if conv else F.linear(x, layer.weight, layer.bias), before, 1e-6)
    close(model(x), before, 1e-6)
    handle.unmerge_()
    for tensor, value in zip((layer.weight, layer.bias) if bias else (layer.weight,), stored, strict=True):
        assert torch.equal(tensor, value)
    close(model(x), before, 1e-12)
    handle.merge_()
    handle.detach_()
    for tensor, value in zip(layer.parameters(), stored, strict=True):
        assert torch.equal(tensor, value)


@pytest.mark.parametrize("groups", [1, 2])
def test_4_convolutions_have_one_gain_per_channel(groups):
    layer, x = convolution(groups), image()
    z, W, b = layer(x).detach(), layer.weight.detach().clone(), layer.bias.detach().clone()
    model, _, gain = begin("output", layer)
    assert gain.shape == (6,)
    close(model(x), z * gain[:, None, None], 1e-12)
    model, _, gain = begin("input", convolution(groups))
    assert gain.shape == (4,)  # per input channel; a group meets its slice
    close(model(x), F.conv2d(x * gain[:, None, None], W, b, padding=1, groups=groups), 1e-12)


def test_5_output_side_is_road_without_rotation_and_boft_but_for_the_bias():
    x = randn(9, 5, seed=1)
    model, _, gain = begin(layer=linear(8, 5))
    road, _, p = adapted(rw.catalog.road(variant=2, group=4), linear(8, 5))
    put(p.roles()["angle"], 0.0)
    put(p.roles()["gain"], gain)
    close(model(x), road(x), 1e-12)
    boft, _, q = adapted(rw.catalog.boft(block=5, factors=1), linear(8, 5))
    put(q.roles()["blocks"], 0.0)
    put(q.roles()["gain"], gain)
    bias = boft.layer.bias.detach()
    close(model(x) - gain * bias, boft(x) - bias, 1e-12)
    assert not torch.allclose(model(x), boft(x))


def test_6_inputs_of_a_layer_are_outputs_of_the_one_before():
    x, gain = randn(9, 5, seed=1), randn(7, seed=3)
    outputs = []
    for site, side in (("0", "output"), ("1", "input")):
        model = nn.Sequential(linear(7, 5), linear(4, 7, seed=1))
        handle = rw.adapt_(model, ia3(side=side), where=[site])
        put(handle.parameterization(site).roles()["gain"], gain)
        outputs.append(model(x))
    close(outputs[0], outputs[1], 1e-12)


@pytest.mark.parametrize("name", ["down", "mlp.down"])
def test_6_named_layers_use_the_input_side(name):
    model = nn.ModuleDict({"attention": nn.ModuleDict({"v": linear(7, 5)}), "mlp": nn.ModuleDict({"down": linear(5, 9)})})
    handle = rw.adapt_(model, ia3(input_layers=(name,)), where=["attention.v", "mlp.down"])
    assert handle.parameterization("attention.v").roles()["gain"].shape == (7,)
    assert handle.parameterization("mlp.down").roles()["gain"].shape == (9,)
    fill(handle)
    x, layer = randn(3, 9, seed=1), model["mlp"]["down"]
    gain = handle.parameterization("mlp.down").roles()["gain"]
    close(layer(x), (gain * x) @ layer.weight.t() + layer.bias, 1e-12)
