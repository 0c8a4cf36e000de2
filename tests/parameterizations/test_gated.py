"""Gated LoRA: both forms, starts with the gate open or the zero kept, and ranks that close."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core import decisions
from rankwise.core.errors import ArgumentError
from rankwise.parameterizations.gated import GatedLoRA
from tests.contract.subjects import scatter


def adapted(text: str, layer: nn.Module | None = None) -> tuple[nn.Sequential, rankwise.Handle, GatedLoRA]:
    model = nn.Sequential(nn.Linear(20, 30) if layer is None else layer).double()
    handle = rankwise.adapt_(model, rankwise.compose(text), where=["0"])
    entry = handle.parameterization("0")
    assert isinstance(entry, GatedLoRA)
    return model, handle, entry


def gradients(model: nn.Module, entry: GatedLoRA, n: int = 20) -> dict[str, bool]:
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model(x).square().sum().backward()
    return {role: bool(tensor.grad.any()) for role, tensor in entry.roles().items()}


def test_the_form_of_adalora() -> None:
    model, _, entry = adapted("gated_lora(rank=16, alpha=32)")
    assert entry.scale == 32 / (16 + 1e-5)
    assert not entry.gate.any() and abs(entry.A.std().item() - 0.02) < 0.002 and abs(entry.B.std().item() - 0.02) < 0.002
    assert not torch.equal(entry.A[:, :16], entry.B[:16, :])
    assert gradients(model, entry) == {"A": False, "B": False, "gate": True}


def test_the_form_of_sora() -> None:
    model, _, entry = adapted("gated_lora(rank=16, alpha=32, form='sora')")
    assert entry.scale == 2.0 and not entry.B.any() and entry.A.abs().max() <= 20**-0.5
    assert 0.6 < entry.gate.std().item() < 1.5
    assert gradients(model, entry) == {"A": False, "B": True, "gate": False}


def test_an_embedding_has_its_zero_in_the_looked_up_columns() -> None:
    _, _, entry = adapted("gated_lora(rank=4, form='sora')", nn.Embedding(9, 6))
    assert not entry.A.any() and entry.B.any()


@pytest.mark.parametrize("form", ["svd", "sora"])
def test_a_product_opens_the_gate_and_an_input_factor_keeps_the_zero(form: str) -> None:
    generator = torch.Generator().manual_seed(2)
    B, A = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((30, 3), (3, 20)))
    _, handle, entry = adapted(f"gated_lora(rank=3, alpha=6, form='{form}')")
    with torch.no_grad():
        entry.load_factors(rankwise.LowRank(B, A))
    torch.testing.assert_close(handle.update_of("0").dense(), entry.scale * B @ A, rtol=1e-12, atol=1e-12)
    model, handle, entry = adapted(f"gated_lora(rank=3, alpha=6, form='{form}')")
    with torch.no_grad():
        entry.load_factors(rankwise.LowRank(torch.zeros_like(B), A))
    assert torch.equal(entry.A, A) and not handle.update_of("0").dense().any()
    assert any(gradients(model, entry).values()), "it can leave the start"


def test_closing_and_cutting_a_rank_is_the_same_function() -> None:
    model, handle, entry = adapted("gated_lora(rank=3)")
    scatter(handle)
    keep = torch.tensor([True, False, True])
    decisions.mask(entry, keep)
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected: Tensor = model(x)
    scale = entry.scale
    decisions.resize(entry, keep, None)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert entry.rank == 2 and entry.scale == scale, "the scale keeps the rank it began with"


def test_another_form_is_refused() -> None:
    with pytest.raises(ArgumentError, match="svd"):
        adapted("gated_lora(rank=2, form='lora')")
