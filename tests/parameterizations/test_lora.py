"""LoRA with one factor frozen: where it starts, and that nothing but the other factor moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankwise
from rankwise.core.errors import ArgumentError
from rankwise.parameterizations.lora import LoRA


def adapted(text: str) -> tuple[nn.Sequential, rankwise.Handle, LoRA]:
    model = nn.Sequential(nn.Linear(7, 9)).double()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
            parameter.copy_(values)
    handle = rankwise.adapt_(model, rankwise.compose(text), where=["0"])
    entry = handle.parameterization("0")
    assert isinstance(entry, LoRA)
    return model, handle, entry


@pytest.mark.parametrize("start", ["leading", "trailing"])
def test_rows_of_a_are_right_singular_vectors(start: str) -> None:
    model, _, entry = adapted(f"lora_fa(rank=2, input_start='{start}')")
    Vh = torch.linalg.svd(model[0].weight, full_matrices=False).Vh
    rows = Vh[:2] if start == "leading" else Vh[-2:]
    torch.testing.assert_close((entry.A @ rows.t()).abs(), torch.eye(2, dtype=torch.float64), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("train", "frozen"), [("B", "A"), ("A", "B")])
def test_only_the_trained_factor_moves(train: str, frozen: str) -> None:
    model, handle, entry = adapted(f"lora_fa(rank=2, train='{train}')")
    assert set(handle.blocks()["0"]) == handle.recipe.roles == {train}
    kept = getattr(entry, frozen).clone()
    gram = kept @ kept.t() if frozen == "A" else kept.t() @ kept
    torch.testing.assert_close(gram, torch.eye(2, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert not getattr(entry, train).any()
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    optimizer = handle.optimizer(lr=0.1)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(getattr(entry, frozen), kept) and getattr(entry, train).any()


def test_arguments_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ArgumentError, match="neither"):
        rankwise.compose("lora_fa(train='C')")
    with pytest.raises(ArgumentError, match="leave out input_start"):
        rankwise.compose("lora_fa(train='A', input_start='kaiming')")
    with pytest.raises(ArgumentError, match="trailing, not 'svd'"):
        adapted("lora(rank=2, input_start='svd')")
