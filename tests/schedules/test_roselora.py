"""RoseLoRA: shares, selection, what a second pass and a gradient scaler do to importances, and the bound on zeros."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError
from rankwise.schedules.importance import Importance
from rankwise.schedules.roselora import RoseLoRA, zeros_bound
from tests.core.training import Regression, numbers, open_gates

Blocks = dict[str, dict[str, nn.Parameter]]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blocks_of(m: int = 9, n: int = 20, r: int = 3, seed: int = 0) -> Blocks:
    return {"x": {"A": nn.Parameter(drawn(seed, r, n)), "B": nn.Parameter(drawn(seed + 1, m, r))}}


def step(schedule: RoseLoRA, blocks: Blocks, number: int, *, seed: int | None = None, fill: float | None = None) -> None:
    """One step with gradients drawn from a seed or all equal, and an optimizer that moves every entry."""
    for block in blocks.values():
        for k, tensor in enumerate(block.values()):
            tensor.grad = (
                torch.full_like(tensor, fill) if fill is not None else drawn(100 * (seed or number) + k, *tensor.shape)
            )
    schedule.before_step(number, blocks)
    with torch.no_grad():
        for block in blocks.values():
            for tensor in block.values():
                tensor.add_(0.1)
    for site, decision in schedule.decide(number, blocks, learning_rate=0.1).items():
        with torch.no_grad():
            for role, value in decision.values.items():
                blocks[site][role].copy_(value)


def zeros(tensor: Tensor, dimension: int) -> list[int]:
    return (tensor == 0).sum(dimension).tolist()


def test_shares() -> None:
    schedule = RoseLoRA(keep=0.05, begin=3, end=20)
    shares = [schedule.share_at(t) for t in range(30)]
    assert shares[:4] == [1] * 4 and shares[20:] == [Fraction(1, 20)] * 10
    assert shares == sorted(shares, reverse=True)
    assert RoseLoRA(keep=0.2, begin=2, end=12).share_at(7) == Fraction("0.2") + Fraction("0.8") / 8


@pytest.mark.parametrize(("n", "keep", "k"), [(20, 0.05, 19), (10, 0.9, 1), (10, 0.7, 3), (7, 0.5, 3), (9, 0.95, 0)])
def test_counts_are_exact_whatever_floating_point_makes_of_the_share(n: int, keep: float, k: int) -> None:
    schedule, blocks = RoseLoRA(keep=keep, begin=1, end=2), blocks_of(n, n)
    for number in range(3):
        step(schedule, blocks, number)
    assert zeros(blocks["x"]["A"], 1) == [max(0, k - 1)] * 3
    assert zeros(blocks["x"]["B"], 0) == [max(0, k - 1)] * 3


def test_ties_at_the_threshold_are_kept() -> None:
    schedule, blocks = RoseLoRA(keep=0.1, begin=1, end=2), blocks_of()
    with torch.no_grad():
        for tensor in blocks["x"].values():
            tensor.fill_(1.0)
    for number in range(4):
        step(schedule, blocks, number, fill=1.0)
    assert zeros(blocks["x"]["A"], 1) == [0, 0, 0]
    assert "no entry was pruned in 4 steps" in (schedule.unfinished(4) or "")


def test_what_is_pruned_never_comes_back_even_where_averages_underflow() -> None:
    schedule, blocks = RoseLoRA(keep=0.5, begin=1, end=4, smoothing=0.1), blocks_of()
    for number in range(6):
        step(schedule, blocks, number)
    gone = {role: tensor == 0 for role, tensor in blocks["x"].items()}
    assert zeros(blocks["x"]["A"], 1) == [9, 9, 9]
    for number in range(6, 360):  # gradients of zero: every average shrinks to 0, so that all would tie
        step(schedule, blocks, number, fill=0.0)
    assert not schedule.importance.score("x.A").any()
    for role, tensor in blocks["x"].items():
        assert torch.equal(tensor == 0, gone[role])


def test_importance_is_of_the_values_before_the_step_and_a_second_pass_does_not_count() -> None:
    schedule, blocks = RoseLoRA(begin=1, end=4), blocks_of()
    before = {role: tensor.detach().clone() for role, tensor in blocks["x"].items()}
    for tensor in blocks["x"].values():
        tensor.grad = drawn(7, *tensor.shape)
    schedule.before_step(0, blocks)
    with torch.no_grad():
        for tensor in blocks["x"].values():
            tensor.mul_(3.0)  # SAM has moved there, and asks again
    schedule.before_step(0, blocks)
    for tensor in blocks["x"].values():
        tensor.grad = drawn(8, *tensor.shape)
    schedule.decide(0, blocks, learning_rate=0.1)
    for role, value in before.items():
        torch.testing.assert_close(schedule.importance.score(f"x.{role}"), (value * drawn(8, *value.shape)).abs())


def test_a_step_that_a_gradient_scaler_skips_is_not_averaged() -> None:
    schedule, blocks = RoseLoRA(begin=1, end=4), blocks_of()
    step(schedule, blocks, 0)
    kept = schedule.importance.score("x.A").clone()
    step(schedule, blocks, 1, fill=math.inf)
    assert torch.equal(schedule.importance.score("x.A"), kept)
    step(schedule, blocks, 2)
    assert torch.isfinite(schedule.importance.score("x.A")).all()
    assert torch.isfinite(blocks["x"]["A"]).all()


def test_importance_without_uncertainty_from_the_first_value_on() -> None:
    importance = Importance(beta1=0.5, beta2=None, from_first=True)
    for value in (4.0, 2.0):
        importance.observe("w", torch.tensor([value]), torch.tensor([-1.0]))
    assert importance.score("w").item() == 3.0 and len(importance.averages("w")) == 1
    importance.forget("w")
    assert not importance.knows("w")


def test_the_bound_holds_and_is_tight_for_rectangles_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(100):
        B, A = drawn(seed, 30, 4), drawn(seed + 1000, 4, 40)
        density = torch.rand(2, generator=generator)
        B[torch.rand(30, 4, generator=generator) > density[0]] = 0
        A[torch.rand(4, 40, generator=generator) > density[1]] = 0
        assert float((B @ A == 0).double().mean()) >= zeros_bound(B, A) - 1e-12
    apart_B, apart_A = torch.zeros(6, 2, dtype=torch.float64), torch.zeros(2, 8, dtype=torch.float64)
    apart_B[:2, 0], apart_B[3:5, 1], apart_A[0, :3], apart_A[1, 4:] = 1, 1, 1, 1
    assert zeros_bound(apart_B, apart_A) == pytest.approx(float((apart_B @ apart_A == 0).double().mean()))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ArgumentError, match="begin is at least 1"):
        rankwise.catalog.roselora(begin=0).schedule.build()
    with pytest.raises(ArgumentError, match="smaller than end, not 5 and 5"):
        RoseLoRA(begin=5, end=5)
    for keep in (0.0, 1.2):
        with pytest.raises(ArgumentError, match=r"keep lies in \(0, 1\]"):
            RoseLoRA(keep=keep)
    with pytest.raises(ArgumentError, match="clamp is positive"):
        RoseLoRA(clamp=0.0)
    with pytest.raises(RecipeError, match="puts a part of the weight into every direction"):
        Regression().adapt("roselora(rank=2) + pissa(rank=2)")
    with pytest.raises(RecipeError, match="needs roles A, B"):
        Regression().adapt("vera(rank=2) + roselora")
    for text in ("batched_flora(rank=2)", "delora(rank=2)"):
        with pytest.raises(RecipeError, match="whose zeros lead back to the base"):
            Regression().adapt(f"{text} + roselora")
    for text in ("batched_flora(rank=2, mode='residual')", "delora(rank=2, start='zero')"):
        Regression().adapt(f"{text} + roselora")


@pytest.mark.parametrize(
    "text", ["roselora(rank=3, keep=0.4, begin=2, end=8)", "dora(rank=3) + roselora(keep=0.4, begin=2, end=8)"]
)
def test_a_whole_run_leaves_sparse_factors_that_merge_and_export(text: str) -> None:
    problem = Regression()
    handle = problem.adapt(text)
    optimizer = handle.optimizer(lr=0.05)
    first = problem.loss(problem.batches[0]).item()
    problem.train(handle, optimizer, 12)
    assert handle.unfinished() is None and problem.loss(problem.batches[0]).item() < first
    for site in handle.targets:
        roles = handle.blocks()[site]
        m, n = roles["B"].shape[0], roles["A"].shape[1]
        assert zeros(roles["A"], 1) == [math.floor(Fraction(n) * Fraction("0.6")) - 1] * 3
        assert zeros(roles["B"], 0) == [math.floor(Fraction(m) * Fraction("0.6")) - 1] * 3
        if "dora" not in text:
            update = handle.update_of(site).dense()
            assert float((update == 0).double().mean()) >= zeros_bound(roles["B"], roles["A"])
    x = problem.batches[0][0]
    expected = problem.model(x)
    handle.merge_()
    torch.testing.assert_close(problem.model(x), expected)


def test_a_clamp_bounds_every_entry_from_the_first_step_on() -> None:
    problem = Regression()
    handle = problem.adapt("roselora(rank=3, keep=0.9, begin=5, end=8, clamp=0.02)")
    open_gates(handle)
    problem.train(handle, handle.optimizer(lr=0.05), 1)
    assert max(float(tensor.abs().max()) for tensor in numbers(handle).values()) == 0.02
