"""Low-rank matrix problems with a known answer, and solvers made of the library's own steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from rankwise.core.catalog import Reference, entry
from rankwise.core.errors import ArgumentError, did_you_mean
from rankwise.problems import generators, scaled
from rankwise.problems.problem import Problem

KINDS: dict[str, Callable[..., Problem]] = {
    make.__name__: make
    for make in (
        generators.factorization,
        generators.sensing,
        generators.completion,
        generators.robust,
        generators.lora_linear,
    )
}


@entry(
    "problem",
    title="Low-rank matrix problems",
    formula="min over B A of L(BA), M* = B* A* known",
    reference=Reference(
        "Tong, Ma, Chi",
        "Accelerating Ill-Conditioned Low-Rank Matrix Estimation via Scaled Gradient Descent",
        2020,
        "2005.08898",
    ),
    when="To see what a step or a start does where the answer is known, before spending GPU hours.",
)
def matrix_problems(
    kind: str = "factorization",
    *,
    m: int | None = None,
    n: int | None = None,
    rank: int | None = None,
    condition: float | None = None,
    spectrum: str | Sequence[float] | None = None,
    symmetric: bool | None = None,
    measurements: int | None = None,
    rate: float | None = None,
    noise: float | None = None,
    outliers: float | None = None,
    magnitude: float | None = None,
    scale: float | None = None,
    input_condition: float | None = None,
    seed: int = 0,
) -> Problem:
    """One instance of factorization, sensing, completion, robust (sensing) or lora_linear, drawn from a seed.

    Arguments left at None take the kind's own default; one that the kind does not have is an error.
    """
    if kind not in KINDS:
        raise ArgumentError(f"there is no matrix problem {kind!r}. {did_you_mean(kind, KINDS)}")
    asked: dict[str, Any] = {
        "m": m,
        "n": n,
        "rank": rank,
        "condition": condition,
        "spectrum": spectrum,
        "symmetric": symmetric,
        "measurements": measurements,
        "rate": rate,
        "noise": noise,
        "outliers": outliers,
        "magnitude": magnitude,
        "scale": scale,
        "input_condition": input_condition,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    accepted = inspect.signature(KINDS[kind]).parameters
    for name in given:
        if name not in accepted:
            raise ArgumentError(f"the problem {kind!r} has no argument {name!r}; it takes {', '.join(accepted)}")
    return KINDS[kind](**given, seed=seed)


matrix_sensing_scaledgd = entry(
    "problem",
    slug="matrix_sensing_scaledgd",
    title="ScaledGD(λ) for over-parameterized sensing",
    formula="X ← X − η G X (XᵀX + λI)⁻¹",
    reference=Reference(
        "Xu, Shen, Chi, Ma", "The Power of Preconditioning in Overparameterized Low-Rank Matrix Sensing", 2023, "2302.01186"
    ),
    cost="one gradient and O((m + n) r² + r³) per iteration",
    when="When the rank is not known and the target may be ill-conditioned.",
)(scaled.sensing_scaledgd)

matrix_nystrom_scaledgd = entry(
    "problem",
    slug="matrix_nystrom_scaledgd",
    title="Nyström start with ScaledGD",
    formula="B₀ = M Ω, A₀ = 0, then ScaledGD",
    reference=Reference(
        "Li, Zhang, Mokhtari, He", "On the Crucial Role of Initialization for Matrix Factorization", 2024, "2410.18965"
    ),
    cost="one product with the target per iteration and O((m + n) r² + r³)",
    when="To factorize a matrix that can be multiplied with: one step, or a handful where it is symmetric.",
)(scaled.nystrom_scaledgd)
