"""Cores in a frame of the weight: which route a forward takes and that both agree, options, refusals, what a file keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.checkpoint import trained_tensors
from rankwise.core.errors import ArgumentError, RecipeError
from rankwise.lab.counters import flops_of
from rankwise.parameterizations.frame import Composed
from rankwise.parameterizations.turned_input import split_in_three


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapted(text: str, m: int = 8, n: int = 12, weight: Tensor | None = None) -> tuple[nn.Module, rankwise.Handle]:
    layer = nn.Linear(n, m).double()
    with torch.no_grad():
        layer.weight.copy_(normal(m, n) if weight is None else weight)
        layer.bias.copy_(normal(m, seed=1))
    model = nn.Sequential(layer)
    return model, rankwise.adapt_(model, rankwise.compose(text))


def move(handle: rankwise.Handle, seed: int = 5) -> None:
    with torch.no_grad():
        for k, tensor in enumerate(handle.blocks()["0"].values()):
            tensor.add_(0.3 * normal(*tensor.shape, seed=seed + k))


@pytest.mark.parametrize("text", ["svfit", "loldu(alpha=4)", "svfit(rank=3)", "soda"])
@pytest.mark.parametrize("tokens", [1, 9, 400])
def test_both_routes_agree_in_value_and_gradient(text: str, tokens: int) -> None:
    model, handle = adapted(text)
    move(handle)
    weight = rankwise.effective_weights(model)["0.weight"]
    x, g = normal(tokens, 12, seed=3).requires_grad_(), normal(tokens, 8, seed=4)
    expected = nn.functional.linear(x, weight, model[0].bias)
    block = handle.blocks()["0"]
    there = torch.autograd.grad((expected * g).sum(), [x, *block.values()])
    y = model(x)
    here = torch.autograd.grad((y * g).sum(), [x, *block.values()])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("rank", "tokens", "grad", "whole"),
    [
        (None, 400, True, True),
        (None, 1, True, False),
        (None, 4, False, False),
        (None, 6, False, True),
        (2, 400, True, False),
    ],
)
def test_the_route_with_less_work_is_taken(rank: int | None, tokens: int, grad: bool, whole: bool) -> None:
    m, n, r = 8, 12, rank or 8
    model, _ = adapted(f"svfit(rank={rank})")
    x = normal(tokens, n, seed=3)
    with torch.set_grad_enabled(grad):
        extra = flops_of(lambda: model(x)) - 2 * tokens * m * n
    assert extra == (2 * m * n * r if whole else 2 * tokens * r * (m + n))


def test_training_on_the_whole_route_costs_what_is_said() -> None:
    """Forward and backward, gradients of the inputs included: 4mnr + 2mnT beyond the frozen layer's own."""
    m, n, tokens = 8, 12, 400
    model, _ = adapted("svfit")
    x = normal(tokens, n, seed=3).requires_grad_()
    total = flops_of(lambda: model(x).sum().backward())
    assert total - 4 * tokens * m * n == 4 * m * n * 8 + 2 * m * n * tokens
    assert total - 4 * tokens * m * n < 4 * 8 * (m + n) * tokens


@pytest.mark.parametrize("text", ["svfit", "loldu", "soda", "pmss(rank=4)", "nested_nora(rank=2, outer_rank=4)"])
@pytest.mark.parametrize("tokens", [1, 400])
def test_the_start_is_the_base_to_the_bit_on_both_routes(text: str, tokens: int) -> None:
    model, _ = adapted(text)
    x = normal(tokens, 12, seed=3)
    with rankwise.switched_off(model):
        expected = model(x)
    assert torch.equal(model(x), expected)


def test_a_convolution_takes_the_whole_route_and_a_lookup_does_not() -> None:
    conv, table = nn.Conv2d(4, 8, 3, stride=2).double(), nn.Embedding(12, 8).double()
    for layer, x, whole in ((conv, normal(4, 4, 15, 15), True), (table, torch.arange(12).repeat(50), False)):
        model = nn.Sequential(layer)
        handle = rankwise.adapt_(model, rankwise.compose("svfit"), where=["0"])
        operator = handle.parameterization("0")(handle.adapters("0").base(layer))
        assert isinstance(operator, Composed)
        assert operator.whole_is_less_work(x, handle.targets["0"].layout) == whole


def test_a_pruned_weight_keeps_every_direction_of_loldu() -> None:
    weight = normal(6, 6)
    weight[:, 2] = 0.0
    model, handle = adapted("loldu(alpha=6)", 6, 6, weight)
    entry = handle.parameterization("0")
    rebuilt = entry.lower @ torch.diag(entry.diagonal_start) @ entry.upper
    torch.testing.assert_close(rebuilt, weight, rtol=0, atol=1e-12)
    model(normal(5, 6, seed=2)).square().sum().backward()
    assert (entry.diagonal.grad != 0).all()


def test_an_embedding_with_a_padding_token_is_decomposed_as_its_table() -> None:
    table = nn.Embedding(12, 8, padding_idx=1).double()
    handle = rankwise.adapt_(nn.Sequential(table), rankwise.compose("loldu"), where=["0"])
    entry = handle.parameterization("0")
    rebuilt = (entry.lower * entry.diagonal_start) @ entry.upper
    torch.testing.assert_close(rebuilt, table.weight.t(), rtol=0, atol=1e-12)
    assert entry.upper.abs().max() <= 1.0  # (P L)ᵀ of a pivoted LU; dividing by a pivot of zero would show here


