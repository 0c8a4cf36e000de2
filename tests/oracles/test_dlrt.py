"""DLRT against its spec (arXiv:2205.13571): the rank-adaptive KLS integrator, W' = U S Vᵀ.

The oracles are the spec's list in its order; number 0 is the definition and whole steps against dense linear algebra.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from tests.oracles.tools_training import SITE, adapted, normal, orthonormal, relative, truncated, with_spectrum

M, N, RANK = 12, 9, 3
Loss = Callable[[Tensor], Tensor]


def begin(weight: Tensor, *, lr: float, seed: int = 0, **arguments):
    """(model, handle, parameterization, optimizer) of one layer without bias."""
    model, handle = adapted(weight, rw.catalog.dlrt(**arguments), seed=seed)
    return model, handle, handle.parameterization(SITE), handle.optimizer(lr)


def matrix_of(model: nn.Module, n: int) -> Tensor:
    """W' through the layer: its outputs at the unit vectors."""
    return model(torch.eye(n, dtype=torch.float64)).T


def effective(handle: rw.Handle, weight: Tensor) -> Tensor:
    return (weight + handle.update_of(SITE).dense()).detach()


def distance(target: Tensor) -> Loss:
    return lambda W: 0.5 * ((W - target) ** 2).sum()


def curved(target: Tensor, seed: int = 30) -> Loss:
    """½ tr (W - T) H (W - T)ᵀ with 0.1 ≤ H ≤ 1."""
    n = target.shape[1]
    Q = orthonormal(seed, n, n)
    H = (Q * torch.linspace(0.1, 1.0, n, dtype=torch.float64)) @ Q.T
    return lambda W: 0.5 * ((W - target) @ H * (W - target)).sum()


def gradient(loss: Loss, W: Tensor) -> Tensor:
    W = W.detach().clone().requires_grad_()
    (G,) = torch.autograd.grad(loss(W), W)
    return G


def train(begun, loss: Loss, steps: int = 1) -> None:
    model, handle, _, optimizer = begun
    n = model[0].weight.shape[1]
    for _ in range(steps):
        handle.backward(lambda: loss(matrix_of(model, n)))
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()


def factors(p) -> tuple[Tensor, Tensor, Tensor]:
    U, S, V = (tensor.detach().clone() for tensor in p.factors())
    return U, S, V


def span(matrix: Tensor) -> Tensor:
    """Projector onto the column space."""
    U, S, _ = torch.linalg.svd(matrix, full_matrices=False)
    U = U[:, S.gt(1e-11 * S[0])]
    return U @ U.T


def kept(values: Tensor, limit: float, low: int, high: int) -> int:
    """The smallest j with ‖d_j, d_{j+1}, …‖ < limit, within [low, high]."""
    j = next(j for j in range(len(values) + 1) if float(values[j:].norm()) < limit)
    return min(max(j, low), high)


def kls(U: Tensor, S: Tensor, V: Tensor, loss: Loss, lr: float) -> tuple[Tensor, Tensor]:
    """(W after the S-step, W̃ before it) of the adaptive integrator, without factors: only projectors matter."""
    W = U @ S @ V.T
    G = gradient(loss, W)
    P, Q = span(torch.cat([U @ S - lr * G @ V, U], 1)), span(torch.cat([V @ S.T - lr * G.T @ U, V], 1))
    start = P @ W @ Q
    return start - lr * P @ gradient(loss, start) @ Q, start


def test_0_the_layer_is_the_product_of_its_factors() -> None:
    weight = normal(0, M, N)
    model, handle, p, _ = begun = begin(weight, lr=0.1, rank=RANK)
    U, S, V = factors(p)
    assert U.shape == (M, RANK) and S.shape == (RANK, RANK) and V.shape == (N, RANK) and p.active == RANK
    assert relative(U @ S @ V.T, truncated(weight, RANK)) < 1e-12  # the start is the truncated SVD
    assert relative(effective(handle, weight), U @ S @ V.T) < 1e-12
    train(begun, distance(normal(1, M, N)), 3)
    U, S, V = factors(p)
    x = normal(2, 7, N)
    assert relative(model(x), x @ V @ S.T @ U.T) < 1e-12
    assert relative(effective(handle, weight), U @ S @ V.T) < 1e-12
    exact = handle.low_rank_of(SITE)
    assert exact is None or relative(exact.B @ exact.A, handle.update_of(SITE).dense()) < 1e-12


