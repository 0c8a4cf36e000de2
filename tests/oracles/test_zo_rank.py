"""ZO-RankSGD against its spec (arXiv:2303.03751): descent with nothing but a ranking of perturbed tries.

The tries are read inside the loss, x_i = x + μ ξ_i, so that every estimate is compared with the sum over the ranking's pairs.
Human studies, policies and images (Claims) are outside of tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from rankwise.perturbations.zo_rank import RankedZerothOrder, weights
from tests.oracles.tools_training import SITE, adapted, block_of, normal, relative, roles_of

Blocks = dict[str, dict[str, nn.Parameter]]
Function = Callable[[Tensor], Tensor]


def flat(blocks: Blocks) -> Tensor:
    return torch.cat([tensor.detach().flatten().clone() for block in blocks.values() for tensor in block.values()])


class Problem:
    """A vector in two layers, a function of it, and every point at which it was evaluated."""

    def __init__(self, start: Tensor, function: Function) -> None:
        cut = len(start) // 2
        self.blocks: Blocks = {"one": block_of(B=start[:cut, None]), "two": block_of(weight=start[cut:])}
        self.function, self.tries = function, list[Tensor]()

    def evaluate(self) -> Tensor:
        self.tries.append(flat(self.blocks))
        return self.function(self.tries[-1])

    def estimate(self, ranked: RankedZerothOrder, *, lr: float = 0.1) -> Tensor:
        self.tries.clear()
        before = flat(self.blocks)
        ranked.estimate(self.blocks, self.evaluate, learning_rate=lr)
        ranked.advance()
        assert torch.equal(flat(self.blocks), before)
        found = [tensor.grad for block in self.blocks.values() for tensor in block.values()]
        assert all(gradient is not None for gradient in found)
        return torch.cat([gradient.flatten().clone() for gradient in found if gradient is not None])

    def step(self, ranked: RankedZerothOrder, lr: float) -> None:
        self.estimate(ranked, lr=lr)
        with torch.no_grad():
            for block in self.blocks.values():
                for tensor in block.values():
                    tensor.sub_(lr * tensor.grad)

    @property
    def value(self) -> float:
        return float(self.function(flat(self.blocks)))


def pairs(values: Sequence[float], best: int) -> list[tuple[int, int]]:
    """Edges i -> j for f(x_i) < f(x_j), where the ranking of the `best` first says so; ties give none."""
    ranked = sorted(range(len(values)), key=lambda i: values[i])[:best]
    found = []
    for i, j in itertools.permutations(range(len(values)), 2):
        if i in ranked and values[i] < values[j]:
            found.append((i, j))
    return found


def by_pairs(tries: Sequence[Tensor], values: Sequence[float], best: int, smoothing: float) -> Tensor:
    """(1/|E|) Σ (x_j - x_i)/μ."""
    edges = pairs(values, best)
    if not edges:
        return torch.zeros_like(tries[0])
    return sum((tries[j] - tries[i] for i, j in edges), torch.zeros_like(tries[0])) / (smoothing * len(edges))


def wavy(x: Tensor) -> Tensor:
    return (torch.linspace(1, 3, len(x), dtype=x.dtype) * x**2).sum() / 10 + torch.sin(3 * x).sum() / 10 + 1.0


def test_1_published_weights() -> None:
    assert [float(w) for w in weights(6, 3)] == [-5, -3, -1, 3, 3, 3]
    assert [float(w) for w in weights(8, 2)] == [-7, -5, 2, 2, 2, 2, 2, 2]
    assert len(pairs(range(6), 3)) == 12
    assert len(pairs(range(8), 2)) == 13


@pytest.mark.parametrize(("m", "k"), [(m, k) for m in range(2, 9) for k in range(1, m + 1)])
def test_1_weights_are_the_sum_over_pairs(m: int, k: int) -> None:
    """A node's weight: how often it is the worse one less how often it is the better one."""
    edges = pairs(range(m), k)
    assert len(edges) == k * (k - 1) // 2 + k * (m - k)
    expected = [sum(j == t for _, j in edges) - sum(i == t for i, _ in edges) for t in range(m)]
    assert [float(w) for w in weights(m, k)] == expected
    assert sum(float(w) for w in weights(m, k)) == 0


