"""OLoRA, MiLoRA, MiCA and the orthogonal start: exactness, options, refusals, and PEFT's own starts."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tests.core.quantized import library
from tests.never_silent.models import inputs, mlp
from torch import Tensor, nn

import rankwise
from rankwise.approximations.mica import MiCA
from rankwise.approximations.milora import MiLoRA
from rankwise.approximations.olora import OLoRA
from rankwise.approximations.orthogonal_start import OrthogonalStart
from rankwise.approximations.pissa import PiSSA
from rankwise.core.errors import ArgumentError, StatisticsError
from rankwise.core.statistics import LayerStatistics

M, N = 9, 12


def weight(m: int = M, n: int = N, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(start: Any, W: Tensor, rank: int, scale: float = 1.0, seed: int = 0):
    return start(LayerStatistics("layer", W), rank, generator=torch.Generator().manual_seed(seed), scale=scale)


@pytest.mark.parametrize(("m", "n"), [(9, 12), (12, 9), (5, 5)])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_olora_is_the_beginning_of_a_whole_qr(m: int, n: int, scale: float) -> None:
    W = weight(m, n)
    Q, R = torch.linalg.qr(W)
    for rank in (1, 3, min(m, n)):
        pair = run(OLoRA(), W, rank, scale)
        torch.testing.assert_close(pair.dense(), Q[:, :rank] @ R[:rank])
        torch.testing.assert_close(pair.B.t() @ pair.B, torch.eye(rank, dtype=torch.float64))
        torch.testing.assert_close((W - scale * pair.dense())[:, :rank], (1 - scale) * W[:, :rank], rtol=0, atol=1e-12)
        assert not torch.tril(pair.A, -1).any()
    residual = (W - run(OLoRA(), W, 3).dense()).norm()
    assert residual >= (W - run(PiSSA(), W, 3).dense()).norm()


def test_olora_stays_trainable_where_columns_depend_on_each_other() -> None:
    W = weight()
    W[:, 1] = 2 * W[:, 0]
    pair = run(OLoRA(), W, 3)
    assert pair.A[1, 1].abs() < 1e-12
    torch.testing.assert_close(pair.B.t() @ pair.B, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("select", ["smallest", "middle", "random", "largest"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_milora_holds_the_components_it_names(select: str, scale: float) -> None:
    W, rank = weight(), 3
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    pair = run(MiLoRA(select=select), W, rank, scale)
    found = torch.linalg.svdvals(scale * pair.dense())[:rank]
    expected = {"smallest": S[-3:], "middle": S[3:6], "largest": S[:3]}.get(select)
    index = [int((S - value).abs().argmin()) for value in found]
    assert len(set(index)) == rank
    if expected is not None:
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(scale * pair.dense(), U[:, index] * S[index] @ Vh[index])
    torch.testing.assert_close(pair.B.t() @ pair.B, pair.A @ pair.A.t(), rtol=0, atol=1e-10)
    left = torch.linalg.svdvals(W - scale * pair.dense())
    torch.testing.assert_close(left[-rank:], torch.zeros(rank, dtype=torch.float64), rtol=0, atol=1e-12)


def test_milora_random_is_drawn_by_the_seed() -> None:
    W = weight()
    products = [run(MiLoRA(select="random"), W, 3, seed=seed).dense() for seed in (0, 0, 1, 2)]
    assert torch.equal(products[0], products[1])
    assert not all(torch.allclose(products[0], other) for other in products[2:])


def test_milora_largest_is_pissa() -> None:
    W = weight()
    mine, theirs = run(MiLoRA(select="largest"), W, 3, 2.0), run(PiSSA(), W, 3, 2.0)
    torch.testing.assert_close(mine.B, theirs.B)
    torch.testing.assert_close(mine.A, theirs.A)


@pytest.mark.parametrize("smallest", [1e-5, 1e-6])
def test_milora_takes_the_small_singular_values_of_real_weights(smallest: float) -> None:
    """A layer of MiniLM has one of 1.2e-5 beside the largest: below 384 times float32's eps (4.6e-5), and no zero."""
    W = torch.randn(384, 384, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(W.double())
    S[-1] = smallest * S[0]
    stored = (U * S @ Vh).float()
    pair = run(MiLoRA(), stored, 1)
    known = torch.linalg.svdvals(stored.double())[-1]
    assert pair.B.dtype == torch.float32
    assert float(pair.dense().double().norm()) == pytest.approx(float(known), rel=1e-4)
    with pytest.raises(StatisticsError, match="1 of the 1 singular values to start from are zero"):
        run(MiLoRA(), (U[:, :-1] * S[:-1] @ Vh[:-1]).float(), 1)  # rounding leaves 0.6 eps in the place of this zero


def test_mica_trains_only_what_leads_into_the_unused_directions() -> None:
    net, x = mlp(), inputs()
    expected = net(x)
    W = net[0].weight.detach().clone()
    handle = rankwise.adapt_(net, rankwise.catalog.mica(rank=2))
    assert torch.equal(net(x), expected) and set(handle.blocks()["0"]) == {"A"}
    net(x).square().sum().backward()
    entry = handle.parameterization("0")
    assert entry.A.grad is not None and entry.A.grad.norm() > 0 and not entry.B.requires_grad
    U = torch.linalg.svd(W)[0]
    torch.testing.assert_close(entry.B @ entry.B.t(), U[:, -2:] @ U[:, -2:].t())


@pytest.mark.parametrize("rank", [2, 3, 8, 9])
def test_orthogonal_start_uses_complementary_halves(rank: int) -> None:
    pair = run(OrthogonalStart(), weight(), rank)
    assert pair.dense().abs().max() < 1e-15
    assert int(torch.linalg.matrix_rank(pair.A)) == (rank + 1) // 2
    assert int(torch.linalg.matrix_rank(pair.B)) == rank // 2
    Q = torch.cat([pair.A @ pair.A.t(), pair.B.t() @ pair.B])  # row spaces in the rank
    assert int(torch.linalg.matrix_rank(Q)) == rank


def test_orthogonal_start_has_the_size_of_the_release() -> None:
    pair = run(OrthogonalStart(), weight(512, 600), 16)
    assert pair.A.std().item() == pytest.approx(0.1 * 0.5**0.5, rel=0.05)
    assert pair.B.std().item() == pytest.approx(0.1 * 0.5**0.5, rel=0.05)
    double = run(OrthogonalStart(std=0.2), weight(512, 600), 16)
    torch.testing.assert_close(double.A, 2 * pair.A)


def test_both_factors_learn_from_the_first_step() -> None:
    net, x, eta = mlp(layers=1), inputs(), 1e-5
    handle = rankwise.adapt_(net, rankwise.catalog.orthogonal_start(rank=4, alpha=8))
    entry = handle.parameterization("0")
    net(x).square().sum().backward()
    dA, dB = entry.A.grad.clone(), entry.B.grad.clone()
    assert dA.norm() > 0 and dB.norm() > 0
    with torch.no_grad():
        expected = -eta * entry.scale * (dB @ entry.A + entry.B @ dA)
        entry.A -= eta * dA
        entry.B -= eta * dB
    torch.testing.assert_close(handle.update_of("0").dense(), expected, rtol=1e-3, atol=1e-9)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ArgumentError, match="mode is offset or absorb, not 'replace'"):
        OLoRA(mode="replace")
    with pytest.raises(ArgumentError, match="select is one of largest, smallest, middle, random, not 'min'"):
        MiLoRA(select="min")
    with pytest.raises(ArgumentError, match="layer: an orthogonal start halves the rank, so it takes rank 2 or more"):
        run(OrthogonalStart(), weight(), 1)
    with pytest.raises(ArgumentError, match="std is the size of the entries and positive"):
        OrthogonalStart(std=0.0)
    spoiled = weight()
    spoiled[0, 0] = float("nan")
    for start in (OLoRA(), MiLoRA(), MiCA()):
        with pytest.raises(StatisticsError, match=r"layer.*holds NaN"):
            run(start, spoiled, 2)
        with pytest.raises(ArgumentError, match="rank is 10, but a matrix of 9×12 has ranks 1 to 9"):
            run(start, weight(), 10)


