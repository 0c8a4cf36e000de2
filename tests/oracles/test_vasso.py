"""VaSSO against its spec (arXiv:2309.15639): SAM along an exponential moving average of the first-pass gradients.

The average itself is read off the moves: a coordinate whose gradient is always 1 has an average of exactly 1, so the ratio of
two coordinates of ε is the average of the other one. The published accuracies (Claims) are left to the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError
from rankwise.perturbations.sharpness import SharpnessAware
from tests.oracles.tools_training import SITE, adapted, block_of, drawn, normal, put, relative, roles_of

M, N, RANK = 4, 3, 2
Blocks = dict[str, dict[str, nn.Parameter]]


def averaging(theta: float, rho: float = 0.1) -> SharpnessAware:
    return SharpnessAware(rho=rho, direction="average", theta=theta)


def two_layers() -> Blocks:
    """Tensors of different sizes in two layers, so that a norm per tensor or per layer shows."""
    return {
        "one": block_of(B=normal(1, M, RANK), A=normal(2, RANK, N)),
        "two": block_of(B=10 * normal(3, 2, 1), A=normal(4, 1, 5)),
    }


def give(blocks: Blocks, gradient: Tensor) -> None:
    """Cuts a flat gradient into the tensors' `.grad`."""
    start = 0
    for block in blocks.values():
        for tensor in block.values():
            tensor.grad = gradient[start : start + tensor.numel()].reshape(tensor.shape).clone()
            start += tensor.numel()
    assert start == len(gradient)


def flat(blocks: Blocks) -> Tensor:
    return torch.cat([tensor.detach().flatten().clone() for block in blocks.values() for tensor in block.values()])


def moved(perturbation: SharpnessAware, blocks: Blocks, gradient: Tensor) -> Tensor:
    """ε of one optimizer step with this first-pass gradient, as one vector; the second pass has other gradients."""
    give(blocks, gradient)
    before = flat(blocks)
    perturbation.move(blocks, learning_rate=0.1)
    epsilon = flat(blocks) - before
    give(blocks, 1e3 * gradient.flip(0))
    perturbation.restore(blocks)
    assert torch.equal(flat(blocks), before)
    perturbation.advance()
    return epsilon


def moves(perturbation: SharpnessAware, gradients: Sequence[Tensor]) -> list[Tensor]:
    blocks = two_layers()
    return [moved(perturbation, blocks, gradient) for gradient in gradients]


def noisy(count: int, *, seed: int = 9, mean: float = 1.0, noise: float = 2.0) -> list[Tensor]:
    size = len(flat(two_layers()))
    generator = drawn(seed)
    center = mean * torch.randn(size, generator=generator, dtype=torch.float64)
    return [center + noise * torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(count)]


def trained(recipe: str, loss: Callable[[nn.Module, int], Tensor], lr: float, steps: int) -> list[dict[str, Tensor]]:
    model, handle = adapted(normal(0, M, N), recipe, seed=1)
    optimizer, reached = handle.optimizer(lr), [roles_of(handle)]
    for t in range(steps):
        handle.backward(lambda t=t: loss(model, t))
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
        reached.append(roles_of(handle))
    return reached


def fit(model: nn.Module, t: int) -> Tensor:
    """Another batch in every step."""
    return ((model(normal(100 + t, 10, N)) - normal(200 + t, 10, M)) ** 2).mean()


@pytest.mark.parametrize("step", ["adamw", "sgd"])
def test_1_theta_one_is_sam_step_by_step(step: str) -> None:
    expected = trained(f"lora(rank={RANK}) + {step} + sam(rho=0.1)", fit, 0.05, 8)
    found = trained(f"lora(rank={RANK}) + {step} + vasso(rho=0.1, theta=1.0)", fit, 0.05, 8)
    other = trained(f"lora(rank={RANK}) + {step} + vasso(rho=0.1, theta=0.3)", fit, 0.05, 8)
    for one, two in zip(found, expected, strict=True):
        assert all(float((one[role] - two[role]).abs().max()) < 1e-7 for role in two)
    assert max(relative(other[-1][role], expected[-1][role]) for role in "BA") > 1e-4