def test_0_beside_a_kept_base() -> None:
    weight = normal(0, M, N)
    begun = begin(weight, lr=0.1, rank=RANK, keep_base=True, start="random")
    train(begun, distance(normal(1, M, N)), 2)
    U, S, V = factors(begun[2])
    assert relative(begun[1].update_of(SITE).dense(), U @ S @ V.T) < 1e-12
    assert relative(matrix_of(begun[0], N), weight + U @ S @ V.T) < 1e-12


def test_0_a_random_start() -> None:
    _, _, p, _ = begin(normal(0, M, N), lr=0.1, rank=RANK, start="random")
    U, S, V = factors(p)
    for basis in (U, V):
        assert relative(basis.T @ basis, torch.eye(RANK, dtype=torch.float64)) < 1e-12
    d = S.diagonal()
    assert torch.equal(S, torch.diag(d)) and (d > 0).all() and torch.equal(d, d.sort(descending=True).values)


def test_0_gradients_of_one_backward() -> None:
    """G V, Gᵀ U and Uᵀ G V: those of K and L at one W, without the ill-conditioned detour over S."""
    weight, loss = normal(0, M, N), curved(normal(1, M, N))
    model, _, p, _ = begin(weight, lr=0.1, rank=RANK)
    U, S, V = factors(p)
    loss(matrix_of(model, N)).backward()
    G, roles = gradient(loss, U @ S @ V.T), p.roles()
    for role, expected in {"U": G @ V, "V": G.T @ U, "S": U.T @ G @ V}.items():
        whole = roles[role].grad
        assert whole is not None and whole.shape == roles[role].shape
        cut = tuple(slice(size) for size in expected.shape)
        assert relative(whole[cut], expected) < 1e-12
        assert float(whole.norm()) == pytest.approx(float(expected.norm()), rel=1e-12)  # the rest is idle
    assert roles["U"].shape == (M, 2 * 4) and roles["S"].shape == (8, 8) and roles["V"].shape == (N, 8)  # 4 = ⌊9/2⌋


@pytest.mark.parametrize(("theta", "absolute"), [(0.3, False), (0.5, False), (1e-9, False), (1.5, True)])
def test_0_steps_against_dense_linear_algebra(theta: float, absolute: bool) -> None:
    lr, weight, loss = 0.4, normal(0, M, N), curved(normal(1, M, N))
    begun = begin(weight, lr=lr, rank=RANK, tolerance=theta, absolute=absolute)
    ranks = set()
    for _ in range(6):
        W, _ = kls(*factors(begun[2]), loss, lr)
        d = torch.linalg.svdvals(W)
        rank = kept(d, theta if absolute else theta * float(d.norm()), 2, 4)
        train(begun, loss)
        assert begun[2].active == rank
        assert relative(effective(begun[1], weight), truncated(W, rank)) < 1e-9
        ranks.add(rank)
    assert (4 in ranks) if theta == 1e-9 else (min(ranks) < 4)


def test_0_fixed_rank() -> None:
    lr, weight, loss = 0.4, normal(0, M, N), curved(normal(1, M, N))
    begun = begin(weight, lr=lr, rank=RANK, adaptive=False)
    for _ in range(5):
        U, S, V = factors(begun[2])
        G = gradient(loss, U @ S @ V.T)
        P, Q = span(U @ S - lr * G @ V), span(V @ S.T - lr * G.T @ U)
        start = P @ U @ S @ V.T @ Q
        expected = start - lr * P @ gradient(loss, start) @ Q
        train(begun, loss)
        assert begun[2].active == RANK
        assert relative(effective(begun[1], weight), expected) < 1e-9


def test_0_frozen_bases() -> None:
    lr, weight, loss = 0.4, normal(0, M, N), curved(normal(1, M, N))
    begun = begin(weight, lr=lr, rank=RANK, frozen_bases_after=2)
    train(begun, loss, 1)
    first = factors(begun[2])
    train(begun, loss, 1)
    U, S, V = factors(begun[2])
    assert begun[2].active != first[0].shape[1] or relative(span(U), span(first[0])) > 1e-3  # still turning
    train(begun, loss, 1)
    W = U @ S @ V.T
    expected = W - lr * U @ U.T @ gradient(loss, W) @ V @ V.T
    assert relative(effective(begun[1], weight), expected) < 1e-10
    assert relative(span(factors(begun[2])[0]), span(U)) < 1e-10 and relative(span(factors(begun[2])[2]), span(V)) < 1e-10


