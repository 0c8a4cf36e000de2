"""RefLoRA against its spec (Zhang, Li, Giannakis, 2025)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.oracles.tools_training import (
    SITE,
    block_of,
    directions,
    factor_gradients,
    normal,
    optimizer_on,
    product,
    relative,
)

M, N, RANK = 30, 20, 3
RECIPE = "lora + sgd + reflora(warmup=0)"


def mean_of(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """S and its inverse, read off what the step makes of gradients that pick them out."""
    r = A.shape[0]
    g_B, g_A = torch.zeros_like(B), torch.zeros_like(A)
    g_B[:r], g_A[:, :r] = torch.eye(r, dtype=torch.float64), torch.eye(r, dtype=torch.float64)
    found = directions(RECIPE, {"B": B, "A": A}, {"B": g_B, "A": g_A}, "reflora")
    return found["B"][:r], found["A"][:, :r]


def pair(seed: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
    return normal(seed, M, rank), 0.3 * normal(seed + 1, rank, N)


def power(S: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh((S + S.T) / 2)
    return (vectors * values**exponent) @ vectors.T


@pytest.mark.parametrize("seed", [0, 2, 4])
def test_1_geometric_mean_solves_its_equation(seed: int) -> None:
    B, A = pair(seed)
    S, inverse = mean_of(B, A)
    P, Q = A @ A.T, B.T @ B
    assert relative(S @ P @ S, Q) < 1e-12
    assert relative(S, S.T) < 1e-12
    assert float(torch.linalg.eigvalsh((S + S.T) / 2).min()) > 0
    assert relative(S @ inverse, torch.eye(RANK, dtype=torch.float64)) < 1e-12


def test_2_bound_is_least_there() -> None:
    B, A = pair(6)
    S, _ = mean_of(B, A)
    P, Q = A @ A.T, B.T @ B

    def bound(at: Tensor) -> float:
        return float(torch.trace(torch.linalg.solve(at, Q)) + torch.trace(at @ P))

    least = bound(S)
    assert abs(least / float(2 * torch.linalg.svdvals(B @ A).sum()) - 1) < 1e-10
    root = power(S, 0.5)
    for seed in range(200):
        noise = normal(100 + seed, RANK, RANK)
        values, vectors = torch.linalg.eigh((noise + noise.T) / 2)
        size = [0.01, 0.1, 1.0][seed % 3]
        other = root @ (vectors * torch.exp(size * values)) @ vectors.T @ root
        assert bound(other) >= least * (1 - 1e-13)


def reached(B: Tensor, A: Tensor, G: Tensor, lr: float, recipe: str = RECIPE) -> Tensor:
    block = block_of(B=B, A=A)
    optimizer = optimizer_on({SITE: block}, recipe, lr)
    factor_gradients(block, G)
    optimizer.step()
    return product(block)


def test_3_step_does_not_see_the_factorization() -> None:
    (B, A), G, T = pair(8), normal(10, M, N), normal(11, RANK, RANK)
    moved = (B @ torch.linalg.inv(T), T @ A)
    assert relative(reached(*moved, G, 0.05), reached(B, A, G, 0.05)) < 1e-11
    assert relative(reached(*moved, G, 0.05, "lora + sgd"), reached(B, A, G, 0.05, "lora + sgd")) > 1e-2


def test_4_explicit_form_agrees() -> None:
    (B, A), G, lr = pair(12), normal(14, M, N), 0.05
    S, _ = mean_of(B, A)
    B_new, A_new = B @ power(S, -0.5), power(S, 0.5) @ A
    explicit = (B_new - lr * G @ A_new.T) @ (A_new - lr * B_new.T @ G)
    assert relative(reached(B, A, G, lr), explicit) < 1e-10


def test_5_refactored_pair_is_balanced() -> None:
    B, A = pair(16)
    S, _ = mean_of(B, A)
    B_new, A_new = B @ power(S, -0.5), power(S, 0.5) @ A
    assert relative(B_new.T @ B_new, A_new @ A_new.T) < 1e-8
    assert relative(B_new @ A_new, B @ A) < 1e-10


def test_6_balanced_pair_is_plain_lora() -> None:
    B, A = pair(18)
    S, _ = mean_of(B, A)
    B, A = B @ power(S, -0.5), power(S, 0.5) @ A
    assert relative(mean_of(B, A)[0], torch.eye(RANK, dtype=torch.float64)) < 1e-10
    G = normal(20, M, N)
    assert relative(reached(B, A, G, 0.05), reached(B, A, G, 0.05, "lora + sgd")) < 1e-10


def test_7_symmetric_pair_is_plain_lora() -> None:
    B = normal(22, M, RANK)
    assert relative(mean_of(B, B.T.clone())[0], torch.eye(RANK, dtype=torch.float64)) < 1e-10


@pytest.mark.parametrize("c", [0.1, 7.0])
def test_8_scalar_trajectory_does_not_see_the_balance(c: float) -> None:
    (B, A), target = pair(24), normal(26, M, N)
    blocks = [block_of(B=B, A=A), block_of(B=c * B, A=A / c)]
    optimizers = [optimizer_on({SITE: block}, "lora + adamw + reflora(warmup=0, variant='scalar')", 0.02) for block in blocks]
    for _ in range(25):
        for block, optimizer in zip(blocks, optimizers, strict=True):
            factor_gradients(block, product(block) - target)
            optimizer.step()
            sizes = [float(torch.linalg.norm(block[role].detach())) for role in ("A", "B")]
            assert abs(sizes[0] / sizes[1] - 1) < 1e-12
        assert relative(product(blocks[1]), product(blocks[0])) < 1e-8
    assert relative(product(blocks[0]), B @ A) > 0.1


def test_9_variants_agree_at_rank_one() -> None:
    """Under SGD: Adam's moments live in different coordinates of the two variants."""
    B, A = normal(28, M, 1), 0.2 * normal(29, 1, N)
    target = normal(30, M, N)
    blocks = [block_of(B=B, A=A), block_of(B=B, A=A)]
    optimizers = [
        optimizer_on({SITE: block}, f"lora + sgd + reflora(warmup=0, variant='{variant}')", 0.01)
        for block, variant in zip(blocks, ("matrix", "scalar"), strict=True)
    ]
    for _ in range(20):
        for block, optimizer in zip(blocks, optimizers, strict=True):
            factor_gradients(block, product(block) - target)
            optimizer.step()
        assert relative(product(blocks[1]), product(blocks[0])) < 1e-10
