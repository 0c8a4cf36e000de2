"""Pivots and skeletons against plain definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankwise.approximations.pivots import RULES, pivoted_lu, select_columns
from rankwise.core.errors import ArgumentError


def matrix(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7, 7), (9, 5), (5, 9), (1, 4), (4, 1)])
def test_packed_factors_and_order_give_the_matrix(shape: tuple[int, int]) -> None:
    M, k = matrix(*shape), min(shape)
    packed, order = pivoted_lu(M)
    L = packed[:, :k].tril(-1) + torch.eye(shape[0], k, dtype=torch.float64)
    torch.testing.assert_close(L @ packed[:k].triu(), M[order])
    assert sorted(order.tolist()) == list(range(shape[0]))
    assert float(L.abs().max()) <= 1.0  # partial pivoting


@pytest.mark.parametrize("rule", RULES)
def test_columns_are_different_and_as_many_as_asked_for(rule: str) -> None:
    for M in (matrix(6, 9), matrix(9, 6), matrix(6, 2) @ matrix(2, 9), torch.zeros(6, 9, dtype=torch.float64)):
        chosen = select_columns(M, 5, rule, generator=torch.Generator().manual_seed(1))
        assert len(set(chosen.tolist())) == 5 and int(chosen.min()) >= 0 and int(chosen.max()) < M.shape[1]


def test_deim_is_the_greedy_interpolation() -> None:
    M, r = matrix(8, 12), 4
    V = torch.linalg.svd(M).Vh[:r].t()  # (n, r)
    points = [int(V[:, 0].abs().argmax())]
    for j in range(1, r):
        weights = torch.linalg.solve(V[points, :j], V[points, j])
        points.append(int((V[:, j] - V[:, :j] @ weights).abs().argmax()))
    assert select_columns(M, r, "deim").tolist() == points


def test_leverage_scores_are_those_of_the_projector() -> None:
    M, r = matrix(8, 12), 3
    V = torch.linalg.svd(M).Vh[:r].t()
    scores = (V @ V.t()).diagonal()
    assert set(select_columns(M, 4, "leverage").tolist()) != set() and select_columns(M, r, "leverage").tolist() == (
        scores.argsort(descending=True)[:r].tolist()
    )


def test_a_selection_of_full_rank_spans_a_matrix_of_low_rank() -> None:
    M = matrix(9, 3) @ matrix(3, 12, seed=1)
    for rule in ("qr", "deim"):
        C = M[:, select_columns(M, 3, rule)]
        torch.testing.assert_close(C @ torch.linalg.lstsq(C, M).solution, M)


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="selected by qr, norm"):
        select_columns(matrix(4, 4), 2, "cur")
    with pytest.raises(ArgumentError, match="ranks 1 to 4"):
        select_columns(matrix(4, 6), 5)