@pytest.mark.parametrize(("m", "k"), [(6, 3), (8, 2), (5, 5), (5, 1), (2, 1), (8, None)])
@pytest.mark.parametrize("smoothing", [1.0, 0.05])
def test_1_the_estimate_is_the_sum_over_pairs(m: int, k: int | None, smoothing: float) -> None:
    ranked = RankedZerothOrder(candidates=m, best=k, smoothing=smoothing, seed=3)
    problem = Problem(normal(1, 12), wavy)
    for _ in range(5):
        found = problem.estimate(ranked)
        assert len(problem.tries) == m
        values = [float(wavy(x)) for x in problem.tries]
        assert relative(found, by_pairs(problem.tries, values, k or m, smoothing)) < 1e-9


def test_1_tries_are_normal_around_the_point() -> None:
    start, smoothing = normal(1, 400), 0.2
    ranked, problem = RankedZerothOrder(candidates=10, smoothing=smoothing, seed=3), Problem(start, wavy)
    xi = []
    for _ in range(5):
        problem.estimate(ranked)
        xi += [(x - start) / smoothing for x in problem.tries]
    draws = torch.stack(xi)  # 50 of 400, so 20 000 numbers; five standard errors
    assert abs(float(draws.mean())) < 5 / 20_000**0.5
    assert abs(float(draws.square().mean()) - 1) < 5 * (2 / 20_000) ** 0.5
    assert abs(float((draws**4).mean()) - 3) < 5 * (96 / 20_000) ** 0.5
    correlation = draws @ draws.T / 400 - torch.eye(50, dtype=torch.float64)
    assert float(correlation.abs().max()) < 0.4


CURVES: dict[str, Function] = {"exp": torch.exp, "log": torch.log, "affine": lambda f: 3 * f - 7}


@pytest.mark.parametrize("curve", sorted(CURVES))
@pytest.mark.parametrize(("best", "line_search"), [(None, 0), (3, 0), (None, 3)])
def test_2_iterates_do_not_see_a_monotone_change(curve: str, best: int | None, line_search: int) -> None:
    """Bit-identical: only the order is used."""
    ends = []
    for change in (lambda f: f, CURVES[curve]):
        ranked = RankedZerothOrder(candidates=6, best=best, smoothing=0.05, line_search=line_search, seed=1)
        problem = Problem(normal(2, 8), lambda x, change=change: change(wavy(x)))
        path = []
        for _ in range(60):
            problem.step(ranked, 0.05)
            path.append(flat(problem.blocks))
        ends.append(torch.stack(path))
    assert torch.equal(ends[0], ends[1])
    assert float((ends[0][-1] - ends[0][0]).norm()) > 0.1


def test_3_the_opposite_goal_gives_the_opposite_estimate() -> None:
    for m in (2, 5, 8):
        found = []
        for sign in (1, -1):
            ranked = RankedZerothOrder(candidates=m, smoothing=0.1, seed=4)
            found.append(Problem(normal(3, 10), lambda x, sign=sign: sign * wavy(x)).estimate(ranked))
        assert float((found[0] + found[1]).norm()) < 1e-14 * float(found[0].norm())
        assert float(found[0].norm()) > 0.1


RATIOS = [(5, 5, 1.129), (2, 1, 1.130), (5, 1, 1.458), (10, 3, 1.405)]


@pytest.mark.parametrize(("m", "k", "expected"), RATIOS)
def test_4_a_linear_function_gives_the_unit_gradient(m: int, k: int, expected: float) -> None:
    """20 000 plain draws with the library's weights, d = 20; the gradient is along the first axis."""
    xi = normal(5, 20_000, m, 20)
    order = xi[:, :, 0].argsort(dim=1)
    w = torch.tensor([float(value) for value in weights(m, k)], dtype=torch.float64)
    ranked = torch.gather(xi, 1, order[:, :, None].expand_as(xi))
    mean = (ranked * w[:, None]).sum(1).mean(0) / len(pairs(range(m), k))
    assert float(mean[0]) == pytest.approx(expected, abs=0.025)
    assert float(mean[1:].norm()) < 0.05