@pytest.mark.parametrize("theta", [1.0, 0.9, 0.3, 1e-3])
def test_2_a_constant_gradient_gives_the_move_of_sam(theta: float) -> None:
    gradient = noisy(1)[0]
    (expected,) = moves(SharpnessAware(rho=0.1), [gradient])
    for found in moves(averaging(theta), [gradient] * 12):
        assert relative(found, expected) < 1e-12


def reference(gradients: Sequence[Tensor], theta: float, rho: float) -> list[Tensor]:
    """ρ d/‖d‖ with d_0 = g_0, no bias correction, theta times the new gradient."""
    average, found = gradients[0], []
    for t, gradient in enumerate(gradients):
        if t:
            average = (1 - theta) * average + theta * gradient
        found.append(rho * average / torch.linalg.norm(average))
    return found


@pytest.mark.parametrize("theta", [0.9, 0.2])
def test_definition_of_the_average(theta: float) -> None:
    """Only what is in `.grad` when the move is made enters it: the second pass leaves gradients a thousand times larger."""
    gradients = noisy(10)
    for found, expected in zip(moves(averaging(theta), gradients), reference(gradients, theta, 0.1), strict=True):
        assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("theta", [0.9, 0.3])
def test_definition_of_the_whole_step(theta: float) -> None:
    """w <- w - η ∇L_t(w + ε) on quadratics of another center in every step."""
    rho, lr, root = 0.3, 0.05, normal(3, M * N, M * N)
    H = root @ root.T / (M * N) + torch.eye(M * N, dtype=torch.float64)

    def loss(model: nn.Module, t: int) -> Tensor:
        w = model(torch.eye(N, dtype=torch.float64)).T.reshape(-1) - normal(300 + t, M * N)
        return 0.5 * w @ H @ w

    reached = trained(f"full + sgd + vasso(rho={rho}, theta={theta})", loss, lr, 12)
    w, average = reached[0]["weight"].reshape(-1), torch.zeros(M * N, dtype=torch.float64)
    for t, found in enumerate(reached[1:]):
        g = H @ (w - normal(300 + t, M * N))
        average = g if t == 0 else (1 - theta) * average + theta * g
        w = w - lr * H @ (w + rho * average / torch.linalg.norm(average) - normal(300 + t, M * N))
        assert relative(found["weight"].reshape(-1), w) < 1e-7


@pytest.mark.parametrize("theta", [0.2, 0.9])
def test_3_the_variance_is_suppressed(theta: float) -> None:
    """v θ/(2 - θ), over 2000 coordinates and 40 steps after 100; the standard error is below 1 %."""
    size, mean, v, generator = 2000, 0.7, 4.0, drawn(6)
    blocks, perturbation, averages = {SITE: block_of(weight=torch.zeros(1, size + 1).double())}, averaging(theta), []
    for t in range(140):
        gradient = mean + v**0.5 * torch.randn(size + 1, generator=generator, dtype=torch.float64)
        gradient[0] = 1.0
        epsilon = moved(perturbation, blocks, gradient)
        if t >= 100:
            averages.append(epsilon[1:] / epsilon[0])
    d = torch.stack(averages)
    assert float(d.mean()) == pytest.approx(mean, abs=0.05)
    assert float((d - mean).square().mean()) == pytest.approx(v * theta / (2 - theta), rel=0.05)


@pytest.mark.parametrize("theta", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e5])
def test_4_the_move_has_length_rho(theta: float, size: float) -> None:
    found = moves(averaging(theta, rho=0.07), [size * gradient for gradient in noisy(8)])
    assert all(float(torch.linalg.norm(epsilon)) == pytest.approx(0.07, rel=1e-4) for epsilon in found)


def test_4_the_norm_is_over_tensors_that_have_a_gradient() -> None:
    blocks, perturbation = two_layers(), averaging(0.5, rho=0.07)
    first, second = noisy(2)
    moved(perturbation, blocks, first)
    give(blocks, second)
    for tensor in blocks["two"].values():
        tensor.grad = None
    before = flat(blocks)
    perturbation.move(blocks, learning_rate=0.1)
    epsilon = flat(blocks) - before
    perturbation.restore(blocks)
    size = M * RANK + RANK * N
    average = 0.5 * (first + second)[:size]
    assert relative(epsilon[:size], 0.07 * average / torch.linalg.norm(average)) < 1e-6
    assert not epsilon[size:].any()


