"""Starts and the list of silent errors: 15, 28, 29, 44, 45, 52, 53, and starts that would never train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.approximations.budget import redistribute
from rankwise.approximations.corda import CorDA
from rankwise.approximations.milora import MiLoRA
from rankwise.core.errors import ArgumentError, FingerprintError, MergeError, StatisticsError
from rankwise.core.statistics import LayerStatistics, MomentCollector, Statistic
from tests.core.quantized import plain, quantize
from tests.never_silent.models import adapted, inputs, mlp, tied

MOVING = ["pissa", "olora", "milora", "corda", "lora_ga"]  # they move a part of the weight into the factors
NEEDS = {Statistic.GRADIENT, Statistic.INPUT_GRAM}


def pairs(rows: int = 40) -> list[tuple[Tensor, Tensor]]:
    return [(inputs(rows), torch.arange(rows) % 8)]


def started(net: nn.Module, text: str, **options: Any) -> rankwise.Handle:
    recipe = rankwise.compose(text)
    known = rankwise.collect(net, pairs(), recipe.needs) if recipe.needs else None
    return rankwise.adapt_(net, recipe, statistics=known, **options)


def shake(handle: rankwise.Handle) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.1)


@pytest.mark.parametrize("rank", [2, 5, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_15_an_orthogonal_start_leaves_a_half_precision_base_where_it_is(dtype: torch.dtype, rank: int) -> None:
    net, x = mlp(dtype=dtype), inputs(dtype=dtype)
    expected = net(x)
    handle = started(net, f"orthogonal_start(rank={rank}) + lora(rank={rank}, alpha={2 * rank})")
    assert torch.equal(net(x), expected)
    entry = handle.parameterization("0")
    assert (entry.B @ entry.A).norm() <= 1e-6 * entry.B.norm() * entry.A.norm()
    assert entry.A.dtype is torch.float32 and entry.B.norm() > 0


def test_15_under_a_random_rotation_of_the_rank_the_zero_would_not_survive() -> None:
    """The same function in exact arithmetic: it shows that the test above can fail."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    x = torch.randn(16, 64, generator=generator).to(torch.bfloat16)
    expected = net(x)
    entry = started(net, "orthogonal_start(rank=16, alpha=32.0)").parameterization("0")
    assert torch.equal(net(x), expected)
    Q = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    with torch.no_grad():
        entry.A.copy_(Q.t() @ entry.A)
        entry.B.copy_(entry.B @ Q)
    assert (entry.B @ entry.A).norm() <= 1e-6 * entry.B.norm() * entry.A.norm()
    assert (net(x) - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("start", [*MOVING, "mica", "loftq", "nystrom_nora"])
def test_28_a_start_reads_the_untouched_weight_while_something_is_merged(start: str) -> None:
    alone = started(mlp(), f"{start}(rank=2)", name="second")
    net = mlp()
    first = adapted(net, name="first")
    known = rankwise.collect(mlp(), pairs(), NEEDS)
    first.merge_()
    recipe = rankwise.compose(f"{start}(rank=2)")
    if start == "loftq":  # it has to write into the weight, which is taken
        with pytest.raises(MergeError, match="unmerge before a start"):
            rankwise.adapt_(net, recipe, statistics=known, name="second")
        assert first.merged
        return
    second = rankwise.adapt_(net, recipe, statistics=known, name="second")
    for site in alone.targets:
        for role, tensor in alone.parameterization(site).state_dict().items():
            torch.testing.assert_close(second.parameterization(site).state_dict()[role], tensor)


@pytest.mark.parametrize("mode", ["offset", "absorb"])
@pytest.mark.parametrize("start", MOVING)
def test_29_a_moved_base_comes_back_with_the_file_or_goes_out_at_twice_the_rank(start: str, mode: str, tmp_path: Path) -> None:
    net, x = mlp(), inputs()
    handle = started(net, f"{start}(rank=2, mode='{mode}')")
    shake(handle)
    expected, base = net(x), mlp()
    handle.save(tmp_path / "own")
    fresh = mlp()
    rankwise.load_(fresh, tmp_path / "own")
    torch.testing.assert_close(fresh(x), expected, rtol=0, atol=1e-12)
    rankwise.interop.to_peft(handle, tmp_path / "peft")
    pair = rankwise.interop.read_peft(tmp_path / "peft")["0"]
    assert pair.rank == 4
    change = handle.update_of("0").dense()
    assert (pair.dense() - change).norm() < 1e-6 * change.norm()  # the file is in float32
    torch.testing.assert_close(handle.low_rank_of("0").dense(), change)
    torch.testing.assert_close(
        torch.nn.functional.linear(x, base[0].weight + change, base[0].bias), net[0](x), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("start", [*MOVING, "loftq"])
def test_29_the_rewritten_base_is_not_taken_for_the_one_it_came_from(start: str, tmp_path: Path) -> None:
    net = mlp()
    handle = started(net, f"{start}(rank=2)" if start == "loftq" else f"{start}(rank=2, mode='absorb')")
    handle.save(tmp_path)
    rewritten = mlp()
    with torch.no_grad():
        rewritten[0].weight.copy_(net[0].weight)
    with pytest.raises(FingerprintError, match=r"1 of 2 weights differ \(0\)"):
        rankwise.load_(rewritten, tmp_path)


def test_44_a_quantizer_that_does_not_fit_the_layer_is_refused() -> None:
    with pytest.raises(StatisticsError, match="0 is not quantized, so mode='quantized'"):
        rankwise.adapt_(mlp(), rankwise.catalog.loftq(rank=2, mode="quantized"))
    with pytest.raises(ArgumentError, match="nf2 has 2 bits, not 4"):
        rankwise.adapt_(mlp(), rankwise.catalog.loftq(rank=2, bits=4, quantizer="nf2"))
    model = quantize(plain(), "bitsandbytes nf4")
    with pytest.raises(StatisticsError, match="is quantized already, so nothing can be written"):
        rankwise.adapt_(model, rankwise.catalog.loftq(rank=2))
    for known in (None, rankwise.collect(model, [], set())):
        with pytest.raises(StatisticsError, match="its weight from before is not known"):
            rankwise.adapt_(model, rankwise.catalog.loftq(rank=2, mode="quantized"), statistics=known)


def test_45_covariances_do_not_depend_on_batches_padding_or_signs() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = -torch.rand(24, 8, generator=generator, dtype=torch.float64) - 1e-9  # all negative, with a maximum near 0
    rows[0, 0] = -1e-12
    W = torch.randn(6, 8, generator=generator, dtype=torch.float64)

    def product(*batches: Tensor) -> Tensor:
        moments = MomentCollector(8)
        for batch in batches:
            moments.add(batch)
        known = LayerStatistics("x", W, inputs=moments)
        return CorDA()(known, 2, generator=torch.Generator(), scale=2.0).dense()

    whole = product(rows)
    assert torch.isfinite(whole).all() and whole.norm() <= W.norm()
    torch.testing.assert_close(product(*rows.split(4)), whole)
    torch.testing.assert_close(product(rows.flip(0)), whole)
    torch.testing.assert_close(product(7 * rows), whole)


def test_52_ranks_that_belong_to_an_inner_method_are_not_moved_in_silence() -> None:
    known = rankwise.collect(mlp(), pairs(), {Statistic.INPUT_GRAM})
    for text, expected in (("dora(rank=3, alpha=6)", 2.0), ("rslora(rank=4, alpha=6)", 3.0)):
        recipe = redistribute(rankwise.compose(text), known, minimum=1)
        handle = rankwise.adapt_(mlp(), recipe, statistics=known)
        assert {handle.parameterization(site).scale for site in handle.targets} == {expected}
        assert sum(recipe.ranks.values()) == 2 * (3 if "3" in text else 4)
    with pytest.raises(ArgumentError, match="leaves the rank to the method inside it"):
        redistribute(rankwise.compose("dora(inner=lora_xs(rank=2))"), known)


@pytest.mark.parametrize("start", [*MOVING, "loftq"])
def test_53_what_rounds_in_half_precision_is_reported_and_what_stays_beside_is_exact(start: str) -> None:
    net = mlp(dtype=torch.bfloat16)
    known = rankwise.collect(mlp(dtype=torch.float32), [(x.float(), y) for x, y in pairs()], NEEDS)
    for one, other in zip(net, mlp(dtype=torch.float32), strict=True):
        assert one.weight.dtype is torch.bfloat16 and other.weight.dtype is torch.float32
    text = f"{start}(rank=2)" if start == "loftq" else f"{start}(rank=2, mode='absorb')"
    with pytest.warns(UserWarning, match=r"rounds to bfloat16.*0\.\d+ %"):
        handle = rankwise.adapt_(net, rankwise.compose(text), statistics=known)
    handle.detach_()
    assert torch.equal(net[0].weight, mlp(dtype=torch.bfloat16)[0].weight)
    if start == "loftq":
        return
    handle = rankwise.adapt_(net, rankwise.compose(f"{start}(rank=2)"), statistics=known)
    assert torch.equal(net[0].weight, mlp(dtype=torch.bfloat16)[0].weight)
    for site in handle.targets:
        assert handle.update_of(site).dense().abs().max() < 1e-6


def deficient() -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, generator=g, dtype=torch.float64) @ torch.randn(3, 8, generator=g, dtype=torch.float64)


def test_a_weight_of_deficient_rank_is_no_start_from_its_small_end() -> None:
    W, moments = deficient(), MomentCollector(8)
    moments.add(torch.randn(40, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    known = LayerStatistics("deep.layer", W, inputs=moments)
    for start in (MiLoRA(), CorDA(select="smallest")):
        with pytest.raises(StatisticsError, match=r"deep\.layer.*2 of the 2 singular values to start from are zero"):
            start(known, 2, generator=torch.Generator())
    for start in (MiLoRA(select="largest"), CorDA()):
        assert start(known, 3, generator=torch.Generator()).dense().norm() > 1
        with pytest.raises(StatisticsError, match="1 of the 4"):
            start(known, 4, generator=torch.Generator())


@pytest.mark.parametrize("start", ["LoRAGA", "LoRAOne", "LoRASB"])
def test_a_layer_without_gradient_says_so_in_the_same_words(start: str) -> None:
    known = LayerStatistics("deep.layer", torch.ones(6, 5), gradient=torch.zeros(6, 5))
    build = rankwise.core.piece.Piece("start", start).build()
    with pytest.warns(UserWarning, match=r"deep\.layer: the probe gradient is zero, so this layer starts as plain LoRA"):
        factors = build(known, 2, generator=torch.Generator())
    assert not factors.B.any() and factors.A.abs().min() > 0


def test_a_probe_of_too_few_tokens_is_named() -> None:
    g = torch.Generator().manual_seed(0)
    G = torch.outer(torch.randn(6, generator=g).double(), torch.randn(8, generator=g).double())
    known = LayerStatistics("x", torch.ones(6, 8, dtype=torch.float64), gradient=G)
    build = rankwise.core.piece.Piece("start", "LoRAGA").build()
    with pytest.warns(UserWarning, match="x: the probe gradient has rank 1, less than 2r = 4"):
        build(known, 2, generator=torch.Generator())
    with pytest.raises(ArgumentError, match=r"takes 2r = 8 directions.*6×8 has 6; use rank=3"):
        build(known, 4, generator=torch.Generator())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("lora_fa(rank=2) + mica(rank=2)", "both lora_fa and mica|holds only"),
        ("lora(rank=2) + mica(rank=2)", "output factor B that stays"),
        ("dora(rank=2) + mica(rank=2)", "output factor B that stays"),
        ("lora_fa(rank=2, train='A') + eva(rank=2)", "can hold an input factor A"),
        ("lora_fa(rank=2) + orthogonal_start(rank=2)", "two factors that both train"),
        ("lora_xs(rank=2) + lora_ga(rank=2)", "two factors that both train"),
    ],
)
def test_a_start_that_would_leave_a_frozen_zero_is_refused(text: str, why: str) -> None:
    known = rankwise.collect(mlp(), pairs(), NEEDS)
    with pytest.raises(rankwise.RankwiseError, match=why):
        rankwise.adapt_(mlp(), rankwise.compose(text), statistics=known)
    legal = rankwise.compose("lora_fa(rank=2, train='A') + mica(rank=2)")
    assert set(rankwise.adapt_(mlp(), legal).blocks()["0"]) == {"A"}


@pytest.mark.parametrize("start", ["pissa(rank=2, mode='absorb')", "loftq(rank=2)"])
def test_a_start_does_not_rewrite_a_tied_weight(start: str) -> None:
    net = tied()
    before = net.embedding.weight.detach().clone()
    with pytest.raises(MergeError, match=r"lm_head\.weight is the same tensor as embedding\.weight"):
        rankwise.adapt_(net, rankwise.compose(start), where=["lm_head"])
    assert torch.equal(net.embedding.weight, before) and not hasattr(net.lm_head, "adapter")
    rankwise.adapt_(net, rankwise.compose("pissa(rank=2)"), where=["lm_head"])
    assert torch.equal(net.embedding.weight, before)
