"""Oracles of SODA: W' = U diag(relu(σ + δ)) Vᵀ Qᵀ with Q = Q₁ ⊗ Q₂ ⊗ Q₃ kept orthogonal by Stiefel-Adam, and its LQ form.

Stiefel-Adam is checked against a step by step reference. The LQ form has diagonal increments: W' = (L + diag(δ)) Q₀ Qᵀ.
"""

import pytest
import torch
import torch.nn.functional as F

import rankwise as rw
from tests.oracles.tools import DOUBLE, adapted, backward, central_difference, close, grad, linear, put, randn

soda = rw.catalog.soda
M, FACTORS, N = 9, (2, 2, 3), 12
TURNS = ("Q_1", "Q_2", "Q_3")


def rotation(size, seed):
    """A random orthogonal matrix with determinant one."""
    Q = torch.linalg.qr(randn(size, size, seed=seed))[0]
    Q[:, 0] *= torch.linalg.det(Q).sign()
    return Q


def build(m=M, n=N, factors=FACTORS, *, dtype=DOUBLE, turned=True, **options):
    """(model, handle, parameterization, roles, W, Q): with `turned`, the three factors are random rotations."""
    layer = linear(m, n, dtype=dtype)
    W = layer.weight.detach().clone()
    model, handle, p = adapted(soda(factors=factors, **options), layer)
    roles, sizes = p.roles(), factors
    if turned:
        for k, role in enumerate(TURNS):
            put(roles[role], rotation(sizes[k], 20 + k))
    Q = torch.kron(torch.kron(roles["Q_1"].detach(), roles["Q_2"].detach()), roles["Q_3"].detach())
    return model, handle, p, roles, W, Q


def weight_of(model):
    return rw.effective_weights(model)["layer.weight"]


def stiefel_adam(X, gradients, lr, betas=(0.9, 0.99), epsilon=1e-5):
    """The published step with an exact polar factor as the retraction; `gradients` is a function of X."""
    first, second, points = torch.zeros_like(X), torch.zeros_like(X), []
    for t, gradient in enumerate(gradients, 1):
        S = X.t() @ gradient(X)
        skew = S - S.t()
        first = betas[0] * first - (1 - betas[0]) * skew
        second = betas[1] * second + (1 - betas[1]) * skew**2
        xi = lr / (1 - betas[0] ** t) * first / ((second / (1 - betas[1] ** t)).sqrt() + epsilon)
        U, _, Vh = torch.linalg.svd(X + X @ xi)
        X = U @ Vh
        points.append(X)
    return points


def steps(model, handle, optimizer, loss, count, *, hold_delta=True):
    """Runs a training loop; with `hold_delta` the spectrum stays as it is. Returns the losses."""
    delta, seen = handle.parameterization("layer").roles()["delta"], []
    kept = delta.detach().clone()
    for _ in range(count):
        value = loss(model)
        value.backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
        if hold_delta:
            put(delta, kept)
        seen.append(float(value.detach()))
    return seen


@pytest.mark.parametrize("decomposition", ["svd", "lq"])
@pytest.mark.parametrize("m", [M, 15])
def test_1_starts_at_the_base(decomposition, m):
    for dtype, tolerance in ((torch.float32, 1e-6), (DOUBLE, 1e-13)):
        model, _, _, roles, W, Q = build(m, dtype=dtype, turned=False, decomposition=decomposition)
        close(weight_of(model), W, tolerance)
        assert torch.equal(Q, torch.eye(N, dtype=dtype))
        assert torch.equal(roles["delta"], torch.zeros(min(m, N), dtype=dtype))


def test_1_the_released_start_is_an_option():
    model, _, _, roles, W, _ = build(turned=False, start_delta=1e-3)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    assert torch.equal(roles["delta"], torch.full((M,), 1e-3, dtype=DOUBLE))
    close(weight_of(model), (U * (S + 1e-3)) @ Vh, 1e-12)


@pytest.mark.parametrize(("n", "factors"), [(640, (8, 8, 10)), (768, (6, 8, 16)), (1280, (4, 16, 20)), (2048, (4, 8, 64))])
def test_2_counts(n, factors):
    _, handle, *_ = build(3, n, factors, dtype=torch.float32, turned=False)
    assert handle.trained_numbers == 3 + sum(size**2 for size in factors)  # k + Σ n_i², k = min(m, n)