def test_5_without_theta_the_first_direction_stays() -> None:
    gradients = noisy(20)
    expected = 0.1 * gradients[0] / torch.linalg.norm(gradients[0])
    for found in moves(averaging(1e-12), gradients):
        assert relative(found, expected) < 1e-6
    assert relative(moves(averaging(0.2), gradients)[-1], expected) > 0.1


@pytest.mark.parametrize("theta", [-0.1, 1.5])
def test_5_theta_is_a_share(theta: float) -> None:
    with pytest.raises(ArgumentError, match="theta"):
        averaging(theta)


def test_6_the_friendly_adversary() -> None:
    """L_t(w) = ½‖w - ξ_t‖², ‖w‖ = 5, noise 5: VaSSO is the weaker adversary of the batch, the stronger one of the mean."""
    size, count, rho, generator = 50, 1000, 0.5, drawn(1)
    w = torch.randn(size, generator=generator, dtype=torch.float64)
    w *= 5 / torch.linalg.norm(w)
    makers = {"sam": SharpnessAware(rho=rho), "vasso": averaging(0.2, rho=rho)}
    blocks = {name: {SITE: block_of(weight=w[None])} for name in makers}
    cosines: dict[str, list[float]] = {name: [] for name in makers}
    batch: dict[str, list[float]] = {name: [] for name in makers}
    mean: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(count):
        gradient = w - 5 * torch.randn(size, generator=generator, dtype=torch.float64)
        for name, perturbation in makers.items():
            epsilon = moved(perturbation, blocks[name], gradient)
            batch[name].append(float(gradient @ epsilon + 0.5 * epsilon @ epsilon))  # L_t(w + ε) - L_t(w)
            mean[name].append(float(w @ epsilon + 0.5 * epsilon @ epsilon))  # of the expectation of L
            cosines[name].append(float(w @ epsilon / rho / 5))
    assert all(one >= two - 1e-9 for one, two in zip(batch["sam"], batch["vasso"], strict=True))
    assert sum(batch["vasso"]) < 0.9 * sum(batch["sam"])
    assert sum(one < two for one, two in zip(mean["sam"], mean["vasso"], strict=True)) >= 0.96 * count
    assert sum(cosines["sam"]) / count == pytest.approx(0.15, abs=0.03)
    assert sum(cosines["vasso"]) / count == pytest.approx(0.41, abs=0.05)


def test_the_average_is_resumed() -> None:
    """It must not begin anew with a checkpoint, nor with an epoch."""
    gradients, blocks = noisy(6), two_layers()
    whole = moves(averaging(0.3), gradients)
    first, second = averaging(0.3), averaging(0.3)
    for gradient in gradients[:3]:
        moved(first, blocks, gradient)
    second.load_state_dict(first.state_dict())
    for gradient, expected in zip(gradients[3:], whole[3:], strict=True):
        assert relative(moved(second, blocks, gradient), expected) < 1e-12


@pytest.mark.parametrize("over", ["all", "factors"])
def test_factors_alone(over: str) -> None:
    """`over="factors"` leaves a head that is trained beside the adapter where it is, and out of the norm."""
    model = nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, 2)).double()
    recipe = rankwise.compose(f"lora(rank=2) + sgd + vasso(rho=0.1, theta=0.5, over='{over}')")
    handle = rankwise.adapt_(model, recipe, where=["0"], train_also=["2"])
    put(handle, {"B": normal(15, M, 2)}, "0")
    handle.optimizer(0.0)
    x, factors = normal(14, 5, N), list(handle.blocks()["0"].values())
    head = [tensor for tensor in model.parameters() if tensor.requires_grad and all(tensor is not f for f in factors)]
    start = [[tensor.detach().clone() for tensor in group] for group in (factors, head)]
    lengths: list[list[float]] = []

    def loss() -> Tensor:
        squares = [
            sum(float((new.detach() - old).square().sum()) for new, old in zip(group, olds, strict=True))
            for group, olds in zip((factors, head), start, strict=True)
        ]
        lengths.append(squares)
        return model(x).pow(2).sum()

    handle.backward(loss)
    assert len(head) == 2
    assert lengths[0] == [0.0, 0.0]
    assert len(lengths) == 2
    if over == "factors":
        assert lengths[1] == [pytest.approx(0.01, rel=1e-6), 0.0]
    else:
        assert sum(lengths[1]) == pytest.approx(0.01, rel=1e-6)
        assert min(lengths[1]) > 0
