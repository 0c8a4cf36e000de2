"""CorDA against its spec (arXiv:2406.05223): the start is a slice of the decomposition of W C, with C the input covariance.

C is the mean of x xᵀ plus `damping` times its mean diagonal; select="largest" learns a task, "smallest" preserves knowledge.
"""

from __future__ import annotations

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
    put,
    relative,
    roles_of,
    started,
    statistics_of,
    truncated,
)

M, N, RANK, SCALE = 12, 8, 3, 2.0  # alpha = 6 on rank 3
WEIGHT = normal(0, M, N)
MODES = ["largest", "smallest"]


def rows_of(seed: int, count: int, n: int, decay: float = 0.7) -> Tensor:
    """Inputs whose covariance has axes of its own and a falling spectrum."""
    sizes = torch.arange(1, n + 1, dtype=torch.float64) ** -decay
    return (normal(seed, count, n) * sizes) @ orthonormal(seed + 1, n, n).T


X = rows_of(1, 200, N)


def covariance(rows: Tensor, damping: float = 0.01) -> Tensor:
    C = rows.T @ rows / len(rows)
    return C + damping * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)


def pick(count: int, rank: int, select: str) -> slice:
    return slice(0, rank) if select == "largest" else slice(count - rank, count)


def selected(weight: Tensor, C: Tensor, rank: int, select: str) -> tuple[Tensor, Tensor, Tensor]:
    """U_sel, S_sel and rows of Vᵀ C⁻¹, with W C = U S Vᵀ."""
    U, S, Vh = torch.linalg.svd(weight @ C, full_matrices=False)
    kept = pick(len(S), rank, select)
    return U[:, kept], S[kept], Vh[kept] @ torch.linalg.inv(C)


def start_of(weight: Tensor = WEIGHT, rows: Tensor | None = X, rank: int = RANK, *, scale: float = 1.0, **options) -> LowRank:
    recipe = rankwise.catalog.corda(rank=rank, **options)
    batches = None if rows is None else [rows]
    return started(recipe, statistics_of(weight, inputs=batches), rank, scale=scale)


@pytest.mark.parametrize("mode", ["offset", "absorb"])
@pytest.mark.parametrize("select", MODES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_1_the_start_is_the_slice_and_leaves_the_output(mode: str, select: str, dtype: torch.dtype, tolerance: float) -> None:
    weight, x = WEIGHT.to(dtype), normal(2, 9, N).to(dtype)
    batches = [(X.to(dtype), torch.zeros(len(X), dtype=torch.long))]
    statistics = rankwise.collect(layer_model(weight), batches, {Statistic.INPUT_GRAM})
    recipe = rankwise.catalog.corda(rank=RANK, alpha=SCALE * RANK, select=select, mode=mode)
    model, handle = adapted(weight, recipe, statistics=statistics)
    assert relative(model(x), x @ weight.T) < tolerance
    trained = roles_of(handle)
    assert handle.parameterization(SITE).scale == SCALE
    U, S, V = selected(weight.double(), covariance(X.to(dtype).double()), RANK, select)
    expected = ((U * S) @ V).to(dtype)
    assert relative(SCALE * trained["B"] @ trained["A"], expected) < max(tolerance, 1e-10)
    if mode == "absorb":
        assert relative(model.get_submodule(SITE).weight, weight - expected) < max(tolerance, 1e-10)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)])
@pytest.mark.parametrize("select", MODES)
def test_1_every_shape_of_weight(shape: tuple[int, int], select: str) -> None:
    weight, rows = normal(3, *shape), rows_of(4, 150, shape[1])
    factors = start_of(weight, rows, scale=SCALE, select=select)
    U, S, V = selected(weight, covariance(rows), RANK, select)
    assert relative(SCALE * factors.B @ factors.A, (U * S) @ V) < 1e-9
    every_U, every_S, every_V = selected(weight, covariance(rows), min(shape), select)
    assert relative((every_U * every_S) @ every_V, weight) < 1e-10  # the whole of it is W, whatever C is


@pytest.mark.parametrize(("select", "like"), [("largest", "pissa"), ("smallest", "milora")])
def test_2_white_inputs_give_pissa_and_milora(select: str, like: str) -> None:
    white = orthonormal(5, 200, N) * 200**0.5
    ours = start_of(rows=white, scale=SCALE, select=select)
    other = started(rankwise.compose(f"lora(rank={RANK}) + {like}(rank={RANK})"), statistics_of(WEIGHT), RANK, scale=SCALE)
    assert relative(ours.B @ ours.A, other.B @ other.A) < 1e-6
    colored = start_of(scale=SCALE, select=select)
    assert relative(colored.B @ colored.A, other.B @ other.A) > 0.01  # and the inputs are not ignored


@pytest.mark.parametrize("select", MODES)
def test_2_full_rank_leaves_nothing_frozen(select: str) -> None:
    factors = start_of(rank=min(M, N), scale=SCALE, select=select)
    assert relative(SCALE * factors.B @ factors.A, WEIGHT) < 1e-5


