"""ReLoRA: restarts, what they keep, and the jagged learning rate."""

from __future__ import annotations

import math

import pytest
import torch

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError
from rankwise.procedures.relora import ReLoRA, relora_schedule
from tests.core.training import Regression, assert_same_bits, numbers


def test_after_k_cycles_the_update_has_rank_k_r() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 20, bias=False)).double()
    start, x = model[0].weight.detach().clone(), torch.randn(64, 16, dtype=torch.float64)
    y = torch.randn(64, 20, dtype=torch.float64)
    handle = rankwise.adapt_(model, rankwise.catalog.relora(rank=3, alpha=3.0, dropout=0.0, interval=5), where=["0"])
    optimizer = handle.optimizer(lr=0.05)
    for step in range(20):
        (model(x) - y).square().mean().backward()
        handle.after_backward()
        optimizer.step()
        out = model(x).detach()
        handle.after_step()
        optimizer.zero_grad()
        torch.testing.assert_close(model(x).detach(), out, rtol=1e-11, atol=1e-12)
        assert bool(numbers(handle)["0.B"].any()) != (step % 5 == 4)
    values = torch.linalg.svdvals(handle.update_of("0").dense().detach())
    assert int((values > 1e-9 * values[0]).sum()) == 12
    torch.testing.assert_close(model[0].weight.detach() - start, handle.update_of("0").dense().detach(), rtol=1e-10, atol=1e-12)
    factors = handle.low_rank_of("0")
    assert factors.rank == 12 + 3
    handle.detach_()
    assert torch.equal(model[0].weight, start)


@pytest.mark.parametrize("method", ["lora(rank=2)", "rslora(rank=2)", "lora_fa(rank=2)", "gated_lora(rank=2)"])
def test_save_and_load_on_the_plain_base(method: str, tmp_path) -> None:
    problem = Regression()
    handle = problem.adapt(f"{method} + relora(interval=3)")
    problem.train(handle, handle.optimizer(lr=0.05), 8)
    problem.model.eval()
    expected = problem.model(problem.batches[0][0]).detach()
    handle.save(tmp_path)
    fresh = Regression()
    again = rankwise.load_(fresh.model, tmp_path)
    fresh.model.eval()
    torch.testing.assert_close(fresh.model(fresh.batches[0][0]), expected, rtol=1e-12, atol=1e-13)
    again.merge_()
    torch.testing.assert_close(fresh.model(fresh.batches[0][0]), expected, rtol=1e-12, atol=1e-13)
    assert not torch.equal(fresh.model[0].weight, Regression().model[0].weight)
    again.detach_()
    assert torch.equal(fresh.model[0].weight, Regression().model[0].weight)


def test_an_endless_cycle_is_lora_to_the_bit() -> None:
    results = []
    for text in ("lora(rank=2)", "lora(rank=2) + relora(interval=1000000)"):
        problem = Regression()
        handle = problem.adapt(text)
        problem.train(handle, handle.optimizer(lr=0.05), 6)
        results.append(numbers(handle))
    assert_same_bits(*results)


def test_every_restart_draws_another_input_factor_and_the_same_run_the_same() -> None:
    drawn = []
    for _ in range(2):
        problem = Regression()
        handle = problem.adapt("relora(rank=2, interval=1)")
        optimizer = handle.optimizer(lr=0.01)
        for step in range(3):
            problem.train(handle, optimizer, 1, first=step)
            drawn.append(numbers(handle)["0.A"])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    for first, second in zip(drawn[:3], drawn[3:], strict=True):
        assert torch.equal(first, second)
    other = Regression().adapt("lora(rank=2)", seed=1)  # a restart must not repeat the start of a neighboring seed
    assert not any(torch.equal(numbers(other)["0.A"], A) for A in drawn)


def test_first_step_after_a_reset_has_the_size_the_spec_states() -> None:
    """Moments at zero but the counter kept: η (1 - β₁)/√(1 - β₂) per entry once the counter is large."""
    for betas, size in (((0.9, 0.95), 0.447), ((0.9, 0.999), 3.162)):
        problem = Regression()
        handle = problem.adapt(rankwise.catalog.relora(rank=2, interval=30, dropout=0.0))
        optimizer = handle.optimizer(lr=1e-3, betas=betas)
        problem.train(handle, optimizer, 30)
        tensor = handle.parameterization("0").roles()["B"]
        for site in handle.targets:  # as after a long run, where the bias correction is over
            for parameter in handle.parameterization(site).roles().values():
                optimizer.state[parameter]["adamw.step"].fill_(1e6)
        assert not tensor.any()
        problem.train(handle, optimizer, 1, first=30)
        torch.testing.assert_close(tensor.detach().abs() / 1e-3, torch.full_like(tensor, size), rtol=2e-3, atol=1e-3)


def test_gradient_right_after_a_restart() -> None:
    problem = Regression()
    handle = problem.adapt("relora(rank=2, alpha=6, dropout=0.0, interval=2)")
    problem.train(handle, handle.optimizer(lr=0.05), 2)
    problem.loss(problem.batches[0]).backward()
    roles = handle.parameterization("2").roles()
    assert not roles["A"].grad.any()
    assert roles["B"].grad.any()


def test_jagged_schedule() -> None:
    N, w, T, v, f = 100, 10, 25, 5, 0.1
    factor = relora_schedule(N, w, T, v, f)

    def envelope(step: float) -> float:
        return f + (1 - f) / 2 * (1 + math.cos(math.pi * (step - w) / (N - w)))

    assert [factor(t) for t in (0, 5, 10)] == pytest.approx([0.0, 0.5, 1.0])
    for k in (1, 2, 3):
        assert factor(k * T) == 0.0
        assert factor(k * T + v) == pytest.approx(envelope(k * T + v))
        assert factor(k * T + 2) == pytest.approx(2 / v * envelope(k * T + v))
        assert factor(k * T - 1) == pytest.approx(envelope(k * T - 1))
    assert envelope(N) == pytest.approx(f)
    assert relora_schedule(N, w, 1000, v, f)(N) == pytest.approx(f)
    assert relora_schedule(N, w, 1000, v, f)(5 * N) == pytest.approx(f)
    assert relora_schedule(10, 0, 5, 0, 1.0)(5) == 1.0
    problem = Regression()
    handle = problem.adapt("relora(rank=2, interval=25)")
    optimizer = handle.optimizer(lr=0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step in range(30):
        assert handle.learning_rate == pytest.approx(0.2 * factor(step))
        problem.train(handle, optimizer, 1, first=step)
        scheduler.step()


def test_refusals() -> None:
    for method, named in (("full", "Full"), ("dora(rank=2)", "Magnitude")):
        with pytest.raises(RecipeError, match=rf"begin again at zero; {named} cannot") as refusal:
            Regression().adapt(f"{method} + relora(interval=3)")
        assert "lora, rslora, lora_fa" in str(refusal.value)
    with pytest.raises(ArgumentError, match="at least 1 step"):
        ReLoRA(interval=0)
    for moments in ("zero", 0.0, 1.0):
        with pytest.raises(ArgumentError, match="'reset' or a fraction"):
            ReLoRA(moments=moments)
    with pytest.raises(ArgumentError, match="warmup=30"):
        relora_schedule(100, 30, 25, 5)
