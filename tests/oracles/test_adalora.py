"""AdaLoRA against its spec (arXiv:2303.10512)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.protocols import Mask
from rankwise.schedules.cubic import cubic_budget
from rankwise.schedules.importance import Importance
from tests.oracles.tools_training import (
    SITE,
    adapted,
    block_of,
    layer_model,
    normal,
    orthonormal,
    put,
    relative,
    schedule_of,
)

M, N = 6, 5


@pytest.mark.parametrize("seed", range(3))
def test_1_update_is_zero_and_only_the_gate_has_a_gradient(seed: int) -> None:
    weight, x = normal(seed, M, N), normal(seed + 10, 7, N)
    model, handle = adapted(weight, rankwise.catalog.adalora(rank=3, target_rank=2, total_steps=10), seed=seed)
    assert int(handle.update_of(SITE).dense().count_nonzero()) == 0
    assert torch.equal(model(x), torch.nn.functional.linear(x, weight))
    (model(x) ** 2).sum().backward()
    roles = handle.parameterization(SITE).roles()
    assert roles["A"].grad is not None
    assert roles["B"].grad is not None
    assert roles["gate"].grad is not None
    assert int(roles["A"].grad.count_nonzero()) == int(roles["B"].grad.count_nonzero()) == 0
    assert int(roles["gate"].grad.count_nonzero()) == 3


def test_1_factors_start_gaussian() -> None:
    _, handle = adapted(normal(3, 200, 150), rankwise.catalog.adalora(rank=12, target_rank=2, total_steps=10))
    for role in ("A", "B"):
        assert float(handle.parameterization(SITE).roles()[role].detach().std()) == pytest.approx(0.02, rel=0.1)


def three_layers() -> dict[str, dict[str, nn.Parameter]]:
    return {f"l{i}": block_of(B=normal(10 + i, M, 4), A=normal(20 + i, 4, N), gate=normal(30 + i, 4)) for i in range(3)}


def with_gradients(blocks: dict[str, dict[str, nn.Parameter]], seed: int) -> None:
    for i, block in enumerate(blocks.values()):
        for j, tensor in enumerate(block.values()):
            tensor.grad = normal(seed + 10 * i + j, *tensor.shape)


def observed(block: dict[str, nn.Parameter]) -> dict[str, tuple[Tensor, Tensor]]:
    return {role: (tensor.detach().clone(), tensor.grad.clone()) for role, tensor in block.items() if tensor.grad is not None}


def brute_scores(history: list[dict[str, dict[str, tuple[Tensor, Tensor]]]], beta1: float, beta2: float) -> dict[str, Tensor]:
    """Triplet scores from (w, g) of every step."""
    scores = {}
    for site in history[0]:
        parts = {}
        for role in ("B", "A", "gate"):
            average = spread = torch.zeros_like(history[0][site][role][0])
            for step in history:
                w, g = step[site][role]
                size = (w * g).abs()
                average = beta1 * average + (1 - beta1) * size
                spread = beta2 * spread + (1 - beta2) * (size - average).abs()
            parts[role] = average * spread
        scores[site] = parts["gate"] + parts["A"].mean(1) + parts["B"].mean(0)
    return scores


def test_2_exactly_the_budget_is_kept() -> None:
    """3 layers of r = 4 (b_0 = 12) down to 3: the budget passes 5."""
    options = {"total_steps": 12, "warmup_steps": 1, "final_steps": 2}
    budget = lambda t: max(3, math.floor(3 + 9 * (1 - (t - 1) / 9) ** 3)) if 1 < t <= 10 else (12 if t <= 1 else 3)  # noqa: E731
    schedule = schedule_of(rankwise.catalog.adalora(rank=4, target_rank=1, orthogonality=0.0, **options))
    blocks = three_layers()
    history, seen = [], set()
    for step in range(10):
        with_gradients(blocks, 1000 + 100 * step)
        if step + 1 < 10:  # scores are taken while t < T - T_final, masks until t = T - T_final
            history.append({site: observed(block) for site, block in blocks.items()})
        decisions = schedule.decide(step, blocks, learning_rate=0.1)
        masks = {site: decision.keep for site, decision in decisions.items() if isinstance(decision, Mask)}
        allowed = budget(step + 1)
        if allowed == 12:
            assert all(bool(mask.all()) for mask in masks.values())
            continue
        kept = sum(int(mask.sum()) for mask in masks.values()) + 4 * (3 - len(masks))
        assert kept == allowed
        seen.add(allowed)
        scores = brute_scores(history, 0.85, 0.85)
        threshold = torch.cat(list(scores.values())).sort(descending=True).values[allowed - 1]
        for site, mask in masks.items():
            assert torch.equal(mask, scores[site] >= threshold)
    assert 5 in seen


@pytest.mark.parametrize(("start", "target"), [(12, 3), (36, 24), (7, 1)])
def test_3_budget_function(start: int, target: int) -> None:
    options = {"start": start, "target": target, "total_steps": 120, "warmup_steps": 10, "final_steps": 30}
    values = [cubic_budget(t, **options) for t in range(121)]
    assert all(value == start for value in values[:11])
    assert all(value == target for value in values[90:])
    assert values[50] == math.floor(target + (start - target) / 8)  # the midpoint of 10 and 90
    assert all(later <= earlier for earlier, later in pairwise(values))
    for t in range(11, 91):
        assert values[t] == math.floor(target + (start - target) * (1 - (t - 10) / 80) ** 3 + 1e-12)


def test_4_averages_by_hand() -> None:
    importance = Importance(beta1=0.5, beta2=0.5)
    one = torch.ones(1, dtype=torch.float64)
    importance.observe("w", one, one)
    average, spread = importance.averages("w")
    assert float(average) == pytest.approx(0.5, abs=1e-7)
    assert float(spread) == pytest.approx(0.25, abs=1e-7)
    importance.observe("w", one, -3 * one)
    average, spread = importance.averages("w")
    assert float(average) == pytest.approx(1.75, abs=1e-7)
    assert float(spread) == pytest.approx(0.75, abs=1e-7)
    assert float(importance.score("w")) == pytest.approx(1.75 * 0.75, abs=1e-7)


@pytest.mark.parametrize("alive", [[0, 2], [1], []])
def test_5_exported_pair_is_the_layer(alive: list[int]) -> None:
    weight, x, rank = normal(40, M, N).float(), normal(41, 7, N).float(), 3
    model, handle = adapted(weight, rankwise.catalog.adalora(rank=rank, target_rank=1, total_steps=10, alpha=6.0))
    gate = torch.zeros(rank)
    gate[alive] = normal(42, len(alive)).float()
    put(handle, {"gate": gate, "B": normal(43, M, rank).float(), "A": normal(44, rank, N).float()})
    roles = handle.parameterization(SITE).roles()
    s = 6.0 / (rank + 1e-5)
    B, A = roles["B"].detach()[:, alive], s * torch.diag(gate[alive]) @ roles["A"].detach()[alive]
    assert float((model(x).detach() - (x @ weight.T + x @ A.T @ B.T)).abs().max()) < 1e-5
    exported = handle.low_rank_of(SITE)
    assert exported is not None
    reference = (x @ weight.T + x @ exported.dense().detach().T).detach()
    assert float((model(x).detach() - reference).abs().max() / reference.abs().max()) < 1e-6


def test_6_masked_rank_can_come_back() -> None:
    model, handle = adapted(normal(50, M, N), rankwise.catalog.adalora(rank=3, target_rank=2, total_steps=10))
    put(handle, {"gate": normal(51, 3), "B": normal(52, M, 3), "A": normal(53, 3, N)})
    optimizer = handle.optimizer(0.05)
    handle.apply_({SITE: Mask(torch.tensor([True, False, True]))})
    gate = handle.parameterization(SITE).roles()["gate"]
    assert float(gate.detach()[1]) == 0.0
    (model(normal(54, 8, N)) ** 2).mean().backward()
    handle.after_backward()
    assert gate.grad is not None
    assert float(gate.grad[1]) != 0.0
    optimizer.step()
    assert float(gate.detach()[1]) != 0.0


def penalty(blocks: dict[str, dict[str, nn.Parameter]], gamma: float) -> Tensor:
    """R of the definition."""
    total = torch.zeros((), dtype=torch.float64)
    for block in blocks.values():
        eye = torch.eye(block["A"].shape[0], dtype=torch.float64)
        for gram in (block["A"] @ block["A"].T, block["B"].T @ block["B"]):
            total = total + torch.linalg.norm(gram - eye)
    return gamma / (2 * len(blocks)) * total


def added(blocks: dict[str, dict[str, nn.Parameter]], gamma: float) -> dict[str, dict[str, Tensor]]:
    """What the schedule adds to zero gradients."""
    for block in blocks.values():
        for tensor in block.values():
            tensor.grad = torch.zeros_like(tensor)
    schedule = schedule_of(rankwise.catalog.adalora(rank=4, target_rank=2, total_steps=10, orthogonality=gamma))
    schedule.before_step(0, blocks)
    return {s: {r: t.grad.clone() for r, t in b.items() if t.grad is not None} for s, b in blocks.items()}


def test_7_penalty_is_the_definitions() -> None:
    gamma, blocks = 0.3, three_layers()
    found = added(blocks, gamma)
    for block in blocks.values():
        for tensor in block.values():
            tensor.grad = None
    penalty(blocks, gamma).backward()
    for site, block in blocks.items():
        assert int(found[site]["gate"].count_nonzero()) == 0
        for role in ("A", "B"):
            expected = block[role].grad
            assert expected is not None
            assert relative(found[site][role], expected) < 1e-12


def test_7_penalty_vanishes_exactly_at_orthonormal_factors_and_is_gamma_root_r_at_zero() -> None:
    """The library gives the gradient only: R(0) - R(orthonormal) is its integral along t ↦ (t B, t A)."""
    gamma, rank = 0.3, 4
    B, A = orthonormal(60, M, rank), orthonormal(61, N, rank).T
    ends = {"l": block_of(B=B, A=A, gate=torch.ones(rank, dtype=torch.float64))}
    assert all(
        int(gradient.count_nonzero()) == 0 or float(gradient.abs().max()) < 1 for gradient in added(ends, gamma)["l"].values()
    )
    assert float(penalty(ends, gamma).detach()) < 1e-14
    nodes = [(i + 0.5) / 200 for i in range(200)]
    integral = 0.0
    for t in nodes:
        gradient = added({"l": block_of(B=t * B, A=t * A, gate=torch.ones(rank, dtype=torch.float64))}, gamma)["l"]
        integral += float((gradient["B"] * B).sum() + (gradient["A"] * A).sum()) / 200
    assert -integral == pytest.approx(gamma * rank**0.5, rel=1e-4)  # midpoint rule on a linear integrand
    assert float(penalty({"l": block_of(B=0 * B, A=0 * A)}, gamma).detach()) == pytest.approx(gamma * rank**0.5)


def test_budget_over_a_run_through_the_handle() -> None:
    """The algorithm's outcome: after the last mask exactly target · L gates are open, and they stay the same."""
    torch.manual_seed(0)
    model = layer_model(normal(70, 6, 6), second=normal(71, 6, 6), third=normal(72, 6, 6))
    recipe = rankwise.catalog.adalora(rank=4, target_rank=2, total_steps=20, warmup_steps=4, final_steps=6, interval=3)
    handle = rankwise.adapt_(model, recipe)
    optimizer, x, y, patterns = handle.optimizer(0.05), normal(73, 16, 6), normal(74, 16, 6), []
    for _ in range(20):
        ((model(x) - y) ** 2).mean().backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
        patterns.append(torch.cat([handle.parameterization(site).roles()["gate"].detach() != 0 for site in handle.targets]))
    assert all(int(pattern.sum()) == 12 for pattern in patterns[:4])
    assert all(int(pattern.sum()) == 6 for pattern in patterns[13:])
    assert all(torch.equal(pattern, patterns[13]) for pattern in patterns[14:])
