"""LoftQ against its spec (arXiv:2310.08659): the weight becomes its quantized form, B A what a low rank can bring back.

Accuracy claims are not tested. Blocks are chosen to divide a row, so that it does not matter how a remainder is cut.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rankwise
from rankwise.approximations.quantizers import NormalFloat, Uniform
from tests.oracles.tools_training import SITE, adapted, normal, put, relative, roles_of, started, statistics_of, truncated

M, N, RANK, BLOCK = 24, 16, 3, 8
WEIGHT = normal(0, M, N)
QUANTIZERS = [("nf4", 4), ("nf2", 2), ("uniform", 2), ("uniform", 4)]
NF4 = [-1, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0]
NF4 += [0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1]
LEVELS = torch.tensor(NF4, dtype=torch.float64)


def nf4(matrix: Tensor, block: int = BLOCK) -> Tensor:
    """Every entry at the nearest level times the largest magnitude of its block."""
    rows = matrix.reshape(-1, block)
    size = rows.abs().amax(1, keepdim=True)
    nearest = (rows / size)[..., None].sub(LEVELS).abs().argmin(-1)
    return (LEVELS[nearest] * size).reshape(matrix.shape)


def recipe(
    quantizer: str = "nf4", bits: int = 4, *, rank: int = RANK, iterations: int = 1, scale: float = 1.0, block: int = BLOCK
):
    options = f"rank={rank}, bits={bits}, iterations={iterations}, block={block}, quantizer='{quantizer}'"
    return rankwise.compose(f"lora(rank={rank}, alpha={scale * rank}) + loftq({options})")


def pieces(weight: Tensor = WEIGHT, quantizer: str = "nf4", bits: int = 4, **options) -> tuple[Tensor, Tensor]:
    """deq(Q) and s·B A of an adapted layer."""
    model, handle = adapted(weight, recipe(quantizer, bits, **options))
    trained, s = roles_of(handle), handle.parameterization(SITE).scale
    return model.get_submodule(SITE).weight.detach().clone(), s * trained["B"] @ trained["A"]


def library_quantizer(quantizer: str, bits: int, block: int = BLOCK) -> NormalFloat | Uniform:
    return Uniform(bits, block) if quantizer == "uniform" else NormalFloat(bits, block)


def test_1_the_first_round_against_a_loop_of_ones_own() -> None:
    quantized, correction = pieces()
    assert relative(quantized, nf4(WEIGHT)) < 1e-5
    assert relative(correction, truncated(WEIGHT - nf4(WEIGHT), RANK)) < 1e-4


@pytest.mark.parametrize(("quantizer", "bits"), QUANTIZERS)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_1_what_one_round_leaves(quantizer: str, bits: int, rank: int) -> None:
    quantized, correction = pieces(quantizer=quantizer, bits=bits, rank=rank)
    assert relative(quantized, library_quantizer(quantizer, bits).quantize(WEIGHT).dequantize()) < 1e-6
    left = float((WEIGHT - quantized - correction).square().sum())
    error = torch.linalg.svdvals(WEIGHT - quantized)
    assert left == pytest.approx(float(error[rank:].square().sum()), rel=1e-5)
    assert left < float(error.square().sum())  # QLoRA's


@pytest.mark.parametrize(("quantizer", "bits"), QUANTIZERS)
@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_2_full_rank_recovers_the_weight(quantizer: str, bits: int, iterations: int, transposed: bool) -> None:
    weight = WEIGHT.T.contiguous() if transposed else WEIGHT
    quantized, correction = pieces(weight, quantizer, bits, rank=min(M, N), iterations=iterations)
    assert relative(quantized + correction, weight) < 1e-5
    assert relative(quantized, weight) > 1e-2


@pytest.mark.parametrize(("quantizer", "bits"), QUANTIZERS)
@pytest.mark.parametrize("iterations", [1, 3])
def test_3_nothing_to_correct(quantizer: str, bits: int, iterations: int) -> None:
    """A weight that the quantizer keeps as it is."""
    weight = library_quantizer(quantizer, bits).quantize(WEIGHT).dequantize()
    # B A = 0 as the spec says; that the layer starts like plain LoRA after all is said, since nobody asks for it on purpose
    with pytest.warns(UserWarning, match="quantizing loses nothing here, so this layer starts as plain LoRA"):
        quantized, correction = pieces(weight, quantizer, bits, iterations=iterations)
    assert relative(quantized, weight) < 1e-6
    assert float(correction.norm()) < 1e-6 * float(weight.norm())


@pytest.mark.parametrize(("quantizer", "bits"), QUANTIZERS)
@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_4_the_correction_never_makes_it_worse(quantizer: str, bits: int, iterations: int) -> None:
    quantized, correction = pieces(quantizer=quantizer, bits=bits, iterations=iterations)
    assert float((WEIGHT - quantized - correction).norm()) < float((WEIGHT - quantized).norm())
    # after the last decomposition the weight is not quantized again: the correction belongs to this very error
    assert relative(correction, truncated(WEIGHT - quantized, RANK)) < 1e-6


@pytest.mark.parametrize("iterations", [2, 4])
@pytest.mark.parametrize(("quantizer", "bits"), QUANTIZERS)
def test_4_each_round_quantizes_what_the_last_correction_left(quantizer: str, bits: int, iterations: int) -> None:
    _, before = pieces(quantizer=quantizer, bits=bits, iterations=iterations - 1)
    quantized, _ = pieces(quantizer=quantizer, bits=bits, iterations=iterations)
    expected = library_quantizer(quantizer, bits).quantize(WEIGHT - before).dequantize()
    assert relative(quantized, expected) < 1e-3  # a number at the edge between two levels may fall on either side
    assert relative(quantized, library_quantizer(quantizer, bits).quantize(WEIGHT).dequantize()) > 1e-2


@pytest.mark.parametrize("quantizer", ["nf2", "uniform"])
@pytest.mark.parametrize("seed", range(5))
def test_4_five_rounds_at_two_bits_beat_qlora(quantizer: str, seed: int) -> None:
    weight = normal(100 + seed, 256, 256)
    quantized, correction = pieces(weight, quantizer, 2, rank=16, iterations=5, block=64)
    plain = library_quantizer(quantizer, 2, 64).quantize(weight).dequantize()
    assert float((weight - quantized - correction).norm()) < 0.95 * float((weight - plain).norm())


@pytest.mark.parametrize("iterations", [1, 3])
def test_5_the_scale_does_not_change_the_product(iterations: int) -> None:
    one, expected = pieces(scale=1.0, iterations=iterations)
    for scale in (0.5, 2.0):
        quantized, correction = pieces(scale=scale, iterations=iterations)
        assert relative(correction, expected) < 1e-6
        assert relative(quantized, one) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_6_normal_float_levels(dtype: torch.dtype) -> None:
    matrix = WEIGHT.clone()
    matrix.view(-1, BLOCK)[3] = 0.0
    matrix = matrix.to(dtype)
    quantized = NormalFloat(4, BLOCK).quantize(matrix)
    found = quantized.dequantize()
    assert found.shape == matrix.shape
    assert torch.isfinite(found).all()
    assert not found.view(-1, BLOCK)[3].any()
    size = matrix.view(-1, BLOCK).abs().amax(1, keepdim=True)
    units = (found.view(-1, BLOCK) / size.clamp_min(1e-30)).double()
    assert float(units[..., None].sub(LEVELS).abs().amin(-1).max()) < 1e-5
    keep = torch.arange(M * N // BLOCK) != 3
    assert relative(found.view(-1, BLOCK)[keep].double(), nf4(matrix.double().view(-1, BLOCK)[keep])) < 1e-5
    assert torch.equal(NormalFloat(4, BLOCK).quantize(found).dequantize(), found)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_6_uniform_levels(bits: int) -> None:
    """2^bits equally spaced numbers from the least to the largest of each block; the ends are kept."""
    found = Uniform(bits, BLOCK).quantize(WEIGHT).dequantize()
    rows, kept = WEIGHT.view(-1, BLOCK), found.view(-1, BLOCK)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    assert float(((kept - rows).abs() / step).max()) < 0.5 + 1e-5
    index = (kept - low) / step
    assert float((index - index.round()).abs().max()) < 1e-4
    assert relative(Uniform(bits, BLOCK).quantize(found).dequantize(), found) < 1e-6
    constant = torch.full((2, BLOCK), 3.0, dtype=torch.float64)
    assert relative(Uniform(bits, BLOCK).quantize(constant).dequantize(), constant) < 1e-6  # a block without a spread


def test_6_two_bits_have_four_levels() -> None:
    units = NormalFloat(2, BLOCK).quantize(WEIGHT).dequantize().view(-1, BLOCK)
    units = units / WEIGHT.view(-1, BLOCK).abs().amax(1, keepdim=True)
    assert len({round(float(value), 5) for value in units.flatten()}) == 4


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("iterations", [1, 3])
def test_7_the_factors_are_balanced(scale: float, iterations: int) -> None:
    start = recipe(iterations=iterations)
    factors = started(start, statistics_of(WEIGHT), RANK, scale=scale)
    assert torch.allclose(factors.B.T @ factors.B, factors.A @ factors.A.T, atol=1e-6)
    quantized, _ = pieces(iterations=iterations)
    S = torch.linalg.svdvals(WEIGHT - quantized)[:RANK]
    assert torch.allclose(factors.B.T @ factors.B, torch.diag(S) / scale, atol=1e-6)


def test_the_layer_computes_with_the_quantized_weight_and_gives_it_back() -> None:
    x = normal(1, 5, N)
    model, handle = adapted(WEIGHT, recipe(scale=2.0))
    layer, trained = model.get_submodule(SITE), roles_of(handle)
    quantized = layer.weight.detach().clone()
    assert relative(model(x), x @ (quantized + 2 * trained["B"] @ trained["A"]).T) < 1e-12
    assert 1e-3 < relative(model(x), x @ WEIGHT.T) < 0.2  # near the base and not at it
    put(handle, {"B": normal(2, M, RANK), "A": normal(3, RANK, N)})
    moved = roles_of(handle)
    whole = quantized + 2 * moved["B"] @ moved["A"]
    assert relative(model(x), x @ whole.T) < 1e-12
    assert relative(handle.update_of(SITE).dense(), whole - WEIGHT) < 1e-6  # deq(Q) - W + s B A, against the untouched weight
    assert torch.equal(layer.weight, quantized)
    handle.detach_()
    assert torch.equal(layer.weight, WEIGHT)