def test_2_factors_are_chosen_when_none_are_given():
    layer, x = linear(4, 60), randn(5, 60, seed=1)
    base = layer(x).detach()
    model, _, p = adapted(soda(), layer)
    sizes = [p.roles()[role].shape for role in TURNS]
    assert torch.Size([size[0] for size in sizes]).numel() == 60 and all(size[0] == size[1] for size in sizes)
    assert max(size[0] for size in sizes) <= 6  # close to each other: 3 · 4 · 5 or near it
    close(model(x), base, 1e-12)


def test_2_a_product_of_orthogonals_is_orthogonal():
    _, _, _, _, _, Q = build()
    close(Q.t() @ Q, torch.eye(N, dtype=DOUBLE), 1e-12)


def test_2_a_hundred_steps_stay_on_the_manifold_in_float32():
    x, y = randn(16, N, seed=1, dtype=torch.float32), randn(16, M, seed=2, dtype=torch.float32)
    model, handle, _, roles, *_ = build(dtype=torch.float32, turned=False)
    optimizer = handle.optimizer(lr=0.02)
    losses = steps(model, handle, optimizer, lambda model: (model(x) - y).square().mean(), 100, hold_delta=False)
    assert losses[-1] < losses[0]
    for role in TURNS:
        Q = roles[role].detach()
        size = len(Q)
        assert (Q.t() @ Q - torch.eye(size)).abs().max() < 1e-5
        assert torch.linalg.det(Q) > 0.999
        assert (Q - torch.eye(size)).norm() > 0.1  # it did move
    assert roles["delta"].abs().max() > 1e-3  # the spectrum is trained too, by an ordinary step


@pytest.mark.parametrize("m", [M, 15])
def test_3_spectrum(m):
    model, _, _, roles, W, Q = build(m)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    delta = randn(min(m, N), seed=3) * 2
    put(roles["delta"], delta)
    values = torch.relu(S + delta)
    assert (S + delta).min() < 0  # some are cut off
    close(torch.linalg.svdvals(weight_of(model).detach()), values.sort(descending=True).values, 1e-10)
    close(weight_of(model) @ weight_of(model).t(), (U * values**2) @ U.t(), 1e-10)
    close(weight_of(model), (U * values) @ Vh @ Q.t(), 1e-12)


@pytest.mark.parametrize("shape", [(7,), (2, 3), (0,), ()])
def test_4_mode_products_are_the_dense_kronecker_product(shape):
    model, _, _, roles, W, Q = build()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    put(roles["delta"], randn(M, seed=3))
    dense = (U * torch.relu(S + roles["delta"].detach())) @ Vh @ Q.t()
    x = randn(*shape, N, seed=1)
    close(model(x), F.linear(x, dense, model.layer.bias), 1e-12)
    # row-major: entry (i₁, i₂, i₃) of Qᵀ x by three small products
    grid = torch.einsum("...abc,ai,bj,ck->...ijk", x.reshape(*shape, *FACTORS), *(roles[role].detach() for role in TURNS))
    close(grid.reshape(*shape, N), x @ Q, 1e-12)


@pytest.mark.parametrize("decomposition", ["svd", "lq"])
@pytest.mark.parametrize("m", [M, 15])
def test_5_rotations_alone_keep_the_output_gram(decomposition, m):
    model, _, _, _, W, Q = build(m, decomposition=decomposition)
    turned = weight_of(model).detach()
    close(turned @ turned.t(), W @ W.t(), 1e-12)
    assert float(turned.norm()) == pytest.approx(float(W.norm()), rel=1e-12)
    close(turned, W @ Q.t(), 1e-12)


@pytest.mark.parametrize("rectify", [True, False])
def test_5_the_spectrum_alone_is_svfit_with_a_relu(rectify):
    x, delta = randn(7, N, seed=1), randn(M, seed=3) * 2
    model, _, _, roles, W, _ = build(turned=False, rectify=rectify)
    put(roles["delta"], delta)
    other, _, q = adapted(rw.catalog.svfit(), linear(M, N))
    S = torch.linalg.svdvals(W)
    assert (S + delta).min() < 0
    put(q.roles()["increment"], delta.clamp_min(-S) if rectify else delta)
    close(model(x), other(x), 1e-12)


@pytest.mark.parametrize("m", [M, 15])
def test_5_the_lq_form_moves_the_diagonal_of_l(m):
    k = min(m, N)
    model, _, _, roles, W, Q = build(m, decomposition="lq", rectify=False)
    delta = randn(k, seed=3)
    put(roles["delta"], delta)
    change = (weight_of(model) @ Q - W).detach()  # diag(δ) Q₀, Q₀ (k, n) with orthonormal rows, L = W Q₀ᵀ lower trapezoidal
    close(change @ change.t(), torch.diag(torch.cat([delta**2, torch.zeros(m - k, dtype=DOUBLE)])), 1e-12)
    assert (W @ change.t())[:, :k].triu(1).abs().max() < 1e-12


