"""IterIS against its spec (arXiv:2411.15231): the regression written out with explicit features, pass by pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rankwise.core.operators import LowRank
from rankwise.core.queries import as_low_rank
from rankwise.merging import MergeResult, iteris

WEIGHTS = ["full", "delta", "none"]
Adapter = dict[str, LowRank]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Tower(nn.Module):
    """A chain of linear layers with nonlinearities between; sites are "0", "1", …"""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        for i in range(depth):
            layer = nn.Linear(width, width).double()
            layer.weight.data = 0.5 * normal(100 + i, width, width)
            layer.bias.data = 0.1 * normal(200 + i, width)
            self.add_module(str(i), layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.tanh(layer(x))
        return x

    def layers(self) -> dict[str, nn.Linear]:
        return {name: layer for name, layer in self.named_children() if isinstance(layer, nn.Linear)}


def adapter(seed: int, depth: int, width: int, rank: int = 2, scale: float = 0.7) -> Adapter:
    return {str(i): LowRank(normal(seed + i, width, rank), normal(seed + 50 + i, rank, width), scale) for i in range(depth)}


def features(model: Tower, updates: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Site -> inputs (n, T) of each layer, when the layers have these updates added."""
    seen = {}
    for name, layer in model.layers().items():
        seen[name] = x.T
        x = torch.tanh(x @ (layer.weight + updates[name]).T + layer.bias)
    return {name: matrix.detach() for name, matrix in seen.items()}


def dense(operators: dict[str, LowRank]) -> dict[str, Tensor]:
    return {site: operator.dense().detach() for site, operator in operators.items()}


def balances(weight: str, W: Tensor, D: list[Tensor], X: list[Tensor], c: list[float]) -> list[float]:
    found = []
    for D_i, X_i, c_i in zip(D, X, c, strict=True):
        F = {"full": W + D_i, "delta": D_i}.get(weight)
        found.append(c_i if F is None else c_i * float(F.norm() ** 2 / (F @ X_i).norm() ** 2))
    return found


def regression(D: list[Tensor], X: list[Tensor], Xt: list[Tensor], lam: list[float], alpha: float) -> Tensor:
    """D* (m, n) with both sums regularized relative to their own norms."""
    eye = torch.eye(D[0].shape[1], dtype=torch.float64)
    R, M = torch.zeros_like(D[0]), torch.zeros_like(eye)
    for D_i, X_i, Xt_i, l_i in zip(D, X, Xt, lam, strict=True):
        G, C = X_i @ Xt_i.T, Xt_i @ Xt_i.T
        R = R + l_i * D_i @ (G + alpha * G.norm() * eye)
        M = M + l_i * (C + alpha * C.norm() * eye)
    return torch.linalg.solve(M, R, left=False)


def by_hand(
    model: Tower, adapters: list[Adapter], data: list[Tensor], *, weight: str, alpha: float, solves: int, c: list[float]
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], list[dict[str, Tensor]], dict[str, list[float]]]:
    """The merged updates, X, the X̃ of the last solve, and λ."""
    deltas = [dense(each) for each in adapters]
    X = [features(model, delta, x) for delta, x in zip(deltas, data, strict=True)]
    Xt, merged, lam = X, {}, {}
    for solve in range(solves):
        if solve:
            Xt = [features(model, merged, x) for x in data]
        fresh = {}
        for site, layer in model.layers().items():
            D, X_site = [delta[site] for delta in deltas], [each[site] for each in X]
            lam[site] = balances(weight, layer.weight.detach(), D, X_site, c)
            fresh[site] = regression(D, X_site, [each[site] for each in Xt], lam[site], alpha)
        merged = fresh
    return merged, X, Xt, lam


def matrices(result: MergeResult) -> dict[str, Tensor]:
    return {site: operator.dense() for site, operator in result.operators.items()}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("alpha", [1e-7, 1e-2, 1.0])
