"""The convergence that theory states, with the library's own steps as the solvers."""

import numpy as np
import pytest
import torch

import rankwise
from rankwise import catalog
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import LowRank
from rankwise.problems.solve import solve
from rankwise.problems.starts import start_of
from rankwise.steps.moments import adamw, sgd
from rankwise.steps.ratio import lora_plus
from rankwise.steps.reflora import reflora
from rankwise.steps.scaled_gd import scaled_gd

ILL = (100.0, 10.0, 1.0, 0.1)


def test_scaled_gd_is_independent_of_the_condition_number_and_gradient_descent_is_not():
    scaled, plain = {}, {}
    for condition in (1.0, 10.0, 100.0):
        problem = catalog.matrix_problems(m=40, rank=3, condition=condition, symmetric=True)
        step = scaled_gd(damping=1.0 / condition / 20)
        scaled[condition] = solve(problem, rank=6, step=step, lr=0.3, iterations=40).iterations_to(1e-6)
        plain[condition] = solve(problem, rank=6, lr=0.3, iterations=1500, every=5).iterations_to(1e-4)
    assert max(scaled.values()) - min(scaled.values()) <= 3 and max(scaled.values()) <= 30
    assert plain[10.0] > 5 * plain[1.0] and plain[100.0] is None


@pytest.mark.parametrize("rate", [0.2, 0.5])
@pytest.mark.parametrize("condition", [10.0, 1000.0])
def test_local_rate_is_one_minus_eta(rate, condition):
    problem = catalog.matrix_problems(m=20, n=15, rank=4, condition=condition)
    exact = start_of(problem, 4, "spectral")
    size = 0.02 * (1.0 / condition) ** 0.5
    generator = torch.Generator().manual_seed(1)
    near = LowRank(
        exact.B + size * torch.nn.functional.normalize(torch.randn(20, 4, generator=generator, dtype=torch.float64), dim=0) / 2,
        exact.A + size * torch.nn.functional.normalize(torch.randn(4, 15, generator=generator, dtype=torch.float64), dim=1) / 2,
    )
    trace = solve(problem, rank=4, init=near, step=scaled_gd(damping=0.0), lr=rate, iterations=12)
    ratios = trace.error[1:] / trace.error[:-1]
    assert ratios.max() <= 1 - 0.7 * rate
    assert trace.rate(decades=0.8) == pytest.approx(1 - rate, abs=0.06)


@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
def test_sensing_with_annealed_damping_reaches_any_accuracy(condition):
    problem = catalog.matrix_problems("sensing", condition=condition)
    trace = catalog.matrix_sensing_scaledgd(problem, iterations=200)
    assert trace.iterations_to(1e-6) is not None and trace.iterations_to(1e-6) <= 150
    assert (np.diff(trace.damping) <= 0).all() and trace.rank[-1] <= 4


def test_damping_sets_the_floor_and_huge_damping_is_gradient_descent():
    problem = catalog.matrix_problems("sensing", condition=100.0)
    small, medium, large = (
        catalog.matrix_sensing_scaledgd(problem, rank=4, damping=value / 100, iterations=300).error[-1]
        for value in (1e-4, 1e-2, 1.0)
    )
    assert small < medium < large < 1e-3
    huge = solve(problem, rank=4, step=scaled_gd(damping=1e8), lr=0.3e8, alpha=1e-2, iterations=50)
    plain = solve(problem, rank=4, lr=0.3, alpha=1e-2, iterations=50)
    np.testing.assert_allclose(huge.error, plain.error, rtol=1e-5)


def test_nystrom_symmetric_is_quadratic():
    problem = catalog.matrix_problems(m=30, rank=4, spectrum=ILL, symmetric=True)
    error = catalog.matrix_nystrom_scaledgd(problem, iterations=25).error
    small = np.flatnonzero(error < 0.1)[0]
    constant = error[small + 1] / error[small] ** 2
    assert error[small + 2] < 10 * constant * error[small + 1] ** 2 + 1e-9
    assert error[small + 3] < 1e-7 and error[-1] < 1e-12
    linear = catalog.matrix_nystrom_scaledgd(problem, lr=0.3, iterations=25)
    assert linear.rate() == pytest.approx(0.4, abs=1e-3)
    random = solve(problem, rank=4, step=scaled_gd(damping=0.0), lr=0.5, init="small", alpha=1e-3, iterations=40)
    assert random.rate() == pytest.approx(0.5, abs=1e-3)


def test_nystrom_asymmetric_takes_one_step():
    problem = catalog.matrix_problems(m=30, n=25, rank=4, spectrum=ILL)
    assert catalog.matrix_nystrom_scaledgd(problem).error[1] < 1e-12
    assert catalog.matrix_nystrom_scaledgd(problem, rank=6).error[1] < 1e-12
    assert catalog.matrix_nystrom_scaledgd(problem, lr=0.5, iterations=3).error[1] == pytest.approx(0.5, abs=1e-9)
    under = catalog.matrix_nystrom_scaledgd(problem, rank=2, lr=0.5, iterations=80)
    assert under.error[-1] == pytest.approx(problem.best_error(2), rel=1e-9)


