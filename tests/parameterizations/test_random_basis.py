"""NOLA: nothing is kept of the matrices, drawing is repeatable and private, and drift of the generator is noticed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rankwise
from rankwise.core.errors import CheckpointError, RecipeError
from rankwise.parameterizations.generated import all_blocks, combine, correlate
from tests.contract.subjects import scatter

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TEXT = "nola(rank=2, bases_A=5, bases_B=7)"


def mlp() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).double()


def adapted(text: str = TEXT) -> tuple[nn.Sequential, rankwise.Handle]:
    model = mlp()
    handle = rankwise.adapt_(model, rankwise.compose(text))
    scatter(handle)
    return model, handle


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_the_sum_is_that_of_the_drawn_matrices_for_every_chunk(chunk: int) -> None:
    c = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    drawn = all_blocks(5, 7, 3, 4, 2.0).double()
    torch.testing.assert_close(combine(c, 5, 3, 4, 2.0, chunk), torch.tensordot(c, drawn, dims=1), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda c: combine(c, 5, 3, 4, 2.0, chunk), (c,))
    g = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(correlate(g, 7, 5, 2.0, chunk), (drawn * g).sum((1, 2)), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(lambda c: combine(c, 5, 3, 4, 2.0, chunk).square(), (c,))


def test_it_trains_under_checkpointing_and_torch_func_as_without() -> None:
    model, handle = adapted()
    blocks = [tensor for block in handle.blocks().values() for tensor in block.values()]
    plain = torch.autograd.grad(model(X).square().sum(), blocks)
    for reentrant in (False, True):
        y = checkpoint(model, X.clone().requires_grad_(), use_reentrant=reentrant)
        assert isinstance(y, torch.Tensor)
        y.square().sum().backward()
        for tensor, expected in zip(blocks, plain, strict=True):
            torch.testing.assert_close(tensor.grad, expected, rtol=1e-12, atol=1e-12)
            tensor.grad = None
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = dict(zip(named, torch.autograd.grad(model(X).square().sum(), list(named.values())), strict=True))
    values = {name: p.detach() for name, p in named.items()}
    found = torch.func.grad(lambda v: torch.func.functional_call(model, v, (X,)).square().sum())(values)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def test_the_file_holds_the_coefficients_and_nothing_else(tmp_path: Path) -> None:
    model, handle = adapted()
    (file,) = handle.save(tmp_path).glob("*.safetensors")
    from safetensors.torch import load_file

    assert sum(tensor.numel() for tensor in load_file(file).values()) == handle.trained_numbers == 2 * (5 + 7)
    description = json.loads((tmp_path / "adapter.json").read_text())
    fresh = mlp()
    rankwise.load_(fresh, tmp_path)
    assert torch.equal(fresh(X), model(X))
    description["bank"]["digest"] = "0" * 32
    (tmp_path / "adapter.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="same numbers from the same seed"):
        rankwise.load_(mlp(), tmp_path)


def test_factors_are_kept_in_eval_until_something_moves(monkeypatch) -> None:
    from rankwise.parameterizations import random_basis

    calls = []
    real = random_basis.combine
    monkeypatch.setattr(random_basis, "combine", lambda *a: calls.append(1) or real(*a))
    model, handle = adapted()
    model.eval()
    with torch.no_grad():
        first = model(X)
        count = len(calls)
        assert torch.equal(model(X), first) and len(calls) == count
        scatter(handle, 5)
        assert not torch.equal(model(X), first) and len(calls) > count


def test_vit_is_as_published_and_shared_bases_are_one_set() -> None:
    model = mlp()
    handle = rankwise.adapt_(model, rankwise.compose(TEXT.replace(")", ", variant='vit')")))
    entry = handle.parameterization("0")
    assert entry.start_A is None and torch.all(entry.coefficients_A == 1 / 5)
    A = entry.factors()[1]
    torch.testing.assert_close(A, entry.basis("A").mean(0), rtol=1e-12, atol=1e-12)
    assert float(entry.basis("A").abs().max()) <= 1 / math.sqrt(8) and float(entry.basis("B").abs().max()) <= 1 / math.sqrt(2)
    _, shared = adapted(TEXT.replace(")", ", share_bases=True)"))
    assert set(dict(shared.bank.named_buffers())) == {"probe", "start_probe", "A_8", "B_12", "A_12", "B_8"}
    assert shared.parameterization("0").basis("A").data_ptr() == shared.bank["A_8"].data_ptr()


def test_no_matrices_are_refused() -> None:
    with pytest.raises(RecipeError, match="bases_B=0"):
        rankwise.adapt_(mlp(), rankwise.catalog.nola(rank=2, bases_B=0))