def test_1_one_adapter_returns_itself_at_any_regularization(weight: str, alpha: float) -> None:
    only = adapter(0, 2, 6)
    for tokens in (30, 4):  # also fewer tokens than inputs: then only the regularizer makes M regular
        if tokens == 4 and alpha < 1e-2:  # the condition of M is then 1e7, which leaves 1e-9 in double precision
            continue
        result = iteris(Tower(2, 6), [only], [[normal(1, tokens, 6)]], alpha=alpha, weight=weight, max_iterations=1)
        for site, matrix in matrices(result).items():
            assert float((matrix - only[site].dense()).abs().max()) <= 1e-10


@pytest.mark.parametrize("weight", WEIGHTS)
def test_1_equal_adapters_return_the_one_they_are(weight: str) -> None:
    only = adapter(0, 3, 6)
    data = [[normal(10 + i, 20, 6) * (i + 1)] for i in range(3)]
    result = iteris(Tower(3, 6), [only, only, only], data, alpha=1e-3, weight=weight, max_iterations=1)
    for site, matrix in matrices(result).items():
        assert float((matrix - only[site].dense()).abs().max()) <= 1e-10


@pytest.mark.parametrize("weight", WEIGHTS)
def test_2_stationary_at_the_features_of_its_last_pass(weight: str) -> None:
    model, width, c = Tower(3, 5), 5, [1.0, 2.5]
    adapters, data = [adapter(0, 3, width), adapter(300, 3, width, rank=1)], [normal(20, 40, width), normal(21, 30, width)]
    result = iteris(model, adapters, [[x] for x in data], weights=c, alpha=0.0, weight=weight, max_iterations=3)
    expected, X, Xt, lam = by_hand(model, adapters, data, weight=weight, alpha=0.0, solves=3, c=c)
    assert float((Xt[0]["2"] - X[0]["2"]).abs().max()) > 1e-3  # the merged model really sees other inputs
    for site, found in matrices(result).items():
        D = [each[site].dense() for each in adapters]
        terms = list(zip(D, [x[site] for x in X], [x[site] for x in Xt], lam[site], strict=True))

        def loss(matrix: Tensor) -> float:
            return float(sum(l_i * (D_i @ X_i - matrix @ Xt_i).pow(2).sum() for D_i, X_i, Xt_i, l_i in terms))  # noqa: B023

        gradient = torch.stack([2 * l_i * (found @ Xt_i - D_i @ X_i) @ Xt_i.T for D_i, X_i, Xt_i, l_i in terms]).sum(0)
        scale = sum(2 * l_i * (D_i @ X_i @ Xt_i.T).norm() for D_i, X_i, Xt_i, l_i in terms)
        assert float(gradient.norm()) <= 1e-8 * float(scale)
        least = loss(found)
        assert all(loss(found + 1e-3 * normal(1000 + i, width, width)) > least for i in range(50))
        assert float((found - expected[site]).abs().max()) <= 1e-9


@pytest.mark.parametrize("alpha", [0.0, 1e-2])
def test_3_isotropic_inputs_give_the_weighted_average(alpha: float) -> None:
    width, model = 6, Tower(1, 6)
    adapters = [adapter(0, 1, width), adapter(300, 1, width), adapter(600, 1, width, scale=-1.2)]
    c = [0.5, 2.0, 7.0]
    data = [torch.linalg.qr(normal(30 + i, 15, width))[0] * c_i**0.5 for i, c_i in enumerate(c)]  # X Xᵀ = c I
    result = iteris(model, adapters, [[x] for x in data], alpha=alpha, weight="none", max_iterations=1)
    expected = sum(c_i * each["0"].dense() for c_i, each in zip(c, adapters, strict=True)) / sum(c)
    assert float((result.operators["0"].dense() - expected).abs().max()) <= 1e-10


def test_4_one_solve_is_regmean_on_the_updates() -> None:
    model, width, depth = Tower(3, 6), 6, 3
    adapters = [adapter(0, depth, width), adapter(300, depth, width, rank=3)]
    data = [normal(40, 25, width), normal(41, 50, width)]
    result = iteris(model, adapters, [[x] for x in data], alpha=0.0, weight="none", max_iterations=1)
    inputs = [features(model, dense(each), x) for each, x in zip(adapters, data, strict=True)]
    for site, found in matrices(result).items():
        grams = [each[site] @ each[site].T for each in inputs]
        summed = sum(each[site].dense() @ gram for each, gram in zip(adapters, grams, strict=True))
        assert float((found - summed @ torch.linalg.inv(sum(grams))).abs().max()) <= 1e-9


