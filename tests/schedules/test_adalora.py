"""AdaLoRA: budget, importance, masks, and the orthogonality term."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError
from rankwise.core.protocols import Mask
from rankwise.schedules.adalora import AdaLoRA
from rankwise.schedules.cubic import cubic_budget
from rankwise.schedules.importance import Importance, keep_best
from rankwise.schedules.orthogonality import add_orthogonality, orthogonality_gradient
from rankwise.schedules.sora import prune
from tests.core.training import Regression, open_gates

RUN = {"total_steps": 20, "warmup_steps": 4, "final_steps": 4}


def budget(step: int, **more: int) -> int:
    return cubic_budget(step, start=24, target=8, **{**RUN, **more})


def test_cubic_budget() -> None:
    assert [budget(step) for step in (0, 1, 4)] == [24, 24, 24]
    assert budget(10) == 8 + 16 // 8  # halfway
    assert [budget(step) for step in (16, 17, 100)] == [8, 8, 8]
    falling = [budget(step) for step in range(25)]
    assert falling == sorted(falling, reverse=True)
    # In floating point 3³ · (1 - 2/3)³ comes out below 1 and its floor would be 0.
    assert cubic_budget(2, start=27, target=0, total_steps=3, warmup_steps=0, final_steps=0) == 1


def test_importance_by_hand() -> None:
    importance = Importance(beta1=0.5, beta2=0.5)
    for value in (1.0, -3.0):
        importance.observe("w", torch.tensor([value]), torch.tensor([1.0]))
    mean, spread = importance.averages("w")
    assert mean.item() == 1.75
    assert spread.item() == 0.75
    assert importance.score("w").item() == 1.75 * 0.75
    importance.observe("w", torch.tensor([5.0]), None)
    assert importance.averages("w")[0].item() == 0.875


def test_keep_best_counts_over_sites_and_breaks_ties_by_order() -> None:
    scores = {"a": torch.tensor([0.3, 0.1, 0.0]), "b": torch.tensor([0.2, 0.1, 0.1])}
    kept = keep_best(scores, 3)
    assert {site: keep.tolist() for site, keep in kept.items()} == {"a": [True, True, False], "b": [True, False, False]}
    assert sum(int(keep.sum()) for keep in keep_best(scores, 6).values()) == 6
    assert sum(int(keep.sum()) for keep in keep_best(scores, 0).values()) == 0


def test_orthogonality_gradient_is_that_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    block = {
        "A": nn.Parameter(torch.randn(3, 7, generator=generator, dtype=torch.float64)),
        "B": nn.Parameter(torch.randn(5, 3, generator=generator, dtype=torch.float64)),
    }
    eye = torch.eye(3, dtype=torch.float64)
    norms = (
        torch.linalg.matrix_norm(block["A"] @ block["A"].t() - eye),
        torch.linalg.matrix_norm(block["B"].t() @ block["B"] - eye),
    )
    expected = torch.autograd.grad(0.4 / 4 * (norms[0] + norms[1]), [block["A"], block["B"]])
    block["A"].grad = torch.ones_like(block["A"])
    add_orthogonality([block, {"A": block["A"].detach().clone(), "B": block["B"].detach().clone()}], 0.4)
    torch.testing.assert_close(block["A"].grad, expected[0] + 1)
    torch.testing.assert_close(block["B"].grad, expected[1])
    assert not orthogonality_gradient(torch.eye(3, 5)).any()


def schedule_with_scores(**arguments) -> tuple[AdaLoRA, dict[str, dict[str, nn.Parameter]]]:
    """Three layers of rank 4 in which every triplet has its own importance."""
    generator = torch.Generator().manual_seed(1)
    blocks = {}
    for site in ("x", "y", "z"):
        shapes = {"A": (4, 6), "B": (5, 4), "gate": (4,)}
        block = {
            role: nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64)) for role, shape in shapes.items()
        }
        for tensor in block.values():
            tensor.grad = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        blocks[site] = block
    return AdaLoRA(**arguments), blocks


def test_scores_are_means_over_rows_and_columns_of_updated_parameters_times_gradients() -> None:
    schedule, blocks = schedule_with_scores(target_rank=1, total_steps=9, beta1=0.0, beta2=0.5)
    schedule.decide(0, blocks, learning_rate=0.1)
    block = blocks["y"]
    importance = {role: (tensor * tensor.grad).abs().detach() for role, tensor in block.items()}
    for _ in range(2):
        for tensor in block.values():
            tensor.grad.mul_(2.0)
        schedule.decide(1, blocks, learning_rate=0.1)
    # β₁ = 0: Ī = I = 4·I₀, so I - Ī = 0 and Ū stays 0: nothing is uncertain, every score is 0
    assert not schedule.scores("y").any()
    schedule, blocks = schedule_with_scores(target_rank=1, total_steps=9, beta1=0.5, beta2=0.5)
    schedule.decide(0, blocks, learning_rate=0.1)
    s = {role: (0.5 * value) * (0.25 * value) for role, value in importance.items()}
    expected = s["gate"] + s["A"].mean(dim=1) + s["B"].mean(dim=0)
    torch.testing.assert_close(schedule.scores("y"), expected)


def test_masks_follow_the_budget_the_interval_and_freeze_at_the_end() -> None:
    schedule, blocks = schedule_with_scores(target_rank=1, total_steps=12, warmup_steps=2, final_steps=3, interval=2)
    kept, patterns = [], []
    for step in range(13):
        decisions = schedule.decide(step, blocks, learning_rate=0.1)
        kept.append(sum(int(decision.keep.sum()) for decision in decisions.values()) if decisions else None)
        patterns.append(torch.cat([decision.keep for decision in decisions.values()]) if decisions else None)
        for block in blocks.values():
            for tensor in block.values():
                tensor.grad.neg_().mul_(1.1)
    expected = {t: cubic_budget(t, start=12, target=3, total_steps=12, warmup_steps=2, final_steps=3) for t in (4, 6, 8)}
    assert kept == [None, None, None, expected[4], None, expected[6], None, expected[8], 3, 3, 3, 3, 3]
    assert all(torch.equal(patterns[8], later) for later in patterns[9:])
    scores = schedule.scores("x")
    schedule.decide(8, blocks, learning_rate=0.1)  # step 9 of 12 - 3: scores are frozen from here on
    assert torch.equal(schedule.scores("x"), scores)


def test_a_masked_rank_comes_back_until_the_last_mask() -> None:
    problem = Regression()
    handle = problem.adapt("adalora(rank=3, target_rank=1, total_steps=30, interval=10)")
    open_gates(handle)
    optimizer = handle.optimizer(lr=0.01)
    problem.train(handle, optimizer, 10)
    gates = [block["gate"] for block in handle.blocks().values()]
    zero = [gate == 0 for gate in gates]
    assert sum(int(mask.sum()) for mask in zero) == 6 - handle.schedule.kept
    problem.train(handle, optimizer, 1, first=10)
    assert all(bool((gate != 0).all()) for gate in gates)


@pytest.mark.parametrize(
    "text", ["adalora(rank=4, target_rank=2, {})", "dora(inner=gated_lora(rank=4)) + adalora(rank=4, target_rank=2, {})"]
)
def test_a_whole_run_reaches_the_target_and_exports_at_the_rank_left(text: str) -> None:
    problem = Regression()
    handle = problem.adapt(text.format("total_steps=20, warmup_steps=4, final_steps=4"))
    optimizer = handle.optimizer(lr=0.05)
    first = problem.loss(problem.batches[0]).item()
    problem.train(handle, optimizer, 20)
    assert handle.unfinished() is None
    gates = [block["gate"] for block in handle.blocks().values()]
    assert sum(int((gate != 0).sum()) for gate in gates) == 4
    assert problem.loss(problem.batches[0]).item() < first
    before = problem.model(problem.batches[0][0]).detach()
    left = prune(handle)
    assert sum(left.values()) == 4
    torch.testing.assert_close(problem.model(problem.batches[0][0]), before, rtol=1e-12, atol=1e-13)


def test_at_the_start_only_the_gate_has_a_gradient() -> None:
    problem = Regression()
    handle = problem.adapt("adalora(rank=3, target_rank=1, total_steps=9, orthogonality=0.0)")
    problem.loss(problem.batches[0]).backward()
    handle.after_backward()
    for block in handle.blocks().values():
        assert not block["A"].grad.any()
        assert not block["B"].grad.any()
        assert block["gate"].grad.all()


def test_unfinished_says_what_is_missing() -> None:
    """A run shorter than it was announced is not silently a LoRA of the starting rank."""
    problem = Regression()
    handle = problem.adapt("adalora(rank=3, target_rank=1, total_steps=100, warmup_steps=10, final_steps=10)")
    optimizer = handle.optimizer(lr=0.01)
    problem.train(handle, optimizer, 6)
    assert "no rank was pruned in 6 steps" in handle.unfinished()
    assert "reached at step 90" in handle.unfinished()
    assert "unfinished   AdaLoRA: no rank was pruned" in handle.coverage()
    problem.train(handle, optimizer, 34, first=6)
    assert "pruning had come to" in handle.unfinished()


def test_bad_budgets_are_refused() -> None:
    with pytest.raises(ArgumentError, match="leave no step of total_steps = 10"):
        AdaLoRA(total_steps=10, warmup_steps=6, final_steps=4)
    with pytest.raises(ArgumentError, match=r"rank=4, target_rank=8\) would prune nothing"):
        rankwise.catalog.adalora(rank=4, total_steps=10)
    with pytest.raises(ArgumentError, match=r"adalora needs total_steps: write adalora\(total_steps=…\)"):
        rankwise.compose("adalora(rank=12)")
    problem = Regression()
    handle = problem.adapt("gated_lora(rank=2) + adalora(rank=12, target_rank=8, total_steps=10)")
    problem.loss(problem.batches[0]).backward()
    with pytest.raises(ArgumentError, match="4 ranks of 2 layers down to target_rank = 8 each, 16 in all"):
        handle.after_backward()
    with pytest.raises(RecipeError, match="use a gated parameterization"):
        Regression().adapt("lora(rank=2) + adalora(total_steps=10)")


def test_final_mask_also_acts_where_training_goes_on_after_the_end() -> None:
    schedule, blocks = schedule_with_scores(target_rank=1, total_steps=5)
    for step in range(9):
        decisions = schedule.decide(step, blocks, learning_rate=0.1)
    assert all(isinstance(decision, Mask) for decision in decisions.values())
    assert sum(int(decision.keep.sum()) for decision in decisions.values()) == 3
