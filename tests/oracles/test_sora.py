"""SoRA against its spec (arXiv:2311.11696)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rankwise
from rankwise.core.protocols import Assign, Freeze
from rankwise.schedules.sora import prune, soft_threshold
from tests.oracles.tools_training import SITE, adapted, block_of, normal, orthonormal, put, relative, roles_of, schedule_of

M, N, RANK = 6, 5, 3


def recipe(threshold: float = 1e-3, **options) -> rankwise.Recipe:
    return rankwise.catalog.sora(rank=RANK, threshold=threshold, alpha=6.0, **options)


def test_1_soft_threshold() -> None:
    values = torch.tensor([-3, -1.5, -0.5, 0.5, 1.5, 2.5, 3], dtype=torch.float64)
    true_prox = torch.tensor([-2, -0.5, 0, 0, 0.5, 1.5, 2], dtype=torch.float64)
    released = torch.tensor([-2, 0, 0, 0, 0, 1.5, 2], dtype=torch.float64)
    assert torch.equal(soft_threshold(values, 1.0), true_prox)
    assert torch.equal(soft_threshold(values, 1.0, compat="released"), released)
    for v, t in zip(values, true_prox, strict=True):  # argmin ½(g - v)² + |g|, by search
        grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
        assert abs(float(grid[(0.5 * (grid - v) ** 2 + grid.abs()).argmin()]) - float(t)) < 1e-3


def test_2_open_frozen_gate_is_lora() -> None:
    weight, x, y = normal(0, M, N), normal(1, 12, N), normal(2, 12, M)
    A = normal(3, RANK, N)
    reached = []
    for recipe_here in (recipe(threshold=0.0), rankwise.compose(f"lora(rank={RANK}, alpha=6.0)")):
        model, handle = adapted(weight, recipe_here)
        put(handle, {"A": A, "B": torch.zeros(M, RANK)})
        if "gate" in handle.parameterization(SITE).roles():
            put(handle, {"gate": torch.ones(RANK)})
            handle.apply_({SITE: Freeze(frozenset({"gate"}))})
        optimizer = handle.optimizer(0.01)
        for _ in range(10):
            ((model(x) - y) ** 2).mean().backward()
            handle.after_backward()
            optimizer.step()
            handle.after_step()
            optimizer.zero_grad()
        reached.append(handle.update_of(SITE).dense().detach())
    assert relative(reached[0], reached[1]) < 1e-12
    assert float(reached[1].abs().max()) > 1e-3


def gates_after(threshold: float, gate: Tensor, gradient: Tensor, lr: float = 1.0) -> Tensor:
    """One gradient step with this rate, then what the schedule decides."""
    block = block_of(B=normal(4, M, len(gate)), A=normal(5, len(gate), N), gate=gate - lr * gradient)
    for tensor in block.values():
        tensor.grad = torch.zeros_like(tensor)
    block["gate"].grad = gradient
    schedule = schedule_of(recipe(threshold=threshold))
    schedule.before_step(0, {SITE: block})
    decision = schedule.decide(0, {SITE: block}, learning_rate=lr)[SITE]
    assert isinstance(decision, Assign)
    return decision.values["gate"]


@pytest.mark.parametrize("threshold", [0.1, 0.7, 2.0])
def test_3_lasso_in_one_step(threshold: float) -> None:
    c, g = normal(6, 8), normal(7, 8)
    found = gates_after(threshold, g, g - c)  # gradient of ½(g - c)²
    assert torch.allclose(found, torch.sign(c) * (c.abs() - threshold).clamp(min=0), atol=1e-15)


@pytest.mark.parametrize("alive", [[0, 2], [1], [0, 1, 2]])
def test_4_deleting_zero_gates_changes_nothing(alive: list[int]) -> None:
    weight, x = normal(8, M, N), normal(9, 7, N)
    model, handle = adapted(weight, recipe())
    gate = torch.zeros(RANK, dtype=torch.float64)
    gate[alive] = normal(10, len(alive)).abs() + 0.1
    put(handle, {"gate": gate, "B": normal(11, M, RANK), "A": normal(12, RANK, N)})
    kept = roles_of(handle)
    expected = weight + 6.0 / RANK * kept["B"][:, alive] @ torch.diag(gate[alive]) @ kept["A"][alive]  # α / the original r
    before = model(x).detach().clone()
    assert relative(before, x @ expected.T) < 1e-12
    exported = handle.low_rank_of(SITE)
    assert exported is not None
    assert relative(x @ (weight + exported.dense()).T, before) < 1e-6
    assert prune(handle) == {SITE: len(alive)}
    assert relative(model(x), before) < 1e-6
    exported = handle.low_rank_of(SITE)
    assert exported is not None
    assert exported.rank == len(alive)
    assert relative(weight + exported.dense(), expected) < 1e-12
    assert {role: tensor.shape for role, tensor in handle.parameterization(SITE).roles().items()} == {
        "A": (len(alive), N),
        "B": (M, len(alive)),
        "gate": (len(alive),),
    }


def test_5_fewer_gates_live_at_a_larger_threshold() -> None:
    rank = 5
    B, A, target = orthonormal(13, M, rank), orthonormal(14, N, rank).T, normal(15, M, N)
    best = (B.T @ target @ A.T).diagonal()  # minimizer of ½‖B diag(g) A - target‖² for orthonormal B, A
    counts = []
    for threshold in [0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8]:
        gate = torch.ones(rank, dtype=torch.float64)
        for _ in range(60):
            gradient = (B.T @ (B @ torch.diag(gate) @ A - target) @ A.T).diagonal()
            gate = gates_after(0.3 * threshold, gate, gradient, lr=0.3)
        assert torch.allclose(gate, torch.sign(best) * (best.abs() - threshold).clamp(min=0), atol=1e-6)
        counts.append(int(gate.count_nonzero()))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


@pytest.mark.parametrize("step", ["adamw", "sgd"])
def test_6_first_step_only_shrinks_the_gate(step: str) -> None:
    threshold = 1e-3
    _, handle = adapted(normal(16, M, N), rankwise.compose(f"sora(rank={RANK}, threshold={threshold}, alpha=6.0) + {step}"))
    model = handle.model
    before, optimizer = roles_of(handle), handle.optimizer(0.05)
    (model(normal(17, 9, N)) ** 2).mean().backward()
    handle.after_backward()
    gate = handle.parameterization(SITE).roles()["gate"]
    assert gate.grad is not None
    assert int(gate.grad.count_nonzero()) == 0
    optimizer.step()
    handle.after_step()
    after = roles_of(handle)
    assert float(before["gate"].abs().min()) > threshold
    assert torch.allclose(before["gate"].abs() - after["gate"].abs(), torch.full((RANK,), threshold, dtype=torch.float64))
    assert torch.equal(torch.sign(before["gate"]), torch.sign(after["gate"]))


def test_definition_learning_rate_mode_and_ladder() -> None:
    """ξ = η λ of the paper, and a ladder that holds each threshold for its steps."""
    gate = torch.tensor([1.0, -1.0, 0.05], dtype=torch.float64)
    block = block_of(B=normal(18, M, 3), A=normal(19, 3, N), gate=gate)
    schedule = schedule_of(recipe(threshold=0.5, mode="learning_rate"))
    decision = schedule.decide(0, {SITE: block}, learning_rate=0.2)[SITE]
    assert torch.allclose(decision.values["gate"], torch.tensor([0.9, -0.9, 0.0], dtype=torch.float64))
    ladder = schedule_of(rankwise.catalog.sora(rank=3, threshold=[0.1, 0.2, 0.4], rung_steps=5))
    assert [ladder.threshold_at(step) for step in (0, 4, 5, 9, 10, 14, 15, 100)] == [0.1, 0.1, 0.2, 0.2, 0.4, 0.4, 0.4, 0.4]


def test_definition_l1_term() -> None:
    """λ₁ / N_g Σ|gate|, N_g the gates of the whole model."""
    blocks = {f"l{i}": block_of(B=normal(20 + i, M, 3), A=normal(30 + i, 3, N), gate=normal(40 + i, 3)) for i in range(2)}
    for block in blocks.values():
        for tensor in block.values():
            tensor.grad = torch.zeros_like(tensor)
    schedule_of(recipe(l1=10.0)).before_step(0, blocks)
    for block in blocks.values():
        assert block["gate"].grad is not None
        assert block["A"].grad is not None
        assert torch.allclose(block["gate"].grad, 10.0 / 6 * torch.sign(block["gate"].detach()))
        assert int(block["A"].grad.count_nonzero()) == 0
