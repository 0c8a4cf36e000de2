"""BoRA and EDoRA: no (m, n) update in a forward, the plan for eval, dropout, zeros, starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rankwise
from rankwise.core.combinators import ColumnScale, RowScale, Sum
from rankwise.core.operators import LowRank
from rankwise.core.queries import column_norms, row_norms


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapted(text: str, m: int = 8, n: int = 12, weight: Tensor | None = None) -> tuple[nn.Module, rankwise.Handle]:
    layer = nn.Linear(n, m).double()
    with torch.no_grad():
        layer.weight.copy_(normal(m, n) if weight is None else weight)
        layer.bias.copy_(normal(m, seed=1))
    model = nn.Sequential(layer)
    handle = rankwise.adapt_(model, rankwise.compose(text))
    with torch.no_grad():
        for k, tensor in enumerate(handle.blocks()["0"].values()):
            tensor.add_(0.3 * normal(*tensor.shape, seed=5 + k))
    return model, handle


@pytest.mark.parametrize("scaled", [RowScale, ColumnScale])
@pytest.mark.parametrize("norms", [row_norms, column_norms])
def test_norms_of_scaled_sums_are_those_of_the_matrix(scaled, norms) -> None:
    model, handle = adapted("lora(rank=2)")
    base = handle.adapters("0").base(model[0])
    scale = normal(8 if scaled is RowScale else 12, seed=4)
    operator = scaled(Sum(base, LowRank(normal(8, 2), normal(2, 12), 1.5)), scale)
    expected = operator.dense().norm(dim=1 if norms is row_norms else 0)
    torch.testing.assert_close(norms(operator), expected, rtol=1e-12, atol=1e-12)


class Products(TorchDispatchMode):
    """The shapes that matrix products give."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if function.__name__.split(".")[0] in ("mm", "addmm", "bmm", "baddbmm", "mul"):
            self.shapes.append((function.__name__.split(".")[0], *result.shape))
        return result


@pytest.mark.parametrize("text", ["bora(rank=2)", "bora(rank=2, order='column')", "edora(rank=2)"])
def test_a_forward_forms_no_update(text: str) -> None:
    model, _ = adapted(text)
    with Products() as seen:
        model(normal(3, 12, seed=2))
    formed = [shape for shape in seen.shapes if shape[0] != "mul" and sorted(shape[1:]) == [8, 12]]
    assert seen.shapes and not formed


@pytest.mark.parametrize("order", ["row", "column"])
def test_one_kind_of_lengths_is_exact(order: str) -> None:
    model, handle = adapted(f"bora(rank=2, order='{order}')")
    block = handle.blocks()["0"]
    weight = rankwise.effective_weights(model)["0.weight"]
    role, dim = ("column_magnitude", 0) if order == "row" else ("row_magnitude", 1)
    torch.testing.assert_close(weight.norm(dim=dim), block[role].abs(), rtol=1e-12, atol=1e-12)


def test_rows_and_columns_of_zeros_stay_zero_and_give_no_nan() -> None:
    weight = normal(8, 12)
    weight[3], weight[:, 5] = 0.0, 0.0
    layer = nn.Linear(12, 8).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
    model = nn.Sequential(layer)
    handle = rankwise.adapt_(model, rankwise.compose("bora(rank=2)"))
    x = normal(4, 12, seed=2)
    with rankwise.switched_off(model):
        expected = model(x)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    model(x).square().sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in handle.blocks()["0"].values())


@pytest.mark.parametrize("text", ["bora(rank=2, dropout=0.4)", "edora(rank=2, dropout=0.4)"])
def test_dropout_thins_the_change_alone_and_is_right_on_average(text: str) -> None:
    model, _ = adapted(text)
    x = normal(1, 12, seed=2)
    with torch.no_grad():
        mean = torch.stack([model.train()(x) for _ in range(3000)]).mean(0)
        expected = model.eval()(x)
        with rankwise.switched_off(model):
            change = (expected - model(x)).abs().max()
    assert (mean - expected).abs().max() < 0.1 * change


@pytest.mark.parametrize("text", ["bora(rank=2)", "edora(rank=2)", "dora(rank=2)"])
def test_gains_are_kept_in_eval_until_something_moves(text: str) -> None:
    model, handle = adapted(text)
    model.eval()
    x = normal(3, 12, seed=2)
    with torch.no_grad():
        with Products() as first:
            model(x)
        with Products() as second:
            kept = model(x)
        norms = ("addmm", 8, 2)  # W Aᵀ + ½ B A Aᵀ
        assert norms in first.shapes and norms not in second.shapes
        torch.testing.assert_close(kept, model.train()(x), rtol=1e-12, atol=1e-12)
        model.eval()
        model(x)
        next(iter(handle.blocks()["0"].values())).add_(0.2)
        moved = model(x)
    torch.testing.assert_close(moved, model.train()(x).detach(), rtol=1e-12, atol=1e-12)


def test_edora_is_dora_with_the_core_as_its_input_factor() -> None:
    model, handle = adapted("edora(rank=3, alpha=6)")
    block, entry = handle.blocks()["0"], handle.parameterization("0")
    pair = entry.update().narrowest()
    other = nn.Sequential(nn.Linear(12, 8).double())
    other.load_state_dict({"0.weight": model[0].weight, "0.bias": model[0].bias})
    twin = rankwise.adapt_(other, rankwise.compose("dora(rank=3, alpha=6)"))
    with torch.no_grad():
        twin.blocks()["0"]["B"].copy_(pair.B)
        twin.blocks()["0"]["A"].copy_(pair.A)
        twin.blocks()["0"]["magnitude"].copy_(block["magnitude"])
    x = normal(5, 12, seed=2)
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=1e-12)


def test_edora_without_spread_is_dora_around_lora_xs_to_the_bit() -> None:
    x, outputs = normal(5, 12, seed=2), []
    for text in ("edora(rank=3, alpha=6, core_std=0.0)", "dora(inner=lora_xs(rank=3, alpha=6))"):
        model, handle = adapted(text)
        handle.blocks()["0"]["R"].data.copy_(normal(3, 3))
        handle.blocks()["0"]["magnitude"].data.fill_(1.5)
        outputs.append(model(x))
    assert torch.equal(*outputs)
