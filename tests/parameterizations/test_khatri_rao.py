"""LoKH beyond its oracles: what is kept for backward, embeddings, refusals, the size of the start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError
from rankwise.core.layouts import LinearLayout
from rankwise.lab.counters import SavedBytes, flops_of
from rankwise.parameterizations.khatri_rao import khatri_rao
from tests.contract.subjects import One
from tests.oracles.tools import adapted, fill, linear, randn

lowrank_tales = rankwise.catalog.lowrank_tales


def test_no_matrix_is_kept_for_backward() -> None:
    model, _, _ = adapted(lowrank_tales(), linear(16, 16))
    x = randn(3, 16)
    with SavedBytes([x, *model.parameters()]) as saved:
        model(x)
    assert saved.total == 0  # the inputs and the factors alone, which exist anyway
    assert flops_of(lambda: model(x)) == 2 * 3 * 16 * 16  # the matrix joins the weight: one product, as in the frozen layer


@pytest.mark.parametrize("factors", [2, 3])
def test_an_embedding_multiplies_columns(factors: int) -> None:
    table = nn.Embedding(9, 8).double()
    model, handle, _ = adapted(lowrank_tales(factors=factors, alpha=0.5), table)
    fill(handle)
    x = torch.tensor([[0, 8, 3]])
    assert torch.allclose(model(x), table.weight[x] + handle.update_of("layer").dense().t()[x], atol=1e-12)


def test_half_precision_keeps_a_small_update() -> None:
    model, handle, p = adapted(lowrank_tales(), linear(16, 16, dtype=torch.bfloat16))
    fill(handle, size=0.01)
    x = randn(4, 16)
    delta = khatri_rao(*p.roles().values()).double()
    update = p.update().apply(x.bfloat16(), LinearLayout())
    assert update.dtype is torch.bfloat16 and (update.double() - x @ delta.t()).norm() < 0.02 * (x @ delta.t()).norm()
    assert model(x.bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize("factors", [2, 3])
def test_columns_of_the_random_factors_have_unit_length_on_average(factors: int) -> None:
    _, _, p = adapted(lowrank_tales(factors=factors), linear(64, 400))
    *random, last = p.roles().values()
    assert not last.any()
    assert float(khatri_rao(*random).square().sum(0).mean()) == pytest.approx(1.0, abs=0.1)


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(RecipeError, match="m = 7"):
        rankwise.adapt_(One(nn.Linear(8, 7)), lowrank_tales(), where=["layer"])
    with pytest.raises(ArgumentError, match="at least 2"):
        rankwise.adapt_(One(nn.Linear(8, 8)), lowrank_tales(factors=1), where=["layer"])