@pytest.mark.parametrize(("m", "k", "expected"), RATIOS)
def test_4_the_library_on_a_linear_function(m: int, k: int, expected: float) -> None:
    """200 estimates of the library, whatever the size of the gradient; four standard errors."""
    gradient = normal(6, 20)
    unit, ranked = gradient / gradient.norm(), RankedZerothOrder(candidates=m, best=k, smoothing=0.1, seed=8)
    problem = Problem(torch.zeros(20, dtype=torch.float64), lambda x: 1e3 * gradient @ x)
    along = torch.stack([problem.estimate(ranked) @ unit for _ in range(200)])
    assert float(along.mean()) == pytest.approx(expected, abs=4 * float(along.std()) / 200**0.5)


H = torch.linspace(1, 3, 20, dtype=torch.float64)


def bowl(x: Tensor) -> Tensor:
    return 0.5 * (H * x**2).sum()


def descent(rate: Callable[[int], float], steps: int) -> list[float]:
    ranked = RankedZerothOrder(candidates=10, smoothing=0.01, seed=2)
    problem = Problem(torch.full((20,), 2.0, dtype=torch.float64), bowl)
    values = [problem.value]
    for t in range(steps):
        problem.step(ranked, rate(t))
        values.append(problem.value)
    return values


def test_5_the_noise_floor_follows_the_rate() -> None:
    constant = descent(lambda _: 0.1, 450)
    assert constant[0] == pytest.approx(80)
    assert sum(constant[300:]) / 151 == pytest.approx(0.04, rel=0.4)
    falling = descent(lambda t: 0.1 * 0.99**t, 600)
    assert falling[600] < 1e-4
    assert falling[600] == pytest.approx(2e-5, rel=0.9)


@pytest.mark.parametrize("seed", [0, 1])
def test_6_a_line_search_never_climbs(seed: int) -> None:
    """80 -> 4.3 -> 0.021 -> 0.005 at rounds 10, 30, 60, with ten tries and five steps from η = 1."""
    ranked = RankedZerothOrder(candidates=10, smoothing=0.01, line_search=5, shrink=0.5, seed=seed)
    problem = Problem(torch.full((20,), 2.0, dtype=torch.float64), bowl)
    values = [problem.value]
    for _ in range(60):
        problem.step(ranked, 1.0)
        values.append(problem.value)
        assert values[-1] <= values[-2] * (1 + 1e-9)
    assert values[0] == pytest.approx(80)
    assert values[10] < 15
    assert values[30] < 0.1
    assert values[60] < 0.015


def stubborn(problem: Problem, refuse: list[bool]) -> Callable[[Sequence[Callable[[], Tensor]]], Sequence[int]]:
    """An exact oracle that, in line searches, puts the point itself first as long as `refuse` says so."""
    origin = flat(problem.blocks)

    def oracle(tries: Sequence[Callable[[], Tensor]]) -> Sequence[int]:
        start = len(problem.tries)
        values = [float(one()) for one in tries]
        here = [float((x - origin).norm()) == 0 for x in problem.tries[start:]]
        order = sorted(range(len(values)), key=lambda i: values[i])
        if any(here) and refuse.pop(0):
            order.sort(key=lambda i: not here[i])
        return order

    return oracle


def test_6_failed_rounds_are_averaged() -> None:
    """Where the point itself wins, it stays, and its direction joins that of the next round."""
    m, tries, smoothing = 4, 3, 0.1
    ranked = RankedZerothOrder(candidates=m, smoothing=smoothing, line_search=tries, shrink=0.5, seed=3)
    problem = Problem(normal(7, 10), wavy)
    origin = flat(problem.blocks)
    ranked.oracle = stubborn(problem, [True, True, True])
    estimates, searched = [], []
    for _ in range(3):
        assert not problem.estimate(ranked, lr=0.2).any()
        first = problem.tries[:m]
        estimates.append(by_pairs(first, [float(wavy(x)) for x in first], m, smoothing))
        searched.append([x for x in problem.tries[m:] if float((x - origin).norm()) > 0])
        assert len(problem.tries) == m + tries + 1
    for t, points in enumerate(searched):
        mean = sum(estimates[: t + 1]) / (t + 1)
        lengths = sorted((points), key=lambda x: -float((x - origin).norm()))
        for j, x in enumerate(lengths):
            assert relative(x - origin, -0.2 * 0.5**j * mean) < 1e-9


