"""Fira against its spec (arXiv:2410.01623): GaLore plus the rest of the gradient, scaled column by column.

The part outside the subspace, S, is what a direction has beside scale · P N, where N is Adam's direction computed here.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rankwise as rw
from tests.oracles.tools_projection import Run, adam, stream
from tests.oracles.tools_training import normal, orthonormal, relative

SHAPES = [(6, 9), (9, 6)]
EXACT = {"inner": rw.catalog.adamw(eps=0.0), "limit": None, "refresh": 1000}


def oriented(run: Run, tensor: Tensor) -> Tensor:
    """So that the subspace is on the left: (m, n) with m <= n."""
    return tensor if tensor.shape[0] < tensor.shape[1] else tensor.T


def parts(run: Run, step: int, scale: float, eps: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, R, N and S of a step, all with the subspace on the left; only for runs in one window, with Adam inside."""
    P = run.basis(step)
    projected = [P.T @ oriented(run, G) for G in run.gradients[: step + 1]]
    N = adam(projected, eps)
    return P, projected[-1], N, oriented(run, run.directions[step]) - scale * P @ N


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("mode", ["code", "clean"])
def test_1_residual_is_orthogonal_to_the_subspace(m: int, n: int, mode: str) -> None:
    run = Run(rw.catalog.fira(rank=2, scale=1.0, alpha_mode=mode, **EXACT), stream(0, m, n), 6, weight=normal(1, m, n), lr=0.1)
    for step in range(6):
        P, _, _, S = parts(run, step, 1.0)
        assert float((P.T @ S).norm()) < 1e-12 * float(S.norm())
        assert float(S.norm()) > 0.1


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("mode", ["code", "clean"])
@pytest.mark.parametrize("scaling", ["column", "matrix"])
def test_1_definition(m: int, n: int, mode: str, scaling: str) -> None:
    """E = G - α P R in the released code, G - P R in the paper; S = E diag(φ) with φ = ‖N_j‖ / ‖R_j‖."""
    recipe = rw.catalog.fira(rank=2, scale=0.25, alpha_mode=mode, scaling=scaling, **EXACT)
    run = Run(recipe, stream(2, m, n), 6, weight=normal(3, m, n), lr=0.1)
    for step in range(6):
        P, R, N, S = parts(run, step, 0.25)
        E = oriented(run, run.gradients[step]) - (0.25 if mode == "code" else 1.0) * P @ R
        phi = N.norm(dim=0) / R.norm(dim=0) if scaling == "column" else N.norm() / R.norm()
        assert relative(S, E * phi) < 1e-6


@pytest.mark.parametrize(("m", "n"), [*SHAPES, (6, 6)])
@pytest.mark.parametrize("mode", ["code", "clean"])
def test_2_at_full_rank_it_is_galore(m: int, n: int, mode: str) -> None:
    start = normal(4, m, n)
    there = Run(
        rw.catalog.fira(rank=6, scale=1.0, refresh=3, alpha_mode=mode),
        lambda t, W: W - stream(5, m, n)(t, W),
        8,
        weight=start,
        lr=0.1,
    )
    here = Run(rw.catalog.galore(rank=6, scale=1.0, refresh=3), lambda t, W: W - stream(5, m, n)(t, W), 8, weight=start, lr=0.1)
    for one, other in zip(there.path, here.path, strict=True):
        assert relative(one, other) < 1e-10


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("scaling", ["column", "matrix"])
def test_3_on_sgd_it_is_full_sgd(m: int, n: int, scaling: str) -> None:
    recipe = rw.catalog.fira(rank=2, scale=1.0, refresh=2, limit=None, scaling=scaling, inner=rw.catalog.sgd())
    run = Run(recipe, stream(6, m, n), 7, weight=normal(7, m, n))
    for direction, G in zip(run.directions, run.gradients, strict=True):
        assert relative(direction, G) < 1e-6


def residuals(limit: float | None, sizes: list[float], m: int = 6, n: int = 9) -> tuple[list[float], list[float], Run]:
    """Norms of S under SGD, limited and as they would be (then S = E), and the run; gradients of these sizes."""
    gradient = stream(8, m, n)
    recipe = rw.catalog.fira(rank=2, scale=1.0, refresh=3, limit=limit, inner=rw.catalog.sgd())
    run = Run(recipe, lambda t, W: sizes[t] * gradient(0, W), len(sizes), weight=torch.zeros(m, n, dtype=torch.float64))
    limited, free = [], []
    for t, direction in enumerate(run.directions):
        P = run.basis(t)
        for kept, matrix in ((limited, oriented(run, direction)), (free, oriented(run, run.gradients[t]))):
            kept.append(float((matrix - P @ (P.T @ matrix)).norm()))
        assert relative(P.T @ oriented(run, direction), P.T @ oriented(run, run.gradients[t])) < 1e-6  # only S is limited
    return limited, free, run


