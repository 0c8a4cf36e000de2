"""Oracle 7 of LoRA-One (arXiv:2502.01235) for its option `preconditioned`: factor gradients times inverse Grams before Adam.

The other oracles of LoRA-One are in test_lora_one.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rankwise
from tests.oracles.tools_training import SITE, adapted, normal, put, relative, roles_of, statistics_of

M, N, RANK = 8, 6, 3


def layer(recipe: str, B: Tensor, A: Tensor, lr: float, **overrides: float):
    """A layer with these factors whose gradients those of ½‖W' - target‖² are; its handle and optimizer."""
    weight = normal(0, M, N)
    model, handle = adapted(weight, recipe, statistics={SITE: statistics_of(weight, gradient=normal(1, M, N))})
    put(handle, {"B": B, "A": A})
    optimizer = handle.optimizer(lr, **overrides)
    (0.5 * (model(torch.eye(N, dtype=torch.float64)).T - normal(2, M, N)).square().sum()).backward()
    return handle, optimizer


@pytest.mark.parametrize("seed", [3, 10, 17])
def test_7_preconditioned_step_does_not_see_the_factorization(seed: int) -> None:
    B, A, T = normal(seed, M, RANK), normal(seed + 1, RANK, N), normal(seed + 2, RANK, RANK)
    recipe, reached = f"lora_one(rank={RANK}, preconditioned=True) + sgd", []
    for pair in ((B, A), (B @ torch.linalg.inv(T), T @ A)):
        handle, optimizer = layer(recipe, *pair, 0.02, damping=0.0)
        optimizer.step()
        reached.append(handle.update_of(SITE).dense().detach())
    assert relative(reached[1], reached[0]) < 1e-9
    assert relative(reached[0], 16.0 / RANK**0.5 * B @ A) > 1e-3
    plain = []
    for pair in ((B, A), (B @ torch.linalg.inv(T), T @ A)):
        handle, optimizer = layer(f"lora_one(rank={RANK}) + sgd", *pair, 1e-4)
        optimizer.step()
        plain.append(handle.update_of(SITE).dense().detach())
    assert relative(plain[1], plain[0]) > 1e-6


def test_7_adam_keeps_moments_of_the_preconditioned_gradient() -> None:
    B, A, damping = normal(30, M, RANK), normal(31, RANK, N), 1e-6
    handle, optimizer = layer(f"lora_one(rank={RANK}, preconditioned=True)", B, A, 1e-3)
    block = handle.blocks()[SITE]
    g_B, g_A, eye = block["B"].grad.clone(), block["A"].grad.clone(), torch.eye(RANK, dtype=torch.float64)
    optimizer.step()
    expected = {
        "B": g_B @ torch.linalg.inv(A @ A.T + damping * eye),
        "A": torch.linalg.inv(B.T @ B + damping * eye) @ g_A,
    }
    for role, direction in expected.items():
        state = {name.rsplit(".", 1)[-1]: value for name, value in optimizer.state[block[role]].items()}
        assert relative(state["exp_avg"], 0.1 * direction) < 1e-10
        assert relative(state["exp_avg_sq"], 0.001 * direction**2) < 1e-10
        step = direction / (direction.abs() + 1e-8)
        assert relative(roles_of(handle)[role], {"B": B, "A": A}[role] - 1e-3 * step) < 1e-10


def test_it_is_off_unless_asked_for() -> None:
    """The paper's algorithm box trains with plain AdamW."""
    assert "scaled_gd" not in [step.name for step in rankwise.compose("lora_one").steps()]
    assert [step.name for step in rankwise.catalog.lora_one(preconditioned=True).steps()] == ["scaled_gd", "adamw"]
