"""COAP against its spec (arXiv:2412.00071): a projector nudged along its correlation-aware objective, seldom recomputed.

The objective is written out here from its definition; steps are checked on the bases and moments that the library keeps.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rankwise as rw
from rankwise.steps import coap
from tests.oracles.tools import central_difference
from tests.oracles.tools_projection import Run, adam, stream
from tests.oracles.tools_training import drawn, normal, orthonormal, relative, sine_of_angle

SHAPES = [(6, 9), (9, 6)]


def objective(Q: Tensor, G: Tensor, M: Tensor) -> Tensor:
    """MSE(G Qᵀ Q, G) · (1 - mean_i cos((M Q)_i, G_i))."""
    R = M @ Q
    cosines = (R * G).sum(dim=1) / (R.norm(dim=1) * G.norm(dim=1))
    return (G @ Q.T @ Q - G).square().mean() * (1 - cosines.mean())


@pytest.mark.parametrize(("m", "n"), [(40, 15), (15, 40)])
@pytest.mark.parametrize("previous", [None, "generic", "orthonormal"])
@pytest.mark.parametrize("true_rank", [2, 4])
def test_1_recompute_is_exact_on_a_gradient_of_low_rank(m: int, n: int, previous: str | None, true_rank: int) -> None:
    rank = 4
    G = normal(0, m, true_rank) @ normal(1, true_rank, n)
    before = {None: None, "generic": normal(2, rank, n), "orthonormal": orthonormal(3, n, rank).T}[previous]
    Q = coap.sketched_basis(G, before, rank, drawn(4))
    assert Q.shape == (rank, n)
    assert relative(G @ Q.T @ Q, G) < 1e-6
    assert torch.allclose(Q @ Q.T, torch.eye(rank, dtype=torch.float64), atol=1e-10)


def test_2_recompute_keeps_the_best_subspace() -> None:
    G, rank = normal(5, 12, 9), 3
    best = torch.linalg.svd(G)[2][:rank]
    Q = coap.sketched_basis(G, best, rank, drawn(6))
    assert sine_of_angle(Q.T, best.T) < 1e-7
    other = coap.sketched_basis(G, normal(7, rank, 9), rank, drawn(6))
    assert sine_of_angle(other.T, best.T) > 1e-3


@pytest.mark.parametrize("seed", [8, 20, 32])
def test_3_gradient_of_the_objective(seed: int) -> None:
    Q, G, M = normal(seed, 2, 5), normal(seed + 1, 6, 5), normal(seed + 2, 6, 2)
    assert float(coap.objective(Q, G, M)) == pytest.approx(float(objective(Q, G, M)), rel=1e-12)
    assert relative(coap.objective_gradient(Q, G, M), central_difference(lambda at: float(objective(at, G, M)), Q)) < 1e-4


def test_4_objective_vanishes_with_a_momentum_along_the_gradient() -> None:
    """Once with an exact reconstruction, and, its blind spot, once without."""
    Q, sizes = orthonormal(40, 5, 2).T, normal(41, 6, 1).abs() + 0.1
    G = normal(42, 6, 2) @ Q
    M = sizes * G @ Q.T
    assert abs(float(coap.objective(Q, G, M))) < 1e-12
    assert float(coap.objective_gradient(Q, G, M).norm()) < 1e-10
    assert relative(G @ (2 * Q).T @ (2 * Q), G) > 1.0
    assert abs(float(coap.objective(2 * Q, G, M))) < 1e-12
    assert float(coap.objective(Q, G, -M + 0.1 * normal(43, 6, 2))) >= 0.0
    assert float(coap.objective(2 * Q, G, -M)) == pytest.approx(2 * float((3 * G).square().mean()), rel=1e-10)


@pytest.mark.parametrize("size", [1.0, 100.0])
@pytest.mark.parametrize("rate", [1e-3, 1e-4])
def test_5_small_update_lowers_the_objective(size: float, rate: float) -> None:
    recipe = rw.catalog.coap(rank=2, refresh=1, recompute=1000, rate=rate)
    gradient = stream(44, 6, 5, 52)
    run = Run(recipe, lambda t, W: size * gradient(t, W), 51, weight=normal(45, 6, 5), lr=0.01)
    for step in range(1, 51):
        before, after, G = run.kept[step - 1], run.kept[step]["Q"], run.gradients[step]
        Q, M = before["Q"], before["inner.exp_avg"]
        assert float(objective(after, G, M)) < float(objective(Q, G, M))
        assert float((after - Q).norm()) <= rate * (1 + 1e-12)
        gradient_of_it = central_difference(lambda at, G=G, M=M: float(objective(at, G, M)), Q)
        assert relative(Q - after, rate * gradient_of_it * min(1.0, 1 / float(gradient_of_it.norm()))) < 1e-4
    if size == 100.0:
        assert float((run.kept[1]["Q"] - run.kept[0]["Q"]).norm()) == pytest.approx(rate, rel=1e-9)


def test_5_small_update_of_a_wide_weight_is_bounded_too() -> None:
    recipe = rw.catalog.coap(rank=2, refresh=1, recompute=1000, rate=1e-3)
    gradient = stream(46, 5, 8)
    run = Run(recipe, lambda t, W: 100 * gradient(t, W), 20, weight=normal(47, 5, 8), lr=0.01)
    for step in range(1, 20):
        assert 0.0 < float((run.basis(step) - run.basis(step - 1)).norm()) <= 1e-3 * (1 + 1e-12)


@pytest.mark.parametrize(("m", "n"), [*SHAPES, (6, 6)])
@pytest.mark.parametrize("inner", ["sgd", "adamw"])
def test_6_always_recomputed_at_full_rank_it_is_galore(m: int, n: int, inner: str) -> None:
    """With Adam in one window: signs of basis vectors are free, and moments outlive a change of basis."""
    shared = {"rank": 6, "scale": 1.0, "refresh": 3 if inner == "sgd" else 100, "inner": getattr(rw.catalog, inner)()}
    gradient = stream(48, m, n)
    there, here = (
        Run(recipe, lambda t, W: W - gradient(t, W), 8, weight=normal(49, m, n), lr=0.1)
        for recipe in (rw.catalog.coap(recompute=1, **shared), rw.catalog.galore(**shared))
    )
    for one, other in zip(there.path, here.path, strict=True):
        assert relative(one, other) < 1e-8


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_7_restoring_into_the_same_basis_changes_nothing(m: int, n: int) -> None:
    """Gradients that are multiples of one matrix of rank r keep the basis up to signs."""
    G, sizes = normal(50, m, 3) @ normal(60, 3, n), [1.0, -2.0, 0.5, 3.0, -1.0, 0.1]
    restored, undisturbed = (
        Run(recipe, lambda t, W: sizes[t] * G, 6, weight=normal(51, m, n), lr=0.1)
        for recipe in (
            rw.catalog.coap(rank=3, refresh=1, recompute=1, restore=True),
            rw.catalog.coap(rank=3, refresh=1000, restore=True),
        )
    )
    for step in range(6):
        assert relative(restored.directions[step], undisturbed.directions[step]) < 1e-6
        for name in ("inner.exp_avg", "inner.exp_avg_sq"):
            assert relative(restored.kept[step][name].abs(), undisturbed.kept[step][name].abs()) < 1e-6


@pytest.mark.parametrize("recompute", [1, 1000])
def test_7_restoring_carries_moments_into_the_new_basis(recompute: int) -> None:
    """M <- M Q_old Q_newᵀ, V <- (√V Q_old Q_newᵀ)², then Adam's own step."""
    recipe = rw.catalog.coap(rank=3, refresh=1, recompute=recompute, restore=True, rate=0.1)
    run = Run(recipe, stream(52, 9, 6), 8, weight=normal(53, 9, 6), lr=0.1)
    for step in range(1, 8):
        old, new, R = run.kept[step - 1], run.kept[step], run.gradients[step] @ run.kept[step]["Q"].T
        turn = old["Q"] @ new["Q"].T
        assert relative(new["inner.exp_avg"], 0.9 * old["inner.exp_avg"] @ turn + 0.1 * R) < 1e-10
        V = (old["inner.exp_avg_sq"].sqrt() @ turn).square()
        assert relative(new["inner.exp_avg_sq"], 0.999 * V + 0.001 * R**2) < 1e-10


