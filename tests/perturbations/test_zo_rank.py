"""ZO-RankSGD: pair-graph weights, order only, oracles of any kind, a line search that never goes up."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError, TrainingError
from rankwise.perturbations.ranking import signed_edges
from rankwise.perturbations.zo_rank import RankedZerothOrder, weights
from tests.core.training import Regression, assert_same_bits, numbers

Blocks = dict[str, dict[str, nn.Parameter]]


def point(d: int = 20) -> Blocks:
    return {"0": {"A": nn.Parameter(torch.full((d,), 2.0, dtype=torch.float64))}}


def bowl(made: Blocks) -> Callable[[], Tensor]:
    curvature = torch.linspace(1.0, 3.0, made["0"]["A"].numel(), dtype=torch.float64)
    return lambda: (curvature * made["0"]["A"].square()).sum() / 2


def run(part: RankedZerothOrder, made: Blocks, loss: Callable[[], Tensor], steps: int, rate: float) -> list[float]:
    values = []
    for _ in range(steps):
        part.estimate(made, loss, learning_rate=rate)
        with torch.no_grad():
            made["0"]["A"].sub_(rate * made["0"]["A"].grad)
            values.append(float(loss()))
    return values


@pytest.mark.parametrize("m", [2, 3, 6, 9])
def test_weights_are_those_of_the_pair_sum(m: int) -> None:
    for k in range(1, m + 1):
        xi = torch.randn(m, 4, generator=torch.Generator().manual_seed(m), dtype=torch.float64)  # by rank
        edges = [(i, j) for i in range(m) for j in range(i + 1, m) if i < k]
        assert len(edges) == k * (k - 1) // 2 + k * (m - k)
        brute = sum(xi[j] - xi[i] for i, j in edges)
        torch.testing.assert_close(torch.tensor(weights(m, k), dtype=torch.float64) @ xi, brute, rtol=1e-12, atol=1e-12)
        assert weights(m, k) == [2 * t - (m - 1) if t < k else k for t in range(m)] and sum(weights(m, k)) == 0


def test_ties_give_no_edge() -> None:
    assert signed_edges([1.0, 1.0, 1.0], [0, 1, 2]) == ([0, 0, 0], 0)
    assert signed_edges([2.0, 1.0, 1.0], [1, 2, 0]) == ([2, -1, -1], 2)
    made = point()
    part = RankedZerothOrder(candidates=5)
    part.estimate(made, lambda: torch.ones(()), learning_rate=0.1)
    assert not made["0"]["A"].grad.any()


def test_monotone_changes_of_the_loss_change_no_bit() -> None:
    results = []
    for change in (lambda f: f, torch.exp, lambda f: (f + 1).log(), lambda f: 3 * f + 7):
        made = point(6)
        loss = bowl(made)
        run(RankedZerothOrder(candidates=5, best=3), made, lambda change=change, loss=loss: change(loss() / 50), 60, 0.05)
        results.append(made["0"]["A"].detach().clone())
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert float(results[0].norm()) < 2.0


def test_the_opposite_order_gives_the_opposite_direction() -> None:
    found = []
    for sign in (1.0, -1.0):
        made = point()
        loss = bowl(made)
        RankedZerothOrder(candidates=6).estimate(made, lambda sign=sign, loss=loss: sign * loss(), learning_rate=0.1)
        found.append(made["0"]["A"].grad.clone())
    assert torch.equal(found[0], -found[1])


def test_an_oracle_that_sorts_the_losses_is_the_default_and_a_person_need_not_see_any() -> None:
    made, again = point(), point()
    loss, shown = bowl(again), []

    def person(tries: Sequence[Callable[[], Tensor]]) -> list[int]:
        values = [float(show()) for show in tries]
        shown.append(values)
        return sorted(range(len(values)), key=values.__getitem__)[:3]

    first, second = RankedZerothOrder(candidates=7, best=3), RankedZerothOrder(candidates=7, best=3)
    second.oracle = person
    value = first.estimate(made, bowl(made), learning_rate=0.1)
    said = second.estimate(again, loss, learning_rate=0.1)
    assert torch.equal(made["0"]["A"].grad, again["0"]["A"].grad) and len(shown[0]) == 7
    assert float(said) == pytest.approx(float(value), rel=1e-6)
    assert torch.equal(again["0"]["A"], point()["0"]["A"])
    second.oracle = lambda tries: [4, 0, 6]
    assert torch.isnan(second.estimate(again, loss, learning_rate=0.1))
    assert again["0"]["A"].grad.any()


@pytest.mark.parametrize("answer", [[0, 1], [0, 1, 1], [0, 1, 7], [-1, 0, 1]])
def test_an_answer_that_is_none_is_refused(answer: list[int]) -> None:
    part = RankedZerothOrder(candidates=7, best=3)
    part.oracle = lambda tries: answer
    with pytest.raises(TrainingError, match="3 best of 7 tries"):
        part.estimate(point(), lambda: torch.ones(()), learning_rate=0.1)


def test_the_line_search_never_goes_up_and_waits_where_x_is_best() -> None:
    made = point()
    part = RankedZerothOrder(candidates=10, line_search=5)
    values = run(part, made, bowl(made), 30, 1.0)
    assert all(after <= before * (1 + 1e-12) for before, after in zip([80.0, *values], values, strict=False))
    assert values[-1] < 0.1 and part.candidates == 10
    stuck = point()
    with torch.no_grad():
        stuck["0"]["A"].zero_()  # the minimum: x always wins
    for rounds in range(1, 4):
        part = part if rounds > 1 else RankedZerothOrder(candidates=4, line_search=3)
        part.estimate(stuck, bowl(stuck), learning_rate=0.5)
        assert not stuck["0"]["A"].grad.any() and part.rounds == rounds + 1 and len(part.kept) == 4 * rounds
    loss, target = bowl(stuck), torch.full((20,), 0.3, dtype=torch.float64)
    kept = list(part.kept)

    def moved() -> Tensor:
        return loss() - target @ stuck["0"]["A"]

    part.estimate(stuck, moved, learning_rate=1e-3)
    assert part.rounds == 1 and not part.kept and len(kept) == 12  # the mean over four rounds was taken
    assert stuck["0"]["A"].grad.any()


def test_forwards_by_counter() -> None:
    for text, count in (("zo_rank", 8), ("zo_rank(candidates=5, best=2)", 5), ("zo_rank(candidates=5, line_search=3)", 9)):
        problem, calls = Regression(), []
        handle = problem.adapt(f"lora(rank=2) + {text}")
        handle.optimizer(lr=0.1)
        problem.model.register_forward_hook(lambda module, inputs, y, calls=calls: calls.append(y.requires_grad))
        handle.backward(lambda problem=problem: problem.loss(problem.batches[0]))
        assert calls == [False] * count


def test_a_try_without_a_finite_loss_is_the_worst_and_none_at_all_stops() -> None:
    made = point()
    part, values = RankedZerothOrder(candidates=4), iter([3.0, float("nan"), 1.0, 2.0])
    part.estimate(made, lambda: torch.tensor(next(values)), learning_rate=0.1)
    expected, (ranks, xi) = made["0"]["A"].grad, ({2: 0, 3: 1, 0: 2, 1: 3}, _drawn(made, 4))
    torch.testing.assert_close(expected, sum((2 * rank - 3) * xi[i] for i, rank in ranks.items()) / 6)
    problem = Regression()
    handle = problem.adapt("lora(rank=2) + zo_rank")
    handle.optimizer(lr=0.1)
    with pytest.raises(TrainingError, match="holds NaN"):
        handle.backward(lambda: problem.loss(problem.batches[0]) * float("nan"))


def _drawn(made: Blocks, count: int) -> list[Tensor]:
    from rankwise.perturbations.directions import drawn, seed_of

    return [next(drawn(made, seed_of(0, k), "gaussian"))[2] for k in range(count)]


@pytest.mark.parametrize("text", ["zo_rank", "zo_rank(candidates=4, line_search=2, smoothing=0.5)"])
def test_it_trains_and_resumes_to_the_bit(text: str) -> None:
    straight, first, second = Regression(), Regression(), Regression()

    def steps(problem: Regression, handle: rankwise.Handle, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            losses.append(float(handle.backward(lambda: problem.loss(problem.batches[0]))))
            optimizer.step()
            handle.after_step()
            optimizer.zero_grad()
        return losses

    whole = straight.adapt(f"lora(rank=2) + {text}")
    losses = steps(straight, whole, whole.optimizer(lr=0.03), 30)
    assert min(losses[-4:]) < 0.9 * losses[0]
    handle = first.adapt(f"lora(rank=2) + {text}")
    steps(first, handle, handle.optimizer(lr=0.03), 13)
    again = second.adapt(f"lora(rank=2) + {text}")
    second.model.load_state_dict(first.model.state_dict())
    again.load_state_dict(copy.deepcopy(handle.state_dict()))
    steps(second, again, again.optimizer(lr=0.03), 17)
    assert_same_bits(numbers(whole), numbers(again))


@pytest.mark.parametrize(
    "arguments",
    [{"candidates": 1}, {"best": 9}, {"best": 0}, {"smoothing": -1.0}, {"line_search": -1}, {"line_search": 3, "shrink": 1.0}],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match="needed"):
        RankedZerothOrder(**arguments)  # type: ignore[arg-type]


def test_a_line_search_under_another_step_is_refused() -> None:
    with pytest.raises(RecipeError, match="plain SGD, which takes the very step that won"):
        Regression().adapt("lora(rank=2) + zo_rank(line_search=3) + adamw")
    Regression().adapt("lora(rank=2) + zo_rank + adamw")
