"""GaLore against its spec (arXiv:2403.03507)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rankwise.core.recipe import piece
from rankwise.core.step import BlockOptimizer
from rankwise.steps.galore import galore
from rankwise.steps.moments import sgd
from tests.oracles.tools_training import SITE, block_of, normal, optimizer_on, orthonormal, relative

WIDE, TALL = (6, 9), (9, 6)  # m < n is projected on the left, m >= n on the right


def run(
    optimizer: BlockOptimizer, weight: torch.nn.Parameter, gradient: Callable[[Tensor, int], Tensor], steps: int
) -> list[Tensor]:
    reached = [weight.detach().clone()]
    for t in range(steps):
        weight.grad = gradient(weight.detach(), t)
        optimizer.step()
        reached.append(weight.detach().clone())
    return reached


def trained(start: Tensor, gradient: Callable[[Tensor, int], Tensor], steps: int, lr: float = 0.1, **options) -> list[Tensor]:
    block = block_of(weight=start)
    return run(optimizer_on({SITE: block}, [galore(**options)], lr), block["weight"], gradient, steps)


def state_of(optimizer: BlockOptimizer, weight: torch.nn.Parameter) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in optimizer.state[weight].items() if tensor.dim() > 0}


def towards(target: Tensor) -> Callable[[Tensor, int], Tensor]:
    return lambda weight, t: weight - target


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_1_full_rank_with_sgd_is_sgd(shape: tuple[int, int]) -> None:
    start, target, lr = normal(0, *shape), normal(1, *shape), 0.1
    reached = trained(start, towards(target), 12, lr, rank=6, scale=1.0, refresh=5, inner=piece(sgd))
    expected = start
    for found in reached[1:]:
        expected = expected - lr * (expected - target)
        assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_2_change_of_one_window_lies_in_its_subspace(shape: tuple[int, int]) -> None:
    rank, window = 2, 4
    start, target = normal(2, *shape), normal(3, *shape)
    reached = trained(start, towards(target), 3 * window, rank=rank, scale=0.5, refresh=window)
    for begin in range(0, 3 * window, window):
        change = reached[begin + window] - reached[begin]
        S = torch.linalg.svdvals(change)
        assert float(S[rank] / S[0]) < 1e-10
        U, _, Vh = torch.linalg.svd(reached[begin] - target)  # the gradient at the refresh
        if shape is WIDE:
            P = U[:, :rank]
            assert float(torch.linalg.norm(change - P @ P.T @ change)) < 1e-6
        else:
            Q = Vh[:rank]
            assert float(torch.linalg.norm(change - change @ Q.T @ Q)) < 1e-6
    assert int(torch.linalg.matrix_rank(reached[-1] - reached[0])) > rank


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_3_basis_is_orthonormal_and_captures_the_most(shape: tuple[int, int]) -> None:
    rank, G = 2, normal(4, *shape)
    block = block_of(weight=normal(5, *shape))
    optimizer = optimizer_on({SITE: block}, [galore(rank=rank, refresh=10)], 0.1)
    run(optimizer, block["weight"], lambda weight, t: G, 1)
    wanted = (shape[0], rank) if shape is WIDE else (rank, shape[1])
    (basis,) = [tensor for tensor in state_of(optimizer, block["weight"]).values() if tensor.shape == wanted]
    P = basis if shape is WIDE else basis.T
    assert float((P.T @ P - torch.eye(rank, dtype=torch.float64)).abs().max()) < 1e-5
    small = P.T @ (G if shape is WIDE else G.T)
    assert abs(float((small**2).sum() / (torch.linalg.svdvals(G)[:rank] ** 2).sum()) - 1) < 1e-12


def test_4_low_rank_gradients_lose_nothing() -> None:
    rank, lr = 2, 0.1
    start, P0 = normal(6, *WIDE), normal(7, WIDE[0], rank)
    reached = trained(
        start, lambda weight, t: P0 @ normal(100 + t, rank, WIDE[1]), 9, lr, rank=rank, scale=1.0, refresh=4, inner=piece(sgd)
    )
    expected = start
    for t, found in enumerate(reached[1:]):
        expected = expected - lr * P0 @ normal(100 + t, rank, WIDE[1])
        assert float((found - expected).abs().max()) < 1e-13


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_5_size_of_the_state(shape: tuple[int, int], rank: int) -> None:
    m, n = shape
    block = block_of(weight=normal(8, m, n))
    optimizer = optimizer_on({SITE: block}, [galore(rank=rank, refresh=10)], 0.1)
    run(optimizer, block["weight"], lambda weight, t: normal(9, m, n), 3)
    kept = sum(tensor.numel() for tensor in state_of(optimizer, block["weight"]).values())
    assert kept == (m * rank + 2 * n * rank if m <= n else n * rank + 2 * m * rank)


def test_6_refreshes_at_multiples_of_t_and_nowhere_else() -> None:
    rank, window = 2, 3
    block = block_of(weight=normal(10, *WIDE))
    optimizer = optimizer_on({SITE: block}, [galore(rank=rank, refresh=window)], 0.1)
    bases: list[Tensor] = []
    for t in range(10):
        G = normal(200 + t, *WIDE)
        run(optimizer, block["weight"], lambda weight, _, G=G: G, 1)
        state = state_of(optimizer, block["weight"])
        (P,) = [tensor for tensor in state.values() if tensor.shape == (WIDE[0], rank)]
        if t % window == 0:
            U = torch.linalg.svd(G)[0][:, :rank]
            assert relative(P @ P.T, U @ U.T) < 1e-10
        else:
            assert torch.equal(P, bases[-1])
        bases.append(P.clone())


@pytest.mark.parametrize("inner", ["adamw", "sgd"])
def test_7_transposed_training_gives_the_transpose(inner: str) -> None:
    start, target = normal(11, *WIDE), normal(12, *WIDE)
    options = {"rank": 2, "refresh": 3, "inner": piece(sgd) if inner == "sgd" else None}
    reached = trained(start, towards(target), 12, **options)
    flipped = trained(start.T, towards(target.T), 12, **options)
    for found, expected in zip(flipped, reached, strict=True):
        assert relative(found.T, expected) < 1e-6


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_definition_against_brute_force(shape: tuple[int, int]) -> None:
    """Adam on the projected gradient, moments kept over refreshes; signs of singular vectors as the library fixes them."""
    rank, window, lr, scale, decay = 2, 3, 0.05, 0.25, 0.1
    start, target = normal(13, *shape), normal(14, *shape)
    block = block_of(weight=start)
    optimizer = optimizer_on({SITE: block}, [galore(rank=rank, refresh=window, scale=scale, weight_decay=decay)], lr)
    W = start.clone()
    left = shape is WIDE
    first = torch.zeros((rank, shape[1]) if left else (shape[0], rank), dtype=torch.float64)
    second = torch.zeros_like(first)
    wanted = (shape[0], rank) if left else (rank, shape[1])
    for t in range(1, 11):
        G = W - target
        run(optimizer, block["weight"], towards(target), 1)
        (basis,) = [tensor for tensor in state_of(optimizer, block["weight"]).values() if tensor.shape == wanted]
        R = basis.T @ G if left else G @ basis.T
        first, second = 0.9 * first + 0.1 * R, 0.999 * second + 0.001 * R**2
        direction = (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        W = W - lr * scale * (basis @ direction if left else direction @ basis) - lr * decay * W
        assert relative(block["weight"], W) < 1e-10


def test_orthonormal_change_of_outputs_is_followed() -> None:
    """W -> T W with an orthonormal T and SGD inside: the subspace turns with the gradient."""
    start, target, T = normal(15, *WIDE), normal(16, *WIDE), orthonormal(17, WIDE[0], WIDE[0])
    options = {"rank": 2, "refresh": 3, "inner": piece(sgd)}
    reached = trained(start, towards(target), 9, **options)
    turned = trained(T @ start, towards(T @ target), 9, **options)
    assert relative(T.T @ turned[-1], reached[-1]) < 1e-9
