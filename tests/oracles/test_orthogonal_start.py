"""Oracles of the orthogonal start of LoRA: both factors are non-zero, in complementary halves of the rank space, and B A = 0.

The one published run (GSM8K, one seed) is not tested.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.operators import LowRank
from tests.oracles.tools_training import SITE, adapted, normal, orthonormal, put, relative, roles_of, started, statistics_of

M, N, RANK, ALPHA = 9, 7, 4, 6.0
WEIGHT = normal(0, M, N)


def start_of(
    m: int = M, n: int = N, rank: int = RANK, *, seed: int = 0, dtype: torch.dtype = torch.float64, **options
) -> LowRank:
    recipe = rankwise.catalog.orthogonal_start(rank=rank, **options)
    return started(recipe, statistics_of(normal(1, m, n).to(dtype)), rank, seed=seed)


def rank_of(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-4))


@pytest.mark.parametrize("rank", [2, 4, 6, 3, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_1_the_product_is_zero(rank: int, dtype: torch.dtype, tolerance: float) -> None:
    factors = start_of(40, 30, rank, dtype=dtype)
    assert float((factors.B @ factors.A).norm() / (factors.B.norm() * factors.A.norm())) < tolerance
    assert float(factors.B.norm()) > 0.1
    assert float(factors.A.norm()) > 0.1


@pytest.mark.parametrize("rank", [2, 4, 6])
def test_2_each_factor_has_half_the_rank(rank: int) -> None:
    factors = start_of(40, 30, rank)
    assert (rank_of(factors.A), rank_of(factors.B)) == (rank // 2, rank // 2)


@pytest.mark.parametrize("rank", [3, 5, 7])
def test_2_an_odd_rank_is_split_too(rank: int) -> None:
    factors = start_of(40, 30, rank)
    assert sorted([rank_of(factors.A), rank_of(factors.B)]) == [(rank - 1) // 2, (rank + 1) // 2]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_3_base_output_and_gradients_of_both_factors(dtype: torch.dtype, tolerance: float) -> None:
    weight, x, cotangent = WEIGHT.to(dtype), normal(2, 8, N).to(dtype), normal(3, 8, M).to(dtype)
    model, handle = adapted(weight, rankwise.catalog.orthogonal_start(rank=RANK, alpha=ALPHA))
    assert relative(model(x), x @ weight.T) < tolerance
    assert torch.equal(model.get_submodule(SITE).weight, weight)
    (model(x) * cotangent).sum().backward()
    block, s, G = handle.blocks()[SITE], ALPHA / RANK, cotangent.T @ x
    assert block["A"].grad is not None
    assert block["B"].grad is not None
    assert relative(block["A"].grad, s * block["B"].T @ G) < 1e-5
    assert relative(block["B"].grad, s * G @ block["A"].T) < 1e-5
    assert min(float(tensor.grad.norm()) for tensor in block.values()) > 0.1


@pytest.mark.parametrize("lr", [1e-2, 1e-3, 1e-4])
def test_4_the_first_step_has_the_terms_of_both_factors(lr: float) -> None:
    """δ = -η s (g_B A + B g_A) + η² s g_B g_A: the last term is all that is left, so the rest is of second order."""
    x, cotangent, s = normal(2, 8, N), normal(3, 8, M), ALPHA / RANK
    model, handle = adapted(WEIGHT, rankwise.compose(f"orthogonal_start(rank={RANK}, alpha={ALPHA}) + sgd"))
    optimizer, start = handle.optimizer(lr), roles_of(handle)
    (model(x) * cotangent).sum().backward()
    handle.after_backward()
    optimizer.step()
    handle.after_step()
    G = cotangent.T @ x
    g_B, g_A = s * G @ start["A"].T, s * start["B"].T @ G
    first = -lr * s * (g_B @ start["A"] + start["B"] @ g_A)
    found = handle.update_of(SITE).dense().detach()
    assert relative(found - lr**2 * s * g_B @ g_A, first) < 1e-10
    assert float((found - first).norm()) == pytest.approx(lr**2 * s * float((g_B @ g_A).norm()), rel=1e-4)
    assert float((g_B @ start["A"]).norm()) > 0.1  # LoRA's zero start has this one alone
    assert float((start["B"] @ g_A).norm()) > 0.1
    # each factor's first step lies in the half of the rank space that the other one fills
    half_A = start["A"] @ torch.linalg.pinv(start["A"])  # (r, r), projector on the half that A fills
    assert relative(g_B @ half_A, g_B) < 1e-10
    assert float((half_A @ g_A).norm()) < 1e-10 * float(g_A.norm())


@pytest.mark.parametrize("std", [0.1, 0.02])
@pytest.mark.parametrize("rank", [4, 16])
def test_5_size_of_the_entries(std: float, rank: int) -> None:
    factors = start_of(640, 512, rank, std=std)
    for factor in (factors.A, factors.B):  # σ √(h/r) = σ / √2
        assert float(factor.square().mean().sqrt()) == pytest.approx(std * 0.5**0.5, rel=0.05)
        assert abs(float(factor.mean())) < 0.05 * std


def test_5_the_default_deviation() -> None:
    assert float(start_of(640, 512, 16).A.square().mean().sqrt()) == pytest.approx(0.0707, rel=0.05)


def test_6_rotating_the_rank_space_changes_nothing() -> None:
    model, handle = adapted(WEIGHT, rankwise.catalog.orthogonal_start(rank=RANK, alpha=ALPHA))
    x, T, trained = normal(4, 5, N), orthonormal(5, RANK, RANK), roles_of(handle)
    moved = {"B": trained["B"] + normal(6, M, RANK), "A": trained["A"] + normal(7, RANK, N)}
    put(handle, moved)
    before = model(x).detach()
    assert relative(before, x @ (WEIGHT + ALPHA / RANK * moved["B"] @ moved["A"]).T) < 1e-12
    put(handle, {"B": moved["B"] @ T.T, "A": T @ moved["A"]})
    assert relative(model(x), before) < 1e-12
    put(handle, {"B": trained["B"] @ T.T, "A": T @ trained["A"]})  # the start itself stays a start
    assert float((model(x) - x @ WEIGHT.T).norm()) < 1e-13


def test_7_a_half_precision_base_does_not_round_the_factors() -> None:
    torch_linear = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    weight = normal(8, 256, 256).to(torch.bfloat16)
    model = nn.Sequential()
    model.add_module(SITE, torch_linear)
    with torch.no_grad():
        torch_linear.weight.copy_(weight)
    handle = rankwise.adapt_(model, rankwise.catalog.orthogonal_start(rank=16, alpha=32.0))
    trained = roles_of(handle)
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    product = 2.0 * trained["B"] @ trained["A"]
    # The library's Q is made of blocks [1 1; 1 -1]/√2, under which rounding keeps the zero. A random Q, the spec's, loses it:
    T = orthonormal(10, 16, 16).float()
    rounded = 2.0 * (trained["B"] @ T.T).bfloat16().float() @ (T @ trained["A"]).bfloat16().float()
    assert float(rounded.norm()) > 1e-3
    assert float((2.0 * trained["B"].bfloat16().float() @ trained["A"].bfloat16().float()).norm()) < 1e-6
    x = normal(9, 12, 256).float()
    base = x @ weight.float().T
    assert float((x @ product.T).norm() / base.norm()) <= 1e-6
    update = handle.update_of(SITE).dense().float()
    assert float((x @ update.T).norm() / base.norm()) <= 1e-6


def test_the_seed_decides() -> None:
    one, again, other = start_of(seed=1), start_of(seed=1), start_of(seed=2)
    assert torch.equal(one.A, again.A)
    assert torch.equal(one.B, again.B)
    assert not torch.equal(one.A, other.A)
