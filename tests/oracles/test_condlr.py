"""CondLR against its spec (arXiv:2306.01485): W' = U S Vᵀ of fixed rank with the condition number of S at most τ.

The oracles are the spec's list in its order, and number 0 is the definition. Two of them hold only as stated here: the clamp
leaves every S alone at τ = ∞ but not as a limit (4), and a product of layers is bounded with the angle between their bases (6).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankwise as rw
from rankwise.steps.condlr import clamp_core, scaled_orthogonal, tangent
from tests.oracles.tools_training import SITE, adapted, layer_model, normal, orthonormal, relative, truncated, with_spectrum

M, N, RANK = 10, 7, 4
TAUS = [1.0, 1.1, 1.5]
Loss = Callable[[Tensor], Tensor]


def begin(weight: Tensor, *, lr: float = 0.1, **arguments):
    """(model, handle, parameterization, optimizer) of one layer without bias."""
    model, handle = adapted(weight, rw.catalog.condlr(**arguments))
    return model, handle, handle.parameterization(SITE), handle.optimizer(lr)


def effective(handle: rw.Handle, weight: Tensor) -> Tensor:
    return (weight + handle.update_of(SITE).dense()).detach()


def curved(target: Tensor) -> Loss:
    weights = torch.linspace(0.2, 1.0, target.numel(), dtype=torch.float64).reshape(target.shape)
    return lambda W: 0.5 * (weights * (W - target) ** 2).sum()


def gradient(loss: Loss, W: Tensor) -> Tensor:
    W = W.detach().clone().requires_grad_()
    (G,) = torch.autograd.grad(loss(W), W)
    return G


def train(begun, loss: Loss, steps: int = 1) -> None:
    model, handle, _, optimizer = begun
    eye = torch.eye(model[0].weight.shape[1], dtype=torch.float64)
    for _ in range(steps):
        handle.backward(lambda: loss(model(eye).T))
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()


def copies(p) -> tuple[Tensor, Tensor, Tensor]:
    U, S, V = (p.roles()[role].detach().clone() for role in ("U", "S", "V"))
    return U, S, V


def condition(S: Tensor, rank: int | None = None) -> float:
    d = torch.linalg.svdvals(S)[:rank]
    return float(d[0] / d[-1])


def qf(matrix: Tensor) -> Tensor:
    """Q of the QR decomposition with a positive diagonal."""
    Q, R = torch.linalg.qr(matrix)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)


def mean_square(S: Tensor) -> Tensor:
    """a = tr(S Sᵀ) / r."""
    return S.square().sum() / S.shape[0]


def nearest(S: Tensor, retraction: str) -> Tensor:
    """√a times an orthogonal matrix."""
    if retraction == "qr":
        return mean_square(S).sqrt() * qf(S)
    P, _, Qh = torch.linalg.svd(S)
    return mean_square(S).sqrt() * P @ Qh


def clamped(S: Tensor, tau: float) -> Tensor:
    if math.isinf(tau):
        return S
    P, d, Qh = torch.linalg.svd(S)
    reach = d.mean() * (tau - 1) / (tau + 1)
    return P @ torch.diag(d.clamp(d.mean() - reach, d.mean() + reach)) @ Qh


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_0_the_layer_is_the_product_of_its_factors(tau: float, shape: tuple[int, int]) -> None:
    weight = normal(0, *shape)
    begun = begin(weight, rank=RANK, tau=tau)
    U, S, V = copies(begun[2])
    assert U.shape == (shape[0], RANK) and S.shape == (RANK, RANK) and V.shape == (shape[1], RANK)
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    assert relative(U @ U.T, left[:, :RANK] @ left[:, :RANK].T) < 1e-10  # the start spans the best subspaces
    assert relative(V @ V.T, right[:RANK].T @ right[:RANK]) < 1e-10
    train(begun, curved(normal(1, *shape)), 2)
    U, S, V = copies(begun[2])
    x = normal(2, 5, shape[1])
    assert relative(begun[0](x), x @ V @ S.T @ U.T) < 1e-12
    assert relative(effective(begun[1], weight), U @ S @ V.T) < 1e-12
    assert begun[1].trained_numbers == RANK * (sum(shape) + RANK)


def test_0_a_convolution_is_its_unfolded_kernel() -> None:
    model = nn.Sequential()
    model.add_module(SITE, nn.Conv2d(3, 8, 3, stride=2, padding=1).double())
    handle = rw.adapt_(model, rw.catalog.condlr(rank=3), where=[SITE])
    U, S, V = copies(handle.parameterization(SITE))
    x = normal(2, 2, 3, 6, 6)
    expected = F.conv2d(x, (U @ S @ V.T).reshape(8, 3, 3, 3), model[0].bias, stride=2, padding=1)
    assert relative(model(x), expected) < 1e-12


@pytest.mark.parametrize(
    ("compression", "shape", "rank"), [(0.5, (10, 7), 4), (0.8, (10, 7), 2), (0.5, (6, 20), 3), (0.0, (5, 8), 5)]
)
def test_0_rank_of_a_compression(compression: float, shape: tuple[int, int], rank: int) -> None:
    _, _, p, _ = begin(normal(0, *shape), compression=compression)
    assert p.roles()["S"].shape == (rank, rank)


@pytest.mark.parametrize("tau", [*TAUS, 5.0])
@pytest.mark.parametrize("retraction", ["qr", "polar"])
def test_1_condition_number_after_every_step(tau: float, retraction: str) -> None:
    weight = normal(0, M, N)
    begun = begin(weight, lr=0.5, rank=RANK, tau=tau, retraction=retraction)
    loss = curved(with_spectrum(3, M, N, [9.0, 3.0, 1.0, 0.1]))
    for _ in range(8):
        train(begun, loss)
        S = copies(begun[2])[1]
        assert condition(S) <= tau * (1 + 1e-6)
        assert condition(effective(begun[1], weight), RANK) == pytest.approx(condition(S), rel=1e-9)
    assert condition(S) > 0.9 * tau  # this target pulls against the bound
    assert torch.linalg.matrix_rank(effective(begun[1], weight), rtol=1e-10) == RANK


def test_1_the_clamp_by_hand() -> None:
    P, Q = orthonormal(4, 4, 4), orthonormal(5, 4, 4)
    S = P @ torch.diag(torch.tensor([5.0, 2.0, 1.0, 0.1], dtype=torch.float64)) @ Q.T
    found = clamp_core(S, 1.5)
    expected = torch.tensor([2.43, 2.0, 1.62, 1.62], dtype=torch.float64)  # mean 2.025, reach 0.405
    assert relative(torch.linalg.svdvals(found), expected) < 1e-12
    assert relative(found, P @ torch.diag(expected) @ Q.T) < 1e-12
    assert condition(found) == pytest.approx(1.5, rel=1e-12)


@pytest.mark.parametrize("tau", [1.0 + 1e-9, 1.1, 1.5, 3.0, 40.0])
def test_1_the_clamp_against_its_formula(tau: float) -> None:
    for seed in range(20):
        S = normal(seed, 5, 5)
        found = clamp_core(S, tau)
        assert relative(found, clamped(S, tau)) < 1e-10
        assert condition(found) <= tau * (1 + 1e-6)


@pytest.mark.parametrize("retraction", ["qr", "polar"])
def test_2_multiple_of_an_orthogonal_matrix(retraction: str) -> None:
    S = normal(6, RANK, RANK)
    found = scaled_orthogonal(S, retraction)
    eye = torch.eye(RANK, dtype=torch.float64)
    assert relative(found, nearest(S, retraction)) < 1e-12
    assert relative(found.T @ found, mean_square(S) * eye) < 1e-12
    assert float(found.square().sum()) == pytest.approx(float(S.square().sum()), rel=1e-12)
    begun = begin(normal(0, M, N), lr=0.3, rank=RANK, tau=1.0, retraction=retraction)
    for _ in range(5):
        train(begun, curved(normal(1, M, N)))
        S = copies(begun[2])[1]
        assert relative(S.T @ S, mean_square(S) * eye) < 1e-10


def test_2_polar_is_the_nearest_one() -> None:
    """Among all multiples of orthogonal matrices of S's own norm; QR's is another one."""
    S = normal(6, RANK, RANK)
    best = float((S - scaled_orthogonal(S, "polar")).norm())
    assert float((S - scaled_orthogonal(S, "qr")).norm()) > 1.001 * best
    size = mean_square(S).sqrt()
    assert all(float((S - size * orthonormal(100 + k, RANK, RANK)).norm()) > best for k in range(30))


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("momentum", [0.0, 0.45])
def test_3_bases_and_tangents(tau: float, momentum: float) -> None:
    begun = begin(normal(0, M, N), lr=0.5, rank=RANK, tau=tau, momentum=momentum)
    eye = torch.eye(RANK, dtype=torch.float64)
    for _ in range(10):
        train(begun, curved(normal(1, M, N)))
        U, _, V = copies(begun[2])
        assert float((U.T @ U - eye).norm()) < 1e-12 and float((V.T @ V - eye).norm()) < 1e-12
    D = normal(7, M, RANK)
    found = tangent(U, D)
    assert relative(found, (torch.eye(M, dtype=torch.float64) - U @ U.T) @ D) < 1e-12
    assert float((U.T @ found).norm()) < 1e-12


@pytest.mark.parametrize("tau", [1.0, 1.1, 1.5, 20.0, math.inf])
@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_4_steps_against_the_formulas(tau: float, momentum: float) -> None:
    """At τ = ∞ this is SGD on three factors, with the gradients of the outer two projected onto their tangents."""
    lr, loss = 0.3, curved(normal(1, M, N))
    begun = begin(normal(0, M, N), lr=lr, rank=RANK, tau=tau, momentum=momentum)
    buffers = [torch.zeros(M, RANK), torch.zeros(RANK, RANK), torch.zeros(N, RANK)]
    for _ in range(5):
        U, S, V = copies(begun[2])
        G = gradient(loss, U @ S @ V.T)
        c = 1 / mean_square(S) if tau == 1 else 1 / condition(S) ** 2
        D_U, D_V = tangent(U, G @ V @ S.T) * c, tangent(V, G.T @ U @ S) * c
        if tau == 1 and condition(S) < 1 + 1e-9:  # then c stands for (S Sᵀ)⁻¹
            assert relative(D_U, (torch.eye(M, dtype=torch.float64) - U @ U.T) @ G @ V @ torch.linalg.inv(S)) < 1e-9
        buffers = [momentum * old + new for old, new in zip(buffers, (D_U, U.T @ G @ V, D_V), strict=True)]
        moved = S - lr * buffers[1]
        core = nearest(moved, "qr") if tau == 1 else clamped(moved, tau)
        expected = {"U": qf(U - lr * buffers[0]), "S": core, "V": qf(V - lr * buffers[2])}
        train(begun, loss)
        for role, value in expected.items():
            assert relative(begun[2].roles()[role], value) < 1e-9


@pytest.mark.parametrize("tau", [1.0, 1.5])
def test_4_gradients_of_the_factorized_forward(tau: float) -> None:
    loss = curved(normal(1, M, N))
    model, handle, p, _ = begin(normal(0, M, N), rank=RANK, tau=tau)
    U, S, V = copies(p)
    G = gradient(loss, U @ S @ V.T)
    handle.backward(lambda: loss(model(torch.eye(N, dtype=torch.float64)).T))
    for role, value in {"U": G @ V @ S.T, "S": U.T @ G @ V, "V": G.T @ U @ S}.items():
        found = p.roles()[role].grad
        assert found is not None and relative(found, value) < 1e-12


def test_4_no_bound_is_no_clamp() -> None:
    S = torch.diag(torch.tensor([10.0, 1.0, 1.0], dtype=torch.float64))
    assert torch.equal(clamp_core(S, math.inf), S)
    almost = torch.linalg.svdvals(clamp_core(S, 1e12))
    assert float(almost[0]) == pytest.approx(8.0, rel=1e-9)  # the interval's upper end goes to twice the mean, no further
    mild = normal(8, 4, 4) * 0.1 + torch.eye(4, dtype=torch.float64)
    assert relative(clamp_core(mild, 1e12), mild) < 1e-12


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("retraction", ["qr", "polar"])
def test_5_a_partial_isometry_is_a_fixed_point(tau: float, retraction: str) -> None:
    target = with_spectrum(9, M, N, [2.5] * RANK)
    begun = begin(target, lr=0.7, rank=RANK, tau=tau, retraction=retraction)
    for _ in range(4):
        assert float(curved(target)(effective(begun[1], target))) < 1e-24
        train(begun, curved(target))
    assert relative(effective(begun[1], target), target) < 1e-12
    train(begun, curved(truncated(normal(1, M, N), RANK)))
    assert relative(effective(begun[1], target), target) > 1e-3


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("hidden", [3, 8])
def test_6_two_linear_layers(tau: float, hidden: int) -> None:
    """cond(W₂ W₁) ≤ τ² · cond(V₂ᵀ U₁); the angle costs nothing where the rank is the whole hidden width, and much elsewhere."""
    rank = 3
    model = layer_model(normal(10, hidden, N), after=normal(11, M, hidden))
    handle = rw.adapt_(model, rw.catalog.condlr(rank=rank, tau=tau))
    optimizer = handle.optimizer(lr=0.02)
    weights = {site: getattr(model, site).weight.detach().clone() for site in (SITE, "after")}
    target, eye = normal(12, M, N), torch.eye(N, dtype=torch.float64)
    worst = 0.0
    for _ in range(5):
        handle.backward(lambda: 0.5 * (model(eye).T - target).square().sum())
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
        first, second = (weights[site] + handle.update_of(site).dense().detach() for site in weights)
        turn = handle.parameterization("after").roles()["V"].detach().T @ handle.parameterization(SITE).roles()["U"].detach()
        found = condition(second @ first, rank)
        assert found <= tau**2 * condition(turn) * (1 + 1e-6)
        worst = max(worst, found / tau**2)
        if hidden == rank:
            assert condition(turn) == pytest.approx(1, rel=1e-9)
    assert (worst <= 1 + 1e-6) == (hidden == rank)
