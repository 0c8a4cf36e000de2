"""LoRA-GGPO against its spec (arXiv:2502.14538): Gaussian noise on the whole weight in training, sized per row.

The noise is read off a forward of the identity inside the step: y = (W' + E) I. One E holds for a whole optimizer step. Sizes
and moments use many rows or long rows, so that a few hundred steps see 5 %. Published scores are left to the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rankwise
from rankwise.core.handle import Handle
from rankwise.perturbations.ggpo import gradient_row_squares, product_row_squares, row_variances
from tests.oracles.tools_training import SITE, adapted, layer_model, normal, put, relative, roles_of

M, N, RANK, SCALE = 4, 6, 2, 1.5
Noises = list[Tensor]


def begin(
    m: int = M, n: int = N, *, lr: float = 0.0, weight: Tensor | None = None, away: bool = True, step: str = "sgd", **options
):
    """A layer (m, n) with its adapter at a generic point (or at B = 0)."""
    said = ", ".join(f"{key}={value!r}" for key, value in options.items())
    recipe = f"lora(rank={RANK}, alpha={SCALE * RANK}) + {step} + lora_ggpo({said})"
    model, handle = adapted(normal(0, m, n) if weight is None else weight, recipe, seed=1)
    if away:
        put(handle, {"B": normal(1, m, RANK), "A": 0.3 * normal(2, RANK, n)})
    model.train()
    return model, handle, handle.optimizer(lr)


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def effective(model: nn.Sequential, handle: Handle) -> Tensor:
    """W' = W0 + s B A, without noise."""
    return model.get_submodule(SITE).weight.detach() + handle.update_of(SITE).dense().detach()


def linear_loss(cotangent: Tensor) -> Callable[[Tensor], Tensor]:
    """⟨C, W' + E⟩, whose gradient is C whatever the noise is."""
    return lambda weight: (cotangent * weight).sum()


def noises(
    model: nn.Sequential, handle: Handle, optimizer, count: int, loss: Callable[[Tensor], Tensor]
) -> tuple[Noises, Noises]:
    """(E, variances in use) of `count` steps with this loss of the perturbed weight."""
    n = model.get_submodule(SITE).weight.shape[1]
    drawn, used = [], []
    for _ in range(count):
        plain = effective(model, handle)

        def closure(plain: Tensor = plain) -> Tensor:
            weight = model(eye(n)).T
            drawn.append(weight.detach() - plain)
            used.append(handle.perturbation.variances(SITE).detach().clone())
            return loss(weight)

        handle.backward(closure)
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    assert len(drawn) == count  # one backward per step: the closure runs once
    return drawn, used


def row_squares(matrix: Tensor) -> Tensor:
    return matrix.detach().square().sum(dim=1)


@pytest.mark.parametrize("step", ["sgd", "adamw"])
@pytest.mark.parametrize("variant", ["paper", "kohya"])
def test_1_no_noise_is_lora_to_the_bit(step: str, variant: str) -> None:
    reached = []
    base = f"lora(rank={RANK}) + {step}"
    for recipe in (base, f"{base} + lora_ggpo(sigma=0.0, beta=0.0, variant='{variant}')"):
        model, handle = adapted(normal(0, M, N), recipe, seed=1)
        optimizer = handle.optimizer(0.05)
        for t in range(6):
            x, y = normal(10 + t, 8, N), normal(20 + t, 8, M)
            handle.backward(lambda model=model, x=x, y=y: ((model(x) - y) ** 2).mean())
            optimizer.step()
            handle.after_step()
            optimizer.zero_grad()
        reached.append(roles_of(handle))
    assert all(torch.equal(reached[0][role], reached[1][role]) for role in "BA")


def test_1_without_sigma_beta_alone_is_nothing() -> None:
    model, handle, optimizer = begin(sigma=0.0, beta=5.0)
    drawn, used = noises(model, handle, optimizer, 3, linear_loss(normal(3, M, N)))
    assert all(float(E.abs().max()) < 1e-14 for E in drawn)
    assert not any(v.any() for v in used)


