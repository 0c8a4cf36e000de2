"""loha, lokr, hira, gralora, fourierft, c3a and shira: routes chosen by count, sizes of factors, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError
from rankwise.core.queries import as_low_rank
from rankwise.core.statistics import Statistic
from rankwise.core.structured import Kronecker
from rankwise.lab.counters import flops_of
from rankwise.parameterizations.hadamard_product import HadamardProduct
from rankwise.parameterizations.lokr import split


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapted(text: str, layer: nn.Module) -> rankwise.Handle:
    model = nn.Sequential(layer).double()
    handle = rankwise.adapt_(model, rankwise.compose(text), where=["0"])
    with torch.no_grad():
        for k, tensor in enumerate(handle.blocks()["0"].values()):
            tensor.copy_(numbers(*tensor.shape, seed=k))
    return handle


@pytest.mark.parametrize(("tokens", "rank"), [(1, 2), (64, 2), (1, 8), (64, 8)])
@pytest.mark.parametrize("trained", [True, False])
def test_loha_takes_the_route_of_fewer_operations(tokens: int, rank: int, trained: bool) -> None:
    m, n = 48, 32
    product = HadamardProduct(numbers(m, rank), numbers(rank, n), numbers(m, rank), numbers(rank, n))
    factored = (6 if trained else 2) * tokens * rank**2 * (m + n)
    matrix = (16 if trained else 4) * m * n * rank + (2 * tokens * m * n if trained else 0)
    with torch.set_grad_enabled(trained):
        assert product.prefers_factors(tokens, merged=True) is (factored < matrix)
    layer = nn.Linear(n, m).double().requires_grad_(False)
    model = adapted(f"loha(rank={rank})", layer).model
    x = numbers(tokens, n)
    with torch.set_grad_enabled(trained):
        extra = flops_of(lambda: model(x)) - 2 * tokens * m * n
    assert extra == (2 * tokens * rank**2 * (m + n) if factored < matrix else 4 * m * n * rank)


def test_loha_in_tucker_form_with_a_kernel_of_one_is_the_flat_form() -> None:
    handle = adapted("loha(rank=2, tucker=True)", nn.Conv2d(4, 6, 1))
    assert set(handle.blocks()["0"]) == {"A1", "B1", "A2", "B2"}


@pytest.mark.parametrize(
    ("dim", "factor", "expected"),
    [
        (256, -1, (16, 16)),
        (128, -1, (8, 16)),
        (127, -1, (1, 127)),
        (128, 4, (4, 32)),
        (128, 64, (64, 2)),
        (128, 5, (4, 32)),
        (11008, -1, (86, 128)),
        (50257, -1, (29, 1733)),
    ],
)
def test_lokr_splits_sizes(dim: int, factor: int, expected: tuple[int, int]) -> None:
    assert split(dim, factor) == expected


@pytest.mark.parametrize("sizes", [(2, 8, 8, 3), (8, 2, 3, 8)])
@pytest.mark.parametrize("factored", [True, False])
def test_a_kronecker_product_is_applied_in_the_cheaper_order(sizes: tuple[int, ...], factored: bool) -> None:
    m1, n1, m2, n2 = sizes
    right = (numbers(m2, 1), numbers(1, n2)) if factored else numbers(m2, n2)
    operator = Kronecker(numbers(m1, n1), right, 0.5)
    x, rho = numbers(7, n1 * n2), m2 + n2 if factored else m2 * n2
    layout = rankwise.core.layouts.LinearLayout()
    cheaper = min(m1 * (n1 * n2 + rho), n1 * (rho + m1 * m2))
    assert flops_of(lambda: operator.apply(x, layout)) == 2 * 7 * cheaper
    torch.testing.assert_close(operator.apply(x, layout), x @ operator.dense().t())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.Conv1d(8, 12, 3, padding="same"),
        nn.Conv2d(8, 12, 3, groups=2),
        nn.Embedding(12, 8),
    ],
    ids=["conv2d", "conv1d", "grouped", "embedding"],
)
@pytest.mark.parametrize("text", ["lokr(rank=1, tucker=True)", "lokr(rank=1)", "lokr(rank=9)", "loha(rank=2)"])
def test_convolutions_and_embeddings_are_applied_as_their_matrix(layer: nn.Module, text: str) -> None:
    handle = adapted(text, copy.deepcopy(layer))
    shapes = {nn.Conv2d: (2, 8, 7, 6), nn.Conv1d: (2, 8, 7), nn.Embedding: (3, 4)}
    x = numbers(*shapes[next(kind for kind in shapes if isinstance(layer, kind))])
    x = x if not isinstance(layer, nn.Embedding) else torch.arange(12).reshape(3, 4)
    layout, update = handle.targets["0"].layout, handle.update_of("0")
    torch.testing.assert_close(update.apply(x, layout), layout.matrix(x, update.dense()))


def test_hira_keeps_the_zeros_of_the_weight_and_its_rank() -> None:
    layer = nn.Linear(12, 9).double()
    with torch.no_grad():
        layer.weight.copy_(numbers(9, 2) @ numbers(2, 12, seed=2))
        layer.weight[:, ::3] = 0
    update = adapted("hira(rank=1)", layer).update_of("0").dense()
    assert not update[:, ::3].any() and int(torch.linalg.matrix_rank(update)) == 2


@pytest.mark.parametrize(
    ("text", "rank"), [("gralora(rank=4, blocks=4)", 16), ("gralora(rank=4, blocks=2, hybrid_rank=3)", 11)]
)
def test_gralora_is_lora_of_k_times_the_rank(text: str, rank: int) -> None:
    update = adapted(text, nn.Linear(24, 32)).update_of("0")
    factors = as_low_rank(update)
    assert factors is not None and factors.rank == rank
    torch.testing.assert_close(factors.dense(), update.dense())
    assert int(torch.linalg.matrix_rank(update.dense())) == rank


def test_one_block_of_inputs_reaches_only_its_own_factor_of_gralora() -> None:
    handle = adapted("gralora(rank=4, blocks=2)", nn.Linear(8, 6))
    x = numbers(5, 8)
    x[:, :4] = 0
    handle.model(x).square().sum().backward()
    gradient = handle.blocks()["0"]["block_A"].grad
    assert gradient is not None and not gradient[0].any() and gradient[1].all()


def test_masks_of_shira_hold_the_entries_they_name() -> None:
    model = nn.Sequential(nn.Linear(8, 12)).double()
    x, y = numbers(20, 8), torch.arange(20) % 12
    statistics = rankwise.collect(model, [(x, y)], {Statistic.GRADIENT})
    G, W = statistics["0"].require_gradient().abs(), model[0].weight.detach().abs()
    for mask, score in (("magnitude", W), ("gradient", G), ("snip", W * G)):
        handle = rankwise.adapt_(model, rankwise.compose(f"shira(rank=1, mask='{mask}')"), statistics=statistics, name=mask)
        rows, columns = handle.parameterization("0").indices.long()
        assert score[rows, columns].min() >= score.flatten().sort(descending=True).values[20 - 1]
        assert len(rows) == 20
    handle = rankwise.adapt_(model, rankwise.compose("shira(rank=1, mask='structured')"), name="structured")
    rows, columns = handle.parameterization("0").indices.long()
    assert set(rows.tolist()) == set(range(12)) and set(columns.tolist()) == set(range(8))


def test_two_adapters_of_shira_with_their_own_entries_come_apart_again() -> None:
    model = nn.Sequential(nn.Linear(16, 16)).double()
    before = model[0].weight.detach().clone()
    handles = [rankwise.adapt_(model, rankwise.compose("shira(rank=1)"), name=name, seed=k) for k, name in enumerate("ab")]
    with torch.no_grad():
        for handle in handles:
            handle.blocks()["0"]["values"].fill_(1.0)
    rankwise.activate_(model, {"a": 1.0, "b": 1.0})
    for handle in handles:
        handle.merge_()
    total = handles[0].update_of("0").dense() + handles[1].update_of("0").dense()
    torch.testing.assert_close(model[0].weight - before, total)
    for handle in reversed(handles):
        handle.unmerge_()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gralora(rank=6, blocks=4)", "possible here: 1, 2"),
        ("gralora(rank=4, blocks=2, hybrid_rank=-1)", "use 0 for none"),
        ("c3a(block=5)", "one of 1, 2, 4"),
        ("shira(rank=9)", "rank=4 or less"),
        ("fourierft(frequencies=1000)", "frequencies=96 or less"),
        ("loha(rank=9)", "rank=8 or less"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        rankwise.adapt_(nn.Sequential(nn.Linear(8, 12)), rankwise.compose(text))


@pytest.mark.parametrize(
    "text",
    [
        "loha(start='normal')",
        "loha(dropout=1.0)",
        "lokr(factor=0)",
        "lokr(zero='B')",
        "lokr(full_scale='r')",
        "shira(mask='all')",
    ],
)
def test_unknown_options_are_refused(text: str) -> None:
    with pytest.raises(ArgumentError):
        rankwise.adapt_(nn.Sequential(nn.Linear(32, 32)), rankwise.compose(text))


class TwoReaders(nn.Module):
    """Two layers that read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 12), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x).square().sum() + self.two(x).square().sum()


