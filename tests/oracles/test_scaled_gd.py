"""ScaledGD, ScaledGD(λ) and Riemannian-preconditioned LoRA against their spec (arXiv:2302.01186, 2402.02347)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rankwise
from rankwise.core.operators import LowRank
from rankwise.problems import generators, problem, solve
from tests.oracles.tools_training import (
    SITE,
    block_of,
    directions,
    factor_gradients,
    normal,
    optimizer_on,
    orthonormal,
    product,
    relative,
    with_spectrum,
)

M, N, RANK = 8, 6, 3


def one_step(B: Tensor, A: Tensor, G: Tensor, lr: float, damping: float = 0.0, scale: float = 1.0) -> Tensor:
    block = block_of(B=B, A=A)
    optimizer = optimizer_on({SITE: block}, f"lora + sgd + scaled_gd(damping={damping})", lr)
    factor_gradients(block, G, scale)
    optimizer.step()
    return product(block)


@pytest.mark.parametrize("seed", range(3))
def test_1_step_does_not_see_the_factorization(seed: int) -> None:
    B, A, G, T = normal(seed, M, RANK), normal(seed + 10, RANK, N), normal(seed + 20, M, N), normal(seed + 30, RANK, RANK)
    first = one_step(B, A, G, 0.1)
    second = one_step(B @ torch.linalg.inv(T), T @ A, G, 0.1)
    assert relative(second, first) < 1e-11  # 8e-15 in the spec, times the condition of T
    assert relative(first, B @ A) > 1e-3


def test_2_identity_factor_leaves_the_gradient() -> None:
    s, G, A = 2.0, normal(40, RANK, N), normal(41, RANK, N)
    eye = torch.eye(RANK, dtype=torch.float64)
    found = directions("lora + sgd + scaled_gd(damping=0.0)", {"B": eye, "A": A}, {"B": s * G @ A.T, "A": s * G}, "scaled_gd")
    assert relative(found["A"], s * G) < 1e-14


@pytest.mark.parametrize("damping", [1e4, 1e6])
def test_2_large_damping_is_plain_descent(damping: float) -> None:
    B, A, g_B, g_A = normal(42, M, RANK), normal(43, RANK, N), normal(44, M, RANK), normal(45, RANK, N)
    found = directions(f"lora + sgd + scaled_gd(damping={damping})", {"B": B, "A": A}, {"B": g_B, "A": g_A}, "scaled_gd")
    assert relative(damping * found["A"], g_A) < float(torch.linalg.matrix_norm(B, 2) ** 2) / damping
    assert relative(damping * found["B"], g_B) < float(torch.linalg.matrix_norm(A, 2) ** 2) / damping


def iterations(condition: float, *, scaled: bool, limit: int, every: int = 1) -> int | None:
    target = generators.factorization(m=60, rank=3, condition=condition, symmetric=True)
    steps = rankwise.compose(f"lora + sgd + scaled_gd(damping={1 / condition / 20})").steps() if scaled else None
    trace = solve.solve(
        target, rank=6, init="small", step=steps, lr=0.3, iterations=limit, every=every, alpha=1e-6, symmetric=True
    )
    return trace.iterations_to(1e-6)


@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
def test_3_condition_number_does_not_enter(condition: float) -> None:
    found = iterations(condition, scaled=True, limit=40)
    assert found is not None
    assert found <= 40


def test_3_plain_descent_slows_down_with_the_condition_number() -> None:
    easy = iterations(10.0, scaled=False, limit=1000, every=10)
    assert easy is not None
    assert iterations(100.0, scaled=False, limit=4 * easy, every=4 * easy) is None  # so the ratio exceeds 4


@pytest.mark.parametrize("lr", [0.2, 0.4, 0.5, 0.66])
@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
def test_4_local_rate(lr: float, condition: float) -> None:
    S = torch.linspace(1.0, 1 / condition, 4, dtype=torch.float64)
    U, V = orthonormal(50, 40, 4), orthonormal(51, 30, 4)
    size = 0.02 * float(S[-1]) ** 0.5
    E_B, E_A = normal(52, 40, 4), normal(53, 4, 30)
    B = U * S.sqrt() + size * E_B / torch.linalg.matrix_norm(E_B, 2)
    A = (V * S.sqrt()).T + size * E_A / torch.linalg.matrix_norm(E_A, 2)
    trace = solve.solve(
        problem.factorizing((U * S) @ V.T, rank=4),
        rank=4,
        init=LowRank(B, A),
        step=rankwise.compose("lora + sgd + scaled_gd(damping=0.0)").steps(),
        lr=lr,
        iterations=8,
    )
    floor = 1e-13 * condition
    ratios = [trace.error[t + 1] / trace.error[t] for t in range(8) if trace.error[t + 1] > floor]
    assert ratios
    assert max(ratios) <= 1 - 0.7 * lr


def test_5_first_order_change_is_the_projected_gradient() -> None:
    """s (B + dB)(A + dA) - s B A without the second-order part s dB dA."""
    s, lr = 2.0, 1e-3
    B, A, G = normal(54, M, RANK), normal(55, RANK, N), normal(56, M, N)
    block = block_of(B=B, A=A)
    optimizer = optimizer_on({SITE: block}, "lora + sgd + scaled_gd(damping=0.0)", lr)
    factor_gradients(block, G, s)
    optimizer.step()
    dB, dA = block["B"].detach() - B, block["A"].detach() - A
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    assert relative(s * (dB @ A + B @ dA), -lr * s**2 * (P_B @ G + G @ P_A)) < 1e-11


def test_6_too_large_a_rank_needs_damping() -> None:
    target = with_spectrum(57, 20, 20, [1.0, 0.7, 0.4])
    symmetric = target @ target.T
    symmetric = (symmetric + symmetric.T) / 2
    X = 0.3 * normal(58, 20, 6)
    known = problem.factorizing(symmetric, rank=3, symmetric=True)
    condition = {}
    for damping in (0.0, 0.16 / 20):
        trace = solve.solve(
            known,
            rank=6,
            init=LowRank(X, X.T.clone()),
            step=rankwise.compose(f"lora + sgd + scaled_gd(damping={damping})").steps(),
            lr=0.5,
            iterations=60,
            symmetric=True,
        )
        B = trace.factors.B.detach()
        S = torch.linalg.svdvals(B)
        condition[damping] = float((S[0] / S[-1]) ** 2)
        if damping > 0:
            assert torch.isfinite(B).all()
            assert float(S[0]) < 2.0
            assert trace.error[-1] < 1e-2
    assert condition[0.0] > 1e12
    assert condition[0.16 / 20] < condition[0.0]
