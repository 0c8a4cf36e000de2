"""Oracles of Tied-LoRA: W' = W + s diag(v_l) B diag(u_l) A with (B, A) shared by all layers of one role and shape.

Which of A, B, u, v are trained is free: 15 settings. The shared tensors are found in the adapter's bank by their shape.
"""

import itertools

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from tests.oracles.tools import adapted, backward, close, fill, grad, linear, put, randn

tied_lora = rw.catalog.tied_lora
SETTINGS = ["".join(letters) for size in (1, 2, 3, 4) for letters in itertools.combinations("ABuv", size)]
M, N, R = 6, 5, 3


class Layer(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.proj = linear(M, N, seed=k)


class Stack(nn.Module):
    """Layers of one role side by side: the outputs of all, on one input each."""

    def __init__(self, count: int, seeds: list[int] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(k) for k in (seeds or range(count))])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer.proj(x[k]) for k, layer in enumerate(self.layers)])


def begin(count=3, **options):
    model = Stack(count)
    return model, rw.adapt_(model, tied_lora(rank=R, **options))


def sites(handle):
    return list(handle.targets)


def shared(handle, shape):
    """The one tensor of the bank with this shape, trained or frozen."""
    (found,) = [t for t in (*handle.bank.parameters(), *handle.bank.buffers()) if t.shape == shape]
    return found


def tensors(handle, site):
    """B, A, u, v of one site, wherever they are held."""
    p = handle.parameterization(site)
    u, v = (p.roles()[role] if role in p.roles() else getattr(p, role) for role in "uv")
    return shared(handle, (M, R)), shared(handle, (R, N)), u, v


def dense(handle, site, scale=1.0):
    B, A, u, v = tensors(handle, site)
    return scale * torch.diag(v) @ B @ torch.diag(u) @ A


def count(m, n, layers, rank):
    """TL6: the pair once, and u and v per layer."""
    return rank * (m + n) + layers * (rank + m)


@pytest.mark.parametrize(("layers", "rank"), [(1, 2), (4, 3)])
def test_1_counts(layers, rank):
    def trained(train):
        return rw.adapt_(Stack(layers), tied_lora(rank=rank, train=train)).trained_numbers

    assert trained("ABuv") == count(M, N, layers, rank)
    assert trained("AB") == rank * (M + N)
    assert trained("uv") == layers * (rank + M)
    # the same formula at the sizes of the paper, where W is the fused (3d, d)
    assert count(3 * 4096, 4096, 32, 8) == 524_544 and 32 * 8 * 4 * 4096 == 4_194_304
    assert count(3 * 2048, 2048, 24, 8) == 213_184 and 24 * 8 * 4 * 2048 == 1_572_864


def test_1_layers_of_another_role_or_shape_have_their_own_pair():
    class Block(nn.Module):
        def __init__(self, k: int) -> None:
            super().__init__()
            self.q, self.v, self.up = linear(5, 5, seed=k), linear(5, 5, seed=k + 20), linear(9, 5, seed=k + 40)

    model = nn.ModuleList([Block(k) for k in range(3)])
    handle = rw.adapt_(model, tied_lora(rank=2, train="AB"))
    assert handle.trained_numbers == 2 * (5 + 5) + 2 * (5 + 5) + 2 * (9 + 5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_2_one_layer_trains_like_lora(optimizer):
    x, y = randn(8, 5, seed=1), randn(8, 6, seed=2)
    step = getattr(rw.catalog, optimizer)()
    one, handle, _ = adapted(rw.compose(tied_lora(rank=R, alpha=2.0, train="AB"), step), linear(M, N))
    two, plain, p = adapted(rw.compose(rw.catalog.lora(rank=R, alpha=2.0), step), linear(M, N))
    put(shared(handle, (R, N)), p.roles()["A"])
    put(shared(handle, (M, R)), p.roles()["B"])
    for model, adapter in ((one, handle), (two, plain)):
        made = adapter.optimizer(lr=0.02)
        for _ in range(5):
            (model(x) - y).square().mean().backward()
            adapter.after_backward()
            made.step()
            adapter.after_step()
            made.zero_grad()
    assert plain.update_of("layer").dense().norm() > 1e-2
    close(handle.update_of("layer").dense(), plain.update_of("layer").dense(), 1e-6)


@pytest.mark.parametrize("train", ["AB", "ABuv"])
def test_3_shared_gradients_are_sums(train):
    x, g = randn(3, 7, N, seed=1), randn(3, 7, M, seed=2)
    model, handle = begin(alpha=2 * R, train=train)
    fill(handle)
    (model(x) * g).sum().backward()
    dB, dA = torch.zeros(M, R, dtype=torch.float64), torch.zeros(R, N, dtype=torch.float64)
    for k, site in enumerate(sites(handle)):  # each layer as a LoRA of its own, at the same values
        B, A, u, v = (t.detach().clone() for t in tensors(handle, site))
        B, A = (v[:, None] * B * u).requires_grad_(), A.requires_grad_()
        ((x[k] @ (2 * B @ A).t()) * g[k]).sum().backward()
        dB += v[:, None] * grad(B) * u
        dA += grad(A)
    close(grad(shared(handle, (M, R))), dB, 1e-10)
    close(grad(shared(handle, (R, N))), dA, 1e-10)


def test_3_identical_layers_multiply_the_gradient():
    x, g = randn(7, N, seed=1), randn(7, M, seed=2)
    gradients = []
    for count_ in (1, 4):
        model = Stack(count_, seeds=[0] * count_)
        handle = rw.adapt_(model, tied_lora(rank=R, train="AB"))
        fill(handle)
        (model(x.expand(count_, -1, -1)) * g).sum().backward()
        gradients.append([grad(shared(handle, shape)) for shape in ((M, R), (R, N))])
    for single, several in zip(*gradients, strict=True):
        close(several, 4 * single, 1e-12)


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 20.0), ("adamw", 0.05)])  # d is 0.1, so plain steps are short
def test_4_with_a_frozen_pair_it_trains_like_vera(optimizer, lr):
    x, y = randn(3, 8, N, seed=1), randn(3, 8, M, seed=2)
    step = getattr(rw.catalog, optimizer)()
    one, two = Stack(3), Stack(3)
    tied = rw.adapt_(one, rw.compose(tied_lora(rank=R, train="uv"), step))
    vera = rw.adapt_(two, rw.compose(rw.catalog.vera(rank=R), step))
    put(vera.bank["B"], shared(tied, (M, R)))
    put(vera.bank["A"], shared(tied, (R, N)))
    for site in sites(tied):
        put(tied.parameterization(site).roles()["u"], vera.parameterization(site).roles()["d"])
        put(tied.parameterization(site).roles()["v"], vera.parameterization(site).roles()["b"])
    for model, handle in ((one, tied), (two, vera)):
        made = handle.optimizer(lr=lr)
        for _ in range(5):
            (model(x) - y).square().mean().backward()
            handle.after_backward()
            made.step()
            handle.after_step()
            made.zero_grad()
    for site in sites(tied):
        assert vera.update_of(site).dense().norm() > 1e-2
        close(tied.update_of(site).dense(), vera.update_of(site).dense(), 1e-6)


