"""LoRA-Pro against its spec (arXiv:2407.18242): factor steps whose change of W is the nearest to the full gradient's.

Reference values come from projectors, dense Kronecker systems and a loop written from the paper's algorithm.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rankwise
from rankwise.core.optimizer import BlockOptimizer
from rankwise.core.step import SiteBlock
from rankwise.steps import lora_pro
from tests.oracles.tools_training import SITE, adapted, block_of, factor_gradients, normal, product, put, relative

M, N, RANK, S = 30, 20, 3, 2.0


def point(seed: int, m: int = M, n: int = N, r: int = RANK, s: float = S) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """B, A, G and the factors' gradients."""
    B, A, G = normal(seed, m, r), normal(seed + 1, r, n), normal(seed + 2, m, n)
    return B, A, G, s * G @ A.T, s * B.T @ G


def projectors(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    return B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A


def family(B: Tensor, A: Tensor, g_B: Tensor, g_A: Tensor, s: float, X: Tensor) -> tuple[Tensor, Tensor]:
    """All best pairs, X (r, r) free."""
    P_B, _ = projectors(B, A)
    d_A = torch.linalg.solve(B.T @ B, g_A) / s**2 + X @ A
    d_B = torch.linalg.solve(A @ A.T, (g_B - P_B @ g_B).T).T / s**2 - B @ X
    return d_B, d_A


def distance(d_B: Tensor, d_A: Tensor, g_B: Tensor, g_A: Tensor) -> float:
    return float((d_A - g_A).square().sum() + (d_B - g_B).square().sum())


def optimizer_for(block: dict[str, torch.nn.Parameter], s: float, lr: float, **arguments) -> BlockOptimizer:
    steps = rankwise.catalog.lora_pro(**arguments).steps()
    return BlockOptimizer({SITE: block}, steps, lr, facts={SITE: SiteBlock(site=SITE, scale=s, shape=(M, N))})


@pytest.mark.parametrize("seed", [0, 10])
def test_1_equivalent_gradient_misses_only_what_both_projectors_miss(seed: int) -> None:
    B, A, G, g_B, g_A = point(seed)
    P_B, P_A = projectors(B, A)
    expected = G - (G - P_B @ G) @ (torch.eye(N, dtype=torch.float64) - P_A)
    d_B, d_A = lora_pro.directions(B, A, g_B, g_A, S)
    assert relative(S * (B @ d_A + d_B @ A), expected) < 1e-12
    assert relative(lora_pro.equivalent_gradient(B, A, g_B, g_A, S), expected) < 1e-12
    assert relative(expected, G) > 0.1


def test_2_no_pair_is_nearer() -> None:
    m, n, r = 6, 5, 2
    B, A, G, g_B, g_A = point(20, m, n, r)
    d_B, d_A = lora_pro.directions(B, A, g_B, g_A, S)
    # s vec(d_B A + B d_A), row-major: (I ⊗ Aᵀ) vec(d_B) + (B ⊗ I) vec(d_A)
    system = S * torch.cat([torch.kron(torch.eye(m).double(), A.T.contiguous()), torch.kron(B, torch.eye(n).double())], dim=1)
    best = torch.linalg.pinv(system) @ G.reshape(-1)
    least = float((system @ best - G.reshape(-1)).square().sum())
    found = float((S * (B @ d_A + d_B @ A) - G).square().sum())
    assert found == pytest.approx(least, rel=1e-9)
    assert least > 1e-2


def test_3_the_free_matrix_keeps_the_pair_nearest_to_the_raw_gradients() -> None:
    B, A, _, g_B, g_A = point(30)
    d_B, d_A = lora_pro.directions(B, A, g_B, g_A, S)
    least, Gt = distance(d_B, d_A, g_B, g_A), lora_pro.equivalent_gradient(B, A, g_B, g_A, S)
    X = torch.linalg.lstsq(A.T, (d_A - family(B, A, g_B, g_A, S, torch.zeros(RANK, RANK).double())[1]).T).solution.T
    for found, expected in zip(family(B, A, g_B, g_A, S, X), (d_B, d_A), strict=True):  # the pair is one of the family
        assert relative(found, expected) < 1e-10
    for seed in range(200):
        other = X + [1e-3, 0.1, 1.0][seed % 3] * normal(100 + seed, RANK, RANK)
        e_B, e_A = family(B, A, g_B, g_A, S, other)
        assert distance(e_B, e_A, g_B, g_A) > least
        assert relative(S * (B @ e_A + e_B @ A), Gt) < 1e-10


def test_3_sylvester_equation_is_solved() -> None:
    F, H, C = normal(40, 9, 4), normal(41, 9, 4), normal(42, 4, 4)
    P, Q = F.T @ F, H.T @ H
    X = lora_pro.sylvester(P, Q, C)
    assert relative(P @ X + X @ Q, C) < 1e-12


def test_4_both_gradients_say_the_same_in_the_small_space() -> None:
    """g_A Aᵀ = Bᵀ g_B for a real layer, and so d_A Aᵀ = Bᵀ d_B where the free matrix is best."""
    model, handle = adapted(normal(50, M, N), f"lora(rank={RANK}, alpha={RANK * S}) + sgd")
    put(handle, {"B": normal(51, M, RANK), "A": normal(52, RANK, N)})
    model(normal(53, 9, N)).sin().sum().backward()
    block = handle.blocks()[SITE]
    B, A, g_B, g_A = block["B"].detach(), block["A"].detach(), block["B"].grad, block["A"].grad
    assert relative(g_A @ A.T, B.T @ g_B) < 1e-12
    d_B, d_A = lora_pro.directions(B, A, g_B, g_A, S)
    assert relative(d_A @ A.T, B.T @ d_B) < 1e-10


@pytest.mark.parametrize("seed", range(60, 90, 5))
def test_5_descent_is_guaranteed(seed: int) -> None:
    B, A, G, g_B, g_A = point(seed)
    P_B, P_A = projectors(B, A)
    d_B, d_A = lora_pro.directions(B, A, g_B, g_A, S)
    slope = float((g_A * d_A).sum() + (g_B * d_B).sum())
    assert slope == pytest.approx(float((G * lora_pro.equivalent_gradient(B, A, g_B, g_A, S)).sum()), rel=1e-11)
    assert slope == pytest.approx(float((P_B @ G).square().sum() + ((G - P_B @ G) @ P_A).square().sum()), rel=1e-11)
    assert slope > 0


def test_6_a_gradient_in_the_tangent_space_is_followed_exactly() -> None:
    B, A = normal(90, M, RANK), normal(91, RANK, N)
    G = B @ normal(92, RANK, N) + normal(93, M, RANK) @ A
    assert relative(lora_pro.equivalent_gradient(B, A, S * G @ A.T, S * B.T @ G, S), G) < 1e-12


def test_6_at_full_rank_it_is_full_gradient_descent() -> None:
    m, n = 5, 4
    B, A, target, time = 2 * normal(94, m, n), 2 * normal(95, n, n), normal(96, m, n), 0.02
    gap = []
    for count in (10, 20):  # the same time in steps of half the length
        lr, block, W = time / count, block_of(B=B, A=A), S * B @ A
        optimizer = optimizer_for(block, S, lr, variant="sgd", damping=0.0)
        for _ in range(count):
            factor_gradients(block, S * product(block) - target, S)
            optimizer.step()
            W = W - lr * (W - target)
        gap.append(float((S * product(block) - W).norm() / (W - S * B @ A).norm()))
    assert gap[0] < 0.05
    assert gap[0] / gap[1] == pytest.approx(2.0, abs=0.2)  # O(lr²) per step, so O(lr) over a fixed time
    one = []
    for lr in (1e-3, 5e-4):
        block = block_of(B=B, A=A)
        optimizer = optimizer_for(block, S, lr, variant="sgd", damping=0.0)
        factor_gradients(block, S * B @ A - target, S)
        optimizer.step()
        one.append(float((S * product(block) - (S * B @ A - lr * (S * B @ A - target))).norm()))
    assert one[0] / one[1] == pytest.approx(4.0, rel=1e-3)


def test_7_equivalent_gradient_does_not_see_the_factorization() -> None:
    B, A, G, g_B, g_A = point(100)
    T = normal(103, RANK, RANK)
    B_moved, A_moved = B @ torch.linalg.inv(T), T @ A
    found = lora_pro.equivalent_gradient(B_moved, A_moved, S * G @ A_moved.T, S * B_moved.T @ G, S)
    assert relative(found, lora_pro.equivalent_gradient(B, A, g_B, g_A, S)) < 1e-10


def test_8_scale_drops_out_of_the_equivalent_gradient() -> None:
    B, A, _, g_B, g_A = point(110)
    found = lora_pro.equivalent_gradient(B, A, 2 * g_B, 2 * g_A, 2 * S)
    assert relative(found, lora_pro.equivalent_gradient(B, A, g_B, g_A, S)) < 1e-12


def test_step_zero_moves_b_along_the_preconditioned_gradient() -> None:
    """The definition's B = 0: d_A = g_A = 0 and d_B = g_B (A Aᵀ)⁻¹ / s²."""
    A, G = normal(120, RANK, N), normal(121, M, N)
    B, g_A = torch.zeros(M, RANK, dtype=torch.float64), torch.zeros(RANK, N, dtype=torch.float64)
    d_B, d_A = lora_pro.directions(B, A, S * G @ A.T, g_A, S)
    assert float(d_A.abs().max()) == 0.0
    assert relative(d_B, G @ torch.linalg.pinv(A) / S) < 1e-12


def test_adam_acts_on_the_equivalent_gradient() -> None:
    """The algorithm's "full" form: moments (m, n) of Gt, their direction Z treated as the gradient, then plain descent."""
    B, A, target, lr = normal(130, M, RANK), normal(131, RANK, N), normal(132, M, N), 0.01
    block = block_of(B=B, A=A)
    optimizer = optimizer_for(block, S, lr, variant="adamw", damping=1e-12)
    mean = square = torch.zeros(M, N, dtype=torch.float64)
    for count in range(1, 9):
        factor_gradients(block, S * product(block) - target, S)
        optimizer.step()
        G = S * B @ A - target
        P_B, P_A = projectors(B, A)
        Gt = G - (G - P_B @ G) @ (torch.eye(N, dtype=torch.float64) - P_A)
        mean, square = 0.9 * mean + 0.1 * Gt, 0.999 * square + 0.001 * Gt**2
        Z = mean / (1 - 0.9**count) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
        g_B, g_A = S * Z @ A.T, S * B.T @ Z
        C = -torch.linalg.solve(B.T @ B, g_A) @ A.T / S**2
        eye = torch.eye(RANK, dtype=torch.float64)
        dense = torch.kron(B.T @ B, eye) + torch.kron(eye, A @ A.T)  # of P X + X Q, row-major, Q symmetric
        d_B, d_A = family(B, A, g_B, g_A, S, torch.linalg.solve(dense, C.reshape(-1)).reshape(RANK, RANK))
        B, A = B - lr * d_B, A - lr * d_A
        assert relative(block["B"], B) < 1e-7
        assert relative(block["A"], A) < 1e-7
    shapes = [tuple(value.shape) for value in optimizer.state[block["B"]].values()]
    assert shapes.count((M, N)) == 2
