"""SAM and ASAM against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError
from rankwise.perturbations.sharpness import SharpnessAware
from tests.core.training import Regression, assert_same_bits, numbers, open_gates


def blocks(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, dict[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for index, shape in enumerate(shapes):
        tensor = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        tensor.grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        made[str(index)] = {"A": tensor}
    return made


def move(sam: SharpnessAware, made) -> list[Tensor]:
    before = [block["A"].detach().clone() for block in made.values()]
    sam.move(made, learning_rate=1.0)
    return [block["A"].detach() - old for block, old in zip(made.values(), before, strict=True)]


def test_one_global_norm_of_length_rho_whatever_the_scale_of_the_loss() -> None:
    made = blocks((3, 4), (5,))
    steps = move(SharpnessAware(rho=0.3), made)
    assert abs(float(torch.cat([step.flatten() for step in steps]).norm()) - 0.3) < 1e-9
    for step, block in zip(steps, made.values(), strict=True):
        torch.testing.assert_close(
            step / block["A"].grad, torch.full_like(step, float(step.flatten()[0] / block["A"].grad.flatten()[0]))
        )
    again = blocks((3, 4), (5,))
    for block in again.values():
        block["A"].grad.mul_(1000.0)
    for one, other in zip(steps, move(SharpnessAware(rho=0.3), again), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_adaptive_step_and_its_invariance() -> None:
    """ε = ρ w² g / ‖w g‖; rescaling w by c and the gradient by 1/c rescales ε by c."""
    made = blocks((3, 4), (5,))
    expected_norm = torch.cat([(b["A"] * b["A"].grad).flatten() for b in made.values()]).norm()
    expected = [0.7 * b["A"].detach() ** 2 * b["A"].grad / expected_norm for b in made.values()]
    steps = move(SharpnessAware(rho=0.7, adaptive=True), made)
    for step, wanted in zip(steps, expected, strict=True):
        torch.testing.assert_close(step, wanted.detach(), rtol=1e-9, atol=1e-12)
    scaled, factors = blocks((3, 4), (5,)), (4.0, 0.25)
    with torch.no_grad():
        for block, factor in zip(scaled.values(), factors, strict=True):
            block["A"].mul_(factor)
            block["A"].grad.div_(factor)
    for step, other, factor in zip(steps, move(SharpnessAware(rho=0.7, adaptive=True), scaled), factors, strict=True):
        torch.testing.assert_close(other, step * factor, rtol=1e-9, atol=1e-12)


def test_restore_is_exact_in_bfloat16_and_gradients_that_overflow_it_are_not() -> None:
    made = blocks((64,), (64,), dtype=torch.bfloat16)
    before = {name: block["A"].detach().clone() for name, block in made.items()}
    for block in made.values():
        block["A"].grad.mul_(1e18)  # squares are past bfloat16's reach when summed carelessly in half precision
    sam = SharpnessAware(rho=0.5)
    steps = move(sam, made)
    assert abs(float(torch.cat([step.float() for step in steps]).norm()) - 0.5) < 0.05
    sam.restore(made)
    assert_same_bits(before, {name: block["A"].detach() for name, block in made.items()})


def test_zero_or_missing_gradients_move_nothing() -> None:
    made = blocks((3, 4), (5,))
    made["0"]["A"].grad.zero_()
    made["1"]["A"].grad = None
    sam = SharpnessAware(rho=0.3)
    for step in move(sam, made):
        assert not step.any()
    sam.restore(made)
    sam.move({}, learning_rate=1.0)
    sam.restore({})


def test_quadratic_trajectory_matches_the_closed_form() -> None:
    """On ½ wᵀ H w the second gradient is H (w + ρ H w / ‖H w‖)."""
    generator = torch.Generator().manual_seed(2)
    H = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    H = H @ H.t() / 6
    torch.manual_seed(0)  # of the layer
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    handle = rankwise.adapt_(model, rankwise.compose("full + sgd + sam(rho=0.2)"), where=["0"])
    weight = handle.parameterization("0").roles()["weight"]
    optimizer = handle.optimizer(lr=0.1)

    def run() -> None:
        flat = weight.flatten()
        (0.5 * flat @ H @ flat).backward()

    w = weight.detach().flatten().clone()
    for _ in range(20):
        run()
        handle.after_backward(run)
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
        g = H @ w
        w = w - 0.1 * H @ (w + 0.2 * g / g.norm())
        torch.testing.assert_close(weight.detach().flatten(), w, rtol=1e-10, atol=1e-12)


def test_rho_zero_is_the_plain_optimizer_to_the_bit_and_rho_is_not() -> None:
    results = {}
    for text in ("lora(rank=2, dropout=0.2)", "lora(rank=2, dropout=0.2) + sam(rho=0.0)", "lora(rank=2, dropout=0.2) + sam"):
        problem = Regression()
        handle = problem.adapt(text)
        problem.train(handle, handle.optimizer(lr=0.02, weight_decay=0.1), 6)
        results[text] = numbers(handle)
    plain, zero, sam = results.values()
    assert_same_bits(plain, zero)
    assert not torch.equal(plain["0.B"], sam["0.B"])


def test_a_head_trained_beside_the_adapter_is_in_the_norm() -> None:
    problem = Regression()
    handle = rankwise.adapt_(problem.model, rankwise.compose("lora(rank=2) + sam(rho=0.4)"), where=["0"], train_also=["2"])
    open_gates(handle)
    handle.optimizer(lr=0.1)
    seen = []

    def run() -> None:
        seen.append([p.detach().clone() for p in problem.model.parameters() if p.requires_grad])
        problem.loss(problem.batches[0]).backward()

    run()
    handle.after_backward(run)
    step = torch.cat([(moved - old).flatten() for old, moved in zip(*seen, strict=True)])
    assert len(seen[0]) == 4  # A, B, and the head's weight and bias
    assert all(not torch.equal(old, moved) for old, moved in zip(*seen, strict=True))
    assert abs(float(step.norm()) - 0.4) < 1e-9


def test_balancedness_drifts_as_the_theory_says() -> None:
    """For f(x yᵀ): d/dt ½(‖x‖² - ‖y‖²) = ρ (‖g_x‖² - ‖g_y‖²) / √(‖g_x‖² + ‖g_y‖²) + O(ρ²)."""
    generator = torch.Generator().manual_seed(4)
    x = nn.Parameter(torch.randn(5, 1, generator=generator, dtype=torch.float64))
    y = nn.Parameter(2 * torch.randn(1, 4, generator=generator, dtype=torch.float64))
    M = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    rho, made = 1e-3, {"0": {"B": x, "A": y}}

    def gradients() -> tuple[Tensor, Tensor]:
        x.grad = y.grad = None
        (0.5 * (x @ y - M).square().sum()).backward()
        return x.grad.clone(), y.grad.clone()

    g_x, g_y = gradients()
    sam = SharpnessAware(rho=rho)
    sam.move(made, learning_rate=1.0)
    s_x, s_y = gradients()
    sam.restore(made)
    drift = float(-(x.detach() * s_x).sum() + (y.detach() * s_y).sum())
    expected = float(rho * (g_x.square().sum() - g_y.square().sum()) / (g_x.square().sum() + g_y.square().sum()).sqrt())
    assert abs(drift - expected) < 5e-3 * abs(expected)


def test_negative_radius_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"cannot be negative, it is -0\.1"):
        SharpnessAware(rho=-0.1)
