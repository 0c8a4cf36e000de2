"""Operators: the fast path equals the dense reference, on every layout, gradients too; queries equal dense linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankwise.core.combinators import ColumnScale, Dropped, Hadamard, Rotated, Routed, RowScale, Scaled, Sum
from rankwise.core.errors import ActivationError
from rankwise.core.layouts import layout_of
from rankwise.core.operators import Chain, Dense, LowRank, Operator
from rankwise.core.queries import as_low_rank, column_norms, frobenius, rank_bound, row_norms, svd
from rankwise.core.structured import BlockDiagonal, Kronecker, Sparse, TensorTrain, Tucker
from rankwise.core.targets import target_of
from tests.contract.subjects import LAYERS, LayerKind, inputs_of, model_of


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


def operators(m: int, n: int) -> dict[str, Operator]:
    """One of each kind, of shape (m, n) with m and n even."""
    low = LowRank(numbers(m, 2), numbers(2, n), 0.7)
    full = Dense(numbers(m, n))
    return {
        "Dense": full,
        "LowRank": low,
        "Chain of two": Chain(numbers(m, 3), numbers(3, n), scale=1.3),
        "Chain with diagonals": Chain(numbers(m), numbers(m, 3), numbers(3), numbers(3, n)),
        "Chain of four": Chain(numbers(m, 4), numbers(4, 2), numbers(2, 3), numbers(3, n), scale=0.5),
        "Chain with an input diagonal": Chain(numbers(m, 3), numbers(3, n), numbers(n)),
        "Chain of a scaled matrix": Chain(numbers(m), numbers(m, n)),
        "Kronecker": Kronecker(numbers(2, 2), numbers(m // 2, n // 2), 0.4),
        "BlockDiagonal": BlockDiagonal(numbers(2, m // 2, n // 2)),
        "Sparse": Sparse(numbers(3), torch.tensor([0, 1, 1]), torch.tensor([1, 0, 0]), (m, n)),
        "Tucker of two": Tucker(numbers(3, 2), numbers(m, 3), numbers(n, 2), scale=0.3),
        "Tucker of three": Tucker(numbers(3, 2, 2), numbers(m, 3), numbers(2, 2), numbers(n // 2, 2)),
        "TensorTrain": TensorTrain(
            numbers(1, 2, 3), numbers(3, m // 2, 2), numbers(2, n // 2, 3), numbers(3, 2, 1), output_modes=2, scale=0.8
        ),
        "Sum": Sum(full, low, Scaled(low, 0.5)),
        "Scaled": Scaled(low, numbers(1)),
        "RowScale": RowScale(Sum(full, low), numbers(m)),
        "ColumnScale": ColumnScale(low, numbers(n)),
        "Rotated input": Rotated(full, Dense(numbers(n, n)), side="input"),
        "Rotated output": Rotated(low, BlockDiagonal(numbers(2, m // 2, m // 2)), side="output"),
        "Hadamard": Hadamard(full, low),
    }


NAMES = list(operators(4, 6))


@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", NAMES)
def test_apply_equals_dense_on_every_layout(name: str, kind: LayerKind) -> None:
    target = target_of("layer", model_of(kind).layer)
    assert target is not None
    operator = operators(target.m, target.n)[name]
    assert operator.shape == (target.m, target.n) == tuple(operator.dense().shape)
    x = inputs_of(kind)
    fast = operator.apply(x, target.layout)
    reference = target.layout.matrix(x, operator.dense())
    torch.testing.assert_close(fast, reference, rtol=1e-10, atol=1e-10)
    weights = torch.randn(fast.shape, generator=torch.Generator().manual_seed(3), dtype=fast.dtype)
    leaves = [tensor for tensor in _tensors(operator) if tensor.requires_grad]
    for mine, theirs in zip(
        torch.autograd.grad((fast * weights).sum(), leaves),
        torch.autograd.grad((reference * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    y = numbers(*fast.shape)
    kept = y.detach().clone()
    torch.testing.assert_close(operator.add_to(y, x, target.layout), y + reference, rtol=1e-10, atol=1e-10)
    assert torch.equal(y, kept), "add_to does not write into y"


def _tensors(operator: Operator) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for value in vars(operator).values():
        for item in value if isinstance(value, tuple) else (value,):
            inside = [item] if isinstance(item, Tensor) else _tensors(item) if isinstance(item, Operator) else []
            found |= {id(tensor): tensor for tensor in inside}
    return list(found.values())


@pytest.mark.parametrize("shape", [(8, 6), (4, 12), (2, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_queries_equal_dense(name: str, shape: tuple[int, int]) -> None:
    operator = operators(*shape)[name]
    dense = operator.dense()
    torch.testing.assert_close(row_norms(operator), dense.norm(dim=1))
    torch.testing.assert_close(column_norms(operator), dense.norm(dim=0))
    torch.testing.assert_close(frobenius(operator), dense.norm())
    U, S, Vh = svd(operator)
    torch.testing.assert_close((U * S) @ Vh, dense)
    assert torch.all(S[:-1] >= S[1:])
    factors = as_low_rank(operator)
    if factors is not None:
        torch.testing.assert_close(factors.dense(), dense)
        assert factors.rank >= int(torch.linalg.matrix_rank(dense, rtol=1e-9))
    assert int(torch.linalg.matrix_rank(dense, rtol=1e-9)) <= rank_bound(operator)


def test_chain_is_narrowed_at_its_narrowest_width() -> None:
    chain = Chain(numbers(9, 5), numbers(5, 2), numbers(2, 7), numbers(7, 8))
    assert chain.narrowest().rank == 2


def test_dropped_is_the_inner_operator_on_average_and_scales_what_is_kept() -> None:
    inner = LowRank(numbers(4, 2), numbers(2, 6))
    layout = layout_of(torch.nn.Linear(6, 4))
    assert layout is not None
    generator = torch.Generator().manual_seed(0)

    def thin(x: Tensor, probability: float) -> Tensor:
        return x * torch.empty_like(x).bernoulli_(1 - probability, generator=generator) / (1 - probability)

    x = numbers(1, 6).detach().expand(20000, 6)
    with torch.no_grad():
        mean = Dropped(inner, 0.3, thin).apply(x, layout).mean(0)
        expected = inner.apply(x[:1], layout)[0]
        spread = inner.dense().abs().sum(1) * x.abs().max() / 100
    assert torch.all((mean - expected).abs() < 3 * spread)


def test_routed_gives_each_row_its_operator() -> None:
    layout = layout_of(torch.nn.Linear(6, 4))
    assert layout is not None
    parts = [LowRank(numbers(4, 2, seed=i), numbers(2, 6, seed=i)) for i in range(3)]
    x = numbers(5, 2, 6)
    rows = torch.tensor([2, 0, 2, 1, 0])
    got = Routed(parts, rows).apply(x, layout)
    for index, row in enumerate(rows.tolist()):
        torch.testing.assert_close(got[index], parts[row].apply(x[index], layout))
    assert Routed(parts, rows[:0]).apply(x[:0], layout).shape == (0, 2, 4)
    with pytest.raises(ActivationError, match="5 rows, but 3 adapter names"):
        Routed(parts, rows[:3]).apply(x, layout)
    with pytest.raises(TypeError, match="one matrix per row"):
        Routed(parts, rows).dense()


def test_row_norms_of_a_base_and_an_update_form_no_dense_update() -> None:
    """‖w_i + (B A)_i‖ through Gram matrices: no tensor of the update's size (m, n) is made."""
    from rankwise.core.operators import Base

    layer = torch.nn.Linear(40, 50).double().requires_grad_(False)
    layout = layout_of(layer)
    assert layout is not None
    base = Base(layer, layout, layer.forward, lambda: layer.weight, (50, 40))
    update = LowRank(numbers(50, 2).detach(), numbers(2, 40).detach(), 0.3)
    row_norms(Sum(base, update))  # the base's own norms are kept after the first time

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.data_ptr() != layer.weight.data_ptr():  # views of the weight are free
                self.largest = max(self.largest, result.numel())
            return result

    with Sizes() as sizes:
        norms = row_norms(Sum(base, update))
    assert sizes.largest < 50 * 40
    torch.testing.assert_close(norms, (layer.weight + update.dense()).norm(dim=1))
