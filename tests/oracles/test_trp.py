"""TRP against its spec (arXiv:1812.02402, 2004.14566): truncate a dense weight every m steps, add the nuclear sub-gradient.

The oracles are the spec's list in its order. The first holds for an energy as stated here: a truncated matrix can lose ranks
again, as its energy is counted anew (σ² = 0.85, 0.06, 0.05, 0.04 at 0.9: two ranks, then one).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankwise as rw
from rankwise.compression.chains import channel_chain, filter_chain, spatial_chain
from rankwise.procedures.matricize import fold, unfold
from rankwise.procedures.trp import truncate
from tests.oracles.tools_training import SITE, adapted, normal, relative, truncated, with_spectrum

M, N = 9, 7
KERNEL = (6, 4, 3, 3)
KINDS = ["channel", "spatial", "filter"]
Loss = Callable[[Tensor], Tensor]


def nuclear(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix).sum())


def rank_at_energy(values: Tensor, energy: float) -> int:
    """The smallest r with σ₁² + … + σ_r² ≥ energy · Σ σ²."""
    squares = values.square()
    return next(r for r in range(1, len(values) + 1) if float(squares[:r].sum()) >= energy * float(squares.sum()) * (1 - 1e-13))


def reference(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(best of this rank, its sub-gradient U_r V_rᵀ)."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank], U[:, :rank] @ Vh[:rank]


def begin(layer: nn.Module, *, lr: float, **arguments):
    """(model, handle, optimizer): plain SGD on the whole weight."""
    model = nn.Sequential()
    model.add_module(SITE, layer)
    handle = rw.adapt_(model, rw.compose(rw.catalog.trp(**arguments), "sgd"), where=[SITE])
    return model, handle, handle.optimizer(lr)


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def convolution(seed: int = 0, shape=KERNEL, **geometry) -> nn.Conv2d:
    layer = nn.Conv2d(shape[1], shape[0], shape[2:], **geometry).double()
    with torch.no_grad():
        layer.weight.copy_(normal(seed, *shape))
    return layer


def train(begun, loss: Callable[[], Tensor], steps: int = 1) -> None:
    _, handle, optimizer = begun
    for _ in range(steps):
        handle.backward(loss)
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()


def weight_of(handle: rw.Handle) -> Tensor:
    return handle.parameterization(SITE).roles()["weight"].detach().clone()


def curved(target: Tensor) -> Loss:
    weights = torch.linspace(0.2, 1.0, target.numel(), dtype=torch.float64).reshape(target.shape)
    return lambda W: 0.5 * (weights * (W - target) ** 2).sum()


def gradient(loss: Loss, W: Tensor) -> Tensor:
    W = W.detach().clone().requires_grad_()
    (G,) = torch.autograd.grad(loss(W), W)
    return G


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.97, 1.0])
@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_1_truncation_at_an_energy(energy: float, shape: tuple[int, int]) -> None:
    W = normal(1, *shape)
    d = torch.linalg.svdvals(W)
    T, g, r = truncate(W, energy=energy)
    assert r == rank_at_energy(d, energy)
    assert relative(T, truncated(W, r)) < 1e-12 and relative(g, reference(W, r)[1]) < 1e-12
    dropped, whole = float((W - T).square().sum()), float(W.square().sum())
    assert dropped == pytest.approx(float(d[r:].square().sum()), rel=1e-10, abs=1e-12)
    assert dropped <= (1 - energy) * whole + 1e-12
    assert r == 1 or float(d[r - 1 :].square().sum()) > (1 - energy) * whole
    again, _, less = truncate(T, energy=energy)
    assert less <= r and relative(again, truncated(W, less)) < 1e-12
    if less == r:
        assert relative(again, T) < 1e-12


def test_1_energy_is_counted_anew() -> None:
    W = with_spectrum(2, M, N, [0.85**0.5, 0.06**0.5, 0.05**0.5, 0.04**0.5])
    T, _, r = truncate(W, energy=0.9)
    assert (r, truncate(T, energy=0.9)[2]) == (2, 1)
    W = with_spectrum(2, M, N, [0.8**0.5, 0.11**0.5, 0.09**0.5])
    T, _, r = truncate(W, energy=0.9)
    again, _, less = truncate(T, energy=0.9)
    assert (r, less) == (2, 2) and relative(again, T) < 1e-12


@pytest.mark.parametrize("threshold", [0.3, 1.0, 2.5])
def test_1_truncation_at_a_value(threshold: float) -> None:
    W = with_spectrum(3, M, N, [5.0, 3.0, 2.0, 0.9, 0.4, 0.2, 0.1])
    T, g, r = truncate(W, threshold=threshold)
    assert r == {0.3: 5, 1.0: 3, 2.5: 2}[threshold]
    assert relative(T, truncated(W, r)) < 1e-12
    again, other, same = truncate(T, threshold=threshold)
    assert same == r and relative(again, T) < 1e-12 and relative(other, g) < 1e-12


@pytest.mark.parametrize(("fraction", "rank"), [(0.5, 4), (0.25, 2), (1.0, 8)])
def test_1_truncation_to_a_fraction(fraction: float, rank: int) -> None:
    W = normal(4, 11, 8)
    T, g, r = truncate(W, fraction=fraction)
    assert r == rank and relative(T, truncated(W, rank)) < 1e-12
    again, other, same = truncate(T, fraction=fraction)
    assert same == rank and relative(again, T) < 1e-12 and relative(other, g) < 1e-12


def test_2_subgradient_of_the_nuclear_norm() -> None:
    X, g, r = truncate(normal(5, M, N), energy=0.8)
    assert 1 < r < N
    d = torch.linalg.svdvals(g)
    assert float((d[:r] - 1).abs().max()) < 1e-12 and float(d[r:].max()) < 1e-12
    assert float((g * X).sum()) == pytest.approx(nuclear(X), rel=1e-12)
    for k in range(100):
        Y = X + 10.0 ** (k % 5 - 3) * normal(100 + k, M, N)
        assert nuclear(Y) >= nuclear(X) + float((g * (Y - X)).sum()) - 1e-10


def test_3_without_truncation_it_is_sgd() -> None:
    lr, loss, eye = 0.3, curved(normal(6, M, N)), torch.eye(N, dtype=torch.float64)
    begun = begin(linear(normal(0, M, N)), lr=lr, interval=2, energy=1.0, nuclear=0.0)
    W = normal(0, M, N)
    for _ in range(8):
        train(begun, lambda: loss(begun[0](eye).T))
        W = W - lr * gradient(loss, W)
        assert relative(weight_of(begun[1]), W) < 1e-12


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("criterion", [{"energy": 0.9}, {"energy": 0.6}, {"threshold": 1.2}, {"fraction": 3 / 7}])
def test_3_the_whole_trajectory(interval: int, criterion: dict[str, float]) -> None:
    """Truncated at the end of steps m - 1, 2m - 1, …; the sub-gradient joins the next gradient, and only that."""
    lr, strength, loss, eye = 0.3, 0.2, curved(3 * normal(6, M, N)), torch.eye(N, dtype=torch.float64)
    begun = begin(linear(normal(0, M, N)), lr=lr, interval=interval, nuclear=strength, **criterion)
    W, g = normal(0, M, N), None
    for step in range(3 * interval + 2):
        train(begun, lambda: loss(begun[0](eye).T))
        W = W - lr * (gradient(loss, W) + (0 if g is None else strength * g))
        g = None
        if (step + 1) % interval == 0:
            d = torch.linalg.svdvals(W)
            if "energy" in criterion:
                rank = rank_at_energy(d, criterion["energy"])
            else:
                rank = int((d >= criterion["threshold"]).sum()) if "threshold" in criterion else 3
            W, g = reference(W, rank)
        assert relative(weight_of(begun[1]), W) < 1e-10
    assert relative(begun[0](eye).T, W) < 1e-10  # the weight acts


def matrices(kernel: Tensor, kind: str) -> Tensor:
    """The spec's matricizations, by their entries."""
    out, inner, kh, kw = kernel.shape
    if kind == "channel":
        return kernel.reshape(out, inner * kh * kw)
    if kind == "spatial":
        result = torch.empty(inner * kh, out * kw, dtype=kernel.dtype)
        for o in range(out):
            for c in range(inner):
                for i in range(kh):
                    for j in range(kw):
                        result[c * kh + i, o * kw + j] = kernel[o, c, i, j]
        return result
    return torch.stack([kernel[o].reshape(inner, kh * kw) for o in range(out)])


