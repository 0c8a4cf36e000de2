"""GaLore+ against its spec (arXiv:2412.19820): one head's basis for all heads, a randomized basis, a sparse correction.

The positions of the correction are read off where a run differs from the same run with density 0.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rankwise as rw
from rankwise.steps.galore_plus import randomized_basis
from tests.oracles.tools_projection import Run, adam, stream
from tests.oracles.tools_training import SITE, drawn, normal, orthonormal, relative, sine_of_angle, truncated, with_spectrum

SHAPES = [(6, 9), (9, 6)]
MOMENTUM = rw.catalog.sgd(momentum=0.9)


def decaying(m: int, n: int, length: int = 16):
    """Gradients whose spectrum halves from value to value, so that subspaces are well separated."""
    matrices = [with_spectrum(100 + 7 * t, m, n, [0.5**i for i in range(min(m, n))]) for t in range(length)]
    return lambda step, W: matrices[step]


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("inner", ["sgd", "adamw"])
def test_1_without_its_additions_it_is_galore(m: int, n: int, inner: str) -> None:
    """With Adam in one window only: the signs of basis vectors are free, and moments outlive a change of basis."""
    refresh = 3 if inner == "sgd" else 100
    shared = {"rank": 2, "scale": 0.5, "refresh": refresh, "inner": getattr(rw.catalog, inner)()}
    plus = rw.catalog.galore_plus(heads=1, density=0.0, iterations=40, **shared)
    runs = [Run(recipe, decaying(m, n), 8, weight=normal(0, m, n), lr=0.1) for recipe in (plus, rw.catalog.galore(**shared))]
    for step in range(8):
        assert sine_of_angle(runs[0].basis(step), runs[1].basis(step)) < 1e-4
        assert relative(runs[0].directions[step], runs[1].directions[step]) < 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_2_randomized_basis_is_nearly_the_best(side: str) -> None:
    m, n, rank = 100, 80, 8
    for seed in range(10):
        G = with_spectrum(seed, m, n, [0.8**i for i in range(n)])
        found = randomized_basis(G, rank, side, iterations=2, oversampling=8, generator=drawn(seed))
        assert (found.P is None) == (side == "right") and (found.Q is None) == (side == "left")
        basis = found.Q.T if side == "right" else found.P
        assert basis.shape == (n if side == "right" else m, rank)
        assert torch.allclose(basis.T @ basis, torch.eye(rank, dtype=torch.float64), atol=1e-10)
        best = float((G - truncated(G, rank)).norm())
        assert best * (1 - 1e-9) <= float((G - found.up(found.down(G))).norm()) <= 1.001 * best


def test_2_iterations_are_what_makes_it_so() -> None:
    G = with_spectrum(3, 100, 80, [0.8**i for i in range(80)])
    rough = randomized_basis(G, 8, "right", iterations=0, oversampling=0, generator=drawn(3))
    assert float((G - rough.up(rough.down(G))).norm()) > 1.05 * float((G - truncated(G, 8)).norm())


@pytest.mark.parametrize(("m", "n"), [(8, 12), (12, 8)])
def test_3_heads_of_one_row_space_lose_nothing(m: int, n: int) -> None:
    """On the input side whatever the shape: a basis (r, n) is the only one that all heads can share."""
    rows = normal(1, 2, n)
    gradients = [normal(2 + t, m, 2) @ rows for t in range(6)]
    recipe = rw.catalog.galore_plus(
        rank=2, scale=1.0, refresh=2, heads=4, head_layers=(SITE,), density=0.0, inner=rw.catalog.sgd()
    )
    run = Run(recipe, lambda t, W: gradients[t], 6, weight=normal(10, m, n))
    for direction, G, kept in zip(run.directions, gradients, run.kept, strict=True):
        assert relative(direction, G) < 1e-10
        assert kept["Q"].shape == (2, n) and "P" not in kept


def test_3_basis_is_that_of_one_head_drawn_anew_at_every_refresh() -> None:
    m, n, heads, steps = 8, 12, 4, 24
    rows = orthonormal(11, n, 8).T.reshape(heads, 2, n)  # every head its own row space, orthogonal to the others
    gradients = [torch.cat([normal(20 + heads * t + h, 2, 2) @ rows[h] for h in range(heads)]) for t in range(steps)]
    recipe = rw.catalog.galore_plus(
        rank=2, scale=1.0, refresh=1, heads=heads, head_layers=(SITE,), density=0.0, inner=rw.catalog.sgd(), seed=3
    )
    chosen = []
    for _ in range(2):
        run = Run(recipe, lambda t, W: gradients[t], steps, weight=torch.zeros(m, n, dtype=torch.float64))
        picks = []
        for direction, G in zip(run.directions, gradients, strict=True):
            error = (direction - G).reshape(heads, -1).norm(dim=1) / G.reshape(heads, -1).norm(dim=1)
            assert sorted(float(e) > 0.5 for e in error) == [False, True, True, True]
            assert float(error.min()) < 1e-10
            picks.append(int(error.argmin()))
        chosen.append(picks)
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == heads


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_4_with_every_position_kept_momentum_is_whole(m: int, n: int) -> None:
    """The first two gradients lie in the subspace, so that nothing is lost while the positions are chosen."""
    rank = 2
    fixed, rest = normal(30, min(m, n), rank), stream(31, m, n)

    def gradient(t: int, W: Tensor) -> Tensor:
        inside = fixed @ normal(40 + t, rank, max(m, n))
        return (inside if m < n else inside.T) if t < 2 else rest(t, W)

    recipe = rw.catalog.galore_plus(rank=rank, scale=1.0, refresh=1000, density=1.0, warmup=1, inner=MOMENTUM)
    run = Run(recipe, gradient, 10, weight=normal(32, m, n))
    velocity = torch.zeros(m, n, dtype=torch.float64)
    for step in range(10):
        velocity = 0.9 * velocity + run.gradients[step]
        assert relative(run.directions[step], velocity) < 1e-6


def test_5_correction_brings_the_update_nearer_to_full_adam() -> None:
    """With r = 1 and a basis vector whose entries have one size, √m P N is Adam's direction on the projected gradient itself,
    entry by entry: what is left of full Adam's is what the correction is for."""
    m, n, size = 2, 30, 0.05
    p = torch.tensor([[1.0], [1.0]], dtype=torch.float64) / 2**0.5
    q = torch.tensor([[1.0], [-1.0]], dtype=torch.float64) / 2**0.5
    wanted, found = {}, {}
    mean = normal(33, 1, n)
    mean = mean + mean.sign()
    for density in (0.0, 1.0):
        recipe = rw.catalog.galore_plus(rank=1, scale=m**0.5, refresh=1000, density=density, warmup=1)
        run = Run(
            recipe,
            lambda t, W: p @ (mean + 0.3 * normal(50 + t, 1, n)) + (size * q @ normal(90 + t, 1, n) if t > 1 else 0.0),
            12,
            weight=torch.zeros(m, n, dtype=torch.float64),
        )
        found[density], wanted[density] = run.directions, [adam(run.gradients[: t + 1]) for t in range(12)]
    for t in range(4, 12):
        errors = {density: (found[density][t] - wanted[density][t]).abs().median() for density in (0.0, 1.0)}
        assert float(errors[1.0]) < 0.7 * float(errors[0.0])


