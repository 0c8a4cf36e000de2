"""CondLR: one step by hand, the constraint after every step, the clamp, retractions, real layers, refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import rankwise
from rankwise.core.errors import ArgumentError
from rankwise.core.sharding import whole
from rankwise.steps.condlr import clamp_core, condlr, scaled_orthogonal, tangent
from tests.procedures.quadratic import Quadratic, assert_orthonormal, drawn, train


def qf(matrix: torch.Tensor) -> torch.Tensor:
    Q, R = torch.linalg.qr(matrix)
    return Q * R.diagonal().sign()


@pytest.mark.parametrize(("tau", "momentum"), [(1.0, 0.0), (1.0, 0.4), (1.5, 0.4), (math.inf, 0.0)])
def test_two_steps_by_hand(tau: float, momentum: float) -> None:
    problem = Quadratic(
        f"condlr(rank=3, tau={tau if tau < math.inf else '1e999'}, momentum={momentum})", drawn(0, 9, 7), lr=0.05
    )
    U, S, V = (tensor.detach().clone() for tensor in problem.entry.factors())
    buffers = [torch.zeros_like(tensor) for tensor in (U, S, V)]
    for _ in range(2):
        G = U @ S @ V.T - problem.target
        s = torch.linalg.svdvals(S)
        c = 3 / s.square().sum() if tau == 1 else (s[-1] / s[0]) ** 2
        moves = [c * tangent(U, G @ V @ S.T), U.T @ G @ V, c * tangent(V, G.T @ U @ S)]
        buffers = [momentum * buffer + move for buffer, move in zip(buffers, moves, strict=True)]
        U, S, V = (tensor - 0.05 * buffer for tensor, buffer in zip((U, S, V), buffers, strict=True))
        U, V = qf(U), qf(V)
        S = scaled_orthogonal(S) if tau == 1 else clamp_core(S, tau)
        problem.step()
    for tensor, expected in zip(problem.entry.factors(), (U, S, V), strict=True):
        torch.testing.assert_close(tensor.detach(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("retraction", ["qr", "polar"])
@pytest.mark.parametrize("tau", [1.0, 1.1, 1.5])
def test_the_constraint_holds_after_every_step(tau: float, retraction: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 16, 10)).double()
    x, y = drawn(1, 6, 3, 4, 4), drawn(2, 6, 10)
    recipe = rankwise.compose(f"condlr(compression=0.5, tau={tau}, retraction='{retraction}', momentum=0.3)")
    handle = rankwise.adapt_(model, recipe, where=["0", "3"])
    assert [handle.parameterization(site).rank for site in ("0", "3")] == [4, 5]
    losses = []
    for _ in range(15):
        losses += train(handle, lambda: (model(x) - y).square().mean(), 1, 0.1)
        for site in handle.targets:
            U, S, V = (tensor.detach() for tensor in handle.parameterization(site).factors())
            assert_orthonormal(U)
            assert_orthonormal(V)
            assert float(torch.linalg.cond(S)) <= tau * (1 + 1e-12)
            singular = torch.linalg.svdvals(handle.update_of(site).dense() + model.get_submodule(site).weight.flatten(1))
            assert float(singular[0] / singular[len(S) - 1]) <= tau * (1 + 1e-9)  # of the layer itself
    assert losses[-1] < 0.9 * losses[1]


@pytest.mark.parametrize("retraction", ["qr", "polar"])
def test_a_multiple_of_an_orthogonal_matrix_takes_the_place_of_the_core(retraction: str) -> None:
    S = drawn(0, 5, 5)
    new = scaled_orthogonal(S, retraction)
    a = S.square().sum() / 5
    torch.testing.assert_close(new.T @ new, a * torch.eye(5, dtype=S.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(scaled_orthogonal(new, retraction), new, rtol=0, atol=1e-12)
    nearest = {name: float((scaled_orthogonal(S, name) - S).norm()) for name in ("qr", "polar")}
    assert nearest["polar"] < nearest["qr"]


def test_the_clamp() -> None:
    P, Q = (torch.linalg.qr(drawn(k, 4, 4))[0] for k in (0, 1))
    S = P @ torch.diag(torch.tensor([5.0, 2.0, 1.0, 0.1]).double()) @ Q
    values = torch.linalg.svdvals(clamp_core(S, 1.5))
    torch.testing.assert_close(values[0] / values[-1], torch.tensor(1.5).double())
    torch.testing.assert_close(values[1], torch.tensor(2.0).double())
    assert torch.equal(clamp_core(S, math.inf), S)
    torch.testing.assert_close(torch.linalg.svdvals(clamp_core(S, 1.0)), torch.full((4,), 2.025).double())


def test_directions_of_the_bases_are_tangent() -> None:
    U, _ = torch.linalg.qr(drawn(0, 9, 3))
    assert float((U.T @ tangent(U, drawn(1, 9, 3))).abs().max()) < 1e-14


def test_a_multiple_of_a_partial_isometry_is_where_it_stays() -> None:
    P, Q = (torch.linalg.qr(drawn(k, size, 3))[0] for k, size in ((0, 9), (1, 7)))
    target = 2.5 * P @ Q.T
    problem = Quadratic("condlr(rank=3)", target, weight=target, lr=0.3)
    losses = [problem.step() for _ in range(5)]
    assert max(losses) < 1e-24


def test_on_sharded_tensors_it_is_the_same() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        step = condlr(momentum=0.3, tau=1.5)
        values = {"U": qf(drawn(0, 8, 3)), "S": drawn(1, 3, 3), "V": qf(drawn(2, 6, 3))}
        found = []
        for spread in (False, True):

            def made(tensor: torch.Tensor, spread: bool = spread) -> torch.Tensor:
                return distribute_tensor(tensor.clone(), mesh, [Shard(0)]) if spread else tensor.clone()

            block = {role: made(value) for role, value in values.items()}
            state = step.init(block)
            for k in range(2):
                directions = step.update({r: made(drawn(5 + k, *t.shape)) for r, t in values.items()}, state, block)
                for role, direction in directions.items():
                    block[role].add_(direction, alpha=-0.1)
                assert step.after is not None
                step.after(state, block)
            found.append({role: whole(tensor) for role, tensor in block.items()})
        for role, tensor in found[0].items():
            torch.testing.assert_close(found[1][role], tensor, rtol=0, atol=1e-14)
    finally:
        dist.destroy_process_group()


def test_the_rank_of_a_compression() -> None:
    for compression, expected in ((0.0, 10), (0.5, 5), (0.7, 3), (0.8, 2), (0.95, 1)):
        problem = Quadratic(f"condlr(compression={compression})", drawn(0, 12, 10))
        assert problem.entry.rank == expected


@pytest.mark.parametrize(
    "text", ["condlr(tau=0.9)", "condlr(retraction='svd')", "condlr(compression=1.0)", "condlr(rank=2, compression=0.3)"]
)
def test_refusals(text: str) -> None:
    with pytest.raises(ArgumentError):
        Quadratic(text, drawn(0, 9, 7))
