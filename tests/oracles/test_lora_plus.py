"""LoRA+ against its spec (arXiv:2402.12354)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rankwise
from tests.oracles.tools_training import (
    SITE,
    adapted,
    block_of,
    directions,
    factor_gradients,
    normal,
    optimizer_on,
    product,
    relative,
    roles_of,
)

M, N, RANK = 6, 5, 2


def run(recipe: str, lr: float, steps: int = 8) -> list[dict[str, Tensor]]:
    model, handle = adapted(normal(0, M, N), recipe, seed=3)
    optimizer, x, y, reached = handle.optimizer(lr), normal(1, 12, N), normal(2, 12, M), []
    for _ in range(steps):
        ((model(x) - y) ** 2).mean().backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
        reached.append(roles_of(handle))
    return reached


@pytest.mark.parametrize("step", ["adamw", "sgd", "sgd(momentum=0.9)"])
def test_1_ratio_one_is_the_plain_optimizer_to_the_bit(step: str) -> None:
    plain = run(f"lora(rank={RANK}) + {step}", 0.05)
    for found, expected in zip(run(f"lora(rank={RANK}) + {step} + lora_plus(ratio=1.0)", 0.05), plain, strict=True):
        assert all(torch.equal(found[role], expected[role]) for role in expected)


@pytest.mark.parametrize("ratio", [2.0, 16.0])
def test_2_one_sgd_step_moves_b_ratio_times_as_far(ratio: float) -> None:
    B, A, G = normal(3, M, RANK), normal(4, RANK, N), normal(5, M, N)
    moved = []
    for factor in (1.0, ratio):
        block = block_of(B=torch.zeros_like(B), A=torch.zeros_like(A))  # from zero, so that moves are exact
        optimizer = optimizer_on({SITE: block}, f"lora + sgd + lora_plus(ratio={factor})", 0.25)
        block["B"].grad, block["A"].grad = G @ A.T, B.T @ G
        optimizer.step()
        moved.append({role: tensor.detach().clone() for role, tensor in block.items()})
    assert torch.equal(moved[1]["B"], ratio * moved[0]["B"])
    assert torch.equal(moved[1]["A"], moved[0]["A"])


def test_3_first_adam_step() -> None:
    lr, ratio = 1e-3, 16.0
    _, handle = adapted(normal(0, M, N), f"lora(rank={RANK}) + lora_plus(ratio={ratio})")
    before = roles_of(handle)
    optimizer = handle.optimizer(lr)
    block = handle.blocks()[SITE]
    factor_gradients(block, normal(6, M, N))
    optimizer.step()
    after = roles_of(handle)
    assert torch.allclose((after["B"] - before["B"]).abs(), torch.full((M, RANK), ratio * lr, dtype=torch.float64), rtol=1e-6)
    assert torch.equal(after["A"], before["A"])


@pytest.mark.parametrize("k", [1.3, 2.0, 16.0**0.25])
def test_4_ratio_is_an_imbalance_of_the_factors(k: float) -> None:
    ratio, lr, target = 16.0, 1e-3, normal(7, M, N)
    B, A = normal(8, M, RANK), normal(9, RANK, N)
    plain, scaled = block_of(B=B, A=A), block_of(B=B / k, A=k * A)
    first = optimizer_on({SITE: plain}, f"lora + sgd + lora_plus(ratio={ratio})", lr)
    second = optimizer_on({SITE: scaled}, f"lora + sgd + lora_plus(ratio={max(1.0, ratio / k**4)})", k**2 * lr)
    for _ in range(15):
        for block, optimizer in ((plain, first), (scaled, second)):
            factor_gradients(block, product(block) - target)
            optimizer.step()
        assert relative(product(scaled), product(plain)) < 1e-9
    assert relative(product(plain), B @ A) > 1e-2


@pytest.mark.parametrize("k", [1.5, 3.0])
def test_4_map_of_sign_updates(k: float) -> None:
    """Rates (lr_B/k, k lr_A) on (B/k, kA), by the first, sign-like step of Adam."""
    ratio, lr, G = 16.0, 1e-3, normal(10, M, N)
    B, A = normal(11, M, RANK), normal(12, RANK, N)
    plain, scaled = block_of(B=B, A=A), block_of(B=B / k, A=k * A)
    for block, rate, by in ((plain, lr, ratio), (scaled, k * lr, ratio / k**2)):
        optimizer = optimizer_on({SITE: block}, f"lora + adamw(eps=1e-30) + lora_plus(ratio={by})", rate)
        factor_gradients(block, G)
        optimizer.step()
    assert relative(product(scaled), product(plain)) < 1e-9


def test_5_width_scaling_of_sign_updates() -> None:
    widths, draws, b = [64, 128, 256, 512, 1024, 2048, 4096], 200, 0.7
    by_b, by_a = [], []
    for n in widths:
        a = normal(n, draws, n) / n**0.5
        x = torch.sign(normal(n + 1, draws, n))
        from_b, from_a = [], []
        for i in range(draws):
            at_zero = {"B": torch.zeros(1, 1, dtype=torch.float64), "A": a[i : i + 1]}
            g_b = (a[i] @ x[i]).reshape(1, 1)
            moved = directions("lora + adamw(eps=1e-30)", at_zero, {"B": g_b, "A": 0 * a[i : i + 1]}, "adamw")
            from_b.append(float((moved["B"] * g_b).abs()))  # per lr_B
            if i < 3:
                later = {"B": torch.full((1, 1), b, dtype=torch.float64), "A": a[i : i + 1]}
                moved = directions("lora + adamw(eps=1e-30)", later, {"B": g_b, "A": b * x[i : i + 1]}, "adamw")
                from_a.append(float((b * (moved["A"] @ x[i])).abs()))  # per lr_A
        by_b.append(np.mean(from_b))
        by_a.append(np.mean(from_a))
    slope_b = np.polyfit(np.log(widths), np.log(by_b), 1)[0]
    slope_a = np.polyfit(np.log(widths), np.log(by_a), 1)[0]
    assert abs(slope_b - 0) < 0.1
    assert abs(slope_a - 1) < 0.1
    assert np.allclose(by_a, [b * n for n in widths], rtol=1e-9)


def test_6_every_trained_number_is_in_exactly_one_group() -> None:
    model = nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, 4)).double()
    handle = rankwise.adapt_(model, rankwise.compose("dora(rank=2) + lora_plus(ratio=4)"), where=["0"], train_also=["2"])
    optimizer = handle.optimizer(1e-3)
    grouped = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    assert len({id(tensor) for tensor in grouped}) == len(grouped)
    assert {id(tensor) for tensor in grouped} == {id(tensor) for tensor in trained}
    assert sum(tensor.numel() for tensor in grouped) == 2 * (M + N) + M + 4 * M + 4