def chain_of(layer: nn.Conv2d, kind: str, rank: int) -> nn.Sequential:
    if kind == "channel":
        U, S, Vh = torch.linalg.svd(matrices(layer.weight.detach(), kind), full_matrices=False)
        return channel_chain(layer, U[:, :rank] * S[:rank].sqrt(), S[:rank, None].sqrt() * Vh[:rank])
    return spatial_chain(layer, rank) if kind == "spatial" else filter_chain(layer, rank)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_4_after_a_truncation_small_layers_do_the_same(kind: str, padding: int, bias: bool) -> None:
    """At a rate of zero the step is the truncation alone: the model is of rank r and equals a chain of small convolutions."""
    fraction = {"channel": 0.5, "spatial": 0.5, "filter": 0.5}[kind]  # of 6, 12 and 4
    rank = {"channel": 3, "spatial": 6, "filter": 2}[kind]
    begun = begin(convolution(padding=padding, bias=bias), lr=0.0, interval=1, matricization=kind, fraction=fraction)
    model, handle, _ = begun
    before, x = model[0].weight.detach().clone(), normal(7, 2, KERNEL[1], 6, 6)
    train(begun, lambda: model(x).square().sum())
    found = matrices(weight_of(handle).reshape(KERNEL), kind)
    for new, old in zip(found, matrices(before, kind), strict=True) if kind == "filter" else [(found, matrices(before, kind))]:
        assert torch.linalg.matrix_rank(new, rtol=1e-10) == rank
        assert relative(new, truncated(old, rank)) < 1e-10
    twin = nn.Conv2d(KERNEL[1], KERNEL[0], 3, padding=padding, bias=bias).double()
    with torch.no_grad():
        twin.weight.copy_(weight_of(handle).reshape(KERNEL))
        if bias:
            twin.bias.copy_(model[0].bias)
    y = model(x)
    assert relative(twin(x), y) < 1e-12
    assert relative(chain_of(twin, kind, rank)(x), y) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_4_in_float32(kind: str) -> None:
    rank = {"channel": 3, "spatial": 6, "filter": 2}[kind]
    layer = convolution(padding=1).float()
    kept = matrices(layer.weight.detach(), kind)
    low = torch.stack([truncated(part, rank) for part in kept]) if kind == "filter" else truncated(kept, rank)
    with torch.no_grad():
        layer.weight.copy_(fold(low, kind, KERNEL))
    x = normal(7, 2, KERNEL[1], 6, 6).float()
    assert relative(chain_of(layer, kind, rank)(x), layer(x)) < 1e-5


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_4_what_the_chains_are_made_of(stride: int, dilation: int) -> None:
    out, inner, kh, kw = shape = (6, 4, 3, 5)
    layer, x = convolution(shape=shape, padding=(1, 2), stride=stride, dilation=dilation), normal(7, 2, 4, 13, 15)
    whole = {"channel": min(out, inner * kh * kw), "spatial": min(inner * kh, out * kw), "filter": min(inner, kh * kw)}
    shapes = {
        "channel": [(6, inner, kh, kw), (out, 6, 1, 1)],
        "spatial": [(12, inner, kh, 1), (out, 12, 1, kw)],
    }
    numbers = {
        "channel": 6 * (inner * kh * kw + out),
        "spatial": 12 * (inner * kh + out * kw),
        "filter": 4 * out * (inner + kh * kw),
    }
    for kind in KINDS:
        chain = chain_of(layer, kind, whole[kind])
        assert relative(chain(x), layer(x)) < 1e-12  # nothing is lost at full rank
        if kind in shapes:
            assert [tuple(part.weight.shape) for part in chain] == shapes[kind]
        assert sum(tensor.numel() for tensor in chain.parameters()) == numbers[kind] + out