@pytest.mark.parametrize("theta", [0.1, 1e-9])
def test_1_augmentation_loses_nothing(theta: float) -> None:
    lr, weight, loss = 0.4, normal(0, M, N), curved(normal(1, M, N))
    model, handle, p, optimizer = begin(weight, lr=lr, rank=RANK, tolerance=theta)
    for _ in range(4):
        U, S, V = factors(p)
        W, G = U @ S @ V.T, gradient(loss, U @ S @ V.T)
        handle.backward(lambda: loss(matrix_of(model, N)))
        wide_U, wide_S, wide_V = factors(p)  # before the S-step
        assert p.active == wide_U.shape[1] == 2 * U.shape[1]
        assert relative(wide_U @ wide_S @ wide_V.T, W) < 1e-12
        assert relative(effective(handle, weight), W) < 1e-12
        assert relative(wide_U @ wide_U.T, span(torch.cat([U @ S - lr * G @ V, U], 1))) < 1e-9
        assert relative(wide_V @ wide_V.T, span(torch.cat([V @ S.T - lr * G.T @ U, V], 1))) < 1e-9
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()


def test_1_other_tensors_get_the_gradient_of_one_pass() -> None:
    """Gradients of a head in the K and L pass are discarded: it steps once, on the gradient of the S-step."""
    model = nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, 2)).double()
    handle = rw.adapt_(model, rw.catalog.dlrt(rank=RANK), where=["0"], train_also=["2"])
    handle.optimizer(0.4)
    x = normal(3, 6, N)

    def closure() -> Tensor:
        return model(x).pow(2).sum()

    expected = torch.autograd.grad(closure(), [model[2].weight, model[2].bias])
    loss = handle.backward(closure)
    assert float(loss) == pytest.approx(float(closure()), rel=1e-12)
    for tensor, grad in zip([model[2].weight, model[2].bias], expected, strict=True):
        assert tensor.grad is not None and relative(tensor.grad, grad) < 1e-12


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_2_lands_on_a_target_of_the_starts_rank(scale: float) -> None:
    target = scale * with_spectrum(5, M, N, [3.0, 2.0, 1.0])
    weight = normal(0, M, N)
    begun = begin(weight, lr=1.0, rank=RANK, tolerance=1e-8)
    train(begun, distance(target))
    assert relative(effective(begun[1], weight), target) < 1e-12 / min(scale, 1.0)
    assert begun[2].active == RANK


def test_2_grows_to_the_targets_rank() -> None:
    target, weight = normal(5, M, 4) @ normal(6, 4, N), normal(0, M, N)
    begun = begin(weight, lr=1.0, rank=RANK, tolerance=1e-8)
    train(begun, distance(target))
    assert begun[2].active == 4
    assert relative(effective(begun[1], weight), target) > 0.05
    train(begun, distance(target), 2)
    assert begun[2].active == 4
    assert relative(effective(begun[1], weight), target) < 1e-12


@pytest.mark.parametrize(("theta", "absolute"), [(0.1, False), (0.2, False), (0.5, False), (0.8, True)])
def test_3_what_truncation_drops(theta: float, absolute: bool) -> None:
    """Strictly less than θ ‖S₁‖, and one rank fewer would drop more. (The cap on the rank may break it, the floor cannot.)"""
    weight = normal(0, M, N)
    loss = curved(with_spectrum(7, M, N, [8.0, 4.0, 2.0, 1.0, 0.5, 0.2]))
    model, handle, p, optimizer = begin(weight, lr=0.5, rank=RANK, tolerance=theta, absolute=absolute, max_rank=6)
    for _ in range(6):
        handle.backward(lambda: loss(matrix_of(model, N)))
        optimizer.step()
        before = effective(handle, weight)
        handle.after_step()
        optimizer.zero_grad()
        after, d = effective(handle, weight), torch.linalg.svdvals(before)
        limit = theta if absolute else theta * float(before.norm())
        assert p.active < 6  # the cap does not act
        assert float((before - after).norm()) < limit
        assert p.active == 2 or float(d[p.active - 1 :].norm()) >= limit
        assert float((before - after).norm()) == pytest.approx(float(d[p.active :].norm()), rel=1e-9, abs=1e-12)


def test_3_floor_and_cap_of_the_rank() -> None:
    loss = distance(with_spectrum(7, M, N, [8.0, 0.1, 0.05]))
    begun = begin(normal(0, M, N), lr=0.9, rank=RANK, tolerance=0.5, min_rank=2)
    train(begun, loss, 8)
    assert begun[2].active == 2
    begun = begin(normal(0, M, N), lr=0.9, rank=RANK, tolerance=1e-9, max_rank=5)
    train(begun, distance(normal(8, M, N)), 4)
    assert begun[2].active == 5


