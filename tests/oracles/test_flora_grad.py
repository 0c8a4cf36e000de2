"""Flora, gradient compression by seeded random projections, against its spec (arXiv:2402.03293).

Expectations are means over seeds, with a margin of several standard errors; the rest is exact linear algebra.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rankwise as rw
from rankwise.steps.flora_grad import CompressedAccumulation
from rankwise.steps.projector import Projection
from rankwise.steps.random_projection import projection_of
from tests.oracles.tools_projection import Run, stream
from tests.oracles.tools_training import SITE, adapted, normal, put, relative, with_spectrum

SHAPES = [(6, 9), (9, 6)]


def projection(m: int, n: int, rank: int, seed: int) -> Projection:
    return projection_of(m, n, rank, seed, device=torch.device("cpu"), dtype=torch.float64)


@pytest.mark.parametrize(("m", "n"), [(20, 24), (24, 20)])
def test_1_compression_is_unbiased_with_the_variance_of_its_rank(m: int, n: int) -> None:
    rank, seeds, G = 4, 2000, normal(0, m, n)
    mean, square = torch.zeros_like(G), 0.0
    for seed in range(seeds):
        chosen = projection(m, n, rank, seed)
        small = chosen.down(G)
        assert small.shape == ((rank, n) if m < n else (m, rank))
        back = chosen.up(small)
        mean += back / seeds
        square += float((back - G).square().sum()) / seeds
    expected = (min(m, n) + 1) / rank * float(G.square().sum())
    assert square == pytest.approx(expected, rel=0.04)
    assert relative(mean, G) < 2 * (expected / float(G.square().sum()) / seeds) ** 0.5


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_2_compression_is_linear(m: int, n: int) -> None:
    first, second, chosen = normal(1, m, n), normal(2, m, n), projection(m, n, 3, 5)
    assert relative(chosen.down(first + second), chosen.down(first) + chosen.down(second)) < 1e-6


def accumulated(micro_batches: list[Tensor], rank: int = 3, seed: int = 0, rounds: int = 1) -> list[Tensor]:
    """`.grad` after each round of micro-batches, whose gradients are given."""
    weight = torch.nn.Parameter(torch.zeros_like(micro_batches[0]))
    accumulation = CompressedAccumulation([weight], rank, seed)
    found = []
    for _ in range(rounds):
        for G in micro_batches:
            (weight * G).sum().backward()
        accumulation.decompress()
        found.append(weight.grad.clone())
        weight.grad = None
    return found


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_2_accumulating_micro_batches_compresses_their_mean(m: int, n: int) -> None:
    batches = [normal(3 + k, m, n) for k in range(4)]
    (one,), (other,) = accumulated(batches), accumulated([sum(batches) / 4])
    assert relative(one, other) < 1e-6
    assert int(torch.linalg.matrix_rank(one, rtol=1e-9)) == 3


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_3_one_micro_batch_is_projected_down_and_up(m: int, n: int) -> None:
    """RᵀR is read off the gradient that is the identity."""
    small = min(m, n)
    identity, G = torch.eye(m, n, dtype=torch.float64), normal(7, m, n)
    (read,), (found,) = accumulated([identity]), accumulated([G])
    RR = read[:small, :small]
    assert relative(found, RR @ G if m < n else G @ RR) < 1e-6
    assert relative(RR, RR.T) < 1e-12
    assert float(torch.linalg.eigvalsh(RR).min()) > -1e-12
    assert int(torch.linalg.matrix_rank(RR, rtol=1e-9)) == 3


def test_3_every_round_has_its_own_projection() -> None:
    first, second = accumulated([normal(8, 6, 9)], rounds=2)
    both = torch.cat([first, second], dim=1)
    assert int(torch.linalg.matrix_rank(both, rtol=1e-9)) == 6


def test_3_large_ranks_converge_at_the_root_of_the_rank() -> None:
    m, n = 20, 25
    G, errors = normal(9, m, n), {}
    for rank in (100, 1600):
        found = [projection(m, n, rank, seed) for seed in range(20)]
        errors[rank] = sum(relative(chosen.up(chosen.down(G)), G) for chosen in found) / 20
        assert errors[rank] == pytest.approx((21 / rank) ** 0.5, rel=0.1)
    assert errors[100] / errors[1600] == pytest.approx(4.0, rel=0.1)


def adafactor(gradients: list[Tensor], clip: float) -> Tensor:
    """The direction after these gradients: factored second moment with decay 1 - t^-0.8, clipped by its root mean square."""
    rows, columns = torch.zeros(gradients[0].shape[0]).double(), torch.zeros(gradients[0].shape[1]).double()
    for t, G in enumerate(gradients, start=1):
        beta = 1 - t**-0.8
        square = G**2 + 1e-30
        rows, columns = beta * rows + (1 - beta) * square.mean(dim=1), beta * columns + (1 - beta) * square.mean(dim=0)
    U = gradients[-1] / (torch.outer(rows, columns) / rows.mean()).sqrt()
    return U / max(1.0, float(U.square().mean().sqrt()) / clip)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_4_without_momentum_it_is_adafactor(m: int, n: int, clip: float) -> None:
    recipe = rw.catalog.flora_grad(rank=2, interval=3, momentum=0.0, clip=clip)
    gradient = stream(10, m, n)
    run = Run(recipe, lambda t, W: 10.0 ** (t % 3) * gradient(t, W), 8, weight=normal(11, m, n), lr=0.01)
    for t in range(8):
        assert relative(run.directions[t], adafactor(run.gradients[: t + 1], clip)) < 1e-9
        assert float(run.directions[t].square().mean().sqrt()) <= clip * (1 + 1e-9)


@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_4_scaled_to_the_parameter_it_is_adafactor_so_scaled(size: float) -> None:
    recipe = rw.catalog.flora_grad(rank=2, momentum=0.0, scale_parameter=True)
    run = Run(recipe, stream(12, 6, 9), 4, weight=size * normal(13, 6, 9), lr=1e-3)
    for t in range(4):
        factor = max(1e-3, float(run.path[t].square().mean().sqrt()))
        assert relative(run.directions[t], factor * adafactor(run.gradients[: t + 1], 1.0)) < 1e-9


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_4_without_momentum_and_preconditioner_it_is_sgd(m: int, n: int) -> None:
    recipe = rw.catalog.flora_grad(rank=2, interval=2, momentum=0.0, base="sgd", clip=1e30)
    run = Run(recipe, stream(14, m, n), 6, weight=normal(15, m, n))
    for direction, G in zip(run.directions, run.gradients, strict=True):
        assert relative(direction, G) < 1e-12


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_5_a_seed_gives_the_same_projection_to_the_bit(m: int, n: int) -> None:
    first, again, other = projection(m, n, 2, 7), projection(m, n, 2, 7), projection(m, n, 2, 8)
    for one, two, three in zip(first, again, other, strict=True):
        if one is not None:
            assert torch.equal(one, two)
            assert not torch.equal(one, three)
    runs = [
        Run(rw.catalog.flora_grad(rank=2, interval=2, seed=seed), stream(16, m, n), 6, weight=normal(17, m, n), lr=0.1)
        for seed in (4, 4, 5)
    ]
    assert torch.equal(runs[0].path[-1], runs[1].path[-1])
    assert not torch.equal(runs[0].path[-1], runs[2].path[-1])


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("base", ["adafactor", "sgd"])
def test_5_state_holds_no_projection(m: int, n: int, base: str) -> None:
    run = Run(rw.catalog.flora_grad(rank=2, base=base), stream(18, m, n), 3, weight=normal(19, m, n), lr=0.1)
    assert run.numbers == 2 * max(m, n) + (m + n if base == "adafactor" else 0)


@pytest.mark.parametrize(("m", "n"), [(12, 15), (15, 12)])
def test_6_many_seeds_add_up_to_a_high_rank(m: int, n: int) -> None:
    rank = 2
    G = with_spectrum(20, m, n, [3.0, 2.0, 1.5, 1.2, 1.0])
    total = torch.zeros_like(G)
    for seed in range(4):
        chosen = projection(m, n, rank, seed)
        total = total + chosen.up(chosen.down(G))
        assert int(torch.linalg.matrix_rank(total, rtol=1e-9)) == min((seed + 1) * rank, 5)


def linear_problem() -> tuple[Tensor, Tensor, Tensor]:
    """W_0, x and y of ½‖W x - y‖² / T."""
    return normal(21, 9, 6), normal(22, 20, 6), normal(23, 20, 9)


def test_7_lora_with_a_fixed_a_compresses_gradients() -> None:
    """Exactly, with the gradients that it meets itself; up to O(η²T²) with those of full gradient descent."""
    weight, x, y = linear_problem()
    R = projection(9, 6, 3, 1).Q
    steps, gaps = 8, []
    for lr in (2e-3, 1e-3):
        model, handle = adapted(weight, "lora_fa(rank=3, alpha=3.0) + sgd")
        put_frozen(handle, R)
        optimizer = handle.optimizer(lr)
        W = weight.clone()
        same, full = torch.zeros_like(W), torch.zeros_like(W)
        for _ in range(steps):
            reached = weight + handle.update_of(SITE).dense().detach()
            same += (x @ reached.T - y).T @ x / 20
            G = (x @ W.T - y).T @ x / 20
            full, W = full + G, W - lr * G
            (0.5 * (model(x) - y).square().sum() / 20).backward()
            optimizer.step()
            optimizer.zero_grad()
        change = handle.update_of(SITE).dense().detach()
        assert relative(change, -lr * same @ R.T @ R) < 1e-10
        gaps.append(float((change + lr * full @ R.T @ R).norm()))
    assert gaps[0] / gaps[1] == pytest.approx(4.0, rel=0.1)


def put_frozen(handle: rw.Handle, R: Tensor) -> None:
    """B = 0 and A = R."""
    put(handle, {"B": torch.zeros_like(handle.parameterization(SITE).roles()["B"])})
    with torch.no_grad():
        handle.parameterization(SITE).A.copy_(R)


def test_8_transfer_to_a_new_projection_is_exact_on_average() -> None:
    m, n, rank, seeds = 6, 9, 4, 2000
    old = projection(m, n, rank, 12345)
    C = normal(24, rank, n)
    history, mean = old.up(C), torch.zeros(m, n, dtype=torch.float64)
    for seed in range(seeds):
        new = projection(m, n, rank, seed)
        mean += new.up(new.down(history)) / seeds
    assert relative(mean, history) < 2 * ((m + 1) / rank / seeds) ** 0.5


@pytest.mark.parametrize("interval", [1, 100])
def test_8_momentum_that_is_transferred_decays_as_it_should_on_average(interval: int) -> None:
    """One gradient and then none: later directions are (1 - β) βᵗ times what is left of it."""
    m, n, rank, seeds, momentum = 4, 6, 4, 300, 0.5
    G, zero = normal(25, m, n), torch.zeros(m, n, dtype=torch.float64)
    mean = [zero.clone() for _ in range(4)]
    spaces = []
    for seed in range(seeds):
        recipe = rw.catalog.flora_grad(rank=rank, interval=interval, momentum=momentum, base="sgd", clip=1e30, seed=seed)
        run = Run(recipe, lambda t, W: G if t == 0 else zero, 4, weight=zero)
        for t in range(4):
            mean[t] += run.directions[t] / seeds
        spaces.append(relative(run.directions[3] / momentum**2, run.directions[1]))
    assert relative(mean[0], (1 - momentum) * G) < 1e-10
    for t in range(1, 4):
        spread = (((m + 1) / rank + 1) ** t / seeds) ** 0.5 if interval == 1 else ((m + 1) / rank / seeds) ** 0.5
        assert relative(mean[t], (1 - momentum) * momentum**t * G) < 2 * spread
    assert max(spaces) < 1e-10 if interval == 100 else min(spaces) > 1e-3
