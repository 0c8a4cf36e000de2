"""LoftQ and the quantizers: what the spec leaves to the library, and the real 4-bit quantizer of bitsandbytes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from tests.core.quantized import library, plain, quantize
from tests.never_silent.models import inputs, mlp
from torch import Tensor, nn

import rankwise
from rankwise.approximations.loftq import LoftQ
from rankwise.approximations.quantizers import NormalFloat, Uniform
from rankwise.core.errors import ArgumentError, CheckpointError, ExportError, RecipeError
from rankwise.core.statistics import LayerStatistics


def matrix(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(64,), (8, 8), (3, 5), (2, 3, 7), (1, 1)])
@pytest.mark.parametrize("quantizer", [NormalFloat(4, 16), NormalFloat(2, 64), Uniform(3, 16), Uniform(8, 7)])
def test_every_number_goes_to_the_nearest_level_of_its_block(quantizer: NormalFloat | Uniform, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coded = quantizer.quantize(x)
    got = coded.dequantize()
    assert got.shape == x.shape and got.dtype == x.dtype and coded.codes.dtype is torch.uint8
    for start in range(0, x.numel(), quantizer.block):
        block, mine = x.flatten()[start : start + quantizer.block], got.flatten()[start : start + quantizer.block]
        if isinstance(quantizer, Uniform):
            levels = torch.linspace(float(block.min()), float(block.max()), 2**quantizer.bits, dtype=torch.float64)
        else:
            levels = quantizer.levels() * block.abs().max()
        nearest = levels[(block[:, None] - levels).abs().argmin(1)]
        torch.testing.assert_close((mine - block).abs(), (nearest - block).abs(), rtol=0, atol=1e-12)
    torch.testing.assert_close(quantizer.quantize(got).dequantize(), got, rtol=0, atol=1e-12)


def test_zeros_and_constants_survive() -> None:
    for quantizer in (NormalFloat(4, 8), Uniform(4, 8)):
        assert not quantizer.quantize(torch.zeros(20)).dequantize().any()
    torch.testing.assert_close(Uniform(2, 8).quantize(torch.full((20,), 3.5)).dequantize(), torch.full((20,), 3.5))
    with pytest.raises(ArgumentError, match="bits is 2 to 8 and block 1 or more, not 1 and 64"):
        NormalFloat(1)


def test_levels_of_nf4_are_the_published_ones() -> None:
    published = "-1 -.69619 -.52507 -.39492 -.28444 -.18477 -.09105 0 .07958 .16093 .24611 .33792 .44071 .56262 .72296 1"
    expected = torch.tensor([float(level) for level in published.split()], dtype=torch.float64)
    torch.testing.assert_close(NormalFloat(4).levels(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(NormalFloat(2).levels(), torch.tensor([-1.0, 0.0, 0.33792, 1.0]).double(), rtol=0, atol=1e-5)


def bitsandbytes_nf4(x: Tensor) -> Tensor:
    functional = library("bitsandbytes.functional")
    return functional.dequantize_4bit(*functional.quantize_4bit(x.contiguous(), quant_type="nf4", blocksize=64))


def test_nf4_is_that_of_bitsandbytes() -> None:
    x = matrix(96, 128, dtype=torch.float32)
    ours = NormalFloat(4, 64).quantize(x).dequantize()
    torch.testing.assert_close(ours, bitsandbytes_nf4(x), rtol=0, atol=1e-6)


def test_the_alternation_is_that_of_the_real_quantizer() -> None:
    W = matrix(64, 128, dtype=torch.float32)
    B, A = torch.zeros(64, 4), torch.zeros(4, 128)
    for _ in range(3):
        error = W - bitsandbytes_nf4(W - 2.0 * B @ A)
        U, S, Vh = torch.linalg.svd(error, full_matrices=False)
        root = (S[:4] / 2.0).sqrt()
        B, A = U[:, :4] * root, root[:, None] * Vh[:4]
    factors = LoftQ(iterations=3)(LayerStatistics("x", W), 4, generator=torch.Generator(), scale=2.0)
    assert (factors.dense() - B @ A).norm() < 1e-4 * factors.dense().norm()


@pytest.mark.parametrize("arguments", ["", ", iterations=1", ", bits=2, block=16", ", quantizer='uniform', bits=3"])
def test_the_weight_becomes_the_quantized_one_and_comes_back(arguments: str, tmp_path: Path) -> None:
    net, x = mlp(), inputs()
    before = copy.deepcopy(net.state_dict())
    recipe = rankwise.compose(f"loftq(rank=2{arguments}) + lora(rank=2, alpha=6)")
    handle = rankwise.adapt_(net, recipe)
    quantizer = recipe.start.build().quantizer
    for site in handle.targets:
        weight = net.get_submodule(site).weight
        torch.testing.assert_close(quantizer.quantize(weight).dequantize(), weight, rtol=0, atol=1e-12)
        original = before[f"{site}.weight"]
        left = original - weight - 3.0 * handle.parameterization(site).B @ handle.parameterization(site).A
        U, S, Vh = torch.linalg.svd(original - weight, full_matrices=False)
        torch.testing.assert_close(left.detach(), U[:, 2:] * S[2:] @ Vh[2:])
        torch.testing.assert_close(handle.update_of(site).dense(), -left)
    with torch.no_grad():
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.add_(0.05)
    expected = net(x)
    handle.merge_()
    torch.testing.assert_close(net(x), expected)
    handle.unmerge_()
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
    handle.save(tmp_path)
    fresh = mlp()
    loaded = rankwise.load_(fresh, tmp_path)
    assert torch.equal(fresh(x), expected)
    for one in (handle, loaded):
        one.detach_()
    for model in (net, fresh):
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_file_holds_factors_and_no_weights(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(128, 128))
    sizes = {}
    for turns in (1, 5):
        handle = rankwise.adapt_(net, rankwise.catalog.loftq(rank=4, iterations=turns))
        sizes[turns] = next(handle.save(tmp_path / str(turns)).glob("*.safetensors")).stat().st_size
        handle.detach_()
    assert sizes[1] < 4 * 4 * 256 + 1000
    assert sizes[5] < 2 * 4 * 4 * 256 + 1000


def test_beside_another_adapter_each_has_its_own_base() -> None:
    net, x = mlp(), inputs()
    base = net(x)
    rankwise.adapt_(net, rankwise.catalog.loftq(rank=2, bits=2), name="coded")
    coded = net(x)
    other = rankwise.adapt_(net, rankwise.catalog.milora(rank=2), name="other")
    torch.testing.assert_close(net(x), base)
    rankwise.activate_(net, "coded")
    torch.testing.assert_close(net(x), coded)
    rankwise.activate_(net, None)
    torch.testing.assert_close(net(x), base)
    other.detach_()
    torch.testing.assert_close(net[0].weight, NormalFloat(2, 64).quantize(net[0].weight).dequantize())


def test_dora_and_restarts_go_on_from_the_quantized_base() -> None:
    net, x = mlp(), inputs()
    handle = rankwise.adapt_(net, rankwise.compose("dora(rank=2) + loftq(rank=2, bits=2)"))
    entry = handle.parameterization("0")
    direction = net[0].weight + entry.scale * entry.inner.B @ entry.inner.A
    torch.testing.assert_close(entry.magnitude, direction.norm(dim=1))
    handle.detach_()
    handle = rankwise.adapt_(net, rankwise.compose("loftq(rank=2, bits=2) + relora(interval=1, rank=2)"))
    optimizer = handle.optimizer(lr=1e-2)
    net(x).square().mean().backward()
    handle.after_backward()
    optimizer.step()
    expected = net.eval()(x)
    handle.after_step()
    torch.testing.assert_close(net(x), expected)


def test_an_update_of_full_rank_is_not_written_as_lora(tmp_path: Path) -> None:
    net = mlp()
    handle = rankwise.adapt_(net, rankwise.catalog.loftq(rank=2, bits=2))
    with pytest.raises(ExportError, match="numerical rank 6"):
        rankwise.interop.to_peft(handle, tmp_path / "peft")
    with pytest.raises(ExportError, match="moved the base at 2 layers"):
        rankwise.interop.to_peft(handle, tmp_path / "peft", native=True)
    handle.save(tmp_path / "own")
    from rankwise.serving.folders import read_adapter

    with pytest.raises(CheckpointError, match="replaces its base"):
        read_adapter(tmp_path / "own")


def test_exact_codes_start_as_plain_lora_and_say_so() -> None:
    W = Uniform(4, 8).quantize(matrix(8, 8)).dequantize()
    start = LoftQ(quantizer="uniform", block=8)
    with pytest.warns(UserWarning, match="x: quantizing loses nothing here"):
        factors = start(LayerStatistics("x", W), 2, generator=torch.Generator())
    assert not factors.B.any() and factors.A.any()


@pytest.mark.parametrize("backend", ["bitsandbytes nf4", "torchao int4"])
def test_a_really_quantized_layer_is_corrected_by_the_weight_from_before(backend: str) -> None:
    before, model = plain(), quantize(plain(), backend)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    known = rankwise.collect(before, [], set())
    gap = (model(x) - before(x)).norm()
    recipe = rankwise.compose("loftq(rank=16, mode='quantized') + lora(rank=16, alpha=32)")
    handle = rankwise.adapt_(model, recipe, statistics=known)
    assert (model(x) - before(x)).norm() < 0.75 * gap
    for site in handle.targets:
        error = known[site].weight - handle.adapters(site).base(model.get_submodule(site)).dense()
        U, S, Vh = torch.linalg.svd(error, full_matrices=False)
        torch.testing.assert_close(handle.update_of(site).dense(), U[:, :16] * S[:16] @ Vh[:16], rtol=1e-4, atol=1e-5)


def test_methods_that_hold_no_product_refuse_it() -> None:
    with warnings.catch_warnings(), pytest.raises(RecipeError, match="can hold a product B A"):
        rankwise.adapt_(mlp(), rankwise.compose("vera(rank=2) + loftq(rank=2)"))