def test_4_a_linear_layer() -> None:
    layer = nn.Linear(N, M).double()
    B, A, x = normal(8, M, 3), normal(9, 3, N), normal(10, 2, 5, N)
    chain = channel_chain(layer, B, A)
    assert [type(part) for part in chain] == [nn.Linear, nn.Linear]
    assert relative(chain(x), F.linear(x, B @ A, layer.bias)) < 1e-12
    model, handle = adapted(normal(0, M, N), rw.compose(rw.catalog.trp(interval=1, fraction=3 / 7), "sgd"))
    train((model, handle, handle.optimizer(0.0)), lambda: model(x).sum())
    W = weight_of(handle)
    U, S, Vh = torch.linalg.svd(W)
    twin = linear(W)
    assert relative(channel_chain(twin, U[:, :3] * S[:3], Vh[:3])(x), model(x)) < 1e-10


@pytest.mark.parametrize("interval", [1, 2])
def test_5_the_subgradient_shrinks_every_kept_value_by_the_same(interval: int) -> None:
    lr, strength, size = 0.1, 0.2, 4
    W = torch.diag(torch.tensor([5.0, 3.0, 0.8, 0.1], dtype=torch.float64))
    begun = begin(linear(W), lr=lr, interval=interval, threshold=0.5, nuclear=strength)
    x = torch.eye(size, dtype=torch.float64)
    for step in range(8):
        train(begun, lambda: 0.0 * begun[0](x).sum())
        done = step // interval  # sub-gradients applied so far
        kept = torch.tensor([5.0, 3.0, 0.8], dtype=torch.float64) - lr * strength * done
        last = 0.0 if step + 1 >= interval else 0.1
        expected = torch.diag(torch.cat([kept, torch.tensor([last], dtype=torch.float64)]))
        assert relative(weight_of(begun[1]), expected) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [KERNEL, (5, 2, 1, 3), (3, 7, 4, 2)])
def test_6_fold_undoes_unfold(kind: str, shape: tuple[int, ...]) -> None:
    kernel = normal(11, *shape)
    matrix = unfold(kernel, kind)
    assert torch.equal(matrix, matrices(kernel, kind))
    assert torch.equal(fold(matrix, kind, shape), kernel)
