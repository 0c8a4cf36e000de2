"""BAR against its spec (arXiv:2410.14802)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankwise.perturbations.balance import Balance
from tests.oracles.tools_training import (
    SITE,
    adapted,
    block_of,
    factor_gradients,
    normal,
    optimizer_on,
    product,
    relative,
    roles_of,
)

M, N, RANK = 6, 5, 2


def norm(tensor: Tensor) -> float:
    return float(torch.linalg.norm(tensor.detach()))


def balance(B: Tensor, A: Tensor) -> float:
    return 0.5 * (norm(B) ** 2 - norm(A) ** 2)


@pytest.mark.parametrize("kind", ["nbar", "obar"])
@pytest.mark.parametrize("step", ["adamw", "sgd"])
def test_1_zero_strength_is_the_plain_optimizer_to_the_bit(kind: str, step: str) -> None:
    reached = []
    for recipe in (f"lora(rank={RANK}) + {step}", f"lora(rank={RANK}) + {step} + bar(kind='{kind}', strength=0.0)"):
        model, handle = adapted(normal(0, M, N), recipe, seed=1)
        optimizer = handle.optimizer(0.05)
        for t in range(6):
            (model(normal(t, 8, N)) ** 2).mean().backward()
            handle.after_backward()
            optimizer.step()
            handle.after_step()
            optimizer.zero_grad()
        reached.append(roles_of(handle))
    assert all(torch.equal(reached[1][role], reached[0][role]) for role in ("A", "B"))


@pytest.mark.parametrize("kind", ["nbar", "obar"])
@pytest.mark.parametrize("e", [1e-3, 0.1])
def test_2_product_changes_in_second_order_only(kind: str, e: float) -> None:
    block = block_of(B=normal(1, M, RANK), A=normal(2, RANK, N))
    factor_gradients(block, normal(3, M, N))
    before = product(block)
    Balance(kind=kind, strength=0.5).move({SITE: block}, learning_rate=e / 0.5)
    after = product(block)
    assert abs(relative(after, before) / e**2 - 1) < 1e-8
    assert relative(after, (1 - e**2) * before) < 1e-14


@pytest.mark.parametrize(("size_B", "size_A"), [(3.0, 1.0), (0.2, 1.0)])
def test_3_obar_balances_the_norms(size_B: float, size_A: float) -> None:
    block = block_of(B=size_B * normal(4, M, RANK), A=size_A * normal(5, RANK, N))
    for tensor in block.values():
        tensor.grad = torch.zeros_like(tensor)
    e, balancing, flipped = 0.01, Balance(kind="obar", strength=0.1), False
    before = balance(block["B"], block["A"])
    for _ in range(300):
        square = norm(block["B"]) ** 2 + norm(block["A"]) ** 2
        balancing.move({SITE: block}, learning_rate=0.1)
        after = balance(block["B"], block["A"])
        # exactly: ½((1∓e)²‖B‖² - (1±e)²‖A‖²) = (1 + e²) Bal ∓ e (‖B‖² + ‖A‖²)
        sign = 1.0 if before >= 0 else -1.0
        assert after == pytest.approx((1 + e**2) * before - sign * e * square, rel=1e-9, abs=1e-12)
        flipped = flipped or before * after <= 0
        if flipped:
            assert abs(after) <= 2 * e * square
        else:
            assert abs(after) < abs(before)
        before = after
    assert flipped


def test_4_gradient_flow_keeps_the_balance() -> None:
    s, G = 2.0, normal(6, M, N)
    B, A = normal(7, M, RANK), normal(8, RANK, N)
    changes = []
    for lr in (1e-3, 1e-4):
        block = block_of(B=B, A=A)
        factor_gradients(block, G, s)
        assert block["B"].grad is not None
        assert block["A"].grad is not None
        inner = [float((block[role].detach() * block[role].grad).sum()) for role in ("B", "A")]
        assert inner[0] == pytest.approx(inner[1], rel=1e-12)
        assert inner[0] == pytest.approx(float(s * (G * (B @ A)).sum()), rel=1e-12)
        optimizer = optimizer_on({SITE: block}, "lora + sgd", lr)
        optimizer.step()
        changes.append(balance(block["B"], block["A"]) - balance(B, A))
    assert changes[0] / changes[1] == pytest.approx(100, rel=1e-4)  # O(η²)


def test_5_nbar_decides_as_sam_would() -> None:
    noise = normal(9, M, 1) @ normal(10, 1, N)
    block = block_of(B=2.0 * normal(11, M, 1), A=0.5 * normal(12, 1, N))
    optimizer, perturbation, checked = optimizer_on({SITE: block}, "lora + sgd", 0.01), Balance(kind="nbar"), 0
    for _ in range(200):
        factor_gradients(block, product(block) - noise)
        assert block["B"].grad is not None
        assert block["A"].grad is not None
        g_x, g_y = norm(block["B"].grad), norm(block["A"].grad)
        if abs(g_x - g_y) >= 1e-6:
            rate = (g_x**2 - g_y**2) / (g_x**2 + g_y**2) ** 0.5  # SAM's dBal/dt / ρ
            trial = block_of(**{role: tensor.detach() for role, tensor in block.items()})
            for role, tensor in trial.items():
                tensor.grad = block[role].grad
            perturbation.move({SITE: trial}, learning_rate=0.1)
            grown = norm(trial["B"]) - norm(block["B"])
            assert (grown > 0) == (rate > 0)
            assert (norm(trial["A"]) < norm(block["A"])) == (rate > 0)
            checked += 1
        optimizer.step()
    assert checked > 100


@pytest.mark.parametrize("kind", ["nbar", "obar"])
def test_6_swapped_roles_give_the_mirrored_trajectory(kind: str) -> None:
    target, B, A = normal(13, M, N), normal(14, M, RANK), normal(15, RANK, N)
    block, mirror = block_of(B=B, A=A), block_of(B=A.T, A=B.T)
    optimizers = [optimizer_on({SITE: b}, "lora + sgd", 0.01) for b in (block, mirror)]
    for _ in range(30):
        for b, goal, optimizer in ((block, target, optimizers[0]), (mirror, target.T, optimizers[1])):
            factor_gradients(b, product(b) - goal)
            Balance(kind=kind, strength=0.5).move({SITE: b}, learning_rate=0.1)
            optimizer.step()
        assert relative(mirror["B"].T, block["A"]) < 1e-10
        assert relative(mirror["A"].T, block["B"]) < 1e-10


@pytest.mark.parametrize("kind", ["nbar", "obar"])
def test_7_layers_do_not_see_each_other(kind: str) -> None:
    def drawn() -> dict[str, dict[str, torch.nn.Parameter]]:
        blocks = {f"l{i}": block_of(B=(i + 1) * normal(20 + i, M, RANK), A=normal(30 + i, RANK, N)) for i in range(3)}
        for i, block in enumerate(blocks.values()):
            factor_gradients(block, normal(40 + i, M, N))
        return blocks

    together = drawn()
    Balance(kind=kind).move(together, learning_rate=0.1)
    for site, block in drawn().items():
        Balance(kind=kind).move({site: block}, learning_rate=0.1)
        assert all(torch.equal(block[role], together[site][role]) for role in block)


@pytest.mark.parametrize("kind", ["nbar", "obar"])
def test_start_shrinks_a(kind: str) -> None:
    """The pitfall's tie rule: at B = 0 both variants shrink A."""
    block = block_of(B=torch.zeros(M, RANK, dtype=torch.float64), A=normal(50, RANK, N))
    factor_gradients(block, normal(51, M, N))
    before = block["A"].detach().clone()
    Balance(kind=kind, strength=1.0).move({SITE: block}, learning_rate=0.01)
    assert relative(block["A"], 0.99 * before) < 1e-14
    assert int(block["B"].count_nonzero()) == 0
