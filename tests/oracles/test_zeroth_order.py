"""Zeroth-order two-point training against its spec (arXiv:2506.05454, MeZO arXiv:2305.17333).

Expectations over u are shown in two halves: the library's estimate equals the formula at the library's own u, and that u is
standard normal; the mean of the formula is then taken over many plain draws. The slow run of oracle 4 (1e5 steps at d = 100)
and the published accuracies are left to the benchmark.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rankwise.core.handle import Handle
from rankwise.perturbations.zeroth_order import ZerothOrder, replay_
from tests.oracles.tools_training import SITE, adapted, block_of, drawn, normal, orthonormal, put, relative, roles_of

M, N, RANK = 4, 3, 2
Blocks = dict[str, dict[str, nn.Parameter]]


def one(value: Tensor) -> Blocks:
    return {SITE: block_of(weight=value)}


def flat(blocks: Blocks) -> Tensor:
    return torch.cat([tensor.detach().flatten().clone() for block in blocks.values() for tensor in block.values()])


def estimate(zeroth: ZerothOrder, blocks: Blocks, loss: Callable[[], Tensor], *, lr: float = 0.1) -> Tensor:
    """g of one step, as one vector."""

    def evaluate() -> Tensor:
        with torch.no_grad():
            return loss()

    zeroth.estimate(blocks, evaluate, learning_rate=lr)
    found = [tensor.grad for block in blocks.values() for tensor in block.values()]
    zeroth.advance()
    assert all(gradient is not None for gradient in found)
    return torch.cat([gradient.flatten().clone() for gradient in found if gradient is not None])


def direction(zeroth: ZerothOrder, blocks: Blocks, seed: int) -> Tensor:
    """u of a seed, as one vector."""
    u = zeroth.direction(blocks, seed)
    return torch.cat([u[site][role].flatten() for site, block in blocks.items() for role in block])


def quadratic(size: int, seed: int = 0) -> tuple[Blocks, Callable[[], Tensor], Tensor]:
    """Two layers with `size` numbers, a quadratic with a linear term, and its gradient there."""
    half = size // 2
    blocks = {
        "one": block_of(B=normal(seed + 1, half, 1), A=normal(seed + 2, 1, 1)),
        "two": block_of(weight=normal(seed + 3, size - half - 1)),
    }
    Q = orthonormal(seed + 4, size, size)
    H = (Q * torch.linspace(0.5, 2.0, size, dtype=torch.float64)) @ Q.T
    b = normal(seed + 5, size)

    def loss() -> Tensor:
        x = torch.cat([tensor.flatten() for block in blocks.values() for tensor in block.values()])
        return 0.5 * x @ H @ x + b @ x

    return blocks, loss, H @ flat(blocks) + b


def train(handle: Handle, closures: list[Callable[[], Tensor]], rates: list[float]) -> list[Tensor]:
    optimizer = handle.optimizer(rates[0])
    losses = []
    for closure, rate in zip(closures, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses.append(handle.backward(closure))
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    return losses


def fit(model: nn.Module, t: int) -> Callable[[], Tensor]:
    x, y = normal(100 + t, 10, N), normal(200 + t, 10, M)
    return lambda: ((model(x) - y) ** 2).mean()


@pytest.mark.parametrize("smoothing", [1.0, 0.1])
def test_1_a_quartic_at_the_librarys_own_draws(smoothing: float) -> None:
    """c = 4x³u + 4λ²x u³ for x⁴, so g = c u."""
    x, zeroth = 0.7, ZerothOrder(smoothing=smoothing, seed=3)
    blocks = one(torch.tensor([x], dtype=torch.float64))
    for _ in range(50):
        g = estimate(zeroth, blocks, lambda: (blocks[SITE]["weight"] ** 4).sum())
        seed, coefficient, _ = zeroth.log[-1]
        u = direction(zeroth, blocks, seed)
        c = 4 * x**3 * u + 4 * smoothing**2 * x * u**3
        assert relative(g, c * u) < 1e-9
        assert float(coefficient) == pytest.approx(float(c), rel=1e-9)


def test_1_the_mean_over_normal_draws_is_the_smoothed_gradient() -> None:
    """E[g] = 4x³ + 12λ²x, from a million draws of the formula."""
    x, smoothing, u = 0.7, 0.3, normal(1, 1_000_000)
    g = ((x + smoothing * u) ** 4 - (x - smoothing * u) ** 4) / (2 * smoothing) * u
    assert float(g.mean()) == pytest.approx(4 * x**3 + 12 * smoothing**2 * x, rel=0.01)


def test_1_directions_are_standard_normal_and_independent() -> None:
    blocks, zeroth = one(torch.zeros(200, 500, dtype=torch.float64)), ZerothOrder(seed=1)
    seeds = []
    for _ in range(2):
        estimate(zeroth, blocks, lambda: blocks[SITE]["weight"].sum())
        seeds.append(zeroth.log[-1][0])
    one_u, two_u = (direction(zeroth, blocks, seed) for seed in seeds)
    for u in (one_u, two_u):  # five standard errors of 1e5 draws each
        assert abs(float(u.mean())) < 5 / 1e5**0.5
        assert abs(float(u.square().mean()) - 1) < 5 * (2 / 1e5) ** 0.5
        assert abs(float((u**4).mean()) - 3) < 5 * (96 / 1e5) ** 0.5
        assert abs(float((u[1:] * u[:-1]).mean())) < 5 / 1e5**0.5
    assert abs(float((one_u * two_u).mean())) < 5 / 1e5**0.5
    assert torch.equal(direction(zeroth, blocks, seeds[0]), one_u)


def test_1_layers_and_roles_have_directions_of_their_own() -> None:
    shape = torch.zeros(30, 30, dtype=torch.float64)
    blocks = {"one": block_of(B=shape, A=shape), "two": block_of(B=shape, A=shape)}
    u = ZerothOrder().direction(blocks, 5)
    vectors = torch.stack([u[site][role].flatten() for site in blocks for role in "BA"])
    correlation = vectors @ vectors.T / 900 - torch.eye(4, dtype=torch.float64)
    assert float(correlation.abs().max()) < 0.25  # the diagonal has a standard error of 0.047, the rest of 0.033


def test_1_the_mean_estimate_of_a_quadratic_is_its_gradient() -> None:
    """Through the library, 600 averages of four directions: an entry's standard error is at most ‖∇‖ √(2/2400)."""
    blocks, loss, gradient = quadratic(4)
    zeroth = ZerothOrder(smoothing=0.5, directions=4, seed=7)
    mean = sum(estimate(zeroth, blocks, loss) for _ in range(600)) / 600
    assert float((mean - gradient).abs().max()) < 5 * (2 / 2400) ** 0.5 * float(gradient.norm())


