"""PiSSA against its spec (arXiv:2404.02948): every oracle but the one of the quantized form, which is not built yet."""

from __future__ import annotations

import pytest
import torch

import rankwise
from rankwise.core.parameterization import Additive
from tests.oracles.tools_training import SITE, adapted, layer_model, normal, put, relative, roles_of, started, statistics_of

M, N, RANK, SCALE = 9, 7, 3, 2.0  # alpha = 6 on rank 3


def recipe(mode: str = "offset", rank: int = RANK) -> rankwise.Recipe:
    return rankwise.compose(f"lora(rank={rank}, alpha={SCALE * rank}) + pissa(rank={rank}, mode='{mode}')")


def residual(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W_res, B0, A0 of the start called by itself."""
    factors = started(rankwise.catalog.pissa(rank=rank), statistics_of(weight), rank, scale=scale)
    return weight - scale * factors.B @ factors.A, factors.B, factors.A


@pytest.mark.parametrize("mode", ["offset", "absorb"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_1_first_output_is_the_base(mode: str, dtype: torch.dtype, tolerance: float) -> None:
    weight, x = normal(0, M, N).to(dtype), normal(1, 11, N).to(dtype)
    model, _ = adapted(weight, recipe(mode))
    expected = x @ weight.T
    assert float((model(x).detach() - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.3])
def test_2_grams_are_the_singular_values_and_the_residual_has_the_rest(scale: float) -> None:
    weight = normal(2, M, N)
    S = torch.linalg.svdvals(weight)
    rest, B, A = residual(weight, RANK, scale)
    expected = torch.diag(S[:RANK]) / scale
    assert torch.allclose(B.T @ B, expected, atol=1e-12)
    assert torch.allclose(A @ A.T, expected, atol=1e-12)
    left = torch.linalg.svdvals(rest)
    assert torch.allclose(left[: N - RANK], S[RANK:], rtol=1e-5, atol=0)
    assert float(left[N - RANK :].abs().max()) < 1e-12
    assert abs(float(torch.linalg.matrix_norm(rest, 2) / S[RANK]) - 1) < 1e-5


def test_3_residual_is_orthogonal_to_the_principal_part() -> None:
    weight = normal(3, M, N)
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    rest, _, _ = residual(weight, RANK, SCALE)
    assert float((rest @ Vh[:RANK].T).abs().max()) < 1e-12
    assert float((U[:, :RANK].T @ rest).abs().max()) < 1e-12


@pytest.mark.parametrize("mode", ["offset", "absorb"])
def test_4_full_rank_leaves_nothing_frozen(mode: str) -> None:
    weight = normal(4, M, N)
    rest, _, _ = residual(weight, N, SCALE)
    assert float(torch.linalg.norm(rest) / torch.linalg.norm(weight)) < 1e-5
    model, handle = adapted(weight, recipe(mode, rank=N))
    trained = handle.parameterization(SITE)
    assert isinstance(trained, Additive)
    x = normal(5, 4, N)
    assert relative(x @ trained.update().dense().T, model(x)) < 1e-5  # the whole output comes from what is trained


@pytest.mark.parametrize("mode", ["offset", "absorb"])
def test_5_conversion_to_rank_2r_on_the_untouched_weight(mode: str) -> None:
    weight = normal(6, M, N)
    model, handle = adapted(weight, recipe(mode))
    start = roles_of(handle)
    moved = {"B": start["B"] + normal(7, M, RANK), "A": start["A"] + normal(8, RANK, N)}
    put(handle, moved)
    whole = weight - SCALE * start["B"] @ start["A"] + SCALE * moved["B"] @ moved["A"]  # W_res + s B A
    pair = handle.low_rank_of(SITE)
    assert pair is not None
    assert pair.rank == 2 * RANK
    converted = weight + SCALE * torch.cat([moved["B"], -start["B"]], 1) @ torch.cat([moved["A"], start["A"]], 0)
    x = normal(9, 5, N)
    assert relative(weight + pair.dense(), converted) < 1e-12
    assert relative(converted, whole) < 1e-12
    assert relative(model(x), x @ whole.T) < 1e-12


def test_6_first_gradient_step() -> None:
    """The spec's right side is the first-order part; the product of the two factor steps adds η² s³ G A₀ᵀ B₀ᵀ G exactly."""
    weight, x, cotangent, lr = normal(10, M, N), normal(11, 6, N), normal(12, 6, M), 1e-3
    model = layer_model(weight)
    handle = rankwise.adapt_(model, rankwise.compose(f"lora(rank={RANK}, alpha={SCALE * RANK}) + pissa(rank={RANK}) + sgd"))
    optimizer = handle.optimizer(lr)
    before, start = handle.update_of(SITE).dense().detach().clone(), roles_of(handle)
    (model(x) * cotangent).sum().backward()
    handle.after_backward()
    optimizer.step()
    handle.after_step()
    change = handle.update_of(SITE).dense().detach() - before
    G = cotangent.T @ x
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    U, S, Vh = U[:, :RANK], S[:RANK], Vh[:RANK]
    first = -lr * SCALE * (G @ (Vh.T * S) @ Vh + (U * S) @ U.T @ G)
    by_factors = -lr * SCALE**2 * (G @ start["A"].T @ start["A"] + start["B"] @ start["B"].T @ G)
    second = lr**2 * SCALE**3 * G @ start["A"].T @ start["B"].T @ G
    assert relative(by_factors, first) < 1e-12
    assert relative(change - second, first) < 1e-10
