"""ReLoRA against its spec (arXiv:2307.05695)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import rankwise
from rankwise.core.protocols import Restart
from rankwise.procedures.relora import relora_schedule
from tests.oracles.tools_training import SITE, adapted, normal, put, relative, roles_of

M, N, RANK = 20, 16, 3


def recipe(interval: int, extra: str = "", **options) -> rankwise.Recipe:
    more = "".join(f", {key}={value!r}" for key, value in options.items())
    return rankwise.compose(f"relora(rank={RANK}, alpha={2.0 * RANK}, dropout=0.0, interval={interval}{more}){extra}")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_1_function_does_not_move_at_a_restart(dtype: torch.dtype, tolerance: float) -> None:
    model, handle = adapted(normal(0, M, N).to(dtype), recipe(1000))
    put(handle, {"B": normal(1, M, RANK).to(dtype)})
    x = normal(2, 9, N).to(dtype)
    before = model(x).detach().clone()
    handle.apply_({SITE: Restart()})
    assert relative(model(x), before) < tolerance
    assert int(roles_of(handle)["B"].count_nonzero()) == 0
    assert int(roles_of(handle)["A"].count_nonzero()) == RANK * N  # never zero too, or it would stay there


@pytest.mark.parametrize("cycles", [1, 2, 4, 6])
def test_2_rank_grows_by_r_per_cycle(cycles: int) -> None:
    weight = normal(3, M, N)
    model, handle = adapted(weight, recipe(1000))
    for cycle in range(cycles):
        put(handle, {"B": normal(10 + cycle, M, RANK), "A": normal(20 + cycle, RANK, N)})
        handle.apply_({SITE: Restart()})
    change = model(torch.eye(N, dtype=torch.float64)).detach().T - weight
    assert int(torch.linalg.matrix_rank(change, rtol=1e-10)) == min(cycles * RANK, M, N)
    assert relative(handle.update_of(SITE).dense(), change) < 1e-12
    expected = sum(2.0 * normal(10 + c, M, RANK) @ normal(20 + c, RANK, N) for c in range(cycles))
    assert isinstance(expected, Tensor)
    assert relative(change, expected) < 1e-12


def test_3_without_restart_it_is_lora() -> None:
    weight, x, y = normal(4, M, N), normal(5, 30, N), normal(6, 30, M)
    reached = []
    for chosen in (recipe(1000), rankwise.compose(f"lora(rank={RANK}, alpha={2.0 * RANK})")):
        model, handle = adapted(weight, chosen, seed=7)
        optimizer = handle.optimizer(0.01)
        for _ in range(12):
            ((model(x) - y) ** 2).mean().backward()
            handle.after_backward()
            optimizer.step()
            handle.after_step()
            optimizer.zero_grad()
        reached.append(roles_of(handle))
    assert all(torch.equal(reached[0][role], reached[1][role]) for role in ("A", "B"))


def test_4_learning_rate() -> None:
    total, warmup, interval, rise, floor = 100, 8, 20, 5, 0.1
    lr = relora_schedule(total, warmup, interval, rise, floor)

    def envelope(t: float) -> float:
        return floor + (1 - floor) / 2 * (1 + math.cos(math.pi * (t - warmup) / (total - warmup)))

    def reference(t: int) -> float:
        if t < warmup:
            return t / warmup
        q = t % interval
        if q < rise and t >= interval:
            return q / rise * envelope(t // interval * interval + rise)
        return envelope(t)

    for t in range(total):
        assert lr(t) == pytest.approx(reference(t), abs=1e-12)
    for k in range(1, 5):
        assert lr(k * interval) == 0.0
        assert lr(k * interval + rise) == pytest.approx(envelope(k * interval + rise), abs=1e-12)
    for t in range(1, total):
        if t % interval:  # no jump beyond the steepest slope
            assert abs(lr(t) - lr(t - 1)) <= max(1 / warmup, 1 / rise) + 1e-12
    assert envelope(total) == pytest.approx(floor)
    assert lr(total - 1) == pytest.approx(floor, abs=1e-2)


def moments_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    return [state for state in optimizer.state[parameter].values() if state.shape == parameter.shape and state.dim()]


def train(
    model: torch.nn.Module, handle: rankwise.Handle, optimizer: torch.optim.Optimizer, steps: int, *, seed: int = 8
) -> None:
    for t in range(steps):
        optimizer.zero_grad()
        x = normal(seed + t, 30, N)
        (model(x) * normal(seed + 100 + t, 30, M)).sum().backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()


@pytest.mark.parametrize("q", [0.5, 0.8, 0.9])
def test_5_pruned_moments(q: float) -> None:
    model, handle = adapted(normal(9, M, N), recipe(1000, moments=q))
    optimizer = handle.optimizer(0.01)
    train(model, handle, optimizer, 6)
    roles = handle.parameterization(SITE).roles()
    before = {role: [state.clone() for state in moments_of(optimizer, roles[role])] for role in roles}
    handle.apply_({SITE: Restart(q)})
    roles = handle.parameterization(SITE).roles()
    masks = []
    for role in ("A", "B"):
        after = moments_of(optimizer, roles[role])
        assert len(after) == 2
        for old, new in zip(before[role], after, strict=True):
            keep = new != 0
            size = (1 - q) * new.numel()
            assert int(keep.sum()) in (math.floor(size), round(size), math.ceil(size))
            assert torch.equal(new[keep], old[keep])  # what is kept is kept as it was
            assert float(old[keep].abs().min()) >= float(old[~keep].abs().max())  # and it is the largest
            masks.append(keep)
    assert not torch.equal(masks[0], masks[1]) or not torch.equal(masks[2], masks[3])  # the two moments are pruned apart


def test_5_reset_zeroes_both_moments() -> None:
    model, handle = adapted(normal(10, M, N), recipe(5))
    optimizer = handle.optimizer(0.01)
    train(model, handle, optimizer, 5)
    for parameter in handle.parameterization(SITE).roles().values():
        assert len(moments_of(optimizer, parameter)) == 2
        assert all(int(state.count_nonzero()) == 0 for state in moments_of(optimizer, parameter))


@pytest.mark.parametrize(("beta2", "size"), [(0.95, 0.447), (0.999, 3.16)])
def test_6_first_step_after_a_reset(beta2: float, size: float) -> None:
    """The spec's size holds once the bias corrections 1 - b^t are gone: at t = 401 for 0.95, at t > 5000 for 0.999."""
    lr, interval = 1e-3, 400
    model, handle = adapted(normal(11, M, N), recipe(interval))
    optimizer = handle.optimizer(lr, betas=(0.9, beta2))
    train(model, handle, optimizer, interval)
    before = roles_of(handle)
    train(model, handle, optimizer, 1, seed=5000)
    after = roles_of(handle)
    assert torch.equal(after["A"], before["A"])
    t = interval + 1
    corrected = (1 - 0.9) / (1 - 0.9**t) / ((1 - beta2) / (1 - beta2**t)) ** 0.5
    moved = (after["B"] - before["B"]).abs() / lr
    assert torch.allclose(moved, torch.full_like(moved, corrected), rtol=1e-4)
    assert (1 - 0.9) / (1 - beta2) ** 0.5 == pytest.approx(size, rel=2e-3)
    if beta2 == 0.95:  # corrections are gone by now
        assert torch.allclose(moved, torch.full_like(moved, size), rtol=2e-3)


def test_7_gradient_at_a_restart() -> None:
    weight = normal(12, M, N)
    model, handle = adapted(weight, recipe(1000))
    put(handle, {"B": normal(13, M, RANK)})
    handle.apply_({SITE: Restart()})
    x, cotangent = normal(14, 9, N), normal(15, 9, M)
    (model(x) * cotangent).sum().backward()
    roles = handle.parameterization(SITE).roles()
    assert roles["A"].grad is not None
    assert roles["B"].grad is not None
    assert int(roles["A"].grad.count_nonzero()) == 0
    assert relative(roles["B"].grad, 2.0 * cotangent.T @ x @ roles["A"].detach().T) < 1e-12


def test_restarts_come_every_interval() -> None:
    model, handle = adapted(normal(16, M, N), recipe(4))
    optimizer, zeros = handle.optimizer(0.01), []
    for t in range(12):
        train(model, handle, optimizer, 1, seed=300 + t)
        zeros.append(int(roles_of(handle)["B"].count_nonzero()) == 0)
    assert [t + 1 for t, zero in enumerate(zeros) if zero] == [4, 8, 12]
