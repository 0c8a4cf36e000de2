"""Bone in its three modes: sharded sums, block formulas, and messages about sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError
from rankwise.core.queries import as_low_rank, rank_bound
from tests.contract.subjects import scatter


def adapted(text: str, m: int, n: int) -> tuple[nn.Sequential, rankwise.Handle]:
    model = nn.Sequential(nn.Linear(n, m)).double()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
            parameter.copy_(values)
    handle = rankwise.adapt_(model, rankwise.compose(text), where=["0"])
    scatter(handle)
    return model, handle


@pytest.mark.parametrize(("text", "m", "n"), [("bone(rank=4)", 6, 10), ("bone(rank=4, mode='mini', width=3)", 6, 10)])
def test_sharded_sums_are_the_entries_of_the_formula(text: str, m: int, n: int) -> None:
    """n = 10 is no multiple of r = 4, so inputs are padded."""
    model, handle = adapted(text, m, n)
    D = handle.blocks()["0"]["D"]
    delta = torch.stack([torch.stack([D[c % 4, o % D.shape[1]] for c in range(n)]) for o in range(m)])
    update = handle.update_of("0")
    torch.testing.assert_close(update.dense(), delta)
    torch.testing.assert_close(as_low_rank(update).dense(), delta)
    assert rank_bound(update) == 4
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = x @ (model[0].weight + delta).t() + model[0].bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_mini_as_wide_as_the_outputs_is_miss() -> None:
    miss, mini = adapted("bone(rank=4)", 6, 8)[0], adapted("bone(rank=4, mode='mini', width=6)", 6, 8)[0]
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    torch.testing.assert_close(miss(x), mini(x))


def test_the_sum_costs_no_matrix_product() -> None:
    model, _ = adapted("bone(rank=4)", 32, 64)
    x = torch.randn(10, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert counter.get_total_flops() == 10 * (2 * 32 * 64 + 2 * 4 * 32), "base and the map from r sums to the outputs, no more"


@pytest.mark.parametrize("axis", ["row", "col"])
def test_bat_block_by_block(axis: str) -> None:
    model, handle = adapted(f"bone(rank=4, mode='bat', axis='{axis}')", 8, 12)
    D, W = handle.blocks()["0"]["D"], model[0].weight
    assert D.shape == ((2, 4, 4) if axis == "row" else (3, 4, 4))
    expected = W.clone()
    for i in range(2):
        for j in range(3):
            block, d = W[4 * i : 4 * i + 4, 4 * j : 4 * j + 4], D[i if axis == "row" else j]
            expected[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] = block @ (torch.eye(4, dtype=torch.float64) + d) + d
    torch.testing.assert_close(handle.update_of("0").dense(), expected - W, rtol=1e-12, atol=1e-12)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ expected.t() + model[0].bias, rtol=1e-12, atol=1e-12)
    assert torch.linalg.matrix_rank(handle.update_of("0").dense()) == 8


def test_bat_axes_coincide_on_a_single_block() -> None:
    row, col = adapted("bone(rank=4, mode='bat')", 4, 4)[0], adapted("bone(rank=4, mode='bat', axis='col')", 4, 4)[0]
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    torch.testing.assert_close(row(x), col(x))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bone(rank=5, mode='bat')", r"a rank that divides m and n; rank 5 for a layer of 8 × 12.\n.*use .* rank=4"),
        ("bone(rank=4, mode='mini', width=5)", r"8 outputs, width 5.\n.*such as width=4"),
        ("bone(rank=4, mode='mini', width=16)", r"8 outputs, width 16.\n.*such as width=8"),
        ("bone(rank=13)", r"1 <= rank <= n = 12; rank is 13.\n.*use rank=12 or less"),
        ("bone(rank=0)", "rank is 0"),
        ("bone(rank=0, mode='bat')", "rank is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_one_that_does(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        adapted(text, 8, 12)


def test_arguments_of_another_mode_are_refused() -> None:
    for text in (
        "bone(axis='col')",
        "bone(mode='bat', width=4)",
        "bone(mode='bat', dropout=0.1)",
        "bone(mode='mini', axis='col')",
    ):
        with pytest.raises(ArgumentError, match="has no use for"):
            rankwise.compose(text)
    with pytest.raises(ArgumentError, match="miss, mini or bat"):
        rankwise.compose("bone(mode='bone')")