@pytest.mark.parametrize("gamma", [1.01, 1.5])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_4_growth_is_limited_by_the_limited_norm_before(gamma: float, m: int, n: int) -> None:
    sizes = [1.0, 1.015, 2.0, 9.0, 9.0, 0.1, 0.1, 5.0, 5.0]
    limited, free, run = residuals(gamma, sizes, m, n)
    expected = free[:1]
    for size in free[1:]:
        expected.append(min(size, gamma * expected[-1]))
    assert limited == pytest.approx(expected, rel=1e-6)
    assert max(free[t] / limited[t] for t in range(len(sizes))) > 2.0
    assert [float(kept["residual_norm"]) for kept in run.kept] == pytest.approx(expected, rel=1e-6)


def test_4_a_decreasing_sequence_is_never_changed() -> None:
    limited, free, _ = residuals(1.01, [4.0, 3.9, 2.0, 1.0, 1.0, 0.5])
    assert limited == pytest.approx(free, rel=1e-6)


@pytest.mark.parametrize("limit", [None, float("inf")])
def test_4_an_infinite_limit_is_none(limit: float | None) -> None:
    limited, free, _ = residuals(limit, [1.0, 100.0, 0.5, 1e5])
    assert limited == pytest.approx(free, rel=1e-6)


def test_4_adams_residual_grows_no_faster() -> None:
    gradient = stream(9, 6, 9)
    run = Run(rw.catalog.fira(rank=2), lambda t, W: 2.0 ** (t % 5) * gradient(t, W), 30, weight=normal(10, 6, 9), lr=0.01)
    norms = [float(kept["residual_norm"]) for kept in run.kept]
    assert all(norms[t] <= 1.01 * norms[t - 1] * (1 + 1e-6) for t in range(1, 30))
    assert max(norms[t] / norms[t - 1] for t in range(1, 30)) > 1.0099


@pytest.mark.parametrize("c", [1.0, 1e-3, 40.0])
def test_5_size_of_a_column_drops_out_at_the_first_step(c: float) -> None:
    """N = sign(R), so ‖S_j‖ = √r ‖E_j‖ / ‖R_j‖. Two columns are scaled together, which leaves the subspace where it is."""
    a, b = normal(11, 8), 0.3 * normal(12, 8)
    b[0::2], b[1::2] = 0.3 * b[1::2].abs() * a[1::2], -0.3 * b[1::2].abs() * a[0::2]  # every pair of columns orthogonal
    G = orthonormal(13, 2, 2) @ torch.stack([10 * a, b])
    scaled = G.clone()
    scaled[:, 2:4] *= c
    norms = []
    for matrix in (G, scaled):
        recipe = rw.catalog.fira(rank=1, scale=1.0, **EXACT)
        run = Run(recipe, lambda t, W, matrix=matrix: matrix, 1, weight=torch.zeros(2, 8, dtype=torch.float64))
        P, R, N, S = parts(run, 0, 1.0)
        E = matrix - P @ R
        assert torch.allclose(N, R.sign(), rtol=1e-12)
        assert torch.allclose(S.norm(dim=0), E.norm(dim=0) / R.norm(dim=0), rtol=1e-6)
        norms.append(S.norm(dim=0))
    assert torch.allclose(norms[0], norms[1], rtol=1e-6)


@pytest.mark.parametrize("rank", [2, 3])
def test_5_formula_of_the_first_step_at_any_rank(rank: int) -> None:
    run = Run(rw.catalog.fira(rank=rank, scale=1.0, **EXACT), stream(14, 6, 9), 1, weight=normal(15, 6, 9))
    P, R, _, S = parts(run, 0, 1.0)
    E = run.gradients[0] - P @ R
    assert torch.allclose(S.norm(dim=0), rank**0.5 * E.norm(dim=0) / R.norm(dim=0), rtol=1e-6)


def test_6_matrix_and_columns_agree_where_all_columns_are_alike() -> None:
    p, signs = orthonormal(16, 5, 1), torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0]).double()
    E = normal(17, 5, 7)
    E = E - p @ (p.T @ E)
    E = E - torch.outer(E @ signs, signs) / 7  # rows orthogonal to the signs: p stays the leading singular vector
    found = {}
    for name, G in (("alike", 20 * p * signs + E), ("generic", normal(18, 5, 7))):
        for scaling in ("column", "matrix"):
            recipe = rw.catalog.fira(rank=1, scaling=scaling, **EXACT)
            run = Run(recipe, lambda t, W, G=G: G, 1, weight=torch.zeros(5, 7, dtype=torch.float64))
            found[name, scaling] = run.directions[0]
    assert relative(found["alike", "column"], found["alike", "matrix"]) < 1e-6
    assert relative(found["generic", "column"], found["generic", "matrix"]) > 0.01


@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6), (16, 4)])
def test_7_state_is_galores_and_one_number(m: int, n: int) -> None:
    run = Run(rw.catalog.fira(rank=2), stream(19, m, n), 2, weight=normal(20, m, n))
    small, large = min(m, n), max(m, n)
    assert run.numbers == small * 2 + 2 * large * 2
    assert run.kept[-1]["residual_norm"].dim() == 0
    galore = Run(rw.catalog.galore(rank=2), stream(19, m, n), 2, weight=normal(20, m, n))
    assert set(run.kept[-1]) - set(galore.kept[-1]) == {"residual_norm"}
