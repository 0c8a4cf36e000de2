"""SoRA: the soft threshold, the ladder, pruning."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError
from rankwise.schedules.sora import SoRA, prune, soft_threshold, sparsifying_ladder
from tests.core.training import Regression, open_gates


def decide(schedule: SoRA, gate: list[float], *, step: int = 0, learning_rate: float = 0.1) -> list[float]:
    blocks = {"0": {"gate": nn.Parameter(torch.tensor(gate, dtype=torch.float64))}}
    return schedule.decide(step, blocks, learning_rate=learning_rate)["0"].values["gate"].tolist()


def test_the_prox_and_the_released_double_threshold() -> None:
    values = torch.tensor([-3, -1.5, -0.5, 0.5, 1.5, 2.5, 3])
    assert soft_threshold(values, 1.0).tolist() == [-2, -0.5, 0, 0, 0.5, 1.5, 2]
    assert soft_threshold(values, 1.0, compat="released").tolist() == [-2, 0, 0, 0, 0, 1.5, 2]
    assert torch.equal(soft_threshold(values, 0.0), values)


def test_threshold_constant_or_times_the_learning_rate() -> None:
    assert decide(SoRA(threshold=0.5), [1.0, -0.2]) == [0.5, 0.0]
    assert decide(SoRA(threshold=0.5, mode="learning_rate"), [1.0, -0.2]) == pytest.approx([0.95, -0.15])
    assert decide(SoRA(threshold=0.5, compat="released"), [0.9, 1.5]) == [0.0, 1.0]


def test_one_dimensional_lasso_in_one_step() -> None:
    """½ (g - c)² with step 1 and threshold λ gives T_λ(c)."""
    for c, expected in ((2.0, 1.5), (-0.3, 0.0), (-0.8, -0.3)):
        gate = 0.7 - 1.0 * (0.7 - c)
        assert decide(SoRA(threshold=0.5), [gate]) == pytest.approx([expected])


def test_l1_term_is_shared_among_all_gates_of_the_model() -> None:
    blocks = {str(k): {"gate": nn.Parameter(torch.tensor([0.5, -2.0, 0.0]))} for k in range(2)}
    blocks["0"]["gate"].grad = torch.ones(3)
    SoRA(l1=6.0).before_step(0, {**blocks, "head": {"weight": nn.Parameter(torch.ones(2))}})
    assert blocks["0"]["gate"].grad.tolist() == [2, 0, 1]
    assert blocks["1"]["gate"].grad.tolist() == [1, -1, 0]


def test_at_the_start_a_gate_only_shrinks_by_the_threshold() -> None:
    problem = Regression()
    handle = problem.adapt("sora(rank=3, threshold=0.01)")
    before = {site: block["gate"].detach().clone() for site, block in handle.blocks().items()}
    problem.train(handle, handle.optimizer(lr=0.05), 1)
    for site, block in handle.blocks().items():
        torch.testing.assert_close(block["gate"].detach(), soft_threshold(before[site], 0.01))


def test_threshold_zero_and_gates_at_one_is_lora() -> None:
    results = []
    for text in ("lora(rank=3, alpha=16)", "sora(rank=3, threshold=0.0)"):
        problem = Regression()
        handle = problem.adapt(text)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for site in handle.targets:
                roles = handle.parameterization(site).roles()
                roles["A"].copy_(torch.randn(roles["A"].shape, generator=generator, dtype=torch.float64))
                if "gate" in roles:
                    roles["gate"].fill_(1.0).requires_grad_(False)
        problem.train(handle, handle.optimizer(lr=0.02), 6)
        results.append({site: handle.update_of(site).dense().detach() for site in handle.targets})
    for site in results[0]:
        torch.testing.assert_close(results[0][site], results[1][site], rtol=1e-9, atol=1e-12)


def test_more_threshold_never_leaves_more_gates() -> None:
    """With A and B fixed orthonormal and a quadratic loss the gates separate, and each dies at its own threshold."""
    target = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64)
    left = []
    for threshold in (0.0, 0.01, 0.03, 0.05, 0.08, 0.2):
        gate, schedule = target.clone() * 2, SoRA(threshold=threshold)
        for _ in range(200):
            gate = torch.tensor(decide(schedule, (gate - 0.1 * (gate - target)).tolist()), dtype=torch.float64)
        left.append(int((gate != 0).sum()))
        torch.testing.assert_close(gate, soft_threshold(target, threshold / 0.1), rtol=0, atol=1e-8)
    assert left == sorted(left, reverse=True)
    assert left[0] == 8
    assert left[-1] == 0


def test_prune_keeps_function_and_scale_and_saves(tmp_path) -> None:
    problem = Regression()
    handle = problem.adapt("sora(rank=4, threshold=0.05)")
    open_gates(handle, scale=0.2)
    optimizer = handle.optimizer(lr=0.05)
    problem.train(handle, optimizer, 8)
    assert handle.unfinished() is None
    before = problem.model(problem.batches[0][0]).detach()
    scale = handle.parameterization("0").scale
    left = prune(handle)
    assert 0 < sum(left.values()) < 8
    assert scale == handle.parameterization("0").scale == 4.0
    torch.testing.assert_close(problem.model(problem.batches[0][0]), before, rtol=1e-12, atol=1e-13)
    assert {site: handle.low_rank_of(site).rank for site in left} == left
    handle.save(tmp_path)
    fresh = Regression()
    rankwise.load_(fresh.model, tmp_path)
    torch.testing.assert_close(fresh.model(problem.batches[0][0]), before, rtol=1e-12, atol=1e-13)
    problem.train(handle, optimizer, 2)
    with pytest.raises(ArgumentError, match="has no gate to prune by"):
        prune(Regression().adapt("lora(rank=2)"))


def test_the_ladder_is_climbed_rung_by_rung() -> None:
    assert sparsifying_ladder(1.0, 3.0, 3) == (1.0, 2.0, 3.0)
    assert sparsifying_ladder(1.0, 4.0, 3, spacing="exp") == pytest.approx((1.0, 2.0, 4.0))
    assert sparsifying_ladder(1.0, 3.0, 3, spacing="log")[1] == pytest.approx(math.log((math.e + math.e**3) / 2))
    assert sparsifying_ladder(2.0, 3.0, 1) == (2.0,)
    schedule = SoRA(threshold=(0.1, 0.2, 0.4), rung_steps=2)
    assert [schedule.threshold_at(step) for step in (0, 1, 2, 3, 4, 9)] == [0.1, 0.1, 0.2, 0.2, 0.4, 0.4]
    recipe = rankwise.catalog.sora(threshold=[0.1, 0.2], rung_steps=5)
    assert rankwise.Recipe.from_json(recipe.to_json()).schedule.build().ladder == (0.1, 0.2)


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="a ladder of thresholds needs rung_steps"):
        SoRA(threshold=(0.1, 0.2))
    with pytest.raises(ArgumentError, match="one threshold none"):
        SoRA(threshold=0.1, rung_steps=3)
    with pytest.raises(ArgumentError, match="compat None or 'released'"):
        SoRA(compat="paper")
    with pytest.raises(ArgumentError, match="spacing is one of linear, log, exp"):
        sparsifying_ladder(0.1, 1.0, 3, spacing="cubic")
    with pytest.raises(RecipeError, match="start at zero and would never leave"):
        Regression().adapt("gated_lora(rank=2, form='svd') + sora")
    with pytest.raises(RecipeError, match="would never leave"):
        Regression().adapt("dora(inner=gated_lora(rank=2)) + sora")
    with pytest.raises(RecipeError, match="can be pruned without loss; start PiSSA"):
        Regression().adapt("gated_lora(rank=2, form='sora') + pissa + sora")


def test_unfinished_without_a_zero() -> None:
    problem = Regression()
    handle = problem.adapt("sora(rank=2, threshold=1e-9)")
    problem.train(handle, handle.optimizer(lr=1e-3), 2)
    assert "no gate reached zero in 2 steps" in handle.unfinished()