def off(first: Run, second: Run, step: int) -> set[tuple[int, int]]:
    """Positions at which two directions differ."""
    size = first.directions[step].abs().max()
    differ = (first.directions[step] - second.directions[step]).abs() > 1e-10 * size
    return {tuple(position) for position in differ.nonzero().tolist()}


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("inner", [None, MOMENTUM])
def test_6_elsewhere_the_update_is_galores(m: int, n: int, inner: rw.Recipe | None) -> None:
    density, warmup = 0.15, 3
    shared = {"rank": 2, "refresh": 1000, "warmup": warmup, "inner": inner}
    runs = [
        Run(rw.catalog.galore_plus(density=d, **shared), stream(60, m, n), 10, weight=normal(61, m, n), lr=0.1)
        for d in (density, 0.0)
    ]
    positions = off(*runs, 9)
    assert 0 < len(positions) <= round(density * m * n)
    for step in range(10):
        assert off(*runs, step) <= positions


def test_7_positions_are_the_largest_residuals_of_the_warmup_for_good() -> None:
    m, n, density, warmup = 6, 9, 4 / 54, 3
    spikes = {(2, 1), (3, 7), (5, 0), (4, 4)}
    later = {(1, 1), (2, 2), (3, 3), (5, 5)}
    base = torch.zeros(m, n, dtype=torch.float64)
    base[0] = 10 + normal(70, n).abs()

    def gradient(t: int, W: Tensor) -> Tensor:
        G = base + 1e-4 * normal(71 + t, m, n)
        for i, j in spikes if t < warmup else later:
            G[i, j] += 0.1
        return G

    shared = {"rank": 1, "refresh": 1000, "warmup": warmup, "inner": MOMENTUM}
    runs = [
        Run(rw.catalog.galore_plus(density=d, **shared), gradient, 12, weight=torch.zeros(m, n, dtype=torch.float64))
        for d in (density, 0.0)
    ]
    for step in range(warmup + 1, 12):
        assert off(*runs, step) == spikes
    assert len(spikes) == round(density * m * n)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.31])
def test_7_state_grows_by_two_numbers_and_an_index_per_position(density: float) -> None:
    m, n, warmup = 6, 9, 2
    run = Run(
        rw.catalog.galore_plus(rank=2, refresh=1000, density=density, warmup=warmup),
        stream(72, m, n),
        6,
        weight=normal(73, m, n),
    )
    positions = round(density * m * n)
    whole = sum(value.numel() for value in run.kept[-1].values() if value.dim() and value.is_floating_point())
    indices = sum(value.numel() for value in run.kept[-1].values() if value.dim() and not value.is_floating_point())
    assert whole == m * 2 + 2 * n * 2 + 2 * positions
    assert indices in (positions, 2 * positions)  # flat, or row and column