def test_2_the_mean_square_of_a_row() -> None:
    """σ²(‖W'_i‖² + β‖G_i‖²) over 60 steps of rows with 300 entries: standard error about 1 %."""
    m, n, sigma, beta, C = 4, 300, 0.2, 0.5, 3 * normal(3, 4, 300)
    model, handle, optimizer = begin(m, n, sigma=sigma, beta=beta)
    B, A = (roles_of(handle)[role] for role in "BA")
    W0 = model.get_submodule(SITE).weight.detach()
    drawn, used = noises(model, handle, optimizer, 61, linear_loss(C))
    G = SCALE * (B @ (SCALE * B.T @ C) + (SCALE * C @ A.T) @ A)  # s (B g_A + g_B A)
    expected = sigma**2 * (row_squares(W0) + SCALE**2 * row_squares(B @ A) + beta * row_squares(G))
    mean = sum(row_squares(E) for E in drawn[1:]) / 60
    assert float((mean / expected - 1).abs().max()) < 0.05
    assert beta * float((row_squares(G) / row_squares(W0)).min()) > 0.3  # the gradient has its part in it
    assert relative(used[-1] * n, expected) < 1e-10
    start = sigma**2 * (row_squares(W0) + SCALE**2 * row_squares(B @ A))  # no gradient has been seen then
    assert relative(used[0] * n, start) < 1e-10
    assert float((row_squares(drawn[0]) / start - 1).abs().max()) < 0.5


def test_2_variances_use_the_last_gradient_and_the_factors_of_now() -> None:
    """With a rate of its own: ‖BA‖ of the current factors, G with the factors at which it was taken; the cross term dropped."""
    sigma, beta = 0.1, 2.0
    model, handle, optimizer = begin(lr=0.05, sigma=sigma, beta=beta)
    W0, C, squares = model.get_submodule(SITE).weight.detach(), normal(3, M, N), torch.zeros(M, dtype=torch.float64)
    for _ in range(4):
        B, A = (roles_of(handle)[role] for role in "BA")
        _, (v,) = noises(model, handle, optimizer, 1, linear_loss(C))
        expected = sigma**2 / N * (row_squares(W0) + SCALE**2 * row_squares(B @ A) + beta * squares)
        assert relative(v, expected) < 1e-10
        squares = row_squares(SCALE**2 * (B @ B.T @ C + C @ A.T @ A))
        C = C + normal(4, M, N)


def test_2_the_function_of_the_variances() -> None:
    W, BA, G = normal(5, M).square(), normal(6, M).square(), normal(7, M).square()
    assert relative(row_variances(W, BA, G, 9, 0.3, 0.2), 0.09 / 9 * (W + BA + 0.2 * G)) < 1e-12


def test_3_output_noise() -> None:
    """Var(y_i) = v_i ‖x‖²: 60 rows in 150 steps, each in units of its own variance; standard error 1.5 %."""
    m, n = 60, 8
    model, handle, optimizer = begin(m, n, sigma=0.3, beta=0.0)
    drawn, used = noises(model, handle, optimizer, 150, linear_loss(normal(3, m, n)))
    x = normal(4, n)
    outputs = torch.stack([(E @ x) / (v.sqrt() * x.norm()) for E, v in zip(drawn, used, strict=True)])
    assert float(outputs.square().mean()) == pytest.approx(1.0, rel=0.05)
    assert abs(float(outputs.mean())) < 0.04
    assert float((outputs**4).mean()) == pytest.approx(3.0, rel=0.15)
    entries = torch.stack([E / v.sqrt()[:, None] for E, v in zip(drawn, used, strict=True)])  # 72 000 of them
    assert float(entries.square().mean()) == pytest.approx(1.0, abs=0.025)
    across = [entries[1:] * entries[:-1], entries[:, 1:] * entries[:, :-1], entries[:, :, 1:] * entries[:, :, :-1]]
    assert all(abs(float(product.mean())) < 0.02 for product in across)  # steps, rows and columns are independent


def test_4_grams_give_the_explicit_norms() -> None:
    B, A, g_B, g_A = normal(1, M, RANK), normal(2, RANK, N), normal(3, M, RANK), normal(4, RANK, N)
    assert relative(product_row_squares(B, A), row_squares(B @ A)) < 1e-12
    assert relative(gradient_row_squares(B, A, g_B, g_A), row_squares(B @ g_A + g_B @ A)) < 1e-12


