"""One adapter per row of the batch: the pass over the whole batch gives what the loop over adapters gives, gradients too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core import combinators
from rankwise.core.errors import ActivationError
from tests.contract.subjects import Conv1D

NAMES = ["first", "second", "third"]
ROWS: list[str | None] = ["second", "first", "second", None, "second"]
# recipes of the three adapters, and whether all rows run in one pass also beside rows of the frozen layer
ONE_PASS = {
    "lora": (["lora(rank=2)", "lora(rank=3, alpha=6)", "rslora(rank=1)"], True),
    "lora with an offset": (["lora(rank=2) + pissa(rank=2)", "lora(rank=2)", "vera(rank=4)"], False),
    "delora": (["delora(rank=2)", "delora(rank=3)", "capaboost(rank=2)"], True),
    "gates": (["batched_flora", "batched_flora(rank=3)", "batched_flora(rank=2)"], True),
    "gates beside the layer": (["batched_flora(rank=2, mode='residual')"] * 3, True),
    "gains": (["ia3"] * 3, True),
    "input gains": (["ia3(side='input')"] * 3, True),
    "pairs": (["road(group=4)", "road(variant=2, group=4)", "road(variant=4, group=4)"], False),
}
LOOPED = {
    "mixed kinds": ["lora(rank=2)", "ia3", "oft(block=4)"],
    "groups of different size": ["road(group=4)", "road(group=2)", "road(group=4)"],
    "rotations": ["oft(block=4)", "boft(block=4)", "hra(rank=2)"],
}


def adapted(recipes: list[str], layer: nn.Module | None = None) -> tuple[nn.Module, list[rankwise.Handle]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12) if layer is None else layer).double()
    handles = []
    for seed, (name, recipe) in enumerate(zip(NAMES, recipes, strict=True)):
        handles.append(rankwise.adapt_(model, rankwise.compose(recipe), where=["0"], name=name, seed=seed))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in handles[-1].blocks()["0"].values():
                tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model, handles


def batch(rows: int, *shape: int) -> Tensor:
    return torch.randn(rows, *shape, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(model: nn.Module, handles: list[rankwise.Handle], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    x = x.clone().requires_grad_(True)
    y = model(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    for handle in handles:
        for tensor in handle.blocks()["0"].values():
            tensor.grad = None
    (y * weights).sum().backward()
    found = [tensor.grad for handle in handles for tensor in handle.blocks()["0"].values()]
    assert x.grad is not None
    return y.detach(), [x.grad, *(torch.zeros(1) if grad is None else grad for grad in found)]


def compare(recipes: list[str], rows: list[str | None], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> int:
    """Checks the pass against the loop; returns how often the frozen layer's product ran in the pass."""
    model, handles = adapted(recipes)
    rankwise.activate_(model, rows)
    runs = []
    matrix = nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is model[0].weight:  # type: ignore[index]
            runs.append(len(x))
        return matrix(x, weight, bias)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "linear", counted)
        y, mine = gradients(model, handles, batch(len(rows), *shape))
    with monkeypatch.context() as patch:
        patch.setattr(combinators, "_row_passes", {})
        reference, theirs = gradients(model, handles, batch(len(rows), *shape))
    torch.testing.assert_close(y, reference)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)
    for row, name in enumerate(rows):  # and each row is what its adapter gives alone
        rankwise.activate_(model, name)
        torch.testing.assert_close(y[row : row + 1], model(batch(len(rows), *shape)[row : row + 1]).detach())
    return len(runs)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("kind", ONE_PASS)
def test_all_rows_in_one_pass_are_the_loop(kind: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    recipes, base_too = ONE_PASS[kind]
    widest = 3 if kind.startswith("gates") else 1
    runs = compare(recipes, ROWS, shape, monkeypatch)
    if base_too:
        assert runs == widest, "the frozen layer ran once for all rows (once per term of the gates)"
    named: list[str | None] = [name or "first" for name in ROWS]
    if kind != "lora with an offset":  # VeRA's update is a chain, which has no such pass
        assert compare(recipes, named, shape, monkeypatch) == widest


@pytest.mark.parametrize("kind", LOOPED)
def test_other_kinds_are_looped_over(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare(LOOPED[kind], ROWS, (3,), monkeypatch) >= 2


@pytest.mark.parametrize("kind", ONE_PASS)
def test_gradients_return_to_the_adapters_of_the_rows_alone(kind: str) -> None:
    model, handles = adapted(ONE_PASS[kind][0])
    rankwise.activate_(model, ["second", "first", "second"])
    gradients(model, handles, batch(3, 4))
    for name, handle in zip(NAMES, handles, strict=True):
        grads = [tensor.grad for tensor in handle.blocks()["0"].values()]
        if name == "third":
            assert all(grad is None or not grad.any() for grad in grads), "no row, exactly zero"
        else:
            assert all(grad is not None and grad.any() for grad in grads)


@pytest.mark.parametrize("kind", ONE_PASS)
def test_order_and_company_do_not_matter(kind: str) -> None:
    model, _ = adapted(ONE_PASS[kind][0])
    x = batch(4, 3)
    names: list[str | None] = ["third", "first", "third", "second"]
    rankwise.activate_(model, names)
    expected = model(x)
    order = [2, 0, 3, 1]
    rankwise.activate_(model, [names[place] for place in order])
    torch.testing.assert_close(model(x[order]), expected[order])
    rankwise.activate_(model, ["third", "first"])
    torch.testing.assert_close(model(x[:2]), expected[:2])


def test_a_batch_of_another_length_is_refused_and_an_empty_one_is_not() -> None:
    model, _ = adapted(ONE_PASS["lora"][0])
    rankwise.activate_(model, ["first", "second"])
    with pytest.raises(ActivationError, match="3 rows, but 2 adapter names"):
        model(batch(3))
    rankwise.activate_(model, [])
    with pytest.raises(ActivationError, match="3 rows, but 0 adapter names"):
        model(batch(3))


@pytest.mark.parametrize("layer", [Conv1D(12, 8), nn.Linear(8, 12, bias=False)], ids=["Conv1D", "no bias"])
@pytest.mark.parametrize("kind", ["lora", "gates", "gains", "pairs"])
def test_layers_without_bias_and_with_transposed_weight(kind: str, layer: nn.Module) -> None:
    import copy

    model, _ = adapted(ONE_PASS[kind][0], copy.deepcopy(layer))
    x = batch(3, 2)
    rankwise.activate_(model, ["second", "first", "third"])
    together = model(x)
    for row, name in enumerate(["second", "first", "third"]):
        rankwise.activate_(model, name)
        torch.testing.assert_close(together[row : row + 1], model(x[row : row + 1]))


def test_dropout_thins_rows_in_the_loop() -> None:
    model, _ = adapted(["lora(rank=2, dropout=0.5)"] * 3)
    rankwise.activate_(model, ["first", "second"])
    model.train()
    assert not torch.equal(model(batch(2, 5)), model(batch(2, 5)))
    assert torch.equal(model.eval()(batch(2, 5)), model(batch(2, 5)))


def test_half_precision_computes_in_the_layers_dtype() -> None:
    for kind in ("lora", "gates", "gains", "pairs"):
        model, _ = adapted(ONE_PASS[kind][0])
        rankwise.activate_(model, ["first", "second"])
        expected = model(batch(2, 5))
        model[0].weight.data, model[0].bias.data = model[0].weight.data.bfloat16(), model[0].bias.data.bfloat16()
        y = model(batch(2, 5).bfloat16())
        assert y.dtype is torch.bfloat16
        torch.testing.assert_close(y.double(), expected, rtol=0.1, atol=0.1)
