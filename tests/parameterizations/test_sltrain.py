"""SLTrain: places, precision, derivatives by hand, refusals, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError, CheckpointError, RecipeError
from rankwise.parameterizations.low_rank_plus_sparse import LowRankPlusSparse, _Linear, random_places
from tests.contract.subjects import scatter


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model_of(m: int = 10, n: int = 7, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    layer = nn.Linear(n, m).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(drawn(1, m, n))
        layer.bias.copy_(drawn(2, m))
    return nn.Sequential(layer)


def adapted(text: str, model: nn.Sequential | None = None) -> tuple[nn.Sequential, rankwise.Handle]:
    model = model_of() if model is None else model
    handle = rankwise.adapt_(model, rankwise.compose(text))
    scatter(handle)
    return model, handle


@pytest.mark.parametrize("count", [0, 5, 12, 24])
def test_places_are_different_sorted_and_uniform(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    seen, together = torch.zeros(24), torch.zeros(24, 24)
    for _ in range(3000):
        rows, columns = random_places(4, 6, count, generator).long()
        flat = rows * 6 + columns
        assert flat.numel() == count and bool((flat[1:] > flat[:-1]).all())
        seen[flat] += 1
        together[flat[:, None], flat] += 1
    pairs = together[~torch.eye(24, dtype=torch.bool)]
    share, share_of_pairs = count / 24, count * (count - 1) / (24 * 23)
    assert float((seen / 3000 - share).abs().max()) <= 4.5 * (share * (1 - share) / 3000) ** 0.5
    assert float((pairs / 3000 - share_of_pairs).abs().max()) <= 4.5 * (share_of_pairs * (1 - share_of_pairs) / 3000) ** 0.5


def test_layers_draw_places_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    handle = rankwise.adapt_(model, rankwise.compose("sltrain(rank=2, density=0.3)"))
    first, second = (handle.parameterization(site).indices for site in handle.targets)
    assert first.dtype is torch.int32 and not torch.equal(first, second)


@pytest.mark.parametrize("with_weight", [True, False])
def test_first_and_second_derivatives_by_hand(with_weight: bool) -> None:
    x, B, A, values = (drawn(k, *shape).requires_grad_() for k, shape in enumerate([(2, 3, 5), (4, 2), (2, 5), (6,)]))
    W, b = (drawn(8, 4, 5), drawn(9, 4)) if with_weight else (None, None)
    indices = random_places(4, 5, 6, torch.Generator().manual_seed(0))

    def function(x: Tensor, B: Tensor, A: Tensor, values: Tensor) -> Tensor:
        return _Linear(0.7)(x, W, b, B, A, values, indices)

    dense = 0.7 * B @ A + torch.zeros(4, 5, dtype=torch.float64).index_put((indices[0].long(), indices[1].long()), values)
    torch.testing.assert_close(function(x, B, A, values), F.linear(x, dense if W is None else dense + W, b))
    assert torch.autograd.gradcheck(function, (x, B, A, values))
    assert torch.autograd.gradgradcheck(function, (x, B, A, values))


@pytest.mark.parametrize("keep_base", [True, False])
def test_gradients_of_every_sample(keep_base: bool) -> None:
    model, handle = adapted(f"sltrain(rank=2, density=0.3, keep_base={keep_base})")
    x = drawn(3, 4, 7)
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}

    def loss(tensors: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, tensors, (row[None],)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x)
    for name, tensor in trained.items():
        for row, found in zip(x, together[name], strict=True):
            torch.testing.assert_close(found, torch.autograd.grad(loss(trained, row), tensor)[0])
    assert set(handle.blocks()["0"]) == {"A", "B", "values"}


def test_in_half_precision_the_matrix_is_rounded_once() -> None:
    model, handle = adapted("sltrain(rank=2, density=0.3)", model_of(dtype=torch.bfloat16))
    entry = handle.parameterization("0")
    assert {tensor.dtype for tensor in entry.parameters()} == {torch.float32}
    exact = entry.forward(None).dense()  # (m, n) float32
    x = drawn(3, 6, 7).bfloat16()
    assert torch.equal(model(x), F.linear(x, exact.bfloat16()) + model[0].bias)


def test_in_half_precision_a_small_update_beside_the_weight_is_not_rounded_away() -> None:
    model, handle = adapted("sltrain(rank=2, density=0.3, keep_base=True)", model_of(dtype=torch.bfloat16))
    operator = handle.update_of("0")
    with torch.no_grad():
        for tensor in handle.blocks()["0"].values():
            tensor.mul_(0.01)
        model[0].bias.zero_()
        model[0].weight.copy_(torch.eye(10, 7))
    x = torch.zeros(1, 7, dtype=torch.bfloat16)
    x[0, 3] = 1.0
    y = model(x)[0]  # entry 3 is 1 + update, all others are the update alone
    expected = operator.dense()[:, 3]
    others = torch.arange(10) != 3
    torch.testing.assert_close(y[others].float(), expected[others], rtol=2**-7, atol=0)


@pytest.mark.parametrize("keep_base", [True, False])
def test_nothing_as_large_as_the_matrix_is_kept(keep_base: bool) -> None:
    model, _ = adapted(f"sltrain(rank=2, density=0.1, keep_base={keep_base})", model_of(40, 30))
    kept: list[Tensor] = []
    x = drawn(3, 5, 30).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(x)
    own = [tensor for tensor in kept if tensor.data_ptr() != model[0].weight.data_ptr()]
    assert own and max(tensor.numel() for tensor in own) < 40 * 30
    assert not any(tuple(tensor.shape) == (5, 40) for tensor in own)


def test_an_operator_without_a_sparse_part_is_low_rank() -> None:
    B, A, indices = drawn(0, 4, 2), drawn(1, 2, 5), torch.zeros(2, 0, dtype=torch.int32)
    operator = LowRankPlusSparse(B, A, torch.zeros(0, dtype=torch.float64), indices, 0.5)
    torch.testing.assert_close(operator.dense(), 0.5 * B @ A)
    model, handle = adapted("sltrain(rank=2, density=0.0)")
    assert handle.blocks()["0"]["values"].numel() == 0 and handle.trained_numbers == 2 * (10 + 7)
    torch.testing.assert_close(
        model(drawn(3, 4, 7)), F.linear(drawn(3, 4, 7), handle.parameterization("0").forward(None).dense(), model[0].bias)
    )


def test_bad_sizes_are_refused() -> None:
    for density in (-0.1, 1.5):
        with pytest.raises(ArgumentError, match=r"in \[0, 1\]"):
            adapted(f"sltrain(rank=2, density={density})")
    with pytest.raises(RecipeError, match=r"at least one of the layer's 70 entries.*density is 0\.01"):
        adapted("sltrain(rank=2, density=0.01)")
    with pytest.raises(RecipeError, match=r"rank <= min\(m, n\) = 7"):
        adapted("sltrain(rank=8, density=0.3)")
    with pytest.raises(RecipeError, match="a product B A"):
        adapted("sltrain(rank=2, density=0.3, keep_base=True) + pissa(rank=2)")


def test_a_file_for_other_layers_is_refused(tmp_path: Path) -> None:
    model, handle = adapted("sltrain(rank=2, density=0.3)")
    handle.save(tmp_path)
    for m, n in ((7, 10), (14, 5), (10, 8)):
        other = model_of(m, n)
        before = other(drawn(3, 2, n))
        with pytest.raises((CheckpointError, rankwise.RankwiseError), match=rf"{m}×{n}|{m} × {n}|another|base"):
            rankwise.load_(other, tmp_path, any_base=True)
        assert torch.equal(other(drawn(3, 2, n)), before)
    again = model_of()
    loaded = rankwise.load_(again, tmp_path)
    assert torch.equal(loaded.parameterization("0").indices, handle.parameterization("0").indices)
    assert torch.equal(again(drawn(3, 2, 7)), model(drawn(3, 2, 7)))