def test_5_expected_loss_of_a_quadratic() -> None:
    """L = ½ tr((W - W*) K (W - W*)ᵀ) rises by ½ Σ v_i tr K in the mean, from its minimum (no linear part in the samples)."""
    m, n, sigma = 40, 6, 0.3
    model, handle, optimizer = begin(m, n, sigma=sigma, beta=0.0)
    root, goal, rises = normal(5, n, n), effective(model, handle), list[float]()
    K = root @ root.T / n + eye(n)

    def loss(weight: Tensor) -> Tensor:
        value = 0.5 * ((weight - goal) @ K * (weight - goal)).sum()
        rises.append(float(value.detach()))
        return value

    _, used = noises(model, handle, optimizer, 150, loss)
    expected = 0.5 * float(used[0].sum() * K.trace())
    assert sum(rises) / len(rises) == pytest.approx(expected, rel=0.05)


def test_5_the_mean_gradient_of_a_quadratic_is_the_plain_one() -> None:
    model, handle, optimizer = begin(sigma=0.1, beta=0.0)
    root, plain, goal = normal(5, N, N), effective(model, handle), normal(6, M, N)
    K = root @ root.T / N + eye(N)
    block, totals = handle.blocks()[SITE], {role: torch.zeros_like(value) for role, value in roles_of(handle).items()}
    drawn = torch.zeros(M, N, dtype=torch.float64)
    for _ in range(300):

        def closure() -> Tensor:
            weight = model(eye(N)).T
            drawn.add_(weight.detach() - plain)
            return 0.5 * ((weight - goal) @ K * (weight - goal)).sum()

        handle.backward(closure)
        for role, tensor in block.items():
            totals[role] += tensor.grad / 300
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    G, B, A = (plain - goal) @ K, block["B"].detach(), block["A"].detach()
    assert relative(totals["B"], SCALE * G @ A.T) < 0.05
    assert relative(totals["A"], SCALE * B.T @ G) < 0.05
    assert relative(totals["B"], SCALE * (G + drawn / 300 @ K) @ A.T) < 1e-9  # E itself is a constant of the backward
    assert relative(totals["A"], SCALE * B.T @ (G + drawn / 300 @ K)) < 1e-9


def test_6_rows_scale_with_the_weight() -> None:
    """β = 0, B A = 0: the row of a c times larger weight has c times the noise, the others the same."""
    weight = normal(0, M, N)
    larger = weight.clone()
    larger[2] *= 3.5
    results = []
    for W in (weight, larger):
        model, handle, optimizer = begin(weight=W, away=False, sigma=0.3, beta=0.0)
        results.append(noises(model, handle, optimizer, 2, linear_loss(torch.zeros(M, N, dtype=torch.float64))))
    factor = torch.ones(M, dtype=torch.float64)
    factor[2] = 3.5
    for one, two in zip(results[0][1], results[1][1], strict=True):
        assert relative(two, one * factor**2) < 1e-12
    for one, two in zip(results[0][0], results[1][0], strict=True):
        assert relative(two, one * factor[:, None]) < 1e-12
        assert float(one.abs().min()) > 0


