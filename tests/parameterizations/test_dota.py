"""DoTA beyond its oracles: refusals, both routes of the increment, half precision, gauge, blank loading."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError
from rankwise.core.layouts import LinearLayout
from rankwise.lab.counters import flops_of
from rankwise.parameterizations.even_factors import even_factors, has_factors
from rankwise.parameterizations.matrix_product import Increment, decompose, operations
from tests.contract.subjects import One
from tests.oracles.tools import adapted, fill, linear, put, randn

dota = rankwise.catalog.dota


def increment(rank: int = 4, gap: float = 1.0, dtype: torch.dtype = torch.float64) -> Increment:
    W = randn(24, 30, seed=1)
    start = decompose(W, (2, 3, 4), (5, 2, 3), rank, balanced=False)
    cores = [core + gap * randn(*core.shape, seed=k) for k, core in enumerate(start)]
    return Increment([core.to(dtype) for core in cores], [core.to(dtype) for core in start])


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 4000])
def test_both_routes_agree_and_the_cheaper_one_is_taken(tokens: int, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, x = increment(), randn(tokens, 30, seed=2)
    expected = x @ operator.dense().t()
    with torch.set_grad_enabled(trained):
        chosen = flops_of(lambda: operator.apply(x, LinearLayout()))
        costs = {}
        for by_core in (True, False):
            monkeypatch.setattr(Increment, "prefers_cores", lambda *_, answer=by_core, **__: answer)
            assert torch.allclose(operator.apply(x, LinearLayout()), expected, atol=1e-10)
            costs[by_core] = flops_of(lambda: operator.apply(x, LinearLayout()))
    by_core, making = operations(operator.cores)
    assert costs == {True: 2 * tokens * by_core, False: 2 * making + 2 * tokens * 24 * 30}
    if not trained:
        assert chosen == min(costs.values())


def test_a_small_increment_survives_half_precision_where_a_difference_of_results_would_not() -> None:
    gap = 1e-3
    exact, operator = increment(gap=gap), increment(gap=gap, dtype=torch.float32)
    x = randn(5, 30, seed=3)
    expected = x @ exact.dense().t()
    got = operator._core_by_core(x.bfloat16()).double()
    assert (got - expected).norm() < 0.02 * expected.norm()
    rounded = [Increment([core.bfloat16() for core in group], [core.bfloat16() * 0 for core in group]) for group in (
        operator.cores, operator.start
    )]  # fmt: skip
    naive = (rounded[0]._core_by_core(x.bfloat16()) - rounded[1]._core_by_core(x.bfloat16())).double()
    assert (naive - expected).norm() > 0.5 * expected.norm()


def test_under_autocast_the_update_keeps_its_digits() -> None:
    _, handle, p = adapted(dota(rank=4), linear(24, 30, dtype=torch.float32))
    with torch.no_grad():
        for k, core in enumerate(p.roles().values()):
            core.add_(1e-3 * randn(*core.shape, seed=k).float())
    x = randn(2000, 30, seed=3).float()
    exact = x @ handle.update_of("layer").dense().t().detach()
    with torch.autocast("cpu", torch.bfloat16):
        update = p.update().apply(x, LinearLayout()).float()
    assert (update - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("balanced", [False, True])
def test_the_gauge_does_not_change_the_operator_even_for_a_weight_of_low_rank(balanced: bool) -> None:
    W = randn(8, 2, seed=1) @ randn(2, 8, seed=2)
    cores = decompose(W, (2, 2, 2), (2, 2, 2), 16, balanced=balanced)
    assert all(core.isfinite().all() for core in cores)
    zero = [torch.zeros_like(core) for core in cores]
    assert torch.allclose(Increment(cores, zero).dense(), W, atol=1e-12)


def test_balanced_cores_share_the_scale_at_every_bond() -> None:
    W = randn(16, 16, seed=3)
    for count in (2, 3):
        factors = even_factors(16, count)
        plain, even = (decompose(W, factors, factors, 4, balanced=balanced) for balanced in (False, True))
        if count == 2:  # U √S and √S Vᵀ, as PiSSA starts
            left, right = even
            assert torch.allclose(left.flatten(0, 2).norm(dim=0), right.flatten(1).norm(dim=1), atol=1e-10)
        spread = [
            max(map(torch.linalg.vector_norm, cores)) / min(map(torch.linalg.vector_norm, cores)) for cores in (plain, even)
        ]
        assert spread[1] < 0.6 * spread[0]


def test_a_zero_weight_gives_finite_cores_that_train() -> None:
    for balanced in (False, True):
        layer = linear(8, 8)
        put(layer.weight, 0.0)
        model, handle, _ = adapted(dota(rank=2, balanced=balanced), layer)
        model(randn(3, 8)).square().sum().backward()
        gradients = [tensor.grad for tensor in handle.blocks()["layer"].values()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.any() for gradient in gradients)


def test_an_embedding_is_looked_up_core_by_core() -> None:
    table = nn.Embedding(60, 8).double()
    model, handle, _ = adapted(dota(rank=3), table)
    fill(handle, size=0.5)
    x = torch.tensor([[0, 59, 7], [31, 7, 2]])
    delta = handle.update_of("layer").dense()
    assert torch.allclose(model(x), table.weight[x] + delta.t()[x], atol=1e-10)
    assert flops_of(lambda: model(x)) < 2 * 60 * 8 * 3


@pytest.mark.parametrize(
    ("size", "count", "factors"),
    [(64, 3, (4, 4, 4)), (768, 3, (8, 8, 12)), (11008, 3, (16, 16, 43)), (4096, 4, (8, 8, 8, 8)), (7, 3, (1, 1, 7))],
)
def test_factors_are_as_equal_as_possible(size: int, count: int, factors: tuple[int, ...]) -> None:
    assert even_factors(size, count) == factors
    assert has_factors(size) == (size != 7)
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    if count == 3:
        sums = [a + b + size // (a * b) for a, b in itertools.product(divisors, divisors) if size % (a * b) == 0]
        assert sum(factors) == min(sums)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"row_factors": (2, 3)}, "multiply to 12"),
        ({"row_factors": (3, 4), "column_factors": (2, 2, 2)}, "as many row as column factors"),
        ({"column_factors": (2, 5)}, "multiply to 8"),
    ],
)
def test_factors_that_do_not_fit_are_refused_with_ones_that_do(arguments: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        rankwise.adapt_(One(nn.Linear(8, 12)), dota(rank=2, **arguments), where=["layer"])
    with pytest.raises(ArgumentError, match="at least 1"):
        rankwise.adapt_(One(nn.Linear(8, 12)), dota(rank=0), where=["layer"])
    with pytest.raises(RecipeError, match="itself and 1"):
        rankwise.adapt_(One(nn.Linear(8, 13)), dota(rank=2), where=["layer"])
    rankwise.adapt_(One(nn.Linear(8, 13)), dota(rank=2, row_factors=(1, 13, 1)), where=["layer"])


def test_one_side_given_sets_the_number_of_factors_of_the_other() -> None:
    _, handle, p = adapted(dota(rank=2, row_factors=(3, 4)), linear(12, 8))
    assert [tuple(core.shape) for core in p.roles().values()] == [(1, 3, 2, 2), (2, 4, 4, 1)]
    assert set(p.roles()) == {"core_1", "core_2"} and handle.trained_numbers == 12 + 32


def test_each_layer_takes_the_list_that_fits_it(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)).double()
    handle = rankwise.adapt_(net, dota(rank=2, row_factors=[[2, 6], [4, 2]]))
    shapes = [[tuple(core.shape[1:3]) for core in handle.parameterization(site).roles().values()] for site in ("0", "1")]
    assert shapes == [[(2, 2), (6, 4)], [(4, 3), (2, 4)]]
    fill(handle)
    handle.save(tmp_path)
    other = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)).double()
    other.load_state_dict({key: net.state_dict()[key] for key in other.state_dict()})
    rankwise.load_(other, tmp_path)
    assert torch.equal(other(randn(3, 8)), net(randn(3, 8)))
    with pytest.raises(RecipeError, match="multiply to 8"):
        rankwise.adapt_(nn.Sequential(nn.Linear(8, 8)), dota(rank=2, row_factors=[[2, 6], [3, 2]]))


def test_a_checkpoint_brings_its_own_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, handle, _ = adapted(dota(rank=3), linear(12, 8))
    fill(handle)
    handle.save(tmp_path)
    x: Tensor = randn(3, 8)
    other = One(linear(12, 8))
    monkeypatch.setattr(torch.linalg, "svd", None)  # the decomposition is read, not made again
    rankwise.load_(other, tmp_path)
    assert torch.equal(other(x), model(x))
