"""The instances: gradients, adjoints, truths, and what the solvers see of them."""

import pytest
import torch

from rankwise import catalog
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import LowRank
from rankwise.problems.problem import factorizing
from rankwise.problems.solve import solve

SMALL = {
    "factorization": {"m": 7, "n": 6, "rank": 2},
    "sensing": {"m": 6, "rank": 2, "measurements": 40},
    "completion": {"m": 7, "n": 6, "rank": 2, "rate": 0.6},
    "robust": {"m": 6, "rank": 2, "measurements": 40},
    "lora_linear": {"m": 7, "n": 6, "rank": 2, "scale": 1.5, "input_condition": 5.0},
}


def generic(problem, seed=0, rank=2):
    generator = torch.Generator().manual_seed(seed)
    m, n = problem.shape
    B = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    return LowRank(B, B.mT.clone() if problem.symmetric else torch.randn(rank, n, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("kind", SMALL)
def test_gradient_is_the_derivative_of_the_loss(kind):
    problem = catalog.matrix_problems(kind, **SMALL[kind])
    M = generic(problem).dense().requires_grad_()
    (expected,) = torch.autograd.grad(problem.loss(M), M)
    torch.testing.assert_close(problem.gradient(M.detach()), expected)
    if problem.symmetric:
        assert torch.equal(problem.gradient(M.detach()), problem.gradient(M.detach()).mT)


@pytest.mark.parametrize("kind", SMALL)
def test_adjoint_factors_and_truth(kind):
    problem = catalog.matrix_problems(kind, **SMALL[kind])
    factors = generic(problem, seed=1)
    seen = problem.measurement.forward(factors)
    values = torch.randn(seen.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close((seen * values).sum(), (factors.dense() * problem.measurement.adjoint(values)).sum())
    torch.testing.assert_close(problem.loss(factors), problem.loss(factors.dense()))
    assert torch.linalg.matrix_rank(problem.truth) == problem.rank == 2
    assert problem.relative_error(problem.truth) == 0.0
    if kind != "robust":
        assert float(problem.loss(problem.truth)) < 1e-20
    again = catalog.matrix_problems(kind, **SMALL[kind])
    assert torch.equal(problem.truth, again.truth) and torch.equal(problem.observed, again.observed)
    assert not torch.equal(problem.truth, catalog.matrix_problems(kind, **SMALL[kind], seed=1).truth)


@pytest.mark.parametrize("spectrum", ["linear", "geometric", "power"])
def test_condition_is_what_was_asked(spectrum):
    problem = catalog.matrix_problems(m=9, n=8, rank=3, condition=50.0, spectrum=spectrum)
    values = torch.linalg.svdvals(problem.truth)[:3]
    assert float(values[0]) == pytest.approx(1.0) and float(values[0] / values[2]) == pytest.approx(50.0)
    left, right = torch.linalg.svd(problem.truth)[0][:8, :3], torch.linalg.svd(problem.truth)[2][:3].mT
    assert torch.linalg.matrix_norm(left.abs() - right.abs()) > 0.1  # the two factors are drawn independently


def test_sensing_is_nearly_an_isometry():
    problem = catalog.matrix_problems("sensing", measurements=800)
    assert 0.02 < problem.isometry_defect(2) < 0.3
    assert catalog.matrix_problems("factorization", m=9, n=8, rank=2).isometry_defect(2) < 1e-12
    assert catalog.matrix_problems("sensing", measurements=60).isometry_defect(2) > problem.isometry_defect(2)


def test_noise_floor_is_reached_and_not_passed():
    problem = catalog.matrix_problems("sensing", noise=0.01, condition=3.0)
    error = catalog.matrix_sensing_scaledgd(problem, rank=2, iterations=300).error[-1]
    assert 0.5 * problem.noise_floor < error < 2.0 * problem.noise_floor


def test_lora_linear_with_white_inputs_is_factorization_exactly():
    sizes = {"m": 9, "n": 8, "rank": 2, "condition": 4.0}
    one, two = catalog.matrix_problems("factorization", **sizes), catalog.matrix_problems("lora_linear", **sizes)
    for init in ("lora", "small", "spectral", "nystrom", "one_step"):
        first, second = (solve(p, rank=2, init=init, lr=0.2, iterations=20) for p in (one, two))
        assert (first.loss == second.loss).all() and (first.error == second.error).all()


def test_degrees_of_freedom_and_best_error():
    problem = catalog.matrix_problems("completion")
    assert problem.degrees_of_freedom(3) == 321
    values = catalog.matrix_problems(m=9, n=8, rank=3, spectrum=(3.0, 2.0, 1.0))
    assert values.best_error(1) == pytest.approx((5 / 14) ** 0.5)


def test_a_given_matrix_is_recognized():
    X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    M = X @ X.mT
    assert factorizing((M + M.mT) / 2).symmetric and not factorizing(-(M + M.mT)).symmetric
    assert factorizing(LowRank(X, X.mT.clone())).rank == 2
    with pytest.raises(ArgumentError, match="not symmetric and positive"):
        factorizing(X @ torch.ones(2, 6, dtype=torch.float64), symmetric=True)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"kind": "sensin"}, "Did you mean 'sensing'"),
        ({"kind": "factorization", "rate": 0.5}, "'factorization' has no argument 'rate'; it takes m, n"),
        ({"m": 5, "n": 4, "rank": 5}, "rank=5 does not fit a 5 × 4"),
        ({"spectrum": (1.0, 2.0)}, "spectrum needs rank=4"),
        ({"condition": 0.5}, "condition=0.5"),
        ({"spectrum": "flat"}, "linear, geometric, power"),
        ({"kind": "sensing", "m": 5, "n": 4}, "a symmetric problem is square"),
        ({"kind": "completion", "rate": 0.0}, "share of entries"),
        ({"kind": "robust", "outliers": 0.7}, "share of corrupted"),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(ArgumentError, match=text):
        catalog.matrix_problems(**arguments)