def test_a_skeleton_file_keeps_indices_and_core_alone(tmp_path: Path) -> None:
    model, handle = adapted("pmss(rank=4, rescale=True)")
    move(handle)
    assert sum(tensor.numel() for tensor in trained_tensors(handle).values()) == 4**2 + 2 * 4
    handle.save(tmp_path)
    fresh = nn.Sequential(nn.Linear(12, 8).double())
    fresh.load_state_dict({"0.weight": model[0].weight, "0.bias": model[0].bias})
    loaded = rankwise.load_(fresh, tmp_path)
    for name in ("C", "R", "row_index", "column_index"):
        assert torch.equal(loaded.parameterization("0").get_buffer(name), handle.parameterization("0").get_buffer(name))
    for frame in (handle.parameterization("0").C, handle.parameterization("0").R):
        torch.testing.assert_close(torch.linalg.matrix_norm(frame, 2), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("split", ["both", "input", "none"])
@pytest.mark.parametrize("outer", ["svd", "awsvd"])
def test_the_outer_pair_has_the_singular_values_where_it_says(split: str, outer: str) -> None:
    layer = nn.Linear(12, 8).double()
    with torch.no_grad():
        layer.weight.copy_(normal(8, 12))
    model, x = nn.Sequential(layer), normal(50, 12, seed=3) * torch.linspace(0.1, 3.0, 12, dtype=torch.float64)
    recipe = rankwise.compose(f"nested_nora(rank=2, outer_rank=4, split='{split}', outer='{outer}')")
    known = rankwise.collect(model, [(x, torch.zeros(50, dtype=torch.long))], recipe.needs) if recipe.needs else None
    entry = rankwise.adapt_(model, recipe, statistics=known).parameterization("0")
    c = x.square().mean(0).sqrt() if outer == "awsvd" else torch.ones(12, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(layer.weight.detach() * c, full_matrices=False)
    power = {"both": 0.5, "input": 1.0, "none": 0.0}[split]
    best = (U[:, :4] * (S[:4] ** (0.0 if split == "none" else 1.0))) @ Vh[:4] / c
    torch.testing.assert_close(entry.outer_B @ entry.outer_A, best, rtol=0, atol=1e-10)
    lengths = (entry.outer_A * c).norm(dim=1)
    torch.testing.assert_close(lengths, S[:4] ** power, rtol=1e-10, atol=1e-10)


def test_a_compensated_start_trains_both_factors_and_exports_at_twice_the_rank(tmp_path: Path) -> None:
    model, handle = adapted("nested_nora(rank=2, outer_rank=4, compensate=True)")
    x = normal(5, 12, seed=3)
    with rankwise.switched_off(model):
        expected = model(x)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    model(x).square().sum().backward()
    assert all((tensor.grad != 0).any() for tensor in handle.blocks()["0"].values())
    move(handle)
    factors = handle.low_rank_of("0")
    assert factors is not None and factors.rank == 4
    handle.save(tmp_path)
    fresh = nn.Sequential(nn.Linear(12, 8).double())
    fresh.load_state_dict({"0.weight": model[0].weight, "0.bias": model[0].bias})
    rankwise.load_(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("size", [1, 7, 8, 12, 36, 108, 640, 1280, 4096, 11008])
def test_three_factors_multiply_to_the_size(size: int) -> None:
    first, second, third = split_in_three(size)
    assert first * second * third == size and 1 <= first <= second <= third
    triples = [
        (a, b, size // a // b)
        for a in range(1, size + 1)
        if size % a == 0
        for b in range(a, size // a + 1)
        if size // a % b == 0
    ]
    least = min(sum(part**2 for part in triple) for triple in triples)
    released = size in (640, 1280)
    assert (first**2 + second**2 + third**2 == least) or released


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("svfit(rank=9)", RecipeError, "min\\(m, n\\) = 8"),
        ("loldu(start='ones')", ArgumentError, "lu, constant, normal, uniform"),
        ("pmss(rank=3, select='cur')", ArgumentError, "qr, norm, leverage"),
        ("nested_nora(rank=3, outer_rank=2)", ArgumentError, "at most outer_rank"),
        ("nested_nora(rank=3, outer_rank=9)", RecipeError, "outer_rank=8 or less"),
        ("nested_nora(rank=2, outer_rank=4, split='left')", ArgumentError, "split is one of"),
        ("nested_nora(rank=2, outer_rank=4, outer='awsvd')", RecipeError, "INPUT_GRAM"),
        ("soda(factors=(2, 2, 2))", RecipeError, "product is n = 12"),
        ("soda(factors=(5, 2, -1))", RecipeError, "factors is \\(5, 2, -1\\)"),
        ("soda(decomposition='qr')", ArgumentError, "svd or lq"),
        ("bora(rank=2, order='both')", ArgumentError, "row or column"),
    ],
)
def test_refusals_say_what_would_do(text: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        adapted(text)


def test_a_prime_number_of_inputs_is_told() -> None:
    with pytest.warns(UserWarning, match="prime number"):
        adapted("soda", 8, 13)


def test_soda_given_factors_with_a_rest() -> None:
    _, handle = adapted("soda(factors=(2, -1, 3))")
    assert [handle.blocks()["0"][f"Q_{k}"].shape[0] for k in (1, 2, 3)] == [2, 2, 3]