@pytest.mark.parametrize("checkpointed", [False, True])
def test_7_backward_meets_the_noise_of_the_forward(checkpointed: bool) -> None:
    """dL/dx is (W' + E)ᵀ dy, by finite differences within the step, also where a checkpoint runs the forward again."""
    model, handle, optimizer = begin(sigma=0.5, beta=0.1)
    noises(model, handle, optimizer, 2, linear_loss(normal(3, M, N)))
    x = normal(7, 5, N).requires_grad_()
    checks = []

    def loss(values: Tensor) -> Tensor:
        output = checkpoint(model, values, use_reentrant=False) if checkpointed else model(values)
        return torch.sin(output).sum()

    def closure() -> Tensor:
        value = loss(x)
        (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
        with torch.no_grad():
            weight = model(eye(N)).T
            numbers = torch.zeros_like(x)
            for i in range(5):
                for j in range(N):
                    e = torch.zeros_like(x)
                    e[i, j] = 1e-5
                    numbers[i, j] = (torch.sin(model(x + e)).sum() - torch.sin(model(x - e)).sum()) / 2e-5
            checks.append((gradient, numbers, torch.cos(x @ weight.T) @ weight))
            assert relative(weight, effective(model, handle)) > 0.05
        return value

    handle.backward(closure)
    for gradient, numbers, formula in checks:
        assert relative(gradient, numbers) < 1e-4
        assert relative(gradient, formula) < 1e-10
    assert len(checks) == 1
    assert relative(x.grad, checks[0][2]) < 1e-10


def test_7_factors_get_the_gradient_at_the_noisy_weight() -> None:
    model, handle, _ = begin(sigma=0.5, beta=0.0)
    block, seen = handle.blocks()[SITE], []

    def closure() -> Tensor:
        weight = model(eye(N)).T
        seen.append(weight.detach())
        return (weight**3).sum()

    handle.backward(closure)
    G = 3 * seen[0] ** 2
    assert relative(block["B"].grad, SCALE * G @ block["A"].detach().T) < 1e-10
    assert relative(block["A"].grad, SCALE * block["B"].detach().T @ G) < 1e-10
    assert set(block) == {"A", "B"}


def test_eval_and_export_have_no_noise() -> None:
    model, handle, optimizer = begin(sigma=0.5, beta=0.5)
    noises(model, handle, optimizer, 2, linear_loss(normal(3, M, N)))
    B, A, W0 = *(roles_of(handle)[role] for role in "BA"), model.get_submodule(SITE).weight.detach().clone()
    assert relative(handle.update_of(SITE).dense(), SCALE * B @ A) < 1e-12
    plain, other = adapted(normal(0, M, N), f"lora(rank={RANK}, alpha={SCALE * RANK})", seed=1)
    put(other, {"B": B, "A": A})
    x = normal(8, 5, N)
    model.eval()
    assert torch.equal(model(x), plain.eval()(x))
    handle.merge_()
    assert relative(model.get_submodule(SITE).weight, W0 + SCALE * B @ A) < 1e-12


def test_layers_steps_and_seeds_have_their_own_noise() -> None:
    def run(seed: int) -> list[Tensor]:
        model = layer_model(normal(0, N, N), other=normal(0, N, N))
        handle = rankwise.adapt_(model, rankwise.compose(f"lora(rank=2) + sgd + lora_ggpo(sigma=0.3, seed={seed})"), seed=1)
        optimizer, found = handle.optimizer(0.0), []
        model.train()
        for _ in range(2):

            def closure() -> Tensor:
                found.extend(layer(eye(N)).detach().T - normal(0, N, N) for layer in model)
                return model(eye(N)).sum()

            handle.backward(closure)
            optimizer.step()
            handle.after_step()
            optimizer.zero_grad()
        return found

    first = run(0)
    assert all(torch.equal(one, two) for one, two in zip(first, run(0), strict=True))
    everything = first + run(1)
    for i, one in enumerate(everything):
        for two in everything[:i]:
            assert relative(one, two) > 0.5


def test_kohya_has_a_standard_deviation_of_its_own() -> None:
    """(σ w + β‖G_i‖²)/√m with the mean row norm w for every row of W0; at B = 0."""
    sigma, beta, C = 0.2, 0.3, normal(3, M, N)
    model, handle, optimizer = begin(away=False, sigma=sigma, beta=beta, variant="kohya")
    A = roles_of(handle)["A"]
    _, used = noises(model, handle, optimizer, 2, linear_loss(C))
    mean = row_squares(normal(0, M, N)).sqrt().mean()
    squares = row_squares(SCALE**2 * C @ A.T @ A)
    assert relative(used[0].sqrt(), (sigma * mean / M**0.5).expand(M)) < 1e-10
    assert relative(used[1].sqrt(), (sigma * mean + beta * squares) / M**0.5) < 1e-10


def test_the_noise_is_resumed() -> None:
    """Step number and gradient norms belong to the state, so that a resumed run draws the same noise."""
    loss = linear_loss(normal(3, M, N))
    whole, whole_used = noises(*begin(sigma=0.3, beta=0.5), 4, loss)
    first = begin(sigma=0.3, beta=0.5)
    noises(*first, 2, loss)
    second = begin(sigma=0.3, beta=0.5)
    second[1].load_state_dict(first[1].state_dict())
    found, used = noises(*second, 2, loss)
    assert all(relative(one, two) < 1e-12 for one, two in zip(found, whole[2:], strict=True))
    assert all(torch.equal(one, two) for one, two in zip(used, whole_used[2:], strict=True))
