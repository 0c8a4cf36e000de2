"""LoRA-GA against its spec (arXiv:2407.05000): A and B from different singular vectors of a sampled gradient.

The claims about accuracy on GLUE and GSM8K are not tested here.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import rankwise
from rankwise.core.operators import LowRank
from rankwise.core.statistics import Statistic
from tests.oracles.tools_training import (
    SITE,
    adapted,
    layer_model,
    normal,
    orthonormal,
    relative,
    roles_of,
    sine_of_angle,
    started,
    statistics_of,
    truncated,
)

M, N, RANK = 30, 20, 3
DIRECTIONS = ["ArB2r", "A2rBr", "ArBr", "random"]
G = normal(0, M, N)
WEIGHT = normal(1, M, N)


def start_of(rank: int = RANK, *, gradient: Tensor = G, scale: float = 1.0, weight: Tensor | None = None, **options) -> LowRank:
    shown = torch.zeros_like(gradient) + 5.0 if weight is None else weight  # the weight plays no part, but for "weightS"
    recipe = rankwise.catalog.lora_ga(rank=rank, **options)
    return started(recipe, statistics_of(shown, gradient=gradient), rank, scale=scale)


def squared_c(m: int = M, gamma: float = 16.0) -> float:
    """c² = √m / γ."""
    return m**0.5 / gamma


@pytest.mark.parametrize("mode", ["offset", "absorb"])
@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_1_first_output_is_the_base(mode: str, directions: str, dtype: torch.dtype, tolerance: float) -> None:
    weight, x = WEIGHT.to(dtype), normal(2, 7, N).to(dtype)
    statistics = {SITE: statistics_of(weight, gradient=G.to(dtype))}
    recipe = rankwise.catalog.lora_ga(rank=RANK, directions=directions, mode=mode)
    model, handle = adapted(weight, recipe, statistics=statistics)
    assert relative(model(x), x @ weight.T) < tolerance
    trained, s = roles_of(handle), handle.parameterization(SITE).scale
    assert float((trained["B"] @ trained["A"]).norm()) > 0.1
    rest = weight - s * trained["B"] @ trained["A"]
    if mode == "absorb":
        assert relative(model.get_submodule(SITE).weight, rest) < tolerance


def test_1_the_scale_is_that_of_rslora() -> None:
    statistics = {SITE: statistics_of(WEIGHT, gradient=G)}
    _, handle = adapted(WEIGHT, rankwise.catalog.lora_ga(rank=4, alpha=10.0), statistics=statistics)
    assert handle.parameterization(SITE).scale == pytest.approx(10.0 / 2.0)


@pytest.mark.parametrize("gamma", [16.0, 64.0])
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_2_first_step_is_the_best_of_rank_2r(directions: str, gamma: float) -> None:
    factors = start_of(directions=directions, gamma=gamma)
    A, B = factors.A, factors.B
    assert relative(G @ A.T @ A + B @ B.T @ G, squared_c(gamma=gamma) * truncated(G, 2 * RANK)) < 1e-12


@pytest.mark.parametrize("transposed", [False, True])
def test_2_no_other_pair_of_vectors_comes_closer(transposed: bool) -> None:
    """All pairs (i, j) of singular vectors, and many random unit vectors, for r = 1 and m = n = 4."""
    small = normal(3, 4, 4)
    small = small.T.contiguous() if transposed else small
    U, S, Vh = torch.linalg.svd(small)
    c2 = squared_c(4)
    factors = start_of(1, gradient=small)

    def distance(b: Tensor, a: Tensor) -> float:
        """For unit vectors b (m, 1), a (1, n), both scaled by c."""
        return float((c2 * (small - small @ a.T @ a - b @ b.T @ small)).norm())

    found = distance(factors.B / c2**0.5, factors.A / c2**0.5)
    assert found == pytest.approx(c2 * float(S[2:].norm()), rel=1e-12)
    for i, j in itertools.product(range(4), repeat=2):
        other = distance(U[:, [i]], Vh[[j]])
        if {i, j} == {0, 1}:
            assert other == pytest.approx(found, rel=1e-12)
        else:
            assert other > found * (1 + 1e-6)
    for seed in range(300):
        assert distance(orthonormal(100 + seed, 4, 1), orthonormal(5000 + seed, 4, 1).T) > found


@pytest.mark.parametrize("mode", ["offset", "absorb"])
def test_2_first_step_of_gradient_descent_moves_the_weight_along_it(mode: str) -> None:
    """-η s² c² [G]_{2r} to first order; the product of both factor steps adds η² s³ G A₀ᵀ B₀ᵀ G exactly."""
    x, cotangent, lr = normal(4, 40, N), normal(5, 40, M), 1e-4
    gradient = cotangent.T @ x
    recipe = rankwise.compose(f"lora_ga(rank={RANK}, alpha=6.0, mode='{mode}') + sgd")
    model, handle = adapted(WEIGHT, recipe, statistics={SITE: statistics_of(WEIGHT, gradient=gradient)})
    optimizer, start, s = handle.optimizer(lr), roles_of(handle), 6.0 / RANK**0.5
    before = handle.update_of(SITE).dense().detach().clone()
    (model(x) * cotangent).sum().backward()
    handle.after_backward()
    optimizer.step()
    handle.after_step()
    change = handle.update_of(SITE).dense().detach() - before
    second = lr**2 * s**3 * gradient @ start["A"].T @ start["B"].T @ gradient
    assert relative(change - second, -lr * s**2 * squared_c() * truncated(gradient, 2 * RANK)) < 1e-9


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_3_grams_and_the_vectors_left_out(rank: int) -> None:
    factors = start_of(rank)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    expected = squared_c() * torch.eye(rank, dtype=torch.float64)
    assert torch.allclose(factors.A @ factors.A.T, expected, atol=1e-12)
    assert torch.allclose(factors.B.T @ factors.B, expected, atol=1e-12)
    assert float((factors.A @ Vh[rank:].T).abs().max()) < 1e-10
    assert float((factors.B.T @ U[:, :rank]).abs().max()) < 1e-10
    assert float((factors.B.T @ U[:, 2 * rank :]).abs().max()) < 1e-10


def test_3_the_other_halves() -> None:
    factors = start_of(directions="A2rBr")
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    assert sine_of_angle(factors.A.T, Vh[RANK : 2 * RANK].T) < 1e-10
    assert sine_of_angle(factors.B, U[:, :RANK]) < 1e-10
    interleaved = start_of(directions="ArBr")
    used = (interleaved.A @ Vh.T).abs().amax(0) > 1e-8  # which right vectors A has
    assert used.nonzero().flatten().tolist() in ([0, 2, 4], [1, 3, 5])
    rest = (interleaved.B.T @ U).abs().amax(0) > 1e-8
    assert sorted(used.nonzero().flatten().tolist() + rest.nonzero().flatten().tolist()) == list(range(6))


def test_4_every_disjoint_split_gives_the_same_first_step() -> None:
    steps = {}
    for directions in DIRECTIONS:
        factors = start_of(directions=directions)
        steps[directions] = G @ factors.A.T @ factors.A + factors.B @ factors.B.T @ G
    for directions in DIRECTIONS[1:]:
        assert relative(steps[directions], steps["ArB2r"]) < 1e-12
    assert relative(start_of().B, start_of(directions="A2rBr").B) > 0.1  # the factors themselves differ


def test_4_a_random_split_is_disjoint_and_seeded() -> None:
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    seen = set()
    for seed in range(12):
        recipe = rankwise.catalog.lora_ga(rank=RANK, directions="random")
        one, again = (started(recipe, statistics_of(WEIGHT, gradient=G), RANK, seed=seed) for _ in range(2))
        assert torch.equal(one.A, again.A)
        assert torch.equal(one.B, again.B)
        right = tuple(((one.A @ Vh.T).abs().amax(0) > 1e-8).nonzero().flatten().tolist())
        left = tuple(((one.B.T @ U).abs().amax(0) > 1e-8).nonzero().flatten().tolist())
        assert sorted(right + left) == list(range(2 * RANK))
        seen.add(right)
    assert len(seen) > 3


@pytest.mark.parametrize("m", [64, 256])
@pytest.mark.parametrize("rank", [4, 16])
def test_5_the_size_of_the_first_output_does_not_depend_on_the_layer(m: int, rank: int) -> None:
    alpha, gamma, n = 16.0, 8.0, 48
    s = alpha / rank**0.5
    factors = start_of(rank, gradient=normal(6, m, n), alpha=alpha, gamma=gamma, scale=s)
    start = s * factors.B @ factors.A
    expected = alpha**2 / gamma**2
    assert float(start.square().sum()) / m == pytest.approx(expected, rel=1e-10)  # mean over outputs of Σ_j (sBA)_ij²
    x = normal(7, 4000, n)
    assert float((x @ start.T).var(dim=0).mean()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("size", [64.0, 1e-6])
def test_6_the_size_of_the_gradient_does_not_matter(size: float) -> None:
    one, other = start_of(), start_of(gradient=size * G)
    assert relative(other.A.T @ other.A, one.A.T @ one.A) < 1e-10
    assert relative(other.B @ other.B.T, one.B @ one.B.T) < 1e-10
    assert relative(other.B @ other.A, one.B @ one.A) < 1e-10


def test_6_batches_of_a_probe_are_averaged_or_summed_alike() -> None:
    weight = normal(8, 6, 5)
    batches = [(normal(10 + k, 9, 5), torch.arange(9) % 6) for k in range(4)]

    def loss(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    statistics = rankwise.collect(layer_model(weight), batches, {Statistic.GRADIENT}, loss=loss)
    tensor = weight.clone().requires_grad_(True)
    total = sum(torch.nn.functional.cross_entropy(x @ tensor.T, y) for x, y in batches)
    (summed,) = torch.autograd.grad(total, tensor)
    recipe = rankwise.catalog.lora_ga(rank=2)
    found = started(recipe, statistics[SITE], 2)
    expected = started(recipe, statistics_of(weight, gradient=summed), 2)
    assert relative(found.B @ found.A, expected.B @ expected.A) < 1e-6


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_scalings_of_the_definition(s: float) -> None:
    """c = 1 ("unit"), 1/s ("gd"), the mean root of the top singular values of W/s ("weightS"), all with the same directions."""
    stable = start_of(scale=s, weight=WEIGHT)
    roots = (torch.linalg.svdvals(WEIGHT)[:RANK] / s).sqrt().mean()
    for scaling, factor in {"unit": 1.0, "gd": 1 / s, "weightS": float(roots)}.items():
        other = start_of(scaling=scaling, scale=s, weight=WEIGHT)
        assert torch.allclose(other.A @ other.A.T, factor**2 * torch.eye(RANK, dtype=torch.float64), atol=1e-10)
        assert relative(other.A * squared_c() ** 0.5 / factor, stable.A) < 1e-10
        assert relative(other.B * squared_c() ** 0.5 / factor, stable.B) < 1e-10
    gd = start_of(scaling="gd", scale=s)
    first = s**2 * (G @ gd.A.T @ gd.A + gd.B @ gd.B.T @ G)
    assert relative(first, truncated(G, 2 * RANK)) < 1e-12  # "gd": the first step is that of gradient descent at rank 2r
