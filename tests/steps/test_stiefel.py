"""Stiefel-Adam: it stays on the group, follows its own definition, and leaves the rest to AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError
from rankwise.core.optimizer import BlockOptimizer
from rankwise.steps.moments import adamw
from rankwise.steps.stiefel import RETRACTIONS, nearest_orthogonal, stiefel_adam


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int, seed: int = 0) -> Tensor:
    Q = torch.linalg.qr(normal(size, size, seed=seed))[0]
    return Q * torch.linalg.det(Q).sign() if size % 2 else torch.cat([Q[:, :1] * torch.linalg.det(Q).sign(), Q[:, 1:]], dim=1)


def block(size: int = 4, seed: int = 0) -> dict[str, nn.Parameter]:
    made = {role: nn.Parameter(rotation(size, seed + k)) for k, role in enumerate(("Q_1", "Q_2", "Q_3"))}
    return {**made, "delta": nn.Parameter(normal(5, seed=seed + 9))}


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e-3])
def test_nearest_orthogonal_is_the_polar_factor(scale: float) -> None:
    M = (torch.eye(6, dtype=torch.float64) + 0.4 * normal(6, 6)) * scale
    U, _, Vh = torch.linalg.svd(M)
    torch.testing.assert_close(nearest_orthogonal(M), U @ Vh, rtol=0, atol=1e-13)


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_one_step_is_the_formula(retraction: str) -> None:
    """The first step: both corrections cancel, so D = T / (|T| + ε) entry by entry, T the skew part of XᵀG twice."""
    held, lr, epsilon = block(), 0.05, 1e-5
    X = held["Q_2"].detach().clone()
    G = normal(4, 4, seed=3)
    for role, tensor in held.items():
        tensor.grad = G.clone() if role == "Q_2" else torch.zeros_like(tensor)
    BlockOptimizer({"0": held}, [stiefel_adam(retraction=retraction)], lr=lr).step()
    T = X.t() @ G - G.t() @ X
    D = T / (T.abs() + epsilon)
    torch.testing.assert_close(D, -D.t())
    eye = torch.eye(4, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(X @ (eye - lr * D))
    expected = {
        "newton_schulz": U @ Vh,
        "cayley": X @ torch.linalg.inv(eye + lr * D / 2) @ (eye - lr * D / 2),
        "exponential": X @ torch.linalg.matrix_exp(-lr * D),
    }[retraction]
    torch.testing.assert_close(held["Q_2"].detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lr", [1e-3, 0.3, 5.0])
def test_it_stays_on_the_group_at_any_rate(retraction: str, dtype: torch.dtype, lr: float) -> None:
    held = {role: nn.Parameter(tensor.detach().to(dtype)) for role, tensor in block(6).items()}
    signs = {role: torch.linalg.det(held[role].detach().double()).sign() for role in ("Q_1", "Q_2", "Q_3")}
    optimizer = BlockOptimizer({"0": held}, [stiefel_adam(retraction=retraction)], lr=lr)
    for step in range(40):
        for k, tensor in enumerate(held.values()):
            tensor.grad = normal(*tensor.shape, seed=10 * step + k).to(dtype)
        optimizer.step()
    for role, sign in signs.items():
        Q = held[role].detach().double()
        error = (Q.t() @ Q - torch.eye(6, dtype=torch.float64)).abs().max()
        assert error < 40 * torch.finfo(dtype).eps
        assert torch.linalg.det(Q).sign() == sign


def test_the_rest_is_adamw() -> None:
    one, other = block(), block()
    first = BlockOptimizer({"0": one}, [stiefel_adam()], lr=0.1)
    second = BlockOptimizer({"0": {"delta": other["delta"]}}, [adamw()], lr=0.1)
    for step in range(3):
        for held in (one, other):
            for k, tensor in enumerate(held.values()):
                tensor.grad = normal(*tensor.shape, seed=10 * step + k)
        first.step()
        second.step()
    assert torch.equal(one["delta"], other["delta"])


def test_a_rotation_of_size_one_does_not_move() -> None:
    held = {role: nn.Parameter(torch.ones(1, 1, dtype=torch.float64)) for role in ("Q_1", "Q_2", "Q_3")}
    optimizer = BlockOptimizer({"0": held}, [stiefel_adam(epsilon=0.0)], lr=0.1)
    for tensor in held.values():
        tensor.grad = torch.full_like(tensor, 2.0)
    optimizer.step()
    assert all(tensor.item() == 1.0 for tensor in held.values())


def test_soda_is_trained_by_it_and_keeps_its_spectrum() -> None:
    layer = nn.Linear(12, 8).double()
    with torch.no_grad():
        layer.weight.copy_(normal(8, 12))
    model = nn.Sequential(layer)
    handle = rankwise.adapt_(model, rankwise.compose("soda"))
    optimizer = handle.optimizer(lr=0.02)
    x, y, losses = normal(30, 12, seed=1), normal(30, 8, seed=2), []
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        loss.backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    entry = handle.parameterization("0")
    weight = rankwise.effective_weights(model)["0.weight"].detach()
    spectrum = (entry.S + entry.delta).relu().detach().sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(weight), spectrum, rtol=1e-10, atol=1e-10)


def test_plain_adam_would_leave_the_group() -> None:
    """What the step is for: the same few steps by AdamW alone change lengths."""
    held = {"Q": nn.Parameter(torch.eye(4, dtype=torch.float64))}
    optimizer = BlockOptimizer({"0": held}, [adamw()], lr=0.05)
    for step in range(5):
        held["Q"].grad = normal(4, 4, seed=step)
        optimizer.step()
    assert (held["Q"].t() @ held["Q"] - torch.eye(4)).abs().max() > 1e-2


def test_composition_and_refusals() -> None:
    recipe = rankwise.compose("soda + stiefel_adam(retraction='cayley')")
    assert [part.arguments.get("retraction") for part in recipe.step] == ["cayley"]
    assert not recipe.problems()
    for text, said in (
        ("soda + sgd", "exactly one step"),
        ("soda + adamw", "exactly one step"),
        ("lora(rank=2) + stiefel_adam", "Q_1"),
    ):
        with pytest.raises(RecipeError, match=said):
            rankwise.adapt_(nn.Sequential(nn.Linear(8, 8)), rankwise.compose(text))
    for arguments in ({"betas": (1.0, 0.9)}, {"epsilon": -1.0}, {"retraction": "qr"}):
        with pytest.raises(ArgumentError):
            stiefel_adam(**arguments)
