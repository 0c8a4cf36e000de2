"""Meta mirror descent against its spec (arXiv:2312.13486): z ← z - a ∇L(h(z)) with a learned inverse mirror map φ = h(z).

The oracles are the spec's list. The outer loop over tasks is left to the builder's own tests; its gradient is number 7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from rankwise.procedures.mirror_meta import MirrorMap, adapt_task
from tests.oracles.tools_training import drawn, normal, relative

LAYERS = [(6, 4), (6,), (5, 6), (5,), (4, 5), (3, 2, 3, 3)]  # more than one block of four, and a convolution's kernel
Tensors = list[Tensor]


def points(shapes: Sequence[tuple[int, ...]], seed: int) -> Tensors:
    return [normal(seed + k, *shape).requires_grad_() for k, shape in enumerate(shapes)]


def mirror_of(shapes: Sequence[tuple[int, ...]], *, moved: float = 0.0, seed: int = 0, **arguments) -> MirrorMap:
    """In float64; with `moved`, away from its start by that much."""
    mirror = MirrorMap(shapes, generator=drawn(seed), **arguments).double()
    if moved:
        generator = drawn(seed + 1)
        with torch.no_grad():
            for tensor in mirror.parameters():
                tensor.add_(moved * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return mirror


def loss_of(targets: Tensors) -> Callable[[Tensors], Tensor]:
    """Smooth, not quadratic, and it ties the tensors together."""

    def loss(phi: Tensors) -> Tensor:
        parts = [((p - t) ** 2 + torch.sin(p)).sum() for p, t in zip(phi, targets, strict=True)]
        return sum(parts[1:], parts[0]) + 0.05 * sum(p.sum() for p in phi) ** 2

    return loss


def gradients(loss: Callable[[Tensors], Tensor], phi: Tensors) -> Tensors:
    leaves = [p.detach().clone().requires_grad_() for p in phi]
    return list(torch.autograd.grad(loss(leaves), leaves))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def jacobian(function: Callable[[Tensors], Sequence[Tensor]], z: Tensors) -> Tensor:
    """d φ / d z, all numbers of all tensors in order."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in z]
    out = flat(list(function(leaves)))
    rows = []
    for value in out:
        grads = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        rows.append(flat([torch.zeros_like(z) if g is None else g for g, z in zip(grads, leaves, strict=True)]))
    return torch.stack(rows)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_1_it_starts_as_the_identity(block: int) -> None:
    mirror, z = mirror_of(LAYERS, block=block), points(LAYERS, 10)
    phi = mirror(list(z))
    assert all(torch.equal(p, tensor) for p, tensor in zip(phi, z, strict=True))
    assert not any(scale.any() for scale in mirror.log_scales(list(z)))


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_1_then_it_is_maml(steps: int) -> None:
    z, loss = points(LAYERS, 10), loss_of(points(LAYERS, 40))
    found = adapt_task(mirror_of(LAYERS), z, loss, steps=steps, rate=1e-2)
    expected = [tensor.detach().clone() for tensor in z]
    for _ in range(steps):
        expected = [p - 1e-2 * g for p, g in zip(expected, gradients(loss, expected), strict=True)]
    for p, value in zip(found, expected, strict=True):
        assert relative(p, value) < 1e-12


def test_2_a_diagonal_map_is_a_diagonal_preconditioner() -> None:
    shapes = LAYERS[:3]
    z, loss = points(shapes, 10), loss_of(points(shapes, 40))
    D = [torch.exp(normal(70 + k, *shape)) for k, shape in enumerate(shapes)]
    expected = [d * tensor.detach() for d, tensor in zip(D, z, strict=True)]
    for steps in range(1, 5):
        expected = [p - 2e-2 * d * g for p, d, g in zip(expected, D, gradients(loss, expected), strict=True)]
        found = adapt_task(lambda z: [d * t for d, t in zip(D, z, strict=True)], z, loss, steps=steps, rate=2e-2)
        for p, value in zip(found, expected, strict=True):
            assert relative(p, value) < 1e-12