@pytest.mark.parametrize("adaptive", [True, False])
def test_4_bases_stay_orthonormal(adaptive: bool) -> None:
    begun = begin(normal(0, M, N), lr=0.5, rank=RANK, adaptive=adaptive)
    for _ in range(10):
        train(begun, curved(normal(1, M, N)))
        U, S, V = factors(begun[2])
        for basis in (U, V):
            assert float((basis.T @ basis - torch.eye(basis.shape[1], dtype=torch.float64)).norm()) < 1e-12
        if adaptive:  # S = diag(d), descending
            d = S.diagonal()
            assert float((S - torch.diag(d)).norm()) < 1e-12 * float(d[0]) and (d[:-1] >= d[1:]).all()


def test_5_the_s_step_is_projected_gradient_descent() -> None:
    lr, weight, loss = 0.4, normal(0, M, N), curved(normal(1, M, N))
    model, handle, p, optimizer = begin(weight, lr=lr, rank=RANK)
    for _ in range(4):
        before = effective(handle, weight)
        handle.backward(lambda: loss(matrix_of(model, N)))
        U, _, V = factors(p)
        optimizer.step()
        expected = before - lr * U @ U.T @ gradient(loss, before) @ V @ V.T
        assert relative(effective(handle, weight), expected) < 1e-10
        handle.after_step()
        optimizer.zero_grad()


@pytest.mark.parametrize("rank", [4, 5])
def test_5_twice_the_rank_of_the_layer_is_gradient_descent(rank: int) -> None:
    lr, weight, loss = 0.4, normal(0, 8, 8), curved(normal(1, 8, 8))
    model, handle, _, optimizer = begin(weight, lr=lr, rank=rank, max_rank=rank)
    before = effective(handle, weight)
    handle.backward(lambda: loss(matrix_of(model, 8)))
    optimizer.step()
    assert relative(effective(handle, weight), before - lr * gradient(loss, before)) < 1e-10


@pytest.mark.parametrize("theta", [0.02, 0.1, 0.3])
def test_6_descent_up_to_the_tolerance(theta: float) -> None:
    """f(W₊) ≤ f(W) - lr (1 - lr/2) ‖P_U G P_V‖² + ‖G₁‖ δ + δ²/2, δ = θ ‖S₁‖, for a gradient with Lipschitz constant 1."""
    lr, weight, loss = 0.7, normal(0, M, N), curved(with_spectrum(9, M, N, [6.0, 3.0, 1.0, 0.3]))
    model, handle, p, optimizer = begin(weight, lr=lr, rank=RANK, tolerance=theta)
    for _ in range(12):
        before = effective(handle, weight)
        handle.backward(lambda: loss(matrix_of(model, N)))
        U, _, V = factors(p)
        optimizer.step()
        middle = effective(handle, weight)
        handle.after_step()
        optimizer.zero_grad()
        gain = lr * (1 - lr / 2) * float((U.T @ gradient(loss, before) @ V).norm()) ** 2
        assert float(loss(middle)) <= float(loss(before)) - gain + 1e-10
        delta = theta * float(middle.norm())
        slack = float(gradient(loss, middle).norm()) * delta + delta**2 / 2
        assert float(loss(effective(handle, weight))) <= float(loss(before)) - gain + slack + 1e-10
    assert float(loss(effective(handle, weight))) < 0.5 * float(loss(truncated(weight, RANK)))


def test_7_tiny_singular_values_do_not_slow_it() -> None:
    weight, target = normal(0, M, N), with_spectrum(5, M, N, [3.0, 2.0, 1.0])
    for scale in (1.0, 1e-4, 1e-8):
        begun = begin(scale * weight, lr=1.0, rank=RANK, tolerance=1e-8)
        train(begun, distance(target))
        assert relative(effective(begun[1], scale * weight), target) < 1e-12
    U, S, Vh = torch.linalg.svd(1e-8 * weight, full_matrices=False)
    B, A = U[:, :RANK] * S[:RANK].sqrt(), S[:RANK, None].sqrt() * Vh[:RANK]
    G = B @ A - target
    B, A = B - G @ A.T, A - B.T @ G  # the same step on two factors stalls
    assert relative(B @ A, target) > 0.99