def test_6_a_success_forgets_the_failures() -> None:
    m, smoothing = 4, 0.1
    ranked = RankedZerothOrder(candidates=m, smoothing=smoothing, line_search=2, shrink=0.5, seed=3)
    problem = Problem(normal(7, 10), lambda x: x.sum())  # along a good direction every step is a gain
    origin = flat(problem.blocks)
    ranked.oracle = stubborn(problem, [True, False, False])
    estimates = []
    for t in range(3):
        found = problem.estimate(ranked, lr=1e-3)  # nobody moves the point
        first = problem.tries[:m]
        estimates.append(by_pairs(first, [float(x.sum()) for x in first], m, smoothing))
        if t == 0:
            assert not found.any()
        else:
            expected = (estimates[0] + estimates[1]) / 2 if t == 1 else estimates[2]
            assert float(expected.sum()) > 0  # the ranking saw the slope, so the longest step is the best one
            assert relative(found, expected) < 1e-9
    assert torch.equal(flat(problem.blocks), origin)


def test_7_two_tries_are_a_comparison() -> None:
    ranked, problem = RankedZerothOrder(candidates=2, smoothing=0.1, seed=5), Problem(normal(8, 10), wavy)
    winners = set()
    for _ in range(12):
        found = problem.estimate(ranked)
        xi = [(x - flat(problem.blocks)) / 0.1 for x in problem.tries]
        sign = 1.0 if float(wavy(problem.tries[0])) < float(wavy(problem.tries[1])) else -1.0
        winners.add(sign)
        assert relative(found, sign * (xi[1] - xi[0])) < 1e-9
    assert winners == {1.0, -1.0}


def test_ties_give_no_edge() -> None:
    ranked = RankedZerothOrder(candidates=6, smoothing=1.0, seed=6)
    problem = Problem(normal(9, 10), lambda x: torch.zeros((), dtype=torch.float64))
    assert not problem.estimate(ranked).any()
    steps = Problem(normal(9, 10), lambda x: torch.floor(x.sum() / 3))
    tied = 0
    for _ in range(8):
        found = steps.estimate(ranked)
        values = [float(steps.function(x)) for x in steps.tries]
        tied += len(set(values)) < 6
        expected = by_pairs(steps.tries, values, 6, 1.0)
        assert float((found - expected).norm()) < 1e-9 * max(1.0, float(expected.norm()))
    assert tied


def test_a_person_can_be_the_oracle() -> None:
    """`oracle` gets the tries as closures and returns the indices of the best, the best one first."""
    ranked, problem = RankedZerothOrder(candidates=5, best=2, smoothing=0.1, seed=7), Problem(normal(10, 10), wavy)
    seen: list[int] = []

    def oracle(tries: Sequence[Callable[[], Tensor]]) -> Sequence[int]:
        seen.append(len(tries))
        for one in tries:
            one()
        return [3, 1]

    ranked.oracle = oracle
    found = problem.estimate(ranked)
    assert seen == [5]
    assert relative(found, by_pairs(problem.tries, [2, 1, 2, 0, 2], 2, 0.1)) < 1e-9


def test_it_trains_an_adapter_without_a_graph() -> None:
    recipe = "lora(rank=2) + sgd + zo_rank(candidates=6, smoothing=0.05)"
    weight, x, y = normal(0, 4, 3), normal(1, 10, 3), normal(2, 10, 4)
    model, handle = adapted(weight, recipe, seed=1)
    optimizer, calls = handle.optimizer(0.02), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        output = model(x)
        assert not output.requires_grad
        return ((output - y) ** 2).mean()

    with torch.no_grad():
        before, start = float(((model(x) - y) ** 2).mean()), roles_of(handle)
    for t in range(60):
        loss = handle.backward(closure)
        assert not loss.requires_grad
        assert calls == 6 * (t + 1)
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert float(((model(x) - y) ** 2).mean()) < 0.9 * before
    assert not torch.equal(roles_of(handle)["A"], start["A"])
    assert set(handle.blocks()[SITE]) == {"A", "B"}
