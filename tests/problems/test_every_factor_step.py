"""Every factor step of the catalog solves a factorization, and preconditioners do not mind the condition number."""

from __future__ import annotations

import functools

import pytest

from experiments.solvers import ADAM_LIMIT, GOAL, Run, Solver, best, solvers
from rankwise import catalog

SMALL = {"m": 10, "n": 9, "rank": 2}
SOLVERS = {solver.name: solver for solver in solvers()}
BIAS = "where directions and decay balance, BA is smaller than M*, at condition 1 by the share λ: decay moves the answer itself"
DRIFT = "A has to grow for ever to make up for what B loses, and the error falls only as slowly as A grows"
# Check -> solver -> why it cannot hold. What is named here has to fail.
expected_failures = {
    "solves": {
        "decoupled_weight_decay": BIAS,
        "decoupled_weight_decay + sgd": BIAS,
        "decoupled_weight_decay(roles=('B',)) + sgd": DRIFT,
    },
    "flat": {
        "reflora(warmup=2) + sgd": "S = (AAᵀ)⁻¹ # BᵀB makes the step that of the balanced pair, where BᵀB = AAᵀ: as for "
        "gradient descent on it, the direction of σ_i is learned at a rate proportional to σ_i, so the iterations grow with "
        "the condition number",
    },
}
flat = [name for name, solver in SOLVERS.items() if solver.preconditions and not solver.adaptive]


def expect(request: pytest.FixtureRequest, check: str, solver: Solver) -> None:
    """Turns a success of what is known to fail into a failure."""
    if solver.name in expected_failures[check]:
        request.applymarker(pytest.mark.xfail(reason=expected_failures[check][solver.name], strict=True))


@functools.cache
def solved(name: str, condition: float) -> Run:
    problem = catalog.matrix_problems("factorization", condition=condition, **SMALL)
    return best(SOLVERS[name], problem, problem.rank)


def test_every_entry_that_moves_the_factors_is_here():
    entries = {solver.entry for solver in solvers()}
    assert {"sgd", "adamw", "lora_plus", "scaled_gd", "reflora", "conef"} <= entries
    assert not entries & {"galore", "stiefel_adam", "flora_grad"}  # whole weights and rotations
    assert any(SOLVERS[name].entry == "scaled_gd" for name in flat)


@pytest.mark.parametrize("name", SOLVERS)
def test_it_solves_factorization(name: str, request: pytest.FixtureRequest):
    expect(request, "solves", SOLVERS[name])
    run = solved(name, 1.0)
    if SOLVERS[name].adaptive:  # a step of Adam has the size of the rate, and the rate has to fall to get anywhere
        assert run.error < 1e-4
        assert run.trace is not None and run.trace.iteration[-1] <= ADAM_LIMIT
    else:
        assert run.iterations is not None, f"{name} ends at {run.error:.1e} with the rate {run.rate}"


def growth(solver: Solver) -> float:
    """Iterations at condition 100 over those at 1; infinite where the goal is not reached."""
    easy, hard = solved(solver.name, 1.0).iterations, solved(solver.name, 100.0).iterations
    assert easy is not None
    return float("inf") if hard is None else hard / easy


@pytest.mark.parametrize("name", flat)
def test_a_preconditioner_is_flat_in_the_condition_number(name: str, request: pytest.FixtureRequest):
    solver = SOLVERS[name]
    expect(request, "flat", solver)
    assert growth(solver) <= 1.5


def test_gradient_descent_is_not():
    assert growth(SOLVERS["sgd"]) > 10.0
    assert solved("sgd", 100.0).error > GOAL
