"""Oracles of ReLoRA: restarts, what they do to the function, the rank, the moments and the learning rate."""

import math

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.procedures.relora import relora_schedule

M, N, RANK = 20, 16, 3


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(N, M, dtype=torch.float64))


def begin(*, lr: float = 0.05, interval: int = 4, rank: int = RANK, moments: str | float = "reset", seed: int = 0, **step):
    model = network()
    recipe = rw.catalog.relora(rank=rank, alpha=6.0, dropout=0.0, interval=interval, moments=moments)
    handle = rw.adapt_(model, recipe, seed=seed)
    return model, handle, handle.optimizer(lr=lr, **step)


def backward(model: nn.Module, step: int) -> None:
    """Full-rank targets that change from step to step."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(40, N, generator=generator, dtype=torch.float64)
    y = torch.randn(40, M, generator=generator, dtype=torch.float64)
    (model(x) - y).square().mean().backward()


def train(model: nn.Module, handle: rw.Handle, optimizer, steps: int, *, first: int = 0) -> None:
    for step in range(first, first + steps):
        backward(model, step)
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()


def probe() -> Tensor:
    return torch.randn(7, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def block_of(handle: rw.Handle) -> dict[str, nn.Parameter]:
    return handle.blocks()["0"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_1_a_restart_does_not_move_the_function(dtype):
    model = network().to(dtype)
    handle = rw.adapt_(model, rw.catalog.relora(rank=RANK, alpha=6.0, dropout=0.0, interval=4), seed=0)
    optimizer = handle.optimizer(lr=0.05)
    x = probe().to(dtype)
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(5, N, generator=generator, dtype=torch.float64).to(dtype)).square().mean().backward()
        handle.after_backward()
        optimizer.step()
        before, old = model(x).detach(), block_of(handle)["A"].detach().clone()
        scale = handle.parameterization("0").scale
        expected = model[0].weight.detach() + scale * block_of(handle)["B"].detach() @ old
        handle.after_step()
        optimizer.zero_grad()
        after = model(x).detach()
        assert (after - before).norm() / before.norm() < (1e-5 if dtype is torch.float32 else 1e-13)
        if step % 4 == 3:  # W <- W + s B A, B <- 0, A anew
            assert (model[0].weight - expected).norm() / expected.norm() < (1e-6 if dtype is torch.float32 else 1e-14)
            assert not block_of(handle)["B"].any()
            assert (block_of(handle)["A"] - old).abs().max() > 1e-2
        else:
            assert torch.equal(block_of(handle)["A"], old)


def test_1_the_new_input_factor_is_kaiming_uniform():
    model = nn.Sequential(nn.Linear(400, 30, dtype=torch.float64))
    handle = rw.adapt_(model, rw.catalog.relora(rank=20, dropout=0.0, interval=1))
    optimizer = handle.optimizer(lr=0.01)
    model(torch.ones(2, 400, dtype=torch.float64)).square().mean().backward()
    handle.after_backward()
    optimizer.step()
    handle.after_step()
    A = block_of(handle)["A"].detach()
    bound = 1 / math.sqrt(400)  # a = √5: √(6 / (1 + 5)) / √n
    assert A.abs().max() <= bound
    assert A.abs().max() > 0.99 * bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


@pytest.mark.parametrize("cycles", [1, 2, 4, 5, 6])
def test_2_the_rank_grows_by_r_per_cycle(cycles):
    model, handle, optimizer = begin(interval=4)
    start = model[0].weight.detach().clone()
    train(model, handle, optimizer, 4 * cycles)
    change = model[0].weight.detach() - start
    assert torch.linalg.matrix_rank(change, rtol=1e-10) == min(cycles * RANK, M, N)
    assert (handle.update_of("0").dense() - change).abs().max() < 1e-12
    factors = handle.low_rank_of("0")
    assert factors is not None
    assert factors.B.shape[1] <= cycles * RANK + RANK
    assert (factors.B @ factors.A - change).abs().max() < 1e-12


def test_3_without_a_restart_it_is_lora():
    model, handle, optimizer = begin(interval=1000)
    other = network()
    plain = rw.adapt_(other, rw.catalog.lora(rank=RANK, alpha=6.0), seed=0)
    train(model, handle, optimizer, 9)
    train(other, plain, plain.optimizer(lr=0.05), 9)
    for role, tensor in block_of(plain).items():
        assert torch.equal(block_of(handle)[role], tensor)
    assert torch.equal(model[0].weight, network()[0].weight)
    assert torch.equal(model(probe()), other(probe()))


@pytest.mark.parametrize(("total", "warmup", "interval", "rise"), [(230, 20, 50, 10), (97, 7, 30, 5), (60, 20, 20, 19)])
def test_4_the_learning_rate(total, warmup, interval, rise):
    floor = 0.1
    factor = relora_schedule(total, warmup, interval, rise, floor)

    def envelope(t: float) -> float:
        return floor + (1 - floor) / 2 * (1 + math.cos(math.pi * (t - warmup) / (total - warmup)))

    for t in range(total):
        q = t % interval
        if t < warmup:
            expected = t / warmup
        elif q < rise and t >= interval:
            expected = q / rise * envelope(t // interval * interval + rise)
        else:
            expected = envelope(t)
        assert factor(t) == pytest.approx(expected, abs=1e-12)
    for restart in range(interval, total, interval):
        assert factor(restart) == 0.0
        if restart + rise < total:
            assert factor(restart + rise) == pytest.approx(envelope(restart + rise), abs=1e-12)
    if total % interval >= rise:
        assert factor(total) == pytest.approx(floor, abs=1e-12)
    slope = max(1 / warmup, 1 / rise, math.pi / (total - warmup))  # continuous but for the falls to zero
    for t in range(1, total):
        assert abs(factor(t) - factor(t - 1)) <= slope + 1e-12 or (t % interval == 0 and factor(t) == 0.0)


@pytest.mark.parametrize("q", [0.8, 0.9, 0.5, 0.99])
def test_5_pruned_moments_keep_the_largest_of_each(q):
    """Both moments of a factor, each by its own magnitude: (1 - q)·size of them, and those the largest."""
    pruned, kept = begin(interval=4, moments=q), begin(interval=1000)
    train(*pruned, 4)
    train(*kept, 4)
    for role in ("A", "B"):
        before = kept[2].state[block_of(kept[1])[role]]
        after = pruned[2].state[block_of(pruned[1])[role]]
        chosen = {}
        for name in before:
            if before[name].dim() == 0:
                assert torch.equal(before[name], after[name])  # the counter goes on
                continue
            size = before[name].numel()
            left = int((after[name] != 0).sum())
            assert left in (round((1 - q) * size), math.ceil((1 - q) * size))
            order = before[name].abs().flatten().sort(descending=True).values
            least = order[left - 1] if left else math.inf
            expected = torch.where(before[name].abs() >= least, before[name], torch.zeros_like(before[name]))
            assert torch.equal(after[name], expected)
            chosen[name.rsplit(".", 1)[-1]] = after[name] != 0
        assert set(chosen) == {"exp_avg", "exp_avg_sq"}
        if q < 0.9:
            assert not torch.equal(chosen["exp_avg"], chosen["exp_avg_sq"])


def test_5_a_reset_zeroes_both_moments():
    model, handle, optimizer = begin(interval=4)
    train(model, handle, optimizer, 4)
    for tensor in block_of(handle).values():
        shaped = [value for value in optimizer.state[tensor].values() if value.dim()]
        assert len(shaped) == 2
        assert not any(value.any() for value in shaped)


@pytest.mark.parametrize(("betas", "limit"), [((0.9, 0.95), 0.447), ((0.9, 0.999), 3.16)])
def test_6_the_first_step_after_a_reset(betas, limit):
    """lr·(1 - β₁)/√(1 - β₂) per entry, with the counter's bias corrections as they stand (they go to 1)."""
    interval, lr = 400, 1e-4
    model, handle, optimizer = begin(interval=interval, lr=lr, betas=betas, eps=1e-30)
    x = probe()
    for _ in range(interval):
        model(x).square().sum().backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    assert not block_of(handle)["B"].any()
    model(x).square().sum().backward()
    optimizer.step()
    moved = block_of(handle)["B"].detach().abs()
    beta1, beta2 = betas
    t = interval + 1
    expected = lr * (1 - beta1) / (1 - beta1**t) / math.sqrt((1 - beta2) / (1 - beta2**t))
    assert (moved / expected - 1).abs().max() < 1e-6
    assert (1 - beta1) / math.sqrt(1 - beta2) == pytest.approx(limit, abs=5e-3)
    if beta2 == 0.95:  # corrections have died away by now
        assert (moved / lr - limit).abs().max() < 1e-3


def test_7_gradients_at_a_restart():
    model, handle, optimizer = begin(interval=4)
    train(model, handle, optimizer, 4)
    block, s = block_of(handle), handle.parameterization("0").scale
    assert s == 6.0 / RANK
    backward(model, 50)
    generator = torch.Generator().manual_seed(150)
    x = torch.randn(40, N, generator=generator, dtype=torch.float64)
    y = torch.randn(40, M, generator=generator, dtype=torch.float64)
    W = model[0].weight.detach().clone().requires_grad_(True)
    (G,) = torch.autograd.grad((x @ W.T + model[0].bias - y).square().mean(), W)
    assert torch.equal(block["A"].grad, torch.zeros_like(block["A"]))
    assert (block["B"].grad - s * G @ block["A"].T).abs().max() < 1e-12
    assert block["B"].grad.abs().max() > 1e-3