def test_4_features_come_from_the_adapted_model_not_from_the_base() -> None:
    model, width, depth = Tower(2, 6), 6, 2
    adapters = [adapter(0, depth, width), adapter(300, depth, width)]
    data = [normal(42, 25, width), normal(43, 25, width)]
    result = iteris(model, adapters, [[x] for x in data], alpha=0.0, weight="none", max_iterations=1)
    zero = {site: torch.zeros(width, width, dtype=torch.float64) for site in adapters[0]}
    grams = [(x := features(model, zero, each)["1"]) @ x.T for each in data]
    wrong = sum(each["1"].dense() @ gram for each, gram in zip(adapters, grams, strict=True)) @ torch.linalg.inv(sum(grams))
    assert float((result.operators["1"].dense() - wrong).abs().max()) > 1e-3


def test_5_a_chain_of_four_is_final_after_four_solves() -> None:
    depth, width = 4, 5
    adapters = [adapter(0, depth, width), adapter(300, depth, width)]
    data = [[normal(50, 12, width), normal(51, 12, width)], [normal(52, 24, width)]]
    solved = {
        k: matrices(iteris(Tower(depth, width), adapters, data, alpha=1e-6, max_iterations=k)) for k in range(1, depth + 2)
    }
    for layer in range(depth):
        site, first = str(layer), layer + 1
        for k in range(first, depth + 2):
            assert torch.equal(solved[k][site], solved[first][site])
        if layer:  # the solve before is not the final one yet
            assert float((solved[first - 1][site] - solved[first][site]).abs().max()) > 1e-6


def test_5_each_pass_agrees_with_the_definition() -> None:
    model, depth, width = Tower(4, 5), 4, 5
    adapters, data = [adapter(0, depth, width), adapter(300, depth, width)], [normal(50, 24, width), normal(52, 24, width)]
    for solves in (1, 2, 4):
        result = iteris(model, adapters, [[x] for x in data], alpha=1e-3, max_iterations=solves)
        expected, *_ = by_hand(model, adapters, data, weight="full", alpha=1e-3, solves=solves, c=[1.0, 1.0])
        for site, found in matrices(result).items():
            assert float((found - expected[site]).abs().max()) <= 1e-9


def test_6_factors_give_the_dense_solution_at_the_summed_rank() -> None:
    model, depth, width = Tower(2, 9), 2, 9
    adapters = [adapter(0, depth, width, rank=2), adapter(300, depth, width, rank=3, scale=1.3)]
    data = [normal(60, 40, width), normal(61, 40, width)]
    result = iteris(model, adapters, [[x] for x in data], alpha=1e-5, max_iterations=2)
    expected, *_ = by_hand(model, adapters, data, weight="full", alpha=1e-5, solves=2, c=[1.0, 1.0])
    for site, operator in result.operators.items():
        factors = as_low_rank(operator)
        assert factors is not None and factors.rank <= 5 < width
        assert float((factors.scale * factors.B @ factors.A - expected[site]).abs().max()) <= 1e-10
        stacked = torch.cat([each[site].B for each in adapters], dim=1)
        assert torch.linalg.matrix_rank(torch.cat([stacked, expected[site]], dim=1), rtol=1e-9) == 5


@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_7_the_size_of_one_tasks_features_does_not_matter(factor: float) -> None:
    width = 6
    adapters, data = [adapter(0, 1, width), adapter(300, 1, width)], [normal(70, 20, width), normal(71, 20, width)]

    def merged(scale: float, weight: str) -> Tensor:
        batches = [[data[0] * scale], [data[1]]]
        result = iteris(Tower(1, width), adapters, batches, alpha=0.0, weight=weight, max_iterations=1)
        return result.operators["0"].dense()

    assert float((merged(factor, "delta") - merged(1.0, "delta")).abs().max()) <= 1e-10
    assert float((merged(factor, "none") - merged(1.0, "none")).abs().max()) > 1e-3