def test_fourierfts_layers_share_one_transform_of_an_input_and_never_an_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankwise.parameterizations import waves

    calls: list[int] = []
    real = waves._transformed
    monkeypatch.setattr(waves, "_transformed", lambda x: calls.append(1) or real(x))
    model = TwoReaders().double()
    handle = rankwise.adapt_(model, rankwise.compose("fourierft(frequencies=40)"))
    with torch.no_grad():
        for k, block in enumerate(handle.blocks().values()):
            block["coefficients"].copy_(numbers(40, seed=k))
    trained = [block["coefficients"] for block in handle.blocks().values()]

    def expected(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(rankwise.functional_call(model, rankwise.effective_weights(model), x), [x, *trained])

    x = numbers(5, 8).requires_grad_()
    loss = model(x)
    assert len(calls) == 1
    for found, value in zip(torch.autograd.grad(loss, [x, *trained]), expected(x), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        first = model.one(x)
        x.mul_(2)  # in the same storage, and the layer is called alone
        second = model.one(x)
    weights = rankwise.effective_weights(model)
    torch.testing.assert_close(second, x @ weights["one.weight"].t() + model.one.bias, rtol=1e-10, atol=1e-10)
    assert not torch.equal(first, second)
    square = numbers(8, 8, seed=3)
    for turned in (square, square.t()):  # the same numbers in memory
        torch.testing.assert_close(model.one(turned), turned @ weights["one.weight"].t() + model.one.bias)
