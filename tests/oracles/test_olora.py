"""OLoRA against its spec (arXiv:2406.01775): B = leading columns of Q, A = leading rows of R, W = Q R unpivoted.

Signs differ between QR libraries, so only products, Gram matrices and zeros are compared.
"""

from __future__ import annotations

import pytest
import torch

import rankwise
from rankwise.core.operators import LowRank
from tests.oracles.tools_training import (
    SITE,
    adapted,
    normal,
    put,
    relative,
    roles_of,
    sine_of_angle,
    started,
    statistics_of,
    truncated,
)

SHAPES = [(30, 20), (11, 17), (9, 9)]
RANK = 3


def recipe(mode: str = "offset", *, scale: float = 1.0, rank: int = RANK) -> rankwise.Recipe:
    return rankwise.compose(f"lora(rank={rank}, alpha={scale * rank}) + olora(rank={rank}, mode='{mode}')")


def start_of(weight: torch.Tensor, rank: int = RANK, *, scale: float = 1.0) -> LowRank:
    return started(rankwise.catalog.olora(rank=rank), statistics_of(weight), rank, scale=scale)


@pytest.mark.parametrize("scale", [1.0, 0.4, 2.0])
@pytest.mark.parametrize("mode", ["offset", "absorb"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_1_first_output_is_the_base(mode: str, scale: float, dtype: torch.dtype, tolerance: float) -> None:
    weight, x = normal(0, 30, 20).to(dtype), normal(1, 11, 20).to(dtype)
    model, handle = adapted(weight, recipe(mode, scale=scale))
    assert relative(model(x), x @ weight.T) < tolerance
    assert float(roles_of(handle)["B"].norm()) > 1  # and not because nothing was put in


def test_1_the_shelf_entry_stands_alone_with_scale_one() -> None:
    weight, x = normal(0, 30, 20), normal(1, 11, 20)
    model, handle = adapted(weight, rankwise.catalog.olora(rank=RANK))
    assert handle.parameterization(SITE).scale == 1.0
    assert relative(model(x), x @ weight.T) < 1e-13


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_2_the_output_factor_is_orthonormal(m: int, n: int, scale: float) -> None:
    B = start_of(normal(2, m, n), scale=scale).B
    assert B.shape == (m, RANK)
    assert float((B.T @ B - torch.eye(RANK, dtype=torch.float64)).abs().max()) < 1e-12


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_2_it_spans_the_leading_columns(m: int, n: int) -> None:
    """The definition: unpivoted QR is Gram-Schmidt on the columns in their order."""
    weight = normal(3, m, n)
    factors = start_of(weight)
    projected = torch.linalg.lstsq(weight[:, :RANK], weight).solution  # of all columns on the first r
    assert sine_of_angle(factors.B, weight[:, :RANK]) < 1e-12
    assert relative(factors.B @ factors.A, weight[:, :RANK] @ projected) < 1e-12


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, 0.4, 2.0])
def test_3_leading_columns_of_the_residual(m: int, n: int, scale: float) -> None:
    weight = normal(4, m, n)
    model, handle = adapted(weight, recipe("absorb", scale=scale))
    rest = model.get_submodule(SITE).weight.detach()
    leading = weight[:, :RANK]
    assert float((rest[:, :RANK] - (1 - scale) * leading).norm() / leading.norm()) < 1e-13
    assert float(rest[:, RANK:].norm()) > 1  # the rest is not zero
    trained = roles_of(handle)
    assert relative(rest, weight - scale * trained["B"] @ trained["A"]) < 1e-13


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_4_the_input_factor_is_upper_trapezoidal(m: int, n: int, rank: int) -> None:
    A = start_of(normal(5, m, n), rank).A
    assert A.shape == (rank, n)
    assert torch.equal(A, A.triu())
    assert float(A.diagonal().abs().min()) > 1e-3


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_5_energy_of_the_residual(m: int, n: int, rank: int) -> None:
    weight = normal(6, m, n)
    factors = start_of(weight, rank)
    left = float((weight - factors.B @ factors.A).square().sum())
    assert left == pytest.approx(float(weight.square().sum() - factors.A.square().sum()), rel=1e-12)
    assert left > float((weight - truncated(weight, rank)).square().sum())  # Eckart-Young; generic weights are no accident


def test_6_the_order_of_the_inputs_matters() -> None:
    weight = normal(7, 30, 20)
    order = list(range(20))
    order[0], order[-1] = order[-1], order[0]
    assert sine_of_angle(start_of(weight).B, start_of(weight[:, order]).B) > 0.1
    pissa = rankwise.catalog.pissa(rank=RANK)
    one, other = (started(pissa, statistics_of(w), RANK).B for w in (weight, weight[:, order]))
    assert sine_of_angle(one, other) < 1e-10


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("mode", ["offset", "absorb"])
def test_7_conversion_to_rank_2r_on_the_untouched_weight(mode: str, scale: float) -> None:
    weight, x = normal(8, 12, 10), normal(9, 5, 10)
    model, handle = adapted(weight, recipe(mode, scale=scale))
    start = roles_of(handle)
    moved = {"B": start["B"] + normal(10, 12, RANK), "A": start["A"] + normal(11, RANK, 10)}
    put(handle, moved)
    converted = weight + scale * torch.cat([moved["B"], -start["B"]], 1) @ torch.cat([moved["A"], start["A"]], 0)
    pair = handle.low_rank_of(SITE)
    assert pair is not None
    assert pair.rank == 2 * RANK
    assert relative(weight + pair.dense(), converted) < 1e-12
    assert relative(model(x), x @ converted.T) < 1e-12
