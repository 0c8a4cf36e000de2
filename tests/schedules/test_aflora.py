"""AFLoRA: scores, what freezing frees, the form's options, and resuming."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError
from rankwise.core.piece import piece
from rankwise.core.queries import as_low_rank
from rankwise.schedules.aflora import AFLoRA
from rankwise.schedules.importance import IntervalMean, small_means
from tests.core.training import Regression, numbers, open_gates

RUN = {"total_steps": 24, "epochs": 12, "warmup_epochs": 1, "final_epochs": 7, "interval": 2}


def text(**more: object) -> str:
    return f"aflora({', '.join(f'{key}={value}' for key, value in {'rank': 3, **RUN, **more}.items())})"


def test_an_interval_is_averaged_and_a_tensor_that_drops_out_is_forgotten() -> None:
    mean = IntervalMean()
    mean.add({"a": torch.tensor([1.0]), "b": torch.tensor([5.0])})
    mean.add({"a": torch.tensor([4.0])})
    assert mean.state_dict()["steps"] == 2
    closed = mean.close()
    assert set(closed) == {"a"} and closed["a"].item() == 2.5
    assert mean.close() == {}


def test_a_mean_is_compared_with_entries() -> None:
    scores = {"flat": torch.full((4,), 2.0), "steep": torch.tensor([0.0, 0.0, 0.0, 20.0])}
    # entries sorted: 0 0 0 2 2 2 2 20; means 2 and 5
    assert small_means(scores, 0) == [] and small_means(scores, 1) == ["flat", "steep"]
    assert small_means(scores, Fraction(7, 8)) == []  # the seventh entry is 2, and 2 is not below it
    assert small_means({"one": torch.ones(3)}, 1) == []  # all alike


def schedule_and_blocks(**more: object) -> tuple[AFLoRA, dict[str, dict[str, nn.Parameter]]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (3, 5), "B": (4, 3), "u": (3,), "v": (4,)}
    blocks = {
        site: {
            role: nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64)) for role, shape in shapes.items()
        }
        for site in ("x", "y", "z")
    }
    return AFLoRA(**{**RUN, **more}), blocks


def feed(schedule: AFLoRA, blocks: dict[str, dict[str, nn.Parameter]], step: int, **sizes: float) -> None:
    for site, block in blocks.items():
        for k, (role, tensor) in enumerate(block.items()):
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(10 * step + k), dtype=torch.float64)
            tensor.grad = noise * sizes.get(f"{site}{role}", 1.0)
    schedule.before_step(step, blocks)
    for site, decision in schedule.decide(step, blocks, learning_rate=0.1).items():
        for role in decision.roles:
            del blocks[site][role]


def test_the_tensor_with_small_gradients_is_frozen_first_and_its_averages_are_freed() -> None:
    schedule, blocks = schedule_and_blocks()
    for step in range(11):
        feed(schedule, blocks, step, yA=0.1)
    assert schedule.frozen["y.A"] == min(schedule.frozen.values()) < max(schedule.frozen.values())
    for step in range(11, 14):
        feed(schedule, blocks, step, yA=0.1)
    assert schedule.left == 0 and len(schedule.frozen) == 6
    assert not schedule.importance.state_dict() and not schedule.gradients.state_dict()["sums"]
    assert all(set(block) == {"u", "v"} for block in blocks.values())


def test_average_trained_numbers_are_a_sum_over_the_steps() -> None:
    problem = Regression()
    handle = problem.adapt(text())
    optimizer, counts = handle.optimizer(lr=0.02), []
    for step in range(24):
        counts.append(handle.trained_numbers)
        problem.train(handle, optimizer, 1, first=step)
    assert counts[0] > counts[-1] == 2 * 3 + 8 + 4
    assert handle.schedule.average_trained == pytest.approx(sum(counts) / 24)


def test_a_step_that_a_gradient_scaler_skips_does_not_count() -> None:
    schedule, blocks = schedule_and_blocks(interval=3)
    feed(schedule, blocks, 0)
    feed(schedule, blocks, 1, xA=math.inf)
    assert schedule.gradients.state_dict()["steps"] == 1
    feed(schedule, blocks, 2)
    mean = schedule.importance.averages("x.A")[0]
    first, third = (
        torch.randn(3, 5, generator=torch.Generator().manual_seed(10 * k), dtype=torch.float64).abs() for k in (0, 2)
    )
    torch.testing.assert_close(mean, (1 - schedule.importance.beta1) * (first + third) / 2)


def test_nothing_is_frozen_with_keep_1() -> None:
    problem = Regression()
    handle = problem.adapt(text(keep=1.0))
    problem.train(handle, handle.optimizer(lr=0.02), 24)
    assert not handle.schedule.frozen and handle.unfinished() is None
    assert all(set(block) == {"A", "B", "u", "v"} for block in handle.blocks().values())


def square() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def test_square_layers_train_their_projections_only_if_asked_to() -> None:
    roles = []
    for train_square in (False, True):
        handle = rankwise.adapt_(square(), rankwise.compose(text(train_square=train_square)))
        roles.append({site: set(block) for site, block in handle.blocks().items()})
        assert handle.parameterization("0").A.shape == (3, 6)
    every = {"A", "B", "u", "v"}
    assert roles == [{"0": {"u", "v"}, "2": every}, {"0": every, "2": every}]


@pytest.mark.parametrize("frozen", [False, True])
def test_the_update_keeps_no_output_and_with_a_frozen_input_factor_no_input(frozen: bool) -> None:
    handle = rankwise.adapt_(nn.Sequential(nn.Linear(30, 40)).double(), rankwise.compose(text()))
    open_gates(handle)
    handle.parameterization("0").A.requires_grad_(not frozen)
    x = torch.randn(50, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shapes: set[tuple[int, ...]] = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: shapes.add(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        handle.model(x)
    assert (50, 3) in shapes and (50, 40) not in shapes and ((50, 30) in shapes) is not frozen


def test_it_is_exactly_lora_and_holds_starts() -> None:
    problem = Regression()
    handle = problem.adapt(text())
    open_gates(handle)
    for site in handle.targets:
        entry = handle.parameterization(site)
        factors = as_low_rank(entry.update())
        assert factors.rank == 3
        expected = torch.diag(entry.v) @ entry.B @ torch.diag(entry.u) @ entry.A
        torch.testing.assert_close(factors.dense(), expected)
    fresh = Regression()
    x = fresh.batches[0][0]
    expected = fresh.model(x)
    handle = fresh.adapt(rankwise.compose(text(), "pissa(rank=3)"))
    assert (handle.parameterization("0").v == 1).all()
    torch.testing.assert_close(fresh.model(x), expected)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"warmup_epochs": 6}, "do not fit into epochs=12"),
        ({"total_steps": 11}, "do not fit into epochs=12 of total_steps=11"),
        ({"interval": 0}, "interval are at least 1"),
        ({"keep": 1.5}, r"keep lies in \[0, 1\]"),
        ({"smoothing": 1.0}, r"beta2 lie in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_refused(more: dict[str, float], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        AFLoRA(**{**RUN, **more})


def test_it_needs_vectors_that_go_on_training() -> None:
    with pytest.raises(RecipeError, match="needs roles A, B, u, v"):
        Regression().adapt(rankwise.compose("lora(rank=2)", schedule=piece(AFLoRA, **RUN)))
    with pytest.raises(ArgumentError, match=r"aflora needs total_steps, epochs"):
        rankwise.compose("aflora")


def test_after_freezing_only_the_vectors_move() -> None:
    problem = Regression()
    handle = problem.adapt(text())
    optimizer = handle.optimizer(lr=0.02)
    problem.train(handle, optimizer, 12)
    assert handle.unfinished() is None
    kept = {site: [handle.parameterization(site).A.clone(), handle.parameterization(site).B.clone()] for site in handle.targets}
    before = numbers(handle)
    problem.train(handle, optimizer, 6, first=12)
    for site, (A, B) in kept.items():
        assert torch.equal(handle.parameterization(site).A, A) and torch.equal(handle.parameterization(site).B, B)
    assert all(not torch.equal(value, before[name]) for name, value in numbers(handle).items())
