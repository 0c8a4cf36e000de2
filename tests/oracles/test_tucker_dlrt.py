"""TDLRT against its spec (arXiv:2305.19059): DLRT for kernels, W' = core ×_i U_i with one rank per mode.

The oracles are the spec's list in its order. Of number 3 the bounds are tested on cores that training made; they hold for
truncating the modes in parallel and one after the other. The dense kernel is read through the layer with one-hot images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankwise as rw
from rankwise.compression.chains import tucker_chain
from tests.oracles.tools_training import SITE, adapted, normal, orthonormal, relative

Loss = Callable[[Tensor], Tensor]
SHAPE = (10, 8, 3, 3)


def unfolded(tensor: Tensor, mode: int) -> Tensor:
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def multiplied(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """tensor ×_mode matrix."""
    return torch.tensordot(matrix, tensor, dims=([1], [mode])).movedim(0, mode)


def composed(core: Tensor, bases: Sequence[Tensor]) -> Tensor:
    for mode, basis in enumerate(bases):
        core = multiplied(core, basis, mode)
    return core


def multilinear(seed: int, shape: Sequence[int], ranks: Sequence[int]) -> Tensor:
    """A tensor of these multilinear ranks."""
    bases = [orthonormal(seed + 1 + k, d, r) for k, (d, r) in enumerate(zip(shape, ranks, strict=True))]
    return composed(normal(seed, *ranks), bases)


def layer_of(shape: Sequence[int], seed: int = 0) -> nn.Module:
    layer = (
        nn.Linear(shape[1], shape[0], bias=False) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2:], bias=False)
    )
    layer = layer.double()
    with torch.no_grad():
        layer.weight.copy_(normal(seed, *shape))
    return layer


class Begun:
    """One adapted layer and its optimizer."""

    def __init__(self, shape: Sequence[int], *, lr: float, seed: int = 0, **arguments) -> None:
        self.shape, self.lr = tuple(shape), lr
        self.model = nn.Sequential()
        self.model.add_module(SITE, layer_of(shape, seed))
        self.handle = rw.adapt_(self.model, rw.catalog.tucker_dlrt(**arguments), where=[SITE])
        self.entry = self.handle.parameterization(SITE)
        self.optimizer = self.handle.optimizer(lr)

    def read(self) -> Tensor:
        """The kernel that acts, differentiable: one-hot images through the layer."""
        n = math.prod(self.shape[1:])
        eye = torch.eye(n, dtype=torch.float64)
        y = self.model(eye if len(self.shape) == 2 else eye.reshape(n, *self.shape[1:]))
        return y.reshape(n, self.shape[0]).T.reshape(self.shape)

    def kernel(self) -> Tensor:
        return self.read().detach()

    def factors(self) -> tuple[Tensor, list[Tensor]]:
        core, bases = self.entry.factors()
        return core.detach().clone(), [basis.detach().clone() for basis in bases]

    def train(self, loss: Loss, steps: int = 1) -> None:
        for _ in range(steps):
            self.handle.backward(lambda: loss(self.read()))
            self.optimizer.step()
            self.handle.after_step()
            self.optimizer.zero_grad()


def distance(target: Tensor) -> Loss:
    return lambda W: 0.5 * ((W - target) ** 2).sum()


def curved(target: Tensor) -> Loss:
    weights = torch.linspace(0.2, 1.0, target.numel(), dtype=torch.float64).reshape(target.shape)
    return lambda W: 0.5 * (weights * (W - target) ** 2).sum()


def gradient(loss: Loss, W: Tensor) -> Tensor:
    W = W.detach().clone().requires_grad_()
    (G,) = torch.autograd.grad(loss(W), W)
    return G


def basis_of(matrix: Tensor, rank: int | None = None) -> Tensor:
    U, S, _ = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, : int(S.gt(1e-11 * S[0]).sum()) if rank is None else rank]


def widened(W: Tensor, G: Tensor, ranks: Sequence[int], modes: Sequence[int], lr: float) -> dict[int, Tensor]:
    """Per mode the projector onto span [K_i - lr dL/dK_i | U_i], read off the dense kernel."""
    projectors = {}
    for mode in modes:
        U, S, Vh = torch.linalg.svd(unfolded(W, mode), full_matrices=False)
        U, S, V = U[:, : ranks[mode]], S[: ranks[mode]], Vh[: ranks[mode]].T
        Q = basis_of(torch.cat([U * S - lr * unfolded(G, mode) @ V, U], 1))
        projectors[mode] = Q @ Q.T
    return projectors


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dilation", [1, 2])
def test_1_chain_of_small_convolutions(stride: int, padding: int, dilation: int) -> None:
    layer = nn.Conv2d(8, 10, 3, stride=stride, padding=padding, dilation=dilation)
    core, U_out, U_in = (tensor.float() for tensor in (normal(1, 4, 3, 3, 3), orthonormal(2, 10, 4), orthonormal(3, 8, 3)))
    kernel, x = composed(core, [U_out, U_in]), normal(4, 2, 8, 9, 9).float()
    expected = F.conv2d(x, kernel, layer.bias, stride=stride, padding=padding, dilation=dilation)
    chain = tucker_chain(layer, core, U_out, U_in)
    found = chain(x)
    assert found.shape == expected.shape and relative(found, expected) < 1e-4 / 10
    assert [type(part) for part in chain] == [nn.Conv2d] * 3
    assert [tuple(part.weight.shape) for part in chain] == [(3, 8, 1, 1), (4, 3, 3, 3), (10, 4, 1, 1)]
    assert chain[0].bias is None and chain[1].bias is None and chain[2].bias is not None


def test_1_chain_of_a_linear_layer() -> None:
    layer = nn.Linear(8, 10).double()
    core, U_out, U_in, x = normal(1, 4, 3), orthonormal(2, 10, 4), orthonormal(3, 8, 3), normal(4, 2, 5, 8)
    expected = x @ (U_out @ core @ U_in.T).T + layer.bias
    assert relative(tucker_chain(layer, core, U_out, U_in)(x), expected) < 1e-12


@pytest.mark.parametrize("modes", [(0, 1), (0, 1, 2, 3)])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_1_the_adapted_layer(modes: tuple[int, ...], stride: int, padding: int) -> None:
    model = nn.Sequential()
    model.add_module(SITE, nn.Conv2d(8, 10, 3, stride=stride, padding=padding).double())
    handle = rw.adapt_(model, rw.catalog.tucker_dlrt(modes=modes, min_rank=1), where=[SITE])
    p, x = handle.parameterization(SITE), normal(4, 2, 8, 7, 7)
    core, bases = p.factors()
    kernel = composed(core, bases)
    assert relative(p.kernel(), kernel) < 1e-12
    assert relative(model(x), F.conv2d(x, kernel, model[0].bias, stride=stride, padding=padding)) < 1e-12
    change = handle.update_of(SITE).dense()
    assert relative(change + model[0].weight.reshape(10, -1), kernel.reshape(10, -1)) < 1e-12
    # half of each mode; with one channel of each kernel mode left, 5 would exceed 4 · 1 · 1
    assert core.shape == ((5, 4, 3, 3) if modes == (0, 1) else (4, 4, 1, 1))


@pytest.mark.parametrize("modes", [(0, 1), (0, 1, 2, 3)])
def test_2_augmentation_loses_nothing(modes: tuple[int, ...]) -> None:
    begun = Begun(SHAPE, lr=0.4, ranks=(4, 3, 2, 2)[: len(modes)], modes=modes, min_rank=2, max_rank=6)
    loss = curved(normal(5, *SHAPE))
    for _ in range(3):
        before, (narrow, bases) = begun.kernel(), begun.factors()
        begun.handle.backward(lambda: loss(begun.read()))
        core, wide = begun.factors()
        assert relative(composed(core, wide), before) < 1e-10
        assert relative(begun.kernel(), before) < 1e-10
        for mode in modes:
            assert core.shape[mode] == min(2 * narrow.shape[mode], SHAPE[mode])
            assert relative(wide[mode] @ wide[mode].T @ bases[mode], bases[mode]) < 1e-10  # the old basis is inside
        begun.optimizer.step()
        begun.handle.after_step()
        begun.optimizer.zero_grad()


@pytest.mark.parametrize("modes", [(0, 1), (0, 1, 2, 3)])
def test_2_the_core_step_is_projected_gradient_descent(modes: tuple[int, ...]) -> None:
    lr, loss = 0.4, curved(normal(5, *SHAPE))
    begun = Begun(SHAPE, lr=lr, ranks=(4, 3, 2, 2)[: len(modes)], modes=modes, min_rank=2, max_rank=6)
    for _ in range(3):
        W, (core, _) = begun.kernel(), begun.factors()
        G = change = gradient(loss, W)
        for mode, P in widened(W, G, core.shape, modes, lr).items():
            change = multiplied(change, P, mode)
        begun.handle.backward(lambda: loss(begun.read()))
        begun.optimizer.step()
        assert relative(begun.kernel(), W - lr * change) < 1e-9
        begun.handle.after_step()
        begun.optimizer.zero_grad()


@pytest.mark.parametrize("tau", [0.03, 0.1, 0.3])
@pytest.mark.parametrize("modes", [(0, 1), (0, 1, 2, 3)])
def test_3_error_of_the_truncation(tau: float, modes: tuple[int, ...]) -> None:
    target = composed(
        multilinear(6, SHAPE, (6, 6, 3, 3)), [torch.diag(3.0 ** -torch.arange(d, dtype=torch.float64)) for d in SHAPE]
    )
    begun = Begun(SHAPE, lr=0.6, ranks=(4, 3, 2, 2)[: len(modes)], modes=modes, min_rank=1, max_rank=10, tolerance=tau)
    begun.train(distance(target), 3)
    for _ in range(4):
        begun.handle.backward(lambda: distance(target)(begun.read()))
        begun.optimizer.step()
        before = begun.kernel()
        begun.handle.after_step()
        begun.optimizer.zero_grad()
        core, _ = begun.factors()
        tails = [float(torch.linalg.svdvals(unfolded(before, k))[core.shape[k] :].square().sum()) for k in modes]
        error, total = float((before - begun.kernel()).square().sum()), float(before.square().sum())
        assert max(tails) - 1e-12 * total <= error <= sum(tails) + 1e-12 * total
        assert error <= len(modes) * tau**2 * total
    assert max(tails) > 0


def test_3_ranks_are_the_smallest_within_the_tolerance() -> None:
    """The first mode that is cut sees the whole core in either order; in the other one a core that may be cut already."""
    tau, target = 0.1, normal(6, *SHAPE) * 3.0 ** -torch.arange(10, dtype=torch.float64)[:, None, None, None]
    begun = Begun(SHAPE, lr=0.6, ranks=(4, 3), min_rank=1, max_rank=5, tolerance=tau)
    for _ in range(4):
        begun.handle.backward(lambda: distance(target)(begun.read()))
        begun.optimizer.step()
        before = begun.kernel()
        begun.handle.after_step()
        begun.optimizer.zero_grad()
        d = torch.linalg.svdvals(unfolded(before, 0))
        expected = next(j for j in range(len(d) + 1) if float(d[j:].norm()) < tau * float(before.norm()))
        assert begun.factors()[0].shape[0] == min(expected, 5)


@pytest.mark.parametrize("tau", [0.05, 0.2])
def test_4_a_linear_layer_is_dlrt(tau: float) -> None:
    shape, lr = (12, 9), 0.5
    loss, weight = curved(normal(5, *shape)), normal(0, *shape)
    begun = Begun(shape, lr=lr, ranks=(3, 3), tolerance=tau, min_rank=2, max_rank=4)
    model, handle = adapted(weight, rw.catalog.dlrt(rank=3, tolerance=tau, min_rank=2, max_rank=4))
    optimizer = handle.optimizer(lr)
    for _ in range(6):
        assert relative(begun.kernel(), weight + handle.update_of(SITE).dense()) < 1e-9
        begun.train(loss)
        handle.backward(lambda: loss(model(torch.eye(9, dtype=torch.float64)).T))
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
        assert begun.factors()[0].shape == (handle.parameterization(SITE).active,) * 2
    assert relative(begun.kernel(), weight + handle.update_of(SITE).dense()) < 1e-9


@pytest.mark.parametrize(
    ("shape", "ranks", "modes"),
    [(SHAPE, (4, 3), (0, 1)), (SHAPE, (4, 3, 2, 2), (0, 1, 2, 3)), ((12, 9), (3, 3), (0, 1))],
)
def test_5_lands_on_a_target_of_the_starts_ranks(
    shape: tuple[int, ...], ranks: tuple[int, ...], modes: tuple[int, ...]
) -> None:
    target = multilinear(7, shape, (*ranks, *shape[len(ranks) :]))
    begun = Begun(shape, lr=1.0, ranks=ranks, modes=modes, min_rank=2, max_rank=6, tolerance=1e-8)
    begun.train(distance(target))
    assert relative(begun.kernel(), target) < 1e-8
    assert begun.factors()[0].shape == (*ranks, *shape[len(ranks) :])


@pytest.mark.parametrize(
    ("shape", "ranks", "modes"),
    [(SHAPE, (4, 3), (0, 1)), (SHAPE, (4, 3, 2, 2), (0, 1, 2, 3)), ((12, 9), (5, 2), (0, 1)), ((8, 4, 1, 1), (4, 2), (0, 1))],
)
@pytest.mark.parametrize("start", ["svd", "random"])
def test_6_bases_and_ranks(shape: tuple[int, ...], ranks: tuple[int, ...], modes: tuple[int, ...], start: str) -> None:
    """Orthonormal bases, and no rank above the product of the others: (5, 2) in a matrix is (2, 2)."""
    begun = Begun(shape, lr=0.4, ranks=ranks, modes=modes, min_rank=2, max_rank=6, start=start)
    loss = curved(normal(5, *shape))
    for step in range(6):
        core, bases = begun.factors()
        sizes = core.shape
        for mode, basis in enumerate(bases):
            assert basis.shape == (shape[mode], sizes[mode])
            assert float((basis.T @ basis - torch.eye(sizes[mode], dtype=torch.float64)).norm()) < 1e-12
        for mode in modes:
            assert sizes[mode] <= math.prod(sizes) // sizes[mode]
            assert step > 0 or sizes[mode] <= ranks[mode]
            assert step == 0 or 2 <= sizes[mode] <= shape[mode]
        begun.train(loss)


def test_6_the_floor_gives_way_to_the_other_ranks() -> None:
    """A 1×1 kernel with two input channels has no third direction in its outputs, whatever `min_rank` asks for."""
    begun = Begun((8, 2, 1, 1), lr=0.4, ranks=(2, 2), min_rank=3, max_rank=6)
    for _ in range(3):
        begun.train(curved(normal(5, 8, 2, 1, 1)))
        assert begun.factors()[0].shape == (2, 2, 1, 1)