def test_gradients():
    x, g = randn(11, N, seed=1), randn(11, M, seed=2)
    model, _, _, roles, W, _ = build()
    put(roles["delta"], randn(M, seed=3))
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    G, now = backward(model, x, g), {role: tensor.detach().clone() for role, tensor in roles.items()}

    def loss(**changed):
        r = {**now, **changed}
        Q = torch.kron(torch.kron(r["Q_1"], r["Q_2"]), r["Q_3"])
        return float((G * ((U * torch.relu(S + r["delta"])) @ Vh @ Q.t())).sum())

    for role in roles:  # as if unconstrained: the step projects
        close(grad(roles[role]), central_difference(lambda t, role=role: loss(**{role: t}), now[role]), 1e-6)


def test_6_the_step_is_the_published_one():
    x, y = randn(16, N, seed=1), randn(16, M, seed=2)
    model, handle, _, roles, *_ = build(turned=False)
    optimizer, recorded, points = handle.optimizer(lr=0.05), {role: [] for role in TURNS}, {role: [] for role in TURNS}

    def loss(model):
        return (model(x) - y).square().sum()

    for _ in range(6):
        for role, gradient in zip(TURNS, torch.autograd.grad(loss(model), [roles[role] for role in TURNS]), strict=True):
            recorded[role].append(gradient)
        steps(model, handle, optimizer, loss, 1)
        for role in TURNS:
            points[role].append(roles[role].detach().clone())
    for role in TURNS:
        gradients = [lambda X, kept=kept: kept for kept in recorded[role]]
        start = torch.eye(len(roles[role]), dtype=DOUBLE)
        for found, expected in zip(points[role], stiefel_adam(start, gradients, 0.05), strict=True):
            close(found, expected, 1e-6)


def test_6_the_step_is_tangent():
    x, y, symmetric = randn(16, N, seed=1), randn(16, M, seed=2), []
    for lr in (1e-2, 5e-3):
        model, handle, _, roles, *_ = build()
        before = {role: roles[role].detach().clone() for role in TURNS}
        steps(model, handle, handle.optimizer(lr=lr), lambda model: (model(x) - y).square().sum(), 1)
        moved = {role: before[role].t() @ (roles[role].detach() - before[role]) for role in TURNS}
        symmetric.append(torch.stack([(moved[role] + moved[role].t()).norm() / 2 for role in TURNS]))
        for role in TURNS:
            assert (moved[role] - moved[role].t()).norm() / 2 > 0.5 * lr  # the skew part is of order lr
    assert symmetric[0].max() < 10 * 1e-2**2
    assert ((symmetric[0] / symmetric[1] - 4).abs() < 0.2).all()  # and the rest of order lr²


def test_6_it_solves_the_orthogonal_procrustes_problem():
    # With W = I and one factor of size 4, rows x A of the input go to x Q: min ‖A Q - B‖ over orthogonal Q has the solution
    # U Vᵀ of Aᵀ B = U S Vᵀ, the transposed form of ‖Q A - B‖.
    A, target = randn(10, 4, seed=1), rotation(4, 2)
    B = A @ target + 0.1 * randn(10, 4, seed=3)
    layer = linear(4, 4, bias=False)
    put(layer.weight, torch.eye(4, dtype=DOUBLE))
    model, handle, p = adapted(soda(factors=(1, 1, 4)), layer)
    U, _, Vh = torch.linalg.svd(A.t() @ B)
    best = U @ Vh
    assert torch.linalg.det(best) > 0
    optimizer, losses = handle.optimizer(lr=0.1), []
    for lr in (0.1, 0.02, 0.004, 0.0008):
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses += steps(model, handle, optimizer, lambda model: (model(A) - B).square().sum(), 100)
    close(p.roles()["Q_3"], best, 1e-3)
    assert losses[-1] < losses[0] and losses[-1] == pytest.approx(float((A @ best - B).square().sum()), rel=1e-5)


def test_merging_and_the_output_bias():
    x = randn(7, N, seed=1)
    model, handle, _, roles, W, _ = build()
    put(roles["delta"], randn(M, seed=3))
    before = model(x).detach()
    handle.merge_()
    close(F.linear(x, model.layer.weight, model.layer.bias), before, 1e-12)  # the bias is not scaled
    handle.unmerge_()
    assert torch.equal(model.layer.weight, W)
