"""SAM and ASAM against their spec (arXiv:2010.01412, 2102.11600)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.protocols import Perturbation
from rankwise.perturbations.sharpness import SharpnessAware
from tests.oracles.tools_training import SITE, adapted, block_of, normal, put, relative, roles_of

M, N, RANK = 4, 3, 2


def trained(recipe: str, loss: Callable[[nn.Module], Tensor], lr: float, steps: int) -> list[dict[str, Tensor]]:
    model, handle = adapted(normal(0, M, N), recipe, seed=1)
    optimizer, reached = handle.optimizer(lr), [roles_of(handle)]
    for _ in range(steps):
        loss(model).backward()
        if handle.perturbation is None:
            handle.after_backward()
        else:
            handle.after_backward(lambda: loss(model).backward())
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
        reached.append(roles_of(handle))
    return reached


def fit(model: nn.Module) -> Tensor:
    return ((model(normal(1, 10, N)) - normal(2, 10, M)) ** 2).mean()


def moved(perturbation: Perturbation, blocks: dict[str, dict[str, nn.Parameter]]) -> Tensor:
    """ε, as one vector."""
    before = [tensor.detach().clone() for block in blocks.values() for tensor in block.values()]
    perturbation.move(blocks, learning_rate=0.1)
    after = [tensor.detach().clone() for block in blocks.values() for tensor in block.values()]
    perturbation.restore(blocks)
    for old, tensor in zip(before, [t for block in blocks.values() for t in block.values()], strict=True):
        assert torch.equal(old, tensor.detach())
    return torch.cat([(new - old).flatten() for new, old in zip(after, before, strict=True)])


def blocks_with_gradients(scale: float = 1.0) -> dict[str, dict[str, nn.Parameter]]:
    blocks = {f"layer{i}": block_of(B=normal(10 + i, M, RANK), A=normal(20 + i, RANK, N)) for i in range(3)}
    for i, block in enumerate(blocks.values()):
        for j, tensor in enumerate(block.values()):
            tensor.grad = scale * (i + 1) * normal(30 + 2 * i + j, *tensor.shape)
    return blocks


def gradients_of(blocks: dict[str, dict[str, nn.Parameter]]) -> Tensor:
    return torch.cat([t.grad.flatten() for block in blocks.values() for t in block.values() if t.grad is not None])


@pytest.mark.parametrize("step", ["adamw", "sgd"])
def test_1_zero_radius_is_the_plain_optimizer_to_the_bit(step: str) -> None:
    plain = trained(f"lora(rank={RANK}) + {step}", fit, 0.05, 6)
    for found, expected in zip(trained(f"lora(rank={RANK}) + {step} + sam(rho=0.0)", fit, 0.05, 6), plain, strict=True):
        assert all(torch.equal(found[role], expected[role]) for role in expected)


def test_2_quadratic_trajectory() -> None:
    rho, lr, root = 0.3, 0.05, normal(3, M * N, M * N)
    H = root @ root.T / (M * N) + torch.eye(M * N, dtype=torch.float64)

    def loss(model: nn.Module) -> Tensor:
        w = model(torch.eye(N, dtype=torch.float64)).T.reshape(-1)  # all of W', row by row
        return 0.5 * w @ H @ w

    reached = trained(f"full + sgd + sam(rho={rho})", loss, lr, 20)
    w = reached[0]["weight"].reshape(-1)
    for found in reached[1:]:
        g = H @ w
        w = w - lr * H @ (w + rho * g / torch.linalg.norm(g))
        assert relative(found["weight"].reshape(-1), w) < 1e-10


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_3_length_of_the_move_does_not_depend_on_the_gradients_size(scale: float) -> None:
    rho, blocks = 0.07, blocks_with_gradients(scale)
    found = moved(SharpnessAware(rho=rho), blocks)
    assert abs(float(torch.linalg.norm(found)) / rho - 1) < 1e-6
    assert relative(found, moved(SharpnessAware(rho=rho), blocks_with_gradients())) < 1e-6


@pytest.mark.parametrize("adaptive", [False, True])
def test_4_parameters_come_back_to_the_bit(adaptive: bool) -> None:
    model, handle = adapted(normal(4, M, N), f"lora(rank={RANK}) + sgd + sam(rho=0.3, adaptive={adaptive})")
    put(handle, {"B": normal(15, M, RANK)})  # at B = 0 the adaptive ball has no extent
    before, optimizer = roles_of(handle), handle.optimizer(lr=0.0)
    fit(model).backward()
    seen: list[bool] = []

    def replay() -> None:
        seen.append(any(not torch.equal(tensor, before[role]) for role, tensor in roles_of(handle).items()))
        fit(model).backward()

    handle.after_backward(replay)
    optimizer.step()
    handle.after_step()
    assert seen == [True]  # the replay ran at the moved point, once
    assert all(torch.equal(tensor, before[role]) for role, tensor in roles_of(handle).items())


def balance_rate(rho: float, shape: str) -> tuple[float, float]:
    """d/dt ½(‖x‖² - ‖y‖²) along -g' and the spec's formula, for a rank-1 pair."""
    if shape == "outer":  # f(x yᵀ)
        block, target = block_of(B=normal(5, M, 1), A=normal(6, 1, N)), normal(7, M, N)
    else:  # f(xᵀ y)
        block, target = block_of(B=normal(8, 1, M), A=normal(9, M, 1)), normal(10, 1, 1)

    def loss() -> Tensor:
        P = block["B"] @ block["A"]
        return (0.5 * (P - target) ** 2 + 0.1 * torch.sin(P)).sum()

    def backward() -> None:
        for tensor in block.values():
            tensor.grad = None
        loss().backward()

    backward()
    gradients = {role: tensor.grad.clone() for role, tensor in block.items() if tensor.grad is not None}
    size = {role: float(torch.linalg.norm(g)) for role, g in gradients.items()}
    x, y = block["B"].detach().clone(), block["A"].detach().clone()
    sharpness = SharpnessAware(rho=rho)
    sharpness.move({SITE: block}, learning_rate=0.1)
    backward()
    sharpness.restore({SITE: block})
    assert block["B"].grad is not None
    assert block["A"].grad is not None
    found = -float((x * block["B"].grad).sum() - (y * block["A"].grad).sum())
    if shape == "outer":
        return found, rho * (size["B"] ** 2 - size["A"] ** 2) / (size["B"] ** 2 + size["A"] ** 2) ** 0.5
    slope = size["B"] / float(torch.linalg.norm(y))  # |f'|
    balance = 0.5 * float((x**2).sum() - (y**2).sum())
    return found, -2 * rho * slope * balance / float((x**2).sum() + (y**2).sum()) ** 0.5


@pytest.mark.parametrize("shape", ["outer", "inner"])
def test_5_balancedness_of_a_rank_one_pair(shape: str) -> None:
    errors = []
    for rho in (1e-3, 1e-4):
        found, expected = balance_rate(rho, shape)
        errors.append(abs(found / expected - 1))
    assert errors[0] < 1e-2
    assert errors[1] < errors[0] / 5  # the rest is O(rho²), relative O(rho)
    found, _ = balance_rate(0.0, shape)
    assert abs(found) < 1e-12


def test_6_adaptive_ball_follows_a_rescaling_of_the_weights() -> None:
    a = torch.exp(normal(11, M, N))
    weight, curve = normal(12, M, N), normal(13, M, N).abs() + 0.5

    def f(w: Tensor) -> Tensor:
        return (curve * (w - 1) ** 2 + torch.sin(w)).sum()

    values = {}
    for adaptive in (True, False):
        for rescaled in (False, True):
            block = block_of(weight=weight / a if rescaled else weight)
            scale = a if rescaled else torch.ones_like(a)
            f(scale * block["weight"]).backward()
            sharpness = SharpnessAware(rho=0.5, adaptive=adaptive)
            sharpness.move({SITE: block}, learning_rate=0.1)
            values[adaptive, rescaled] = float(f(scale * block["weight"].detach()))
    assert abs(values[True, True] / values[True, False] - 1) < 1e-10
    assert abs(values[False, True] / values[False, False] - 1) > 1e-3


def test_6_adaptive_move_is_the_formula() -> None:
    rho, blocks = 0.5, blocks_with_gradients()
    w = torch.cat([tensor.detach().flatten() for block in blocks.values() for tensor in block.values()])
    g = gradients_of(blocks)
    found = moved(SharpnessAware(rho=rho, adaptive=True), blocks)
    assert relative(found, rho * w**2 * g / torch.linalg.norm(w.abs() * g)) < 1e-9


def test_7_one_norm_over_all_tensors() -> None:
    blocks = blocks_with_gradients()
    found, g = moved(SharpnessAware(rho=0.2), blocks), gradients_of(blocks)
    assert relative(found, 0.2 * g / torch.linalg.norm(g)) < 1e-9
    ratio = found / g
    assert float((ratio - ratio.mean()).abs().max() / ratio.mean()) < 1e-9


def test_7_tensors_beside_the_adapter_belong_to_the_norm() -> None:
    model = nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, 2)).double()
    handle = rankwise.adapt_(model, rankwise.compose("lora(rank=2) + sam(rho=0.1)"), where=["0"], train_also=["2"])
    handle.optimizer(0.1)
    x = normal(14, 5, N)
    model(x).pow(2).sum().backward()
    tensors = [tensor for tensor in model.parameters() if tensor.requires_grad]
    before = [tensor.detach().clone() for tensor in tensors]
    lengths: list[float] = []

    def replay() -> None:
        lengths.append(float(sum(((new.detach() - old) ** 2).sum() for new, old in zip(tensors, before, strict=True))) ** 0.5)
        model(x).pow(2).sum().backward()

    handle.after_backward(replay)
    assert len(tensors) == 4
    assert lengths == [pytest.approx(0.1, rel=1e-6)]