@pytest.mark.parametrize("smoothing", [1e-2, 0.3, 5.0])
def test_2_quadratics_have_exact_coefficients(smoothing: float) -> None:
    blocks, loss, gradient = quadratic(12)
    zeroth = ZerothOrder(smoothing=smoothing, seed=2)
    for _ in range(20):
        g = estimate(zeroth, blocks, loss)
        seed, coefficient, rate = zeroth.log[-1]
        u = direction(zeroth, blocks, seed)
        assert float(coefficient) == pytest.approx(float(gradient @ u), rel=1e-10, abs=1e-10)
        assert float((g - (gradient @ u) * u).norm()) < 1e-9 * float(gradient.norm() * u.norm() ** 2)
        assert rate == 0.1


def test_2_forward_differences_have_the_curvature_in_them() -> None:
    """c = <∇, u> + (λ/2) uᵀ H u: not exact per sample."""
    blocks, loss, gradient = quadratic(12)
    zeroth = ZerothOrder(smoothing=0.3, difference="forward", seed=2)
    g = estimate(zeroth, blocks, loss)
    u = direction(zeroth, blocks, zeroth.log[-1][0])
    with torch.no_grad():
        value = loss()
        blocks_loss = []
        for factor in (1.0, -1.0):
            start = 0
            for block in blocks.values():
                for tensor in block.values():
                    tensor.add_(factor * 0.3 * u[start : start + tensor.numel()].reshape(tensor.shape))
                    start += tensor.numel()
            blocks_loss.append(loss())
    assert relative(g, (blocks_loss[0] - value) / 0.3 * u) < 1e-9
    assert relative(g, (gradient @ u) * u) > 1e-3


def test_2_the_limit_of_no_smoothing_is_the_directional_derivative() -> None:
    """g = <∇L, u> u on a loss that is not quadratic, to rounding and not to O(λ²)."""
    model, handle = adapted(normal(0, M, N), f"lora(rank={RANK}) + sgd + zeroth_order(smoothing=1.0, difference='derivative')")
    put(handle, {"B": normal(1, M, RANK)})
    handle.optimizer(0.1)
    x = normal(2, 10, N)
    blocks = handle.blocks()
    expected = torch.autograd.grad((model(x) ** 4).mean(), list(blocks[SITE].values()))
    gradient = torch.cat([tensor.flatten() for tensor in expected])
    handle.backward(lambda: (model(x) ** 4).mean())
    u = direction(handle.perturbation, blocks, handle.perturbation.log[-1][0])
    found = torch.cat([tensor.grad.flatten() for tensor in blocks[SITE].values()])
    assert relative(found, (gradient @ u) * u) < 1e-9