def test_3_no_matrix_of_rank_r_is_closer_on_the_data() -> None:
    """In the norm ‖(W - M) C‖_F, with a damping that goes to zero."""
    C = covariance(X, 0.0)
    factors = start_of(damping=1e-10)
    product = factors.B @ factors.A
    found = float(((WEIGHT - product) @ C).norm())
    assert found == pytest.approx(float(torch.linalg.svdvals(WEIGHT @ C)[RANK:].norm()), rel=1e-8)
    assert found < 0.99 * float(((WEIGHT - truncated(WEIGHT, RANK)) @ C).norm())
    for seed in range(100):
        M_near = (factors.B + 0.05 * normal(100 + seed, M, RANK)) @ (factors.A + 0.05 * normal(300 + seed, RANK, N))
        M_far = truncated(normal(500 + seed, M, N), RANK)
        assert found < float(((WEIGHT - M_near) @ C).norm())
        assert found < float(((WEIGHT - M_far) @ C).norm())


@pytest.mark.parametrize("select", MODES)
def test_4_size_of_the_covariance_and_order_of_samples(select: str) -> None:
    factors, shuffled = start_of(select=select), X[torch.randperm(len(X), generator=torch.Generator().manual_seed(0))]
    larger = start_of(rows=7**0.5 * X, select=select)  # C -> 7 C
    reordered = start_of(rows=shuffled, select=select)
    assert relative(larger.B @ larger.A, factors.B @ factors.A) < 1e-9
    assert relative(reordered.B @ reordered.A, factors.B @ factors.A) < 1e-9
    assert relative(larger.B.norm(), 7**0.5 * factors.B.norm()) < 1e-8  # the balance between the factors does move


@pytest.mark.parametrize("select", MODES)
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_5_gram_of_the_output_factor(select: str, scale: float) -> None:
    factors = start_of(select=select, scale=scale)
    _, S, V = selected(WEIGHT, covariance(X), RANK, select)
    assert torch.allclose(factors.B.T @ factors.B, torch.diag(S) / scale, rtol=1e-6, atol=1e-10)
    assert torch.allclose((factors.A @ factors.A.T).diagonal(), S / scale * V.square().sum(1), rtol=1e-6, atol=1e-10)


def test_6_smallest_moves_the_outputs_on_the_data_least() -> None:
    """Against PiSSA, MiLoRA and the largest components, over random square layers with anisotropic inputs."""
    n, wins, means = 12, 0, torch.zeros(4, dtype=torch.float64)
    for seed in range(20):
        weight, rows = normal(1000 + seed, n, n), rows_of(2000 + seed, 400, n)
        others = ["lora(rank=3) + pissa(rank=3)", "lora(rank=3) + milora(rank=3)"]
        starts = [start_of(weight, rows, select="smallest"), start_of(weight, rows, select="largest")]
        starts += [started(rankwise.compose(text), statistics_of(weight), RANK) for text in others]
        moved = torch.stack([(rows @ (factors.B @ factors.A).T).norm() for factors in starts])
        wins += int(moved.argmin() == 0)
        means += moved / moved[0] / 20
    assert wins >= 19
    assert float(means[1:].min()) > 1.1


@pytest.mark.parametrize(("select", "damping"), [("largest", 1e-14), ("largest", 0.01), ("smallest", 0.01)])
def test_fewer_tokens_than_inputs_leave_a_start_that_is_finite_and_exact(select: str, damping: float) -> None:
    recipe = rankwise.catalog.corda(rank=RANK, select=select, damping=damping)
    model, handle = adapted(WEIGHT, recipe, statistics={SITE: statistics_of(WEIGHT, inputs=[X[:4]])})
    x = normal(6, 5, N)
    assert all(torch.isfinite(tensor).all() for tensor in roles_of(handle).values())
    assert relative(model(x), x @ WEIGHT.T) < 1e-9


def test_damping_that_leaves_nothing_of_the_smallest_components_is_refused() -> None:
    """The spec doubles the damping until an inverse exists. The library inverts nothing and keeps what it was given.

    With four tokens and damping 1e-14 the smallest singular values of W C are 6e-15, 5e-15 and 3e-15 beside 4.2, below the
    rounding of the decomposition: their vectors are noise. A doubled damping would be another one than was asked for.
    """
    C = covariance(X[:4], 1e-14)
    S = torch.linalg.svdvals(WEIGHT @ C)
    assert float(S[-RANK:].max()) < torch.finfo(S.dtype).eps * M * float(S[0])
    recipe = rankwise.catalog.corda(rank=RANK, select="smallest", damping=1e-14)
    with pytest.raises(rankwise.RankwiseError, match="never train; raise damping"):
        adapted(WEIGHT, recipe, statistics={SITE: statistics_of(WEIGHT, inputs=[X[:4]])})


def test_conversion_to_rank_2r_on_the_untouched_weight() -> None:
    recipe = rankwise.catalog.corda(rank=RANK, alpha=SCALE * RANK, mode="absorb")
    model, handle = adapted(WEIGHT, recipe, statistics={SITE: statistics_of(WEIGHT, inputs=[X])})
    start, x = roles_of(handle), normal(7, 5, N)
    moved = {"B": start["B"] + normal(8, M, RANK), "A": start["A"] + normal(9, RANK, N)}
    put(handle, moved)
    pair = handle.low_rank_of(SITE)
    assert pair is not None
    assert pair.rank == 2 * RANK
    expected = SCALE * (moved["B"] @ moved["A"] - start["B"] @ start["A"])
    assert relative(pair.dense(), expected) < 1e-10
    assert relative(model(x), x @ (WEIGHT + expected).T) < 1e-10
