"""Gradients by hand: against plain autograd, second derivatives, torch.func, and what is kept for backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.handwritten import sums_in_full
from rankwise.core.operators import Dense
from rankwise.core.sparse_linear import SparseLinear, product_at
from rankwise.lab.counters import SavedBytes

# Each takes the short way on a layer of 48 × 32: transforms, sampled products, both forms of LoHa, both orders of LoKr.
METHODS = [
    "loha(rank=2)",
    "loha(rank=6)",
    "lokr(rank=2)",
    "lokr(rank=100)",
    "hira(rank=3)",
    "shira(rank=1)",
    "shira(rank=9)",
    "fourierft(frequencies=3)",
    "fourierft(frequencies=300)",
    "c3a(block=16)",
    "c3a(block=4)",
    "gralora(rank=4)",
]


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(text: str, m: int = 48, n: int = 32) -> tuple[nn.Sequential, rankwise.Handle]:
    model = nn.Sequential(nn.Linear(n, m)).double()
    handle = rankwise.adapt_(model, rankwise.compose(text))
    with torch.no_grad():
        for k, tensor in enumerate([*model[0].parameters(recurse=False), *handle.blocks()["0"].values()]):
            tensor.copy_(numbers(*tensor.shape, seed=k))
    return model, handle


def derivatives(run: Callable[[Tensor], Tensor], x: Tensor, trained: list[Tensor]) -> list[Tensor]:
    """Value, first derivatives, and derivatives of their squares."""
    y = run(x)
    first = torch.autograd.grad((y.square() * numbers(*y.shape, seed=9)).sum(), [x, *trained], create_graph=True)
    second = torch.autograd.grad(sum((g.square().sum() for g in first), start=torch.zeros(())), [x, *trained])
    plain = torch.autograd.grad((run(x) * numbers(*y.shape, seed=9)).sum(), [x, *trained])  # the gradient by hand itself
    return [y, *first, *second, *plain]


@pytest.mark.parametrize("tokens", [(), (0,), (1,), (2, 3), (50,)])
@pytest.mark.parametrize("text", METHODS)
def test_values_and_derivatives_are_those_of_the_matrix(text: str, tokens: tuple[int, ...]) -> None:
    model, handle = made(text)
    x, trained = numbers(*tokens, 32).requires_grad_(), list(handle.blocks()["0"].values())

    def dense(value: Tensor) -> Tensor:
        return value @ handle.adapters("0").operator(model[0]).dense().t() + model[0].bias

    for mine, expected in zip(derivatives(model, x, trained), derivatives(dense, x, trained), strict=True):
        size = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-11 * size)


@pytest.mark.parametrize("text", METHODS)
def test_per_sample_gradients_by_torch_func_are_those_of_a_loop(text: str) -> None:
    model, _ = made(text)
    x = numbers(3, 32)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    values = {name: dict(model.named_parameters())[name].detach() for name in names}

    def loss(changed: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, changed, (sample[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    for row in range(3):
        model.zero_grad()
        model(x[row : row + 1]).square().sum().backward()
        for name in names:
            torch.testing.assert_close(found[name][row], model.get_parameter(name).grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("text", [text for text in METHODS if text not in ("c3a(block=4)",)])
def test_no_matrix_of_the_weights_size_is_kept(text: str) -> None:
    model, handle = made(text, 480, 320)
    frozen = [*model[0].parameters(recurse=False), *handle.parameterization("0").buffers()]
    x = numbers(2, 320).requires_grad_()
    with SavedBytes(frozen) as saved:
        model(x)
    trained = sum(tensor.nbytes for tensor in handle.blocks()["0"].values())
    assert saved.total - 3 * trained < 480 * 320 * 8 / 2


@pytest.mark.parametrize("count", [3, 40, 96])
@pytest.mark.parametrize("ordered", [True, False])
def test_products_at_positions(count: int, ordered: bool) -> None:
    g, x = numbers(5, 12), numbers(5, 8, seed=2)
    flat = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:count]
    flat = flat.sort().values if ordered else flat
    torch.testing.assert_close(product_at(g, x, flat), (g.t() @ x).flatten()[flat])


def test_the_sparse_layer_passes_gradcheck() -> None:
    x, weight, values = numbers(5, 8).requires_grad_(), numbers(12, 8, seed=2), numbers(4, seed=3).requires_grad_()
    flat = torch.tensor([1, 30, 31, 95])

    def run(x: Tensor, values: Tensor) -> Tensor:
        return SparseLinear()(x, weight, None, values, flat)

    assert torch.autograd.gradcheck(run, [x, values])
    assert torch.autograd.gradgradcheck(run, [x, values])


def test_weight_and_update_are_summed_only_where_nothing_is_rounded_away() -> None:
    assert sums_in_full(torch.zeros(1)) and sums_in_full(torch.zeros(1, dtype=torch.float64))
    assert not sums_in_full(torch.zeros(1, dtype=torch.bfloat16)) and not sums_in_full(torch.zeros(1, dtype=torch.float16))


@pytest.mark.parametrize("text", ["loha(rank=6)", "hira(rank=3)", "shira(rank=9)"])
def test_a_small_update_is_felt_in_half_precision(text: str) -> None:
    """Every entry of the update is below the last bit of its weight in bfloat16; a sum of the two would be the weight."""
    model = nn.Sequential(nn.Linear(32, 48, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(4.0)
    handle = rankwise.adapt_(model.bfloat16(), rankwise.compose(text))
    with torch.no_grad():
        for k, tensor in enumerate(handle.blocks()["0"].values()):
            tensor.copy_(numbers(*tensor.shape, seed=k) * (1e-4 if k == 0 else 0.5))
    adapter = handle.parameterization("0")
    weight = torch.full((48, 32), 4.0)
    delta = adapter.total_update(Dense(weight)).dense().detach()
    assert torch.equal((weight + delta).bfloat16(), weight.bfloat16())
    x = 1.0 - 2.0 * (torch.arange(32) % 2)[None]  # W x = 0
    expected = x @ delta.t()
    assert float((model(x.bfloat16()).float() - expected).norm() / expected.norm()) < 0.02