def test_2_several_directions_are_averaged() -> None:
    blocks, loss, gradient = quadratic(12)
    zeroth = ZerothOrder(smoothing=0.3, directions=5, seed=2)
    g = estimate(zeroth, blocks, loss)
    assert len(zeroth.log) == 5
    u = torch.stack([direction(zeroth, blocks, seed) for seed, _, _ in zeroth.log])
    assert relative(g, ((u @ gradient)[:, None] * u).mean(0)) < 1e-9


@pytest.mark.parametrize("difference", ["central", "forward"])
def test_2_spheres_give_the_gradient_too(difference: str) -> None:
    """Their estimate of a linear loss is d <∇, u> u/‖u‖², whose mean is ∇: the factor d must not be lost."""
    size = 30
    blocks, gradient = one(normal(5, size)), normal(6, size)
    zeroth = ZerothOrder(smoothing=0.3, distribution="sphere", difference=difference, seed=2)
    lengths = []
    for _ in range(5):
        g = estimate(zeroth, blocks, lambda: blocks[SITE]["weight"] @ gradient)
        u = direction(zeroth, blocks, zeroth.log[-1][0])
        lengths.append(float(u.norm()))
        assert relative(g, size * (gradient @ u) * u / u.norm() ** 2) < 1e-9
    assert max(lengths) - min(lengths) < 1e-9 * max(lengths)


def test_3_the_second_moment() -> None:
    """E‖g‖² = (d + 2)‖∇‖², within 5 % from 3000 draws.

    Of <∇, u>², known to have the mean ‖∇‖², the chance part is divided out; without that 5 % would need 20 times the draws.
    """
    size = 50
    blocks, gradient = one(torch.zeros(size, dtype=torch.float64)), normal(8, size)
    zeroth = ZerothOrder(smoothing=0.5, seed=11)
    squares, coefficients = [], []
    for _ in range(3000):
        g = estimate(zeroth, blocks, lambda: 0.5 * (blocks[SITE]["weight"] + gradient).square().sum())
        squares.append(float(g.square().sum()))
        coefficients.append(float(zeroth.log[-1][1]) ** 2)
    total = float(gradient.square().sum())
    assert sum(coefficients) / 3000 == pytest.approx(total, rel=0.12)  # 4.6 standard errors
    assert sum(squares) / sum(coefficients) == pytest.approx(size + 2, rel=0.05)


def toy(size: int, seed: int) -> tuple[Blocks, Callable[[], Tensor]]:
    """½ (yᵀ z - 1)², whose minima have the trace ‖y‖² + ‖z‖² >= 2."""
    blocks = one(normal(seed, 2, size))
    rows = blocks[SITE]["weight"]
    return blocks, lambda: 0.5 * (rows[0] @ rows[1] - 1) ** 2


def walk(steps: int, lr: float, smoothing: float) -> tuple[float, float, float]:
    """(trace before, loss after, trace after)."""
    blocks, loss = toy(10, 12)
    zeroth, rows = ZerothOrder(smoothing=smoothing, seed=1), blocks[SITE]["weight"]
    before = float(rows.detach().square().sum())
    for _ in range(steps):
        g = estimate(zeroth, blocks, loss, lr=lr)
        with torch.no_grad():
            rows.sub_(lr * g.reshape(rows.shape))
        zeroth.log.clear()
    return before, float(loss()), float(rows.detach().square().sum())


def test_4_flat_minima_are_found() -> None:
    """With λ = 0.3 in place of 0.1 the trace falls nine times as fast, and the loss ends higher."""
    before, loss, after = walk(3000, 0.01, 0.3)
    assert before > 15
    assert after < 3
    assert loss < 0.1


@pytest.mark.slow
def test_4_flat_minima_are_found_in_the_published_setting() -> None:
    before, loss, after = walk(20_000, 0.01, 0.1)
    assert before > 15
    assert after < 3
    assert loss < 1e-3


def test_4_gradient_descent_keeps_the_trace() -> None:
    """d = 100, from a Gaussian start (about 200): it falls while the loss does, and freezes."""
    w = normal(13, 2, 100)
    traces = []
    for _ in range(2000):
        residual = w[0] @ w[1] - 1
        w = w - 0.01 * residual * w.flip(0)
        traces.append(float(w.square().sum()))
    assert traces[-1] > 100
    assert traces[-1] == pytest.approx(traces[999], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"directions": 3}, {"difference": "forward"}, {"distribution": "sphere"}])
def test_5_parameters_come_back_to_the_bit(dtype: torch.dtype, options: dict) -> None:
    blocks = {
        "one": block_of(B=normal(1, 5, 2).to(dtype), A=normal(2, 2, 7).to(dtype)),
        "two": block_of(w=normal(3, 9).to(dtype)),
    }
    before, seen = flat(blocks), []

    def loss() -> Tensor:
        seen.append(flat(blocks))
        return flat(blocks).square().sum()

    estimate(ZerothOrder(smoothing=0.1, **options), blocks, loss)
    assert torch.equal(flat(blocks), before)
    assert flat(blocks).dtype is dtype
    assert any(not torch.equal(x, before) for x in seen)


