"""RAC-LoRA: blocks with one factor drawn anew, and its guarantee against runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError
from rankwise.procedures.rac_lora import chain_gradient_bound, chain_rate
from tests.never_silent.models import inputs, mlp


def quadratic(layers: int, m: int, n: int) -> tuple[nn.ModuleList, list[Tensor]]:
    """Many independent problems ½‖W − W*‖², W = 0 at first, as the layers of one model."""
    generator = torch.Generator().manual_seed(0)
    net = nn.ModuleList([nn.Linear(n, m, bias=False) for _ in range(layers)]).double()
    for layer in net:
        nn.init.zeros_(layer.weight)
    return net, [torch.randn(m, n, generator=generator, dtype=torch.float64) for _ in range(layers)]


def errors(net: nn.ModuleList, goals: list[Tensor]) -> Tensor:
    eye = torch.eye(goals[0].shape[1], dtype=torch.float64)
    return torch.stack([(layer(eye).t() - goal).square().sum() for layer, goal in zip(net, goals, strict=True)])


@pytest.mark.parametrize(("side", "m", "n", "rank"), [("B", 5, 6, 2), ("A", 6, 5, 2), ("B", 4, 8, 3)])
def test_the_guarantee_is_met_by_a_run(side: str, m: int, n: int, rank: int) -> None:
    """With orthonormal draws and learning rate 1 a step of SGD solves a block exactly: the closed form is the expectation."""
    net, goals = quadratic(150, m, n)
    recipe = rankwise.compose(f"rac_lora(rank={rank}, interval=1, side='{side}', draw='orthonormal')", "sgd(momentum=0.0)")
    handle = rankwise.adapt_(net, recipe, where=lambda name, module: isinstance(module, nn.Linear))
    optimizer = handle.optimizer(lr=1.0)
    first, size = errors(net, goals).detach(), n if side == "B" else m
    for block in range(1, 6):
        (errors(net, goals) / 2).sum().backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
        mean = (errors(net, goals) / first).mean().item()
        assert mean == pytest.approx(chain_rate(size, rank, block), rel=0.1), f"after {block} blocks"
        assert int(torch.linalg.matrix_rank(handle.update_of("0").dense())) == min(block * rank, m, n)


def test_one_draw_for_ever_stalls_where_the_chain_goes_on() -> None:
    stalled = {}
    for interval in (1, 1000):
        net, goals = quadratic(40, 5, 6)
        recipe = rankwise.compose(f"rac_lora(rank=2, interval={interval}, draw='orthonormal')", "sgd(momentum=0.0)")
        handle = rankwise.adapt_(net, recipe, where=lambda name, module: isinstance(module, nn.Linear))
        optimizer, first = handle.optimizer(lr=1.0), errors(net, goals).sum().item()
        for _ in range(12):
            (errors(net, goals) / 2).sum().backward()
            handle.after_backward()
            optimizer.step()
            handle.after_step()
            optimizer.zero_grad()
        stalled[interval] = errors(net, goals).sum().item() / first
    assert stalled[1] < 0.02 and stalled[1000] == pytest.approx(4 / 6, rel=0.1)


@pytest.mark.parametrize(("side", "role"), [("B", "A"), ("A", "B")])
@pytest.mark.parametrize("draw", ["gaussian", "orthonormal"])
def test_a_draw_changes_the_frozen_factor_and_not_the_function(side: str, role: str, draw: str) -> None:
    net, x = mlp(), inputs()
    handle = rankwise.adapt_(net, rankwise.catalog.rac_lora(rank=2, alpha=6, interval=2, side=side, draw=draw))
    optimizer = handle.optimizer(lr=1e-2)
    draws = [handle.parameterization("0").get_buffer(role).clone()]
    for step in range(4):
        net(x).square().mean().backward()
        handle.after_backward()
        optimizer.step()
        before = net(x).detach()
        handle.after_step()
        optimizer.zero_grad()
        if step % 2:
            torch.testing.assert_close(net(x), before, rtol=0, atol=1e-12)
            draws.append(handle.parameterization("0").get_buffer(role).clone())
            assert not handle.blocks()["0"][side].any()
            moments = optimizer.state[handle.blocks()["0"][side]]
            assert all(not value.any() for value in moments.values() if torch.is_tensor(value) and value.dim())
    assert set(handle.blocks()["0"]) == {side}
    assert not torch.allclose(draws[0], draws[1]) and not torch.allclose(draws[1], draws[2])
    if draw == "orthonormal":
        frame = draws[2] if role == "A" else draws[2].t()
        torch.testing.assert_close(frame @ frame.t(), torch.eye(2, dtype=torch.float64))


def test_gaussian_draws_have_the_identity_as_their_mean() -> None:
    net = nn.ModuleList([nn.Linear(6, 5) for _ in range(1500)]).double()
    recipe = rankwise.catalog.rac_lora(rank=2)
    handle = rankwise.adapt_(net, recipe, where=lambda name, module: isinstance(module, nn.Linear))
    frames = torch.stack([handle.parameterization(site).get_buffer("A") for site in handle.targets])
    second = torch.einsum("srn,srk->snk", frames, frames)
    torch.testing.assert_close(second.mean(0), torch.eye(6, dtype=torch.float64), rtol=0, atol=0.08)
    fourth = (second @ second).mean(0).diagonal().mean()
    assert fourth == pytest.approx(1 + (6 + 1) / 2, rel=0.1)


def test_closed_forms() -> None:
    assert chain_rate(6, 2, 5) == pytest.approx(0.1317, abs=1e-4)
    assert chain_rate(6, 6, 1) == 0.0 and chain_rate(6, 2, 0) == 1.0
    assert chain_rate(10, 1, 3, step=0.5, curvature=0.2) == pytest.approx((1 - 0.01) ** 3)
    assert chain_gradient_bound(8, 2, 10, gap=3.0, step=0.5) == pytest.approx(2 * 3 / (0.25 * 0.5 * 10))
    with pytest.raises(ArgumentError, match="rank is 1 to 6 and blocks 0 or more, not 7 and 1"):
        chain_rate(6, 7, 1)
    with pytest.raises(ArgumentError, match="it is 2"):
        chain_rate(6, 2, 1, step=2.0)
    with pytest.raises(ArgumentError, match="gap is 0 or more"):
        chain_gradient_bound(6, 2, 1, gap=-1.0, step=1.0)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ArgumentError, match="side is one of A, B, not 'C'"):
        rankwise.catalog.rac_lora(side="C")
    with pytest.raises(ArgumentError, match="draw is one of gaussian, orthonormal"):
        rankwise.catalog.rac_lora(draw="uniform")
    with pytest.raises(RecipeError, match="both lora and rac_lora do"):
        rankwise.compose("lora + rac_lora")
    with pytest.raises(ArgumentError, match="interval is at least 1"):
        rankwise.adapt_(mlp(), rankwise.catalog.rac_lora(interval=0))