@pytest.mark.parametrize("train", SETTINGS)
def test_5_every_setting_starts_at_the_base_and_is_alive(train):
    x, g = randn(3, 7, N, seed=1), randn(3, 7, M, seed=2)
    base = Stack(3)(x).detach()
    model, handle = begin(train=train)
    assert torch.equal(model(x), base)
    trained = [tensor for block in handle.blocks().values() for tensor in block.values()]
    sizes = {"A": R * N, "B": M * R, "u": 3 * R, "v": 3 * M}
    assert sum(tensor.numel() for tensor in trained) == sum(sizes[letter] for letter in train)
    (model(x) * g).sum().backward()
    assert any(tensor.grad is not None and tensor.grad.any() for tensor in trained)
    fill(handle)
    for site in sites(handle):
        close(handle.update_of(site).dense(), dense(handle, site), 1e-12)
    # no frozen tensor blocks another: all are alive at a generic point
    model.zero_grad()
    (model(x) * g).sum().backward()
    assert all(grad(tensor).abs().min() > 0 for tensor in trained)


@pytest.mark.parametrize("train", SETTINGS)
def test_5_what_starts_where(train):
    _, handle = begin(train=train)
    for site in sites(handle):
        B, A, u, v = tensors(handle, site)
        if "B" in train:
            assert not B.any() and torch.equal(u, torch.ones_like(u)) and torch.equal(v, torch.ones_like(v))
            assert A.abs().min() > 0
        elif "v" in train:
            assert not v.any() and u.abs().min() > 0 and B.abs().min() > 0 and A.abs().min() > 0
        elif train == "u":
            assert not u.any() and v.abs().min() > 0 and B.abs().min() > 0 and A.abs().min() > 0


def test_6_vectors_are_private_and_factors_common():
    x = randn(3, 7, N, seed=1)
    model, handle = begin()
    fill(handle)
    before = model(x).detach()
    for role, size in (("u", R), ("v", M)):
        put(handle.parameterization(sites(handle)[1]).roles()[role], randn(size, seed=9))
        after = model(x).detach()
        assert torch.equal(after[[0, 2]], before[[0, 2]])
        assert not torch.allclose(after[1], before[1])
    for shape in ((M, R), (R, N)):
        before = model(x).detach()
        put(shared(handle, shape), randn(*shape, seed=8))
        assert all(not torch.allclose(model(x)[k], before[k]) for k in range(3))


def test_6_the_pair_stays_tied_after_loading(tmp_path):
    _, handle = begin(alpha=2.0)
    fill(handle)
    handle.save(tmp_path / "adapter")
    again = rw.load_(Stack(3), tmp_path / "adapter")
    assert again.trained_numbers == count(M, N, 3, R)
    put(shared(again, (M, R)), randn(M, R, seed=8))
    put(shared(handle, (M, R)), randn(M, R, seed=8))
    for site in sites(handle):
        close(again.update_of(site).dense(), dense(handle, site, 2 / R), 1e-12)


def test_6_export_is_a_plain_pair_per_layer():
    _, handle = begin(alpha=2.0)
    fill(handle)
    for site in sites(handle):
        B, A, u, v = tensors(handle, site)
        factors = handle.low_rank_of(site)
        assert factors is not None and factors.rank == R
        close(factors.B @ factors.A, (2 / R) * (v[:, None] * B * u) @ A, 1e-12)


def test_3_backward_of_the_vectors():
    x, g = randn(8, N, seed=1), randn(8, M, seed=2)
    model, handle, p = adapted(tied_lora(rank=R), linear(M, N))
    fill(handle)
    G = backward(model, x, g)
    B, A, u, v = tensors(handle, "layer")
    close(grad(p.roles()["v"]), (G * (B @ (u[:, None] * A))).sum(1), 1e-12)
    close(grad(p.roles()["u"]), ((B.t() @ (v[:, None] * G)) * A).sum(1), 1e-12)
