"""Online Subspace Descent against its spec (arXiv:2408.12857): a projector that follows an online-PCA loss.

The loss is written out here; its gradient, trajectories and the order old basis - step - new basis are checked on the library.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import rankwise as rw
from rankwise.steps.online_subspace import pca_gradient
from tests.oracles.tools import central_difference
from tests.oracles.tools_projection import Run, adam, stream
from tests.oracles.tools_training import normal, orthonormal, relative, sine_of_angle

SHAPES = [(6, 9), (9, 6)]
SGD = rw.catalog.sgd()


def loss(P: Tensor, G: Tensor, penalty: float = 0.0) -> float:
    """‖Gn - P Pᵀ Gn‖² + λ ‖PᵀP - I‖², Gn = G / ‖G‖."""
    Gn = G / G.norm()
    eye = torch.eye(P.shape[1], dtype=P.dtype)
    return float((Gn - P @ P.T @ Gn).square().sum() + penalty * (P.T @ P - eye).square().sum())


def left(run: Run, matrix: Tensor) -> Tensor:
    """So that the projector is on the left."""
    return matrix if matrix.shape[0] < matrix.shape[1] else matrix.T


@pytest.mark.parametrize("penalty", [0.0, 0.7])
@pytest.mark.parametrize(("m", "n"), [(6, 8), (8, 6)])
def test_1_closed_form_of_the_gradient(penalty: float, m: int, n: int) -> None:
    P, G = normal(0, m, 3), 5 * normal(1, m, n)
    expected = central_difference(lambda at: loss(at, G, penalty), P)
    assert relative(pca_gradient(P, G, penalty), expected) < 1e-8


def test_2_descent_on_a_fixed_gradient_finds_its_principal_components() -> None:
    m, n, rank = 20, 15, 3
    G, P = normal(2, m, n), 0.3 * normal(3, m, rank)
    for _ in range(4000):
        P = P - 0.5 * pca_gradient(P, G)
    S = torch.linalg.svdvals(G)
    best = float(S[rank:].square().sum() / S.square().sum())
    assert loss(P, G) == pytest.approx(best, rel=1e-10)
    assert float((P.T @ P - torch.eye(rank, dtype=torch.float64)).norm()) < 1e-10
    assert sine_of_angle(P, torch.linalg.svd(G)[0][:, :rank]) < 1e-5


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_2_the_step_finds_them_too(m: int, n: int) -> None:
    """From the basis of another gradient."""
    first, G = normal(4, m, n), normal(5, m, n)
    recipe = rw.catalog.online_subspace_descent(rank=2, projector="sgd", rate=0.5, inner=SGD)
    run = Run(recipe, lambda t, W: first if t == 0 else G, 1500, weight=torch.zeros(m, n, dtype=torch.float64), lr=1e-3)
    S = torch.linalg.svdvals(G)
    P = run.basis(1499)
    assert loss(P, left(run, G)) == pytest.approx(float(S[2:].square().sum() / S.square().sum()), rel=1e-8)
    assert loss(run.basis(0), left(run, G)) > loss(P, left(run, G)) + 0.01
    assert float((P.T @ P - torch.eye(2, dtype=torch.float64)).norm()) < 1e-8


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_3_principal_components_are_stationary(penalty: float) -> None:
    G = normal(6, 8, 11)
    P = torch.linalg.svd(G)[0][:, :3]
    assert float(pca_gradient(P, G, penalty).norm()) < 1e-13
    assert float(pca_gradient(orthonormal(7, 8, 3), G, penalty).norm()) > 1e-2


@pytest.mark.parametrize("projector", ["adamw", "sgd"])
@pytest.mark.parametrize("c", [1e-3, 50.0])
def test_4_size_of_the_gradient_does_not_move_the_projector(projector: str, c: float) -> None:
    gradient = stream(8, 6, 9)
    recipe = rw.catalog.online_subspace_descent(rank=2, projector=projector, rate=0.1)
    runs = [Run(recipe, lambda t, W, s=size: s * gradient(t, W), 12, weight=normal(9, 6, 9), lr=0.01) for size in (1.0, c)]
    for t in range(12):
        assert relative(runs[1].basis(t), runs[0].basis(t)) < 1e-8
    assert relative(runs[0].basis(11), runs[0].basis(0)) > 1e-2


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("projector", ["adamw", "sgd"])
@pytest.mark.parametrize("inner", [None, SGD])
def test_5_a_resting_projector_is_galores_first(m: int, n: int, projector: str, inner: rw.Recipe | None) -> None:
    gradient = stream(10, m, n)
    resting, galore, moving = (
        Run(recipe, lambda t, W: W - gradient(t, W), 10, weight=normal(11, m, n), lr=0.1)
        for recipe in (
            rw.catalog.online_subspace_descent(rank=2, scale=0.5, projector=projector, rate=0.0, inner=inner),
            rw.catalog.galore(rank=2, scale=0.5, refresh=10**6, inner=inner),
            rw.catalog.online_subspace_descent(rank=2, scale=0.5, projector=projector, rate=0.1, inner=inner),
        )
    )
    for one, other in zip(resting.path, galore.path, strict=True):
        assert relative(one, other) < 1e-10
    assert relative(moving.path[-1], galore.path[-1]) > 1e-4


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_6_both_directions_use_the_old_projector(m: int, n: int) -> None:
    gradient = stream(12, m, n)
    recipe = rw.catalog.online_subspace_descent(rank=1, scale=0.5, projector="sgd", rate=0.5, inner=SGD)
    run = Run(recipe, gradient, 8, weight=normal(13, m, n))
    for t in range(1, 8):
        old, new = run.basis(t - 1), run.basis(t)
        G, direction = left(run, run.gradients[t]), left(run, run.directions[t])
        assert relative(direction, 0.5 * old @ old.T @ G) < 1e-10
        assert relative(new @ new.T @ G, old @ old.T @ G) > 1e-3


@pytest.mark.parametrize("inner", [None, SGD])
def test_6_a_switch_of_the_gradient_shows_one_step_later(inner: rw.Recipe | None) -> None:
    e1, e2 = torch.tensor([[1.0], [0.0], [0.0]]).double(), torch.tensor([[0.6], [0.8], [0.0]]).double()
    rows = normal(14, 1, 5)
    recipe = rw.catalog.online_subspace_descent(rank=1, projector="sgd", rate=0.5, inner=inner)
    run = Run(recipe, lambda t, W: (e1 if t < 4 else e2) @ rows, 7, weight=torch.zeros(3, 5, dtype=torch.float64))
    for t in range(7):
        inside = run.directions[t][1:].norm() / run.directions[t].norm()
        assert (float(inside) < 1e-10) == (t <= 4)


@pytest.mark.parametrize("rate", [0.2, 0.0])
def test_7_a_turning_subspace_is_followed(rate: float) -> None:
    """For gradients of rank 1 the norm p of the projector moves by p -> p + 4 rate p (1 - p²), which is stable for rate < 1/4:
    at 0.5 it is chaotic, passes near zero, and the angle reached 0.96."""
    speed, steps, rows = 1e-3, 1000, normal(15, 1, 3)

    def gradient(t: int, W: Tensor) -> Tensor:
        return torch.tensor([[math.cos(speed * t)], [math.sin(speed * t)]], dtype=torch.float64) @ rows

    recipe = rw.catalog.online_subspace_descent(rank=1, projector="sgd", rate=rate, inner=SGD)
    run = Run(recipe, gradient, steps, weight=torch.zeros(2, 3, dtype=torch.float64), lr=1e-3)
    angles = []
    for t in range(0, steps, 20):
        P = run.basis(t)[:, 0] / run.basis(t).norm()
        angles.append(math.acos(min(1.0, abs(float(P[0]) * math.cos(speed * t) + float(P[1]) * math.sin(speed * t)))))
    assert (max(angles) < 0.2) == (rate > 0)
    assert float(run.basis(steps - 1).norm()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("projector", "rate"), [("sgd", 0.5), ("adamw", 0.02), ("adamw", 0.3)])
@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_8_loss_never_rises_however_the_projector_moves(projector: str, rate: float, penalty: float) -> None:
    """Along -P Pᵀ G a convex quadratic falls as long as lr · α · ‖P‖² < 2 / β; here far more is allowed than happens."""
    m, n, scale, lr = 6, 9, 0.25, 0.05
    factor = normal(16, m, m)
    H, target = factor @ factor.T / 10, normal(17, m, n)
    recipe = rw.catalog.online_subspace_descent(rank=2, scale=scale, projector=projector, rate=rate, penalty=penalty, inner=SGD)
    run = Run(recipe, lambda t, W: H @ (W - target), 500, weight=normal(18, m, n), lr=lr)
    losses = [float(0.5 * ((W - target) * (H @ (W - target))).sum()) for W in run.path]
    largest = max(float(torch.linalg.matrix_norm(run.basis(t), 2)) ** 2 for t in range(500))
    assert lr * scale * largest * float(torch.linalg.matrix_norm(H, 2)) < 2.0
    assert all(losses[t + 1] <= losses[t] * (1 + 1e-12) for t in range(500))
    assert losses[-1] < 0.9 * losses[0]


def test_projector_follows_the_schedule_of_the_learning_rate() -> None:
    """lr_P(t) = rate · lr(t) / lr(0), rate = 1 / interval unless given."""
    rates = [0.02, 0.02, 0.01, 0.005, 0.04]
    for arguments, rate in (({"rate": 0.3}, 0.3), ({"interval": 5}, 0.2)):
        recipe = rw.catalog.online_subspace_descent(rank=2, projector="sgd", **arguments)
        run = Run(recipe, stream(19, 6, 9), 5, weight=normal(20, 6, 9), lr=rates[0], rates=rates)
        for t in range(1, 5):
            moved = run.basis(t - 1) - run.basis(t)
            expected = central_difference(lambda at, G=run.gradients[t]: loss(at, G), run.basis(t - 1))
            assert relative(moved, rate * rates[t] / rates[0] * expected) < 1e-6


def test_projectors_own_adam_has_no_decay() -> None:
    recipe = rw.catalog.online_subspace_descent(rank=2, projector="adamw", rate=0.05)
    run = Run(recipe, stream(21, 6, 9), 6, weight=normal(22, 6, 9), lr=0.1)
    slopes = [pca_gradient(run.basis(t - 1), run.gradients[t]) for t in range(1, 6)]
    for t in range(1, 6):
        assert relative(run.basis(t - 1) - run.basis(t), 0.05 * adam(slopes[:t])) < 1e-8


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("projector", ["adamw", "sgd"])
def test_state_is_galores_and_the_projectors_moments(m: int, n: int, projector: str) -> None:
    run = Run(rw.catalog.online_subspace_descent(rank=2, projector=projector), stream(23, m, n), 3, weight=normal(24, m, n))
    small, large = min(m, n), max(m, n)
    assert run.numbers == small * 2 + 2 * large * 2 + (2 * small * 2 if projector == "adamw" else 0)
