"""Oracles of LoRA-FA: LoRA with a frozen random A (or, as the control, a frozen random B)."""

import pytest
import torch
from torch import nn

import rankwise as rw
from tests.oracles.tools import adapted, backward, close, fill, grad, linear, put, randn

lora_fa = rw.catalog.lora_fa


def test_1_only_b_is_trained():
    X, Y = randn(20, 5, seed=1), randn(20, 7, seed=2)
    model, handle, p = adapted(lora_fa(rank=3), linear(7, 5))
    A = p.A.clone()
    assert handle.trained_numbers == 7 * 3 and set(p.roles()) == {"B"}
    optimizer = handle.optimizer(lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (model(X) - Y).square().mean().backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
    assert torch.equal(p.A, A) and p.roles()["B"].abs().max() > 0
    trained = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    assert [tuple(tensor.shape) for tensor in trained] == [(7, 3)]
    assert not any(torch.is_tensor(t) and t.shape == A.shape for s in optimizer.state.values() for t in s.values())


def test_2_convex_and_gradient_descent_reaches_the_closed_form():
    X, Y, layer = randn(40, 6, seed=1), randn(40, 6, seed=2), linear(6, 6, bias=False)
    W = layer.weight.detach().clone()
    model, handle, p = adapted(lora_fa(rank=3, alpha=6.0), layer)
    Z, target = X @ p.A.t(), Y - X @ W.t()
    best = (torch.linalg.pinv(Z) @ target).t() / 2.0  # B* = (Y - W X) Z⁺ / s, s = 2
    closed = (2.0 * Z @ best.t() - target).square().sum()
    (B,) = p.roles().values()
    rate = 1 / (2 * 4 * torch.linalg.eigvalsh(Z.t() @ Z)[-1])
    for _ in range(400):
        B.grad = None
        (model(X) - Y).square().sum().backward()
        put(B, B - rate * grad(B))
    reached = (model(X) - Y).square().sum().detach()
    assert abs(float(reached - closed)) <= 1e-8 * float(closed)
    close(B, best, 1e-6)
    close(handle.update_of("layer").dense(), 2 * B @ p.A, 1e-12)


@pytest.mark.parametrize("start", ["orthonormal", "kaiming"])
def test_3_rows_stay_in_the_span_of_a(start):
    X, Y = randn(20, 6, seed=1), randn(20, 7, seed=2)
    model, handle, p = adapted(lora_fa(rank=3, input_start=start), linear(7, 6))
    optimizer = handle.optimizer(lr=1e-2)
    outside = torch.eye(6, dtype=torch.float64) - torch.linalg.pinv(p.A) @ p.A
    for _ in range(5):
        optimizer.zero_grad()
        (model(X) - Y).square().mean().backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        D = handle.update_of("layer").dense()
        assert (D @ outside).norm() < 1e-6 * D.norm()


@pytest.mark.parametrize("alpha", [3.0, 7.0])
def test_4_corrected_gradient_is_the_projected_full_gradient(alpha):
    # The correction is applied by hand: with it, what reaches the weight is G projected on the row space of A.
    x, g = randn(11, 6, seed=1), randn(11, 7, seed=2)
    model, handle, p = adapted(lora_fa(rank=3, alpha=alpha), linear(7, 6))
    put(p.A, randn(3, 6, seed=8))
    fill(handle)
    s, G = alpha / 3, backward(model, x, g)
    corrected = grad(p.roles()["B"]) @ torch.linalg.inv(p.A @ p.A.t()) / s**2
    projection = p.A.t() @ torch.linalg.inv(p.A @ p.A.t()) @ p.A
    close(s * corrected @ p.A, G @ projection, 1e-12)


def test_4_orthonormal_a_with_scale_one_needs_no_correction():
    x, g = randn(11, 6, seed=1), randn(11, 7, seed=2)
    model, _, p = adapted(lora_fa(rank=3, alpha=3.0), linear(7, 6))
    close(p.A @ p.A.t(), torch.eye(3, dtype=torch.float64), 1e-12)
    G = backward(model, x, g)
    close(grad(p.roles()["B"]) @ p.A, G @ p.A.t() @ torch.linalg.inv(p.A @ p.A.t()) @ p.A, 1e-12)


def frozen_factors(train, draws, r=6, side=24):
    """The frozen factor as the library draws it, for many seeds."""
    model = nn.Sequential(nn.Linear(side, side)).double()
    for seed in range(draws):
        handle = rw.adapt_(model, lora_fa(rank=r, train=train), where=["0"], seed=seed)
        frozen = dict(handle.parameterization("0").named_buffers())
        yield frozen["A" if train == "B" else "B"].clone()
        handle.detach_()


@pytest.mark.parametrize(("decay", "expected"), [(False, 0.25), (True, 0.81)])
def test_5_training_b_profits_from_decaying_inputs_and_training_a_does_not(decay, expected):
    n = 24
    index = torch.arange(1, n + 1, dtype=torch.float64)
    C = torch.diag(index**-2) if decay else torch.eye(n, dtype=torch.float64)
    shares = {"B": [], "A": []}
    for train in shares:
        for seed, F in enumerate(frozen_factors(train, 400)):
            D = randn(n, n, seed=seed)
            full = D @ C @ D.t()
            if train == "B":  # best B: regression of D x on A x
                captured = D @ C @ F.t() @ torch.linalg.solve(F @ C @ F.t(), F @ C @ D.t())
            else:  # best A: D projected on the span of B
                captured = F @ torch.linalg.solve(F.t() @ F, F.t() @ full)
            shares[train].append(float(torch.trace(captured) / torch.trace(full)))
    means = {train: sum(values) / len(values) for train, values in shares.items()}
    assert means["B"] == pytest.approx(expected, abs=0.02)
    assert means["A"] == pytest.approx(0.25, abs=0.02)


def kept_shapes(recipe, x):
    layer = linear(7, 6)
    model = adapted(recipe, layer)[0] if recipe is not None else layer
    shapes: list[tuple[int, ...]] = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return [shape for shape in shapes if x.shape[0] in shape]


@pytest.mark.parametrize("needs_input_gradient", [True, False])
def test_6_no_input_is_kept_for_backward(needs_input_gradient):
    x = randn(13, 6, seed=1).requires_grad_(needs_input_gradient)
    assert (13, 6) in kept_shapes(rw.catalog.lora(rank=3), x)  # the measurement sees it where it is there
    assert (13, 6) not in kept_shapes(lora_fa(rank=3), x)
    assert kept_shapes(lora_fa(rank=3), x) == [(13, 3)]


def one_step(recipe, lr, *, alpha=None, random_a=True, steps=1, **options):
    """(G of the first step, A, update after the steps, optimizer) on a linear loss, whose gradient does not change."""
    x, g = randn(11, 6, seed=1), randn(11, 7, seed=2)
    model, handle, p = adapted(recipe, linear(7, 6))
    if random_a:
        put(p.A, randn(3, 6, seed=8))
    optimizer = handle.optimizer(lr=lr, **options)
    for _ in range(steps):
        G = backward(model, x, g)
        handle.after_backward()
        optimizer.step()
        handle.after_step()
    return G, p.A.clone(), handle.update_of("layer").dense().detach(), (optimizer, p)


@pytest.mark.parametrize("alpha", [3.0, 7.0])
@pytest.mark.parametrize("start", ["orthonormal", "kaiming"])
def test_4_a_corrected_step_moves_the_weight_by_the_projected_gradient(alpha, start):
    recipe = rw.compose(lora_fa(rank=3, alpha=alpha, input_start=start, correct=True), "sgd")
    G, A, update, _ = one_step(recipe, 0.1, random_a=start == "kaiming")
    close(update, -0.1 * G @ A.t() @ torch.linalg.inv(A @ A.t()) @ A, 1e-6)  # the damping of 1e-8 is still there
    s, eye = alpha / 3, torch.eye(3, dtype=torch.float64)
    corrected = s * G @ A.t() @ torch.linalg.inv(A @ A.t() + 1e-8 * eye) / s**2
    close(update, -0.1 * s * corrected @ A, 1e-12)


@pytest.mark.parametrize("damping", [1e-3, 0.5])
def test_4_the_damping_of_the_correction(damping):
    recipe = rw.compose(f"lora_fa(rank=3, alpha=6.0, correct=True, damping={damping}) + sgd")
    G, A, update, _ = one_step(recipe, 0.1)
    corrected = 2 * G @ A.t() @ torch.linalg.inv(A @ A.t() + damping * torch.eye(3, dtype=torch.float64)) / 4
    close(update, -0.1 * 2 * corrected @ A, 1e-12)


def test_4_the_correction_changes_nothing_for_orthonormal_rows_and_scale_one():
    plain, corrected = (
        one_step(rw.compose(lora_fa(rank=3, alpha=3.0, correct=correct), "sgd"), 0.1, random_a=False, steps=4)[2]
        for correct in (False, True)
    )
    close(corrected, plain, 1e-7)
    other = one_step(rw.compose(lora_fa(rank=3, alpha=6.0, correct=True), "sgd"), 0.1, random_a=False, steps=4)[2]
    close(other, plain, 1e-7)  # and it takes the scale out


def test_4_moments_are_kept_of_the_corrected_gradient():
    recipe = lora_fa(rank=3, alpha=6.0, correct=True)
    G, A, _, (optimizer, p) = one_step(recipe, 0.1, betas=(0.9, 0.99), weight_decay=0.0)
    corrected = 2 * G @ A.t() @ torch.linalg.inv(A @ A.t()) / 4
    (B,) = p.roles().values()
    state = {name.rsplit(".", 1)[-1]: value for name, value in optimizer.state[B].items()}
    close(state["exp_avg"], 0.1 * corrected, 1e-6)
    close(state["exp_avg_sq"], 0.01 * corrected.square(), 1e-6)
    close(B.detach(), -0.1 * corrected.sign(), 1e-5)  # Adam's first step


@pytest.mark.parametrize("correct", [False, True])
def test_2_the_correction_is_gradient_descent_in_the_row_space(correct):
    """With whitened inputs one corrected step of rate 1/2 solves the least squares; without it, a long A makes it diverge."""
    X, Y = torch.linalg.qr(randn(40, 6, seed=1))[0], randn(40, 6, seed=2)
    layer = linear(6, 6, bias=False)
    W = layer.weight.detach().clone()
    model, handle, p = adapted(rw.compose(lora_fa(rank=3, alpha=6.0, correct=correct), "sgd"), layer)
    put(p.A, 3 * randn(3, 6, seed=8))
    optimizer, Z = handle.optimizer(lr=0.5), X @ p.A.t()
    (model(X) - Y).square().sum().backward()
    handle.after_backward()
    optimizer.step()
    handle.after_step()
    best = torch.linalg.lstsq(Z, Y - X @ W.t()).solution.t() @ p.A
    reached = (handle.update_of("layer").dense().detach() - best).norm() / best.norm()
    assert (reached < 1e-6) if correct else (reached > 10)
