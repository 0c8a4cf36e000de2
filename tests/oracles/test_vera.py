"""Oracles of VeRA: W' = W + diag(b) B diag(d) A with one frozen random pair for all layers."""

import pytest
import torch
from torch import nn

import rankwise as rw
from tests.oracles.tools import adapted, backward, close, fill, grad, linear, put, randn

vera = rw.catalog.vera


def pair(handle):
    """(B, A) of the adapter's bank."""
    return handle.bank["B"], handle.bank["A"]


@pytest.mark.parametrize(("layers", "width", "rank", "count"), [(24, 768, 1024, 43008), (48, 1024, 256, 61440)])
def test_1_counts(layers, width, rank, count):
    # The specification's counts of RoBERTa's q and v, per layer on a slim stand-in of as many outputs.
    model = nn.Sequential(*[nn.Linear(4, width, bias=False) for _ in range(layers)])
    assert rw.adapt_(model, vera(rank=rank)).trained_numbers == count


def test_2_start_and_bilinearity():
    layer, x, g = linear(7, 5), randn(9, 5, seed=1), randn(9, 7, seed=2)
    base = layer(x).detach()
    model, _, p = adapted(vera(rank=4), layer)
    b, d = p.roles()["b"], p.roles()["d"]
    assert torch.equal(model(x), base)
    assert torch.equal(d, torch.full((4,), 0.1, dtype=torch.float64))
    backward(model, x, g)
    assert torch.equal(grad(d), torch.zeros(4, dtype=torch.float64)) and grad(b).abs().min() > 0
    put(b, randn(7, seed=3))
    put(d, randn(4, seed=4))
    moved = model(x).detach()
    put(d, d * 3)
    put(b, b / 3)
    close(model(x), moved, 1e-12)
    put(b, b * 2)
    close(model(x) - base, 2 * (moved - base), 1e-12)


def test_2_gradients_at_a_generic_point():
    x, g = randn(9, 5, seed=1), randn(9, 7, seed=2)
    model, handle, p = adapted(vera(rank=4), linear(7, 5))
    fill(handle)
    (B, A), b, d = pair(handle), p.roles()["b"], p.roles()["d"]
    G = backward(model, x, g)
    close(grad(b), (G * (B @ (d[:, None] * A))).sum(1), 1e-12)
    close(grad(d), ((B.t() @ (b[:, None] * G)) * A).sum(1), 1e-12)


def test_3_with_ones_it_is_lora_with_the_slices():
    model = nn.Sequential(linear(6, 4), linear(9, 6, seed=1))
    handle, x = rw.adapt_(model, vera(rank=3)), randn(8, 4, seed=2)
    for site in ("0", "1"):
        for tensor in handle.parameterization(site).roles().values():
            put(tensor, 1.0)
    B, A = pair(handle)
    y = model(x)
    plain = nn.Sequential(linear(6, 4), linear(9, 6, seed=1))
    other = rw.adapt_(plain, rw.catalog.lora(rank=3))
    for site, (m, n) in {"0": (6, 4), "1": (9, 6)}.items():
        roles = other.parameterization(site).roles()
        put(roles["B"], B[:m])
        put(roles["A"], A[:, :n])
        close(handle.update_of(site).dense(), B[:m] @ A[:, :n], 1e-12)
    close(y, plain(x), 1e-12)


def test_4_slices_of_the_largest_sizes():
    def build(seed):
        model = nn.ModuleDict({"one": nn.Linear(20, 100), "two": nn.Linear(50, 80)}).double()
        return rw.adapt_(model, vera(rank=6), where=["one", "two"], seed=seed)

    handle, again, other = build(0), build(0), build(1)
    B, A = pair(handle)
    assert A.shape == (6, 50) and B.shape == (100, 6)
    fill(handle)
    for site, (m, n) in {"one": (100, 20), "two": (80, 50)}.items():
        b, d = (handle.parameterization(site).roles()[role] for role in "bd")
        close(handle.update_of(site).dense(), b[:, None] * (B[:m] @ (d[:, None] * A[:, :n])), 1e-12)
    assert torch.equal(pair(again)[0], B) and torch.equal(pair(again)[1], A)
    assert not torch.equal(pair(other)[0], B)
    # U(-√(6/fan_in), √(6/fan_in)) with fan_in = n_max for A and r for B
    for tensor, fan_in in ((A, 50), (B, 6)):
        bound = (6 / fan_in) ** 0.5
        assert 0.9 * bound < float(tensor.abs().max()) <= bound
        assert float(tensor.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_5_equals_tied_lora_with_frozen_factors():
    # Tied-LoRA from its definition: y = W x + s diag(v) B diag(u) A x, one pair (B, A) for layers of one shape, s = 1.
    layers = [linear(5, 5, seed=k) for k in range(3)]
    weights = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in layers]
    model, x = nn.Sequential(*layers), randn(8, 5, seed=2)
    handle = rw.adapt_(model, vera(rank=3))
    fill(handle, size=0.5)
    (B, A), h = pair(handle), x
    for k, (W, bias) in enumerate(weights):
        u, v = (handle.parameterization(str(k)).roles()[role] for role in "db")
        h = h @ W.t() + bias + v * ((u * (h @ A.t())) @ B.t())
    close(model(x), h, 1e-12)


@pytest.mark.parametrize("saved", [False, True])
def test_6_the_pair_is_held_once(saved):
    model = nn.Sequential(linear(6, 4), linear(9, 6, seed=1))
    handle = rw.adapt_(model, vera(rank=3, save_projections=saved))
    B, A = pair(handle)
    last = [handle.update_of(site).factors for site in ("0", "1")]
    assert {factors[-1].data_ptr() for factors in last} == {A.data_ptr()}  # leading columns: the same memory
    assert {factors[1].data_ptr() for factors in last} == {B.data_ptr()}
    held = [key for key, tensor in model.state_dict().items() if tensor.data_ptr() in (A.data_ptr(), B.data_ptr())]
    assert len(held) == (2 if saved else 0)
    assert sum(t.data_ptr() == A.data_ptr() for t in model.buffers()) == 1