def peers(init: str, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W before, B, A and W after, as PEFT's real layer starts."""
    peft = library("peft")
    net = nn.Sequential(nn.Linear(N, M))
    with torch.no_grad():
        net[0].weight.copy_(weight())
    before = net[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"], init_lora_weights=init)
        layer = peft.get_peft_model(net, config).base_model.model[0]
    factors = (layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach())
    return before, *factors, layer.base_layer.weight.detach()


@pytest.mark.parametrize(("init", "start"), [("olora", OLoRA()), ("pissa", MiLoRA(select="largest"))])
def test_product_and_residual_are_those_of_peft(init: str, start: Any) -> None:
    W, B, A, residual = peers(init, 3)
    pair = run(start, W, 3, scale=2.0)
    torch.testing.assert_close(pair.dense(), B @ A, rtol=0, atol=1e-5)
    torch.testing.assert_close(W - 2.0 * pair.dense(), residual, rtol=0, atol=1e-5)


def test_mica_is_that_of_peft() -> None:
    W, B, A, after = peers("mica", 3)
    pair = run(MiCA(), W, 3, scale=2.0)
    torch.testing.assert_close(pair.B @ pair.B.t(), B @ B.t(), rtol=0, atol=1e-5)
    assert not A.any() and not pair.A.any() and torch.equal(W, after)


def test_orthogonal_start_has_the_moments_of_peft() -> None:
    _, B, A, _ = peers("orthogonal", 4)
    mine = run(OrthogonalStart(), weight(), 4)
    for left, right in ((B.double(), A.double()), (mine.B, mine.A)):
        assert (left @ right).norm() < 1e-6 * left.norm() * right.norm()
        assert int(torch.linalg.matrix_rank(left, rtol=1e-5)) == int(torch.linalg.matrix_rank(right, rtol=1e-5)) == 2