@pytest.mark.parametrize("options", ["", ", directions=3", ", distribution='sphere'", ", difference='forward'"])
def test_6_the_log_replays_the_run_to_the_bit(options: str) -> None:
    recipe = f"lora(rank={RANK}) + sgd + zeroth_order(smoothing=0.01{options})"
    model, handle = adapted(normal(0, M, N), recipe, seed=1)
    start = roles_of(handle)
    train(handle, [fit(model, t) for t in range(15)], [0.02 * 0.9**t for t in range(15)])
    log = json.loads(json.dumps(handle.perturbation.log))  # a list of scalars, to be shipped as text
    assert all(len(entry) == 3 for entry in log)
    other, again = adapted(normal(0, M, N), recipe, seed=1)
    assert all(torch.equal(tensor, start[role]) for role, tensor in roles_of(again).items())
    replay_(again, [tuple(entry) for entry in log])
    for role, tensor in roles_of(handle).items():
        assert torch.equal(roles_of(again)[role], tensor)
        assert not torch.equal(tensor, start[role])
    x = normal(3, 4, N)
    assert torch.equal(model(x), other(x))


def test_6_other_seeds_go_elsewhere() -> None:
    ends = []
    for seed in (0, 1, 0):
        model, handle = adapted(normal(0, M, N), f"lora(rank={RANK}) + sgd + zeroth_order(smoothing=0.01, seed={seed})", seed=1)
        train(handle, [fit(model, t) for t in range(4)], [0.02] * 4)
        ends.append(roles_of(handle)["B"])
    assert torch.equal(ends[0], ends[2])
    assert not torch.equal(ends[0], ends[1])


@pytest.mark.parametrize(
    ("options", "calls"),
    [("", 2), (", directions=3", 6), (", difference='forward'", 2), (", directions=3, difference='forward'", 4)],
)
def test_7_two_forwards_and_no_graph(options: str, calls: int) -> None:
    model, handle = adapted(normal(0, M, N), f"lora(rank={RANK}) + sgd + zeroth_order(smoothing=0.01{options})", seed=1)
    put(handle, {"B": normal(1, M, RANK)})
    optimizer, x, seen = handle.optimizer(0.01), normal(2, 10, N), []
    model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))

    def closure() -> Tensor:
        output = model(x)
        assert not output.requires_grad
        assert output.grad_fn is None
        return output.square().mean()

    with torch.no_grad():
        plain = model(x).square().mean()
    seen.clear()
    for _ in range(3):
        before = len(seen)
        loss = handle.backward(closure)
        assert len(seen) - before == calls
        assert not loss.requires_grad
        assert loss.dim() == 0
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
        if before == 0:
            assert float(loss) == pytest.approx(float(plain), rel=0.3)
    assert not any(seen)


def test_7_both_forwards_see_one_function() -> None:
    """Another dropout mask in the second forward would give a coefficient of the order 1/λ."""
    recipe = f"lora(rank={RANK}, dropout=0.5) + sgd + zeroth_order(smoothing=1e-6)"
    model, handle = adapted(normal(0, M, N), recipe, seed=1)
    put(handle, {"B": normal(1, M, RANK)})
    model.train()
    losses = [fit(model, t) for t in range(5)]
    train(handle, losses, [1e-3] * 5)
    assert all(abs(float(coefficient)) < 1e3 for _, coefficient, _ in handle.perturbation.log)
    assert any(abs(float(coefficient)) > 1e-3 for _, coefficient, _ in handle.perturbation.log)
    assert model.training


def test_a_resumed_run_goes_on_to_the_bit() -> None:
    recipe = f"lora(rank={RANK}) + sgd + zeroth_order(smoothing=0.01)"
    model, handle = adapted(normal(0, M, N), recipe, seed=1)
    train(handle, [fit(model, t) for t in range(8)], [0.02] * 8)
    first_model, first = adapted(normal(0, M, N), recipe, seed=1)
    train(first, [fit(first_model, t) for t in range(4)], [0.02] * 4)
    second_model, second = adapted(normal(0, M, N), recipe, seed=1)
    put(second, roles_of(first))
    second.load_state_dict(first.state_dict())
    train(second, [fit(second_model, t) for t in range(4, 8)], [0.02] * 4)
    assert all(torch.equal(tensor, roles_of(second)[role]) for role, tensor in roles_of(handle).items())


def test_generators_of_the_caller_are_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    blocks, loss, _ = quadratic(12)
    estimate(ZerothOrder(seed=drawn(1).initial_seed()), blocks, loss)
    assert torch.equal(torch.rand(3), expected)
