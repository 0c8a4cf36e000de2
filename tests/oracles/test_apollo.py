"""APOLLO and APOLLO-Mini against their spec (arXiv:2412.05270): the gradient scaled as a small random Adam would scale it.

The update U is what the optimizer moves by; norms of the projected gradient are read off it where Adam's first step is a sign.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rankwise as rw
from tests.oracles.tools_projection import Run, stream
from tests.oracles.tools_training import normal, orthonormal, relative

SHAPES = [(6, 9), (9, 6)]
EXACT = rw.catalog.adamw(eps=0.0)


def channels(matrix: Tensor) -> Tensor:
    """Channels, the long dimension, as columns."""
    return matrix if matrix.shape[0] < matrix.shape[1] else matrix.T


def cosines(U: Tensor, G: Tensor) -> Tensor:
    U, G = channels(U), channels(G)
    return (U * G).sum(dim=0) / (U.norm(dim=0) * G.norm(dim=0))


def zeros(m: int, n: int) -> Tensor:
    return torch.zeros(m, n, dtype=torch.float64)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_1_with_a_whole_orthogonal_basis_every_channel_gets_one_norm(m: int, n: int) -> None:
    recipe = rw.catalog.apollo(rank=6, basis="svd", limit=None, inner=EXACT)
    run = Run(recipe, stream(0, m, n), 1, weight=zeros(m, n))
    norms = channels(run.directions[0]).norm(dim=0)
    assert norms.shape == (9,)
    assert torch.allclose(norms, torch.full_like(norms, 6**0.5), rtol=1e-6)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("basis", ["random", "svd"])
def test_2_every_channel_keeps_its_direction(m: int, n: int, basis: str) -> None:
    run = Run(rw.catalog.apollo(rank=2, basis=basis, refresh=3), stream(1, m, n), 8, weight=zeros(m, n))
    for U, G in zip(run.directions, run.gradients, strict=True):
        assert float(cosines(U, G).min()) > 1 - 1e-6
    factors = channels(run.directions[5]).norm(dim=0) / channels(run.gradients[5]).norm(dim=0)
    assert float(factors.max() / factors.min()) > 1.1


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize(
    "recipe", [rw.catalog.apollo_mini(refresh=3), rw.catalog.apollo(rank=2, granularity="tensor", scale=4.0)]
)
def test_2_with_one_factor_the_whole_tensor_does(m: int, n: int, recipe: rw.Recipe) -> None:
    run = Run(recipe, stream(2, m, n), 8, weight=zeros(m, n))
    for U, G in zip(run.directions, run.gradients, strict=True):
        assert relative(U / U.norm(), G / G.norm()) < 1e-6


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_3_on_sgd_the_factors_are_one(m: int, n: int, granularity: str) -> None:
    recipe = rw.catalog.apollo(rank=2, granularity=granularity, limit=None, inner=rw.catalog.sgd())
    run = Run(recipe, stream(3, m, n), 4, weight=zeros(m, n))
    for U, G in zip(run.directions, run.gradients, strict=True):
        assert relative(U, G) < 1e-6


@pytest.mark.parametrize("rank", [2, 8])
def test_4_norms_in_the_projection_spread_as_johnson_and_lindenstrauss_say(rank: int) -> None:
    """At the first step ‖U_j‖ = √r ‖G_j‖ / ‖R_j‖; orthogonal columns of G give independent ‖R_j‖."""
    m, n, seeds = 16, 17, 250
    G = torch.cat([orthonormal(4, m, m), normal(5, m, 1)], dim=1) * torch.linspace(0.1, 10.0, n).double()
    ratios = []
    for seed in range(seeds):
        run = Run(rw.catalog.apollo(rank=rank, limit=None, inner=EXACT, seed=seed), lambda t, W: G, 1, weight=zeros(m, n))
        ratios.append(rank / run.directions[0][:, :m].norm(dim=0).square())
    ratio = torch.cat(ratios)
    assert float(ratio.std()) == pytest.approx((2 / rank) ** 0.5, rel=0.05)
    assert float(ratio.mean()) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("c", [0.1, 100.0])
@pytest.mark.parametrize("recipe", [rw.catalog.apollo(rank=2, refresh=3, inner=EXACT), rw.catalog.apollo_mini(inner=EXACT)])
def test_5_size_of_the_gradient_drops_out(c: float, recipe: rw.Recipe) -> None:
    gradient = stream(6, 6, 9)
    runs = [Run(recipe, lambda t, W, s=size: s * gradient(t, W), 8, weight=zeros(6, 9)) for size in (1.0, c)]
    for one, other in zip(runs[0].directions, runs[1].directions, strict=True):
        assert relative(other, one) < 1e-5  # 1e-8 is added to every ‖R_j‖


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("scale", [1.0, 16.0])
@pytest.mark.parametrize("gamma", [1.01, 1.5])
def test_6_growth_is_limited_by_the_limited_norm_before(gamma: float, scale: float, front: bool) -> None:
    """Under SGD U = √scale G but for the limiter, which looks at ratios: before or after √scale is the same to it."""
    G, sizes = normal(7, 6, 9), [1.0, 1.015, 2.0, 9.0, 0.1, 0.1, 5.0, 5.0]
    recipe = rw.catalog.apollo(rank=2, scale=scale, limit=gamma, scale_front=front, inner=rw.catalog.sgd())
    run = Run(recipe, lambda t, W: sizes[t] * G, len(sizes), weight=zeros(6, 9))
    expected = [sizes[0]]
    for size in sizes[1:]:
        expected.append(min(size, gamma * expected[-1]))
    for U, size in zip(run.directions, expected, strict=True):
        assert relative(U, scale**0.5 * size * G) < 1e-6


@pytest.mark.parametrize("limit", [None, float("inf")])
def test_6_without_a_limit_growth_is_free(limit: float | None) -> None:
    G, sizes = normal(8, 6, 9), [1.0, 100.0, 0.5, 1e5]
    run = Run(rw.catalog.apollo(rank=2, limit=limit, inner=rw.catalog.sgd()), lambda t, W: sizes[t] * G, 4, weight=zeros(6, 9))
    for U, size in zip(run.directions, sizes, strict=True):
        assert relative(U, size * G) < 1e-6


def test_6_adams_update_grows_no_faster() -> None:
    gradient = stream(9, 6, 9)
    run = Run(rw.catalog.apollo(rank=2, refresh=5), lambda t, W: 3.0 ** (t % 4) * gradient(t, W), 30, weight=zeros(6, 9))
    norms = [float(U.norm()) for U in run.directions]
    growth = [norms[t] / norms[t - 1] for t in range(1, 30)]
    assert max(growth) <= 1.01 * (1 + 1e-6)
    assert max(growth) > 1.0099


@pytest.mark.parametrize(("m", "n"), [*SHAPES, (16, 4)])
def test_7_state_is_two_moments_in_the_projection(m: int, n: int) -> None:
    for recipe, rank in ((rw.catalog.apollo(rank=3), 3), (rw.catalog.apollo_mini(), 1)):
        run = Run(recipe, stream(10, m, n), 3, weight=zeros(m, n))
        assert run.numbers == 2 * rank * max(m, n)


def test_7_projections_are_drawn_anew_at_every_refresh_and_moments_stay() -> None:
    """With one gradient and one projection Adam's factors would repeat themselves to the bit from the first step on."""
    G = normal(11, 6, 9)
    run = Run(rw.catalog.apollo(rank=2, refresh=4, limit=None, inner=EXACT), lambda t, W: G, 12, weight=zeros(6, 9))
    for t in range(1, 12):
        assert (relative(run.directions[t], run.directions[t - 1]) < 1e-9) == (t < 4)
    assert relative(run.directions[4] / run.directions[0], torch.ones(6, 9).double()) > 1e-3


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_8_scale_enters_by_its_root(granularity: str) -> None:
    runs = [
        Run(rw.catalog.apollo(rank=2, scale=scale, granularity=granularity), stream(12, 6, 9), 6, weight=zeros(6, 9))
        for scale in (1.0, 4.0)
    ]
    for one, other in zip(runs[0].directions, runs[1].directions, strict=True):
        assert relative(other, 2 * one) < 1e-10


def test_8_mini_is_rank_one_with_one_factor_and_scale_128() -> None:
    there = Run(rw.catalog.apollo_mini(seed=3), stream(13, 6, 9), 6, weight=zeros(6, 9))
    here = Run(rw.catalog.apollo(rank=1, granularity="tensor", scale=128.0, seed=3), stream(13, 6, 9), 6, weight=zeros(6, 9))
    for one, other in zip(there.directions, here.directions, strict=True):
        assert torch.equal(one, other)
    small = Run(rw.catalog.apollo_mini(scale=1.0, seed=3), stream(13, 6, 9), 1, weight=zeros(6, 9))
    assert relative(there.directions[0], 128**0.5 * small.directions[0]) < 1e-10
