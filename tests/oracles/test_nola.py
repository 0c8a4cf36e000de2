"""Oracles of NOLA: A = A0 + k^-1/2 Σ α_i A_i and B = l^-1/2 Σ β_j B_j over seeded uniform bases that are never stored.

The dense reference is the materialized basis, `basis("A")` (k, r, n) and `basis("B")` (l, m, r), contracted by plain torch.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rankwise as rw
from tests.oracles.tools import adapted, backward, close, fill, grad, linear, put, randn

nola = rw.catalog.nola


def contract(p, alpha, beta):
    """(B, A) by the definition, from the whole bases."""
    k, l_ = alpha.numel(), beta.numel()
    A = p.start_A + torch.einsum("k,kij->ij", alpha, p.basis("A").to(alpha.dtype)) / k**0.5
    B = torch.einsum("l,lij->ij", beta, p.basis("B").to(beta.dtype)) / l_**0.5
    return B, A


@pytest.mark.parametrize(("m", "n", "rank"), [(7, 5, 2), (12, 30, 4), (4, 4, 1)])
def test_1_the_count_does_not_depend_on_the_sizes(m, n, rank):
    _, handle, p = adapted(nola(rank=rank, bases_A=9, bases_B=11), linear(m, n))
    assert handle.trained_numbers == 9 + 11
    assert p.roles()["coefficients_A"].shape == (9,) and p.roles()["coefficients_B"].shape == (11,)


def test_2_start_and_first_gradients():
    layer, x, g = linear(7, 5), randn(9, 5, seed=1), randn(9, 7, seed=2)
    base = layer(x).detach()
    model, _, p = adapted(nola(rank=3, bases_A=6, bases_B=8), layer)
    assert torch.equal(model(x), base)
    assert not any(tensor.any() for tensor in p.roles().values())
    backward(model, x, g)
    assert not grad(p.roles()["coefficients_A"]).any()
    assert grad(p.roles()["coefficients_B"]).abs().min() > 0


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_2_bilinearity(alpha):
    _, handle, p = adapted(nola(rank=3, alpha=alpha, bases_A=6, bases_B=8), linear(7, 5))
    s = 1.0 if alpha is None else alpha / 3
    beta = randn(8, seed=3)
    put(p.roles()["coefficients_B"], beta)
    first = handle.update_of("layer").dense().detach()
    close(first, s * contract(p, torch.zeros(6, dtype=torch.float64), beta)[0] @ p.start_A, 1e-12)  # (0, β): s B(β) A0
    put(p.roles()["coefficients_B"], -2.5 * beta)
    close(handle.update_of("layer").dense(), -2.5 * first, 1e-12)
    put(p.roles()["coefficients_A"], randn(6, seed=4))
    moved = handle.update_of("layer").dense().detach()
    put(p.roles()["coefficients_A"], 3 * p.roles()["coefficients_A"])
    close(handle.update_of("layer").dense() + 2.5 * first, 3 * (moved + 2.5 * first), 1e-12)  # linear in α beside A0


def test_2_the_frozen_start_is_that_of_lora():
    # kaiming-uniform with a = √5: U(-1/√n, 1/√n)
    _, _, p = adapted(nola(rank=20, bases_A=2, bases_B=2), linear(25, 100))
    assert p.start_A.shape == (20, 100)
    assert 0.095 < float(p.start_A.abs().max()) <= 0.1
    assert float(p.start_A.std()) == pytest.approx(0.1 / 3**0.5, rel=0.05)


def test_2_the_vision_variant_starts_shifted():
    _, handle, p = adapted(nola(rank=2, alpha=1.0, bases_A=5, bases_B=4, variant="vit"), linear(7, 6))
    alpha, beta = p.roles()["coefficients_A"], p.roles()["coefficients_B"]
    assert torch.equal(alpha, torch.full((5,), 1 / 5, dtype=torch.float64))
    assert torch.equal(beta, torch.full((4,), 1 / 4, dtype=torch.float64))
    for _ in range(2):  # no A0, no 1/√k, scale 1/r
        A = torch.einsum("k,kij->ij", alpha, p.basis("A").double())
        B = torch.einsum("l,lij->ij", beta, p.basis("B").double())
        assert B.norm() > 0 and A.norm() > 0
        close(handle.update_of("layer").dense(), B @ A / 2, 1e-10)
        fill(handle)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [2, 64])
def test_3_gradients_against_materialized_bases(dtype, tolerance, chunk):
    layer = linear(6, 6, dtype=dtype)
    W, b, x, g = (
        layer.weight.detach().clone(),
        layer.bias.detach().clone(),
        randn(9, 6, seed=1, dtype=dtype),
        randn(9, 6, seed=2),
    )
    model, handle, p = adapted(nola(rank=2, alpha=3.0, bases_A=5, bases_B=5, chunk=chunk), layer)
    fill(handle)
    backward(model, x, g.to(dtype))
    alpha, beta = (p.roles()[role].detach().clone().requires_grad_() for role in ("coefficients_A", "coefficients_B"))
    B, A = contract(p, alpha, beta)
    y = x @ (W + 1.5 * B @ A).t() + b
    (y * g.to(dtype)).sum().backward()
    close(model(x), y, tolerance)
    close(grad(p.roles()["coefficients_A"]), grad(alpha), tolerance)
    close(grad(p.roles()["coefficients_B"]), grad(beta), tolerance)
    for found, expected in zip(p.factors(), (B, A), strict=True):
        close(found, expected, tolerance)


def test_4_bases_are_uniform_and_drawn_alike_for_every_dtype():
    _, _, p = adapted(nola(rank=4, bases_A=20, bases_B=30), linear(15, 10))
    A, B = p.basis("A"), p.basis("B")
    assert A.shape == (20, 4, 10) and B.shape == (30, 15, 4)
    for basis in (A, B):
        assert 0.99 < float(basis.abs().max()) <= 1
        assert float(basis.double().std()) == pytest.approx(3**-0.5, rel=0.05)
    assert not torch.equal(A.flatten()[:50], B.flatten()[:50])
    _, _, single = adapted(nola(rank=4, bases_A=20, bases_B=30), linear(15, 10, dtype=torch.float32))
    assert torch.equal(single.basis("A").float(), A.float()) and torch.equal(single.basis("B").float(), B.float())
    _, _, other = adapted(nola(rank=4, bases_A=20, bases_B=30), linear(15, 10), seed=1)
    assert not torch.equal(other.basis("A"), A)


@pytest.mark.parametrize("shared", [False, True])
def test_4_layers_of_one_shape_share_bases_where_asked(shared):
    model = nn.Sequential(linear(5, 5), linear(5, 5, seed=1))
    handle = rw.adapt_(model, nola(rank=2, bases_A=4, bases_B=4, share_bases=shared))
    one, two = (handle.parameterization(site) for site in ("0", "1"))
    assert torch.equal(one.basis("A"), two.basis("A")) == shared
    assert torch.equal(one.basis("B"), two.basis("B")) == shared


def test_4_forward_is_repeatable_also_inside_checkpointing_and_leaves_the_global_generator():
    x, g = randn(9, 5, seed=1), randn(9, 7, seed=2)
    model, handle, p = adapted(nola(rank=3, bases_A=6, bases_B=8, chunk=4), linear(7, 5))
    fill(handle)
    before = torch.get_rng_state()
    backward(model, x, g)
    plain = {role: grad(tensor).clone() for role, tensor in p.roles().items()}
    first = model(x).detach()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model(x), first)
    model.zero_grad()
    again = checkpoint(model, x, use_reentrant=False)
    assert torch.equal(again, first)
    (again * g).sum().backward()
    for role, tensor in p.roles().items():
        close(grad(tensor), plain[role], 1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 10])
def test_4_the_chunk_does_not_change_the_numbers(chunk):
    _, handle, p = adapted(nola(rank=3, bases_A=10, bases_B=10, chunk=chunk), linear(7, 5))
    _, reference, q = adapted(nola(rank=3, bases_A=10, bases_B=10, chunk=64), linear(7, 5))
    fill(handle)
    fill(reference)
    assert torch.equal(p.basis("A"), q.basis("A")) and torch.equal(p.basis("B"), q.basis("B"))
    for found, expected in zip(p.factors(), q.factors(), strict=True):
        close(found, expected, 1e-6)


def test_4_nothing_of_the_bases_is_kept_for_backward():
    def saved(bases):
        kept = []
        model, handle, _ = adapted(nola(rank=2, bases_A=bases, bases_B=bases, chunk=5), linear(6, 8))
        fill(handle)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            model(randn(3, 8, seed=1))
        return sum(kept)

    assert saved(100) - saved(50) <= 4 * 50  # the coefficients and no more: the bases of A alone would be 50 · 2 · 8


RELOAD = """
import sys, torch, rankwise as rw
model = torch.nn.Sequential(torch.nn.Linear(5, 7, dtype=torch.float64))
handle = rw.load_(model, sys.argv[1], any_base=True)
B, A = handle.parameterization("0").factors()
print([value.hex() for value in torch.cat([B.flatten(), A.flatten()]).tolist()])
"""


def test_4_a_new_process_draws_the_same_bases(tmp_path):
    model = nn.Sequential(linear(7, 5))
    handle = rw.adapt_(model, nola(rank=2, bases_A=6, bases_B=5, chunk=4), seed=3)
    fill(handle)
    handle.save(tmp_path / "adapter")
    stored = sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors"))
    assert stored < 8 * (6 + 5 + 2 * 5) + 800  # coefficients, A0 and a header: the bases (8 · 6 · 10 + 8 · 5 · 14) do not fit
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "adapter")]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    B, A = handle.parameterization("0").factors()
    assert printed.strip() == str([value.hex() for value in torch.cat([B.flatten(), A.flatten()]).tolist()])


def test_5_with_enough_bases_every_pair_is_reached():
    m, n, r, k, l_ = 4, 3, 2, 6, 8
    _, handle, p = adapted(nola(rank=r, bases_A=k, bases_B=l_), linear(m, n))
    B, A = randn(m, r, seed=3), randn(r, n, seed=4)
    for role, basis, goal in (("coefficients_A", "A", A - p.start_A), ("coefficients_B", "B", B)):
        whole = p.basis(basis).double()
        columns = whole.reshape(whole.shape[0], -1).t() / whole.shape[0] ** 0.5
        put(p.roles()[role], torch.linalg.lstsq(columns, goal.reshape(-1, 1)).solution.squeeze(1))
    for found, expected in zip(p.factors(), (B, A), strict=True):
        close(found, expected, 1e-8)
    close(handle.update_of("layer").dense(), B @ A, 1e-8)