def test_2_one_block_is_affine_entry_by_entry() -> None:
    """φ = exp(w) z + b, so that training it is Meta-SGD."""
    shapes = LAYERS[:4]
    mirror, z, loss = mirror_of(shapes, moved=0.3), points(shapes, 10), loss_of(points(shapes, 40))
    zero = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    b, D = mirror(zero), [torch.exp(scale).detach() for scale in mirror.log_scales(zero)]
    assert relative(flat(D), torch.ones(sum(d.numel() for d in D), dtype=torch.float64)) > 0.1
    for p, d, tensor, shift in zip(mirror(list(z)), D, z, b, strict=True):
        assert d.shape == tensor.shape and relative(p, d * tensor + shift) < 1e-12
    expected = [p.detach() for p in mirror(list(z))]
    for _ in range(3):
        expected = [p - 2e-2 * d * g for p, d, g in zip(expected, D, gradients(loss, expected), strict=True)]
    for p, value in zip(adapt_task(mirror, z, loss, steps=3, rate=2e-2), expected, strict=True):
        assert relative(p, value) < 1e-12


@pytest.mark.parametrize(
    ("shapes", "block", "shrink"),
    [
        ([(4, 3), (4,), (3, 4)], 1, 1),
        ([(4, 3), (4,), (3, 4), (3,), (2, 3)], 2, 1),
        ([(16, 8), (8,), (4, 8)], 1, 2),
        ([(3, 2, 3, 3), (3,), (2, 3)], 1, 1),
    ],
)
def test_3_the_jacobian_is_triangular(shapes: list[tuple[int, ...]], block: int, shrink: int) -> None:
    """Diagonal with positive entries within a block, zero above; later blocks see earlier ones, log |det| is read off."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    group = torch.tensor([k // block for k, size in enumerate(sizes) for _ in range(size)])
    seen = 0
    for seed in range(3):
        mirror, z = mirror_of(shapes, moved=0.3, seed=10 * seed, block=block, shrink=shrink), points(shapes, 10 + 50 * seed)
        J = jacobian(mirror, z)
        own = torch.eye(len(J), dtype=torch.bool)
        below = group[:, None] > group[None, :]
        assert not J[~own & ~below].any()
        assert (J.diagonal() > 0).all()
        scales = mirror.log_scales(list(z))
        assert [tuple(scale.shape) for scale in scales] == [tuple(shape) for shape in shapes]
        assert relative(flat(scales), J.diagonal().log()) < 1e-10
        assert float(torch.linalg.slogdet(J).logabsdet) == pytest.approx(float(flat(scales).sum().detach()), rel=1e-9, abs=1e-9)
        seen += int(J[below].any())
    assert seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_4_the_inverse(dtype: torch.dtype, block: int) -> None:
    mirror = mirror_of(LAYERS, moved=0.2, block=block).to(dtype)
    z = [tensor.detach().to(dtype) for tensor in points(LAYERS, 10)]
    phi = mirror(list(z))
    assert max(relative(p, tensor) for p, tensor in zip(phi, z, strict=True)) > 0.05
    for back, tensor in zip(mirror.inverse(list(phi)), z, strict=True):
        assert relative(back, tensor) < (1e-10 if dtype is torch.float64 else 1e-5)


def test_4_far_points_do_not_overflow() -> None:
    mirror = mirror_of(LAYERS, moved=1.0, block=1)
    z = [1e3 * tensor.detach() for tensor in points(LAYERS, 10)]
    assert all(torch.isfinite(p).all() for p in mirror(list(z)))


def test_5_the_right_map_solves_a_quadratic_in_one_step() -> None:
    H = torch.exp(normal(80, 7))
    (z,) = points([(7,)], 81)
    for optimum in (torch.zeros(7, dtype=torch.float64), normal(82, 7)):
        (phi,) = adapt_task(
            lambda z: [z[0] / H], [z], lambda p, o=optimum: 0.5 * (H * (p[0] - o) ** 2).sum(), steps=1, rate=1.0
        )
        assert float((phi - optimum).norm()) < 1e-12


def test_6_with_softmax_it_is_exponentiated_gradient() -> None:
    """φ ← φ exp(-a ∇L(φ)), normalized: the gradient is taken at φ and not through the map."""
    (z,), a = points([(6,)], 83), 0.3
    costs, curve = normal(84, 6), normal(85, 6).abs()

    def loss(phi: Tensors) -> Tensor:
        return (costs * phi[0] + curve * phi[0] ** 2).sum()

    phi = torch.softmax(z.detach(), 0)
    for steps in range(1, 8):
        phi = phi * torch.exp(-a * (costs + 2 * curve * phi))
        phi = phi / phi.sum()
        (found,) = adapt_task(lambda z: [torch.softmax(z[0], 0)], [z], loss, steps=steps, rate=a)
        assert relative(found, phi) < 1e-12


def query(phi: Tensors) -> Tensor:
    return (torch.cos(2 * phi[0]) + 0.3 * phi[0] ** 3).sum()


def support(phi: Tensors) -> Tensor:
    return ((phi[0] - 0.7) ** 4 + torch.exp(0.5 * phi[0])).sum() + phi[0].prod()


def meta_value(z: Tensor, w: Tensor, b: Tensor, steps: int, a: float) -> float:
    """The query loss after the inner loop, by hand, in numbers without a graph."""

    def g(phi: Tensor) -> Tensor:
        return 4 * (phi - 0.7) ** 3 + 0.5 * torch.exp(0.5 * phi) + phi.flip(0)

    for _ in range(steps):
        z = z - a * g(torch.exp(w) * z + b)
    return float(query([torch.exp(w) * z + b]))


@pytest.mark.parametrize("steps", [1, 3])
def test_7_the_meta_gradient_is_that_of_finite_differences(steps: int) -> None:
    a, start = 0.1, [normal(90 + k, 2) * 0.5 for k in range(3)]
    leaves = [tensor.clone().requires_grad_() for tensor in start]
    z, w, b = leaves

    def mirror(z: Tensors) -> Tensors:
        return [torch.exp(w) * z[0] + b]

    value = query(adapt_task(mirror, [z], support, steps=steps, rate=a))
    assert float(value.detach()) == pytest.approx(meta_value(*start, steps, a), rel=1e-12)
    found = torch.autograd.grad(value, leaves)
    for k in range(3):
        for i in range(2):
            step = torch.zeros(2, dtype=torch.float64)
            step[i] = 1e-5
            up = meta_value(*(t + step if j == k else t for j, t in enumerate(start)), steps, a)
            down = meta_value(*(t - step if j == k else t for j, t in enumerate(start)), steps, a)
            assert float(found[k][i]) == pytest.approx((up - down) / 2e-5, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("steps", [1, 3])
def test_7_first_order_takes_the_inner_gradients_as_constants(steps: int) -> None:
    a, start = 0.1, [normal(90 + k, 2) * 0.5 for k in range(3)]
    grads = {}
    for second_order in (True, False):
        leaves = z, w, b = [tensor.clone().requires_grad_() for tensor in start]
        phi = adapt_task(
            lambda t, w=w, b=b: [torch.exp(w) * t[0] + b], [z], support, steps=steps, rate=a, second_order=second_order
        )
        grads[second_order] = torch.autograd.grad(query(phi), leaves)
        last = phi[0].detach()
    at = last.clone().requires_grad_()
    (outer,) = torch.autograd.grad(query([at]), at)
    D = torch.exp(start[1])
    for found, expected in zip(grads[False], (D * outer, (last - start[2]) * outer, outer), strict=True):
        assert relative(found, expected) < 1e-10  # dφ = D dz_0, dw (φ - b), db
    for first, second in zip(grads[False], grads[True], strict=True):
        assert relative(first, second) > 1e-2


def test_7_the_meta_gradient_of_the_learned_map() -> None:
    """Along a random direction in the start and all parameters of the map at once."""
    shapes = [(4, 3), (4,), (3, 4), (3,)]
    mirror, z = mirror_of(shapes, moved=0.2, block=2, shrink=1), points(shapes, 10)
    inner, outer = loss_of(points(shapes, 40)), loss_of(points(shapes, 60))
    leaves = [*z, *mirror.parameters()]

    def value() -> Tensor:
        return outer(adapt_task(mirror, z, inner, steps=2, rate=2e-2))

    grads = torch.autograd.grad(value(), leaves, allow_unused=True)
    generator = drawn(5)
    turns = [torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for tensor in leaves]
    slopes = [0.0 if grad is None else float((grad * turn).sum()) for grad, turn in zip(grads, turns, strict=True)]
    assert abs(sum(slopes[: len(z)])) > 1e-3 and abs(sum(slopes[len(z) :])) > 1e-3
    values = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for tensor, turn in zip(leaves, turns, strict=True):
                tensor.add_(sign * 1e-6 * turn)
        values.append(float(value().detach()))
        with torch.no_grad():
            for tensor, turn in zip(leaves, turns, strict=True):
                tensor.sub_(sign * 1e-6 * turn)
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(sum(slopes), rel=1e-4)