def test_7_moments_stay_as_they_are_unless_restored() -> None:
    run = Run(rw.catalog.coap(rank=3, refresh=1), stream(54, 9, 6), 8, weight=normal(55, 9, 6), lr=0.1)
    for step in range(1, 8):
        R = run.gradients[step] @ run.kept[step]["Q"].T
        assert relative(run.kept[step]["inner.exp_avg"], 0.9 * run.kept[step - 1]["inner.exp_avg"] + 0.1 * R) < 1e-10


def test_8_schedule() -> None:
    """A change at 32, 64, …; at 160 and 320 a recompute from the basis before, which is orthonormal, as the nudged is not."""
    gradient = stream(56, 5, 3, 330)
    run = Run(rw.catalog.coap(rank=2, refresh=32, recompute=5), gradient, 330, weight=normal(57, 5, 3), lr=0.01)
    changed = [t for t in range(1, 330) if not torch.equal(run.kept[t]["Q"], run.kept[t - 1]["Q"])]
    assert changed == list(range(32, 330, 32))
    for t in [0, *changed]:
        Q = run.kept[t]["Q"]
        drift = float((Q @ Q.T - torch.eye(2, dtype=torch.float64)).norm())
        assert (drift < 1e-12) == (t % 160 == 0)
    for t in (160, 320):
        G = run.gradients[t]
        left = torch.linalg.qr(G @ run.kept[t - 1]["Q"].T)[0]
        assert sine_of_angle(run.kept[t]["Q"].T, torch.linalg.svd(left.T @ G)[2][:2].T) < 1e-10


def test_direction_is_projected_back_with_the_new_basis() -> None:
    """The definition: R = G Qᵀ, back N Q, times scale; also with a basis that is no longer orthonormal."""
    recipe = rw.catalog.coap(rank=2, scale=0.25, refresh=1, recompute=1000, rate=0.5)
    run = Run(recipe, stream(58, 9, 6), 5, weight=normal(59, 9, 6))
    for step, kept in enumerate(run.kept):
        N = adam([G @ earlier["Q"].T for G, earlier in zip(run.gradients[: step + 1], run.kept, strict=False)])
        assert relative(run.directions[step], 0.25 * N @ kept["Q"]) < 1e-10
    Q = run.kept[-1]["Q"]
    assert relative(Q @ Q.T, torch.eye(2, dtype=torch.float64)) > 1e-3