def test_nystrom_stays_in_the_range_and_scales_with_the_target():
    problem = catalog.matrix_problems(m=20, rank=3, symmetric=True)
    Q = torch.linalg.qr(problem.truth[:, :3]).Q
    X = catalog.matrix_nystrom_scaledgd(problem, iterations=6).factors.B
    assert torch.linalg.matrix_norm(X - Q @ (Q.mT @ X)) < 1e-10 * torch.linalg.matrix_norm(X)
    M = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, two = (catalog.matrix_nystrom_scaledgd(scale * M, rank=2, lr=0.5).error for scale in (1.0, 8.0))
    np.testing.assert_allclose(one, two, rtol=1e-10)


def test_symmetric_solving_is_the_published_iteration():
    problem = catalog.matrix_problems("sensing", m=8, measurements=100)
    start = start_of(problem, 3, "spectral", symmetric=True)
    X, eye = start.B.clone(), torch.eye(3, dtype=torch.float64)
    for _ in range(5):
        X = X - 0.3 * problem.gradient(X @ X.mT) @ X @ torch.linalg.inv(X.mT @ X + 0.01 * eye)
    trace = solve(problem, rank=3, init="spectral", step=scaled_gd(damping=0.01), lr=0.3, iterations=5)
    torch.testing.assert_close(trace.factors.B, X)
    assert torch.equal(trace.factors.A, trace.factors.B.mT)


def test_orthogonal_invariance():
    problem = catalog.matrix_problems(m=8, rank=2, symmetric=True)
    start = start_of(problem, 3, "small", symmetric=True, alpha=0.5)
    O = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q  # noqa: E741
    turned = LowRank(start.B @ O, (start.B @ O).mT.clone())
    for step in (sgd(), scaled_gd(damping=0.0)):
        one, two = (solve(problem, rank=3, init=init, step=step, lr=0.1, iterations=15) for init in (start, turned))
        torch.testing.assert_close(one.factors.B @ O, two.factors.B)


@pytest.mark.parametrize("init", ["lora", "small", "spectral", "nystrom", "one_step"])
def test_every_start_solves_with_steps_of_the_catalog(init):
    problem = catalog.matrix_problems(m=12, n=10, rank=2, condition=3.0)
    for step in (rankwise.compose("lora + sgd + scaled_gd(damping=0.02)").steps(), [reflora(warmup=2), sgd()]):
        trace = solve(problem, rank=2, init=init, step=step, lr=0.3, alpha=1e-2, iterations=400)
        assert trace.error[-1] < 1e-3
        assert trace.iteration[-1] == 400 and trace.rank[-1] == 2 and not trace.diverged


def test_trace_reads_itself():
    problem = catalog.matrix_problems("sensing", condition=2.0, m=10, measurements=200)
    trace = solve(problem, rank=2, step=scaled_gd(damping=0.0), init="spectral", lr=0.5, iterations=30, every=3)
    assert list(trace.iteration) == list(range(0, 31, 3))
    assert trace.iterations_to(1e-3) is not None and trace.iterations_to(0.0) is None
    assert abs(trace.lambda_min[-1]) < 1e-4 and 0.3 < trace.rate(decades=2.0) < 0.9
    assert (np.diff(trace.seconds) >= 0).all()
    stuck = solve(problem, rank=1, step=scaled_gd(damping=0.0), init="spectral", lr=0.5, iterations=100)
    assert stuck.plateau() and trace.plateau(last=3) is False
    assert solve(problem, rank=2, init="spectral", lr=50.0, iterations=100).diverged


def test_what_does_not_fit_the_symmetric_form_is_refused():
    problem = catalog.matrix_problems("sensing", m=8, measurements=100)
    with pytest.raises(ArgumentError, match="lora_plus moves A and B differently"):
        solve(problem, rank=2, init="spectral", step=[adamw(), lora_plus()], lr=0.01)
    assert solve(problem, rank=2, init="spectral", step=[adamw(), lora_plus()], lr=0.001, symmetric=False).error[-1] < 0.5
    with pytest.raises(ArgumentError, match="which is no X Xᵀ"):
        solve(problem, rank=2, init="lora", symmetric=True)
    with pytest.raises(ArgumentError, match="a symmetric start has A = Bᵀ"):
        solve(problem, rank=2, init=start_of(problem, 2, "lora"))
    with pytest.raises(ArgumentError, match="is not symmetric, so there is no"):
        solve(catalog.matrix_problems(m=5, n=4, rank=2), rank=2, symmetric=True)
    with pytest.raises(ArgumentError, match="is to be solved with rank 3"):
        solve(problem, rank=3, init=start_of(problem, 2, "spectral", symmetric=True))
    with pytest.raises(ArgumentError, match="init is one of lora, small"):
        solve(problem, rank=2, init="zero")
