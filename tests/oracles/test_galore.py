"""Oracles of GaLore: the projected training of whole weights, against loops written from the paper."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.core.optimizer import BlockOptimizer

SHAPES = [(6, 9), (9, 6), (6, 6)]
Gradient = Callable[[int, Tensor], Tensor]


def gradients(m: int, n: int, seed: int = 0) -> Gradient:
    """A gradient that depends on the step and on the weight: dL/dW of ½‖W - T_t‖² with a moving target."""
    targets = torch.randn(64, m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda step, W: W - targets[step]


class Run:
    """A weight trained by the library's optimizer; what it was after every step, and the projectors in use."""

    def __init__(self, W: Tensor, recipe: rw.Recipe, gradient: Gradient, *, lr: float, steps: int) -> None:
        self.weight = nn.Parameter(W.clone())
        self.optimizer = BlockOptimizer({"layer": {"weight": self.weight}}, recipe.steps(), lr)
        self.path, self.gradients, self.projectors = [W.clone()], [], []
        for step in range(steps):
            self.weight.grad = gradient(step, self.weight.detach()).clone()
            self.gradients.append(self.weight.grad.clone())
            self.optimizer.step()
            self.path.append(self.weight.detach().clone())
            state = {name.rsplit(".", 1)[-1]: value for name, value in self.optimizer.state[self.weight].items()}
            self.projectors.append({side: state[side].clone() for side in ("P", "Q") if side in state})


def weight(m: int, n: int) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def projector(matrix: Tensor) -> Tensor:
    """Onto the span of orthonormal columns."""
    return matrix @ matrix.T


WHOLE = [(6, 9, "std"), (9, 6, "std"), (6, 6, "std"), (6, 9, "left"), (9, 6, "right"), (6, 6, "reverse_std"), (6, 6, "full")]


@pytest.mark.parametrize(("m", "n", "side"), WHOLE)
def test_1_at_full_rank_it_is_sgd(m, n, side):
    rank = min(m, n)
    recipe = rw.catalog.galore(rank=rank, scale=1.0, refresh=3, side=side, inner=rw.catalog.sgd())
    run = Run(weight(m, n), recipe, gradients(m, n), lr=0.2, steps=8)
    W = weight(m, n)
    for step in range(8):
        W = W - 0.2 * gradients(m, n)(step, W)
        assert (run.path[step + 1] - W).abs().max() < 1e-6


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_2_the_change_within_a_window_lies_in_the_projectors_span(m, n):
    rank, window = 2, 4
    run = Run(weight(m, n), rw.catalog.galore(rank=rank, refresh=window), gradients(m, n), lr=0.2, steps=3 * window)
    for start in range(0, 3 * window, window):
        change = run.path[start + window] - run.path[start]
        assert torch.linalg.matrix_rank(change, rtol=1e-9) <= rank
        assert change.norm() > 0.1
        P = run.projectors[start].get("P")
        Q = run.projectors[start].get("Q")
        outside = change - projector(P) @ change if P is not None else change - change @ projector(Q.T)
        assert outside.norm() < 1e-6
    assert torch.linalg.matrix_rank(run.path[-1] - run.path[0], rtol=1e-9) > rank


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("side", ["std", "left", "right", "reverse_std", "full"])
def test_3_projectors_are_orthonormal_and_take_the_top_energy(m, n, side):
    rank = 3
    run = Run(weight(m, n), rw.catalog.galore(rank=rank, refresh=2, side=side), gradients(m, n), lr=0.1, steps=5)
    expected = {"std": {"Q"} if m >= n else {"P"}, "left": {"P"}, "right": {"Q"}, "full": {"P", "Q"}}
    expected["reverse_std"] = {"P"} if m >= n else {"Q"}
    for step in (0, 2, 4):
        kept, G = run.projectors[step], run.gradients[step]
        assert set(kept) == expected[side]
        energy = torch.linalg.svdvals(G)[:rank].square().sum()
        if "P" in kept:
            assert kept["P"].shape == (m, rank)
            assert (kept["P"].T @ kept["P"] - torch.eye(rank)).abs().max() < 1e-5
            assert (kept["P"].T @ G).square().sum() == pytest.approx(energy.item(), rel=1e-10)
        if "Q" in kept:
            assert kept["Q"].shape == (rank, n)
            assert (kept["Q"] @ kept["Q"].T - torch.eye(rank)).abs().max() < 1e-5
            assert (G @ kept["Q"].T).square().sum() == pytest.approx(energy.item(), rel=1e-10)


@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6)])
def test_4_a_gradient_of_low_rank_is_followed_exactly(m, n):
    rank = 2
    generator = torch.Generator().manual_seed(3)
    fixed = torch.linalg.qr(torch.randn(min(m, n), rank, generator=generator, dtype=torch.float64)).Q
    moving = torch.randn(9, rank, max(m, n), generator=generator, dtype=torch.float64)

    def gradient(step: int, W: Tensor) -> Tensor:
        G = fixed @ moving[step]
        return G if m < n else G.T

    recipe = rw.catalog.galore(rank=rank, scale=1.0, refresh=4, inner=rw.catalog.sgd())
    run = Run(weight(m, n), recipe, gradient, lr=0.3, steps=9)
    W = weight(m, n)
    for step in range(9):
        W = W - 0.3 * gradient(step, W)
        assert (run.path[step + 1] - W).abs().max() < 1e-12


@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6), (16, 4)])
def test_5_the_state_has_the_size_the_paper_says(m, n):
    rank = 2
    run = Run(weight(m, n), rw.catalog.galore(rank=rank), gradients(m, n), lr=0.1, steps=2)
    numbers = sum(value.numel() for value in run.optimizer.state[run.weight].values() if value.dim())
    assert numbers == (m * rank + 2 * n * rank if m <= n else n * rank + 2 * m * rank)


def test_6_the_projector_is_renewed_at_multiples_of_the_interval_only():
    run = Run(weight(6, 9), rw.catalog.galore(rank=2, refresh=3), gradients(6, 9), lr=0.1, steps=10)
    for step in range(1, 10):
        same = torch.equal(run.projectors[step]["P"], run.projectors[step - 1]["P"])
        assert same == (step % 3 != 0)
    for step in (0, 3, 6, 9):  # from the gradient of this very step
        U = torch.linalg.svd(run.gradients[step]).U[:, :2]
        assert (projector(U) - projector(run.projectors[step]["P"])).abs().max() < 1e-10


@pytest.mark.parametrize("side", [("std", "std"), ("left", "right"), ("full", "full")])
def test_7_the_transposed_problem_has_the_transposed_solution(side):
    gradient = gradients(6, 9)
    there = Run(weight(6, 9), rw.catalog.galore(rank=2, refresh=3, side=side[0]), gradient, lr=0.1, steps=10)
    recipe = rw.catalog.galore(rank=2, refresh=3, side=side[1])
    back = Run(weight(6, 9).T, recipe, lambda step, W: gradient(step, W.T).T, lr=0.1, steps=10)
    for W, transposed in zip(there.path, back.path, strict=True):
        assert (W - transposed.T).abs().max() < 1e-6


@pytest.mark.parametrize(("m", "n", "side"), [(6, 9, "std"), (9, 6, "std"), (6, 9, "full"), (9, 6, "left")])
def test_algorithm_as_a_loop(m, n, side):
    """Steps 1 to 3: Adam on R, moments kept over refreshes, projected back, scaled, with decoupled decay on the whole weight.

    The projectors' signs are the library's (any signs are singular vectors); that they span the right space is test 6's.
    """
    lr, alpha, decay, beta1, beta2, eps = 0.1, 0.25, 0.03, 0.8, 0.95, 1e-6
    inner = rw.catalog.adamw(betas=(beta1, beta2), eps=eps)
    recipe = rw.catalog.galore(rank=2, scale=alpha, refresh=3, side=side, weight_decay=decay, inner=inner)
    run = Run(weight(m, n), recipe, gradients(m, n), lr=lr, steps=8)
    W, M, V = weight(m, n), 0.0, 0.0
    for step in range(8):
        G = gradients(m, n)(step, W)
        P = run.projectors[step].get("P", torch.eye(m, dtype=W.dtype))
        Q = run.projectors[step].get("Q", torch.eye(n, dtype=W.dtype))
        R = P.T @ G @ Q.T
        M, V = beta1 * M + (1 - beta1) * R, beta2 * V + (1 - beta2) * R.square()
        N = (M / (1 - beta1 ** (step + 1))) / ((V / (1 - beta2 ** (step + 1))).sqrt() + eps)
        W = W - lr * alpha * (P @ N @ Q) - lr * decay * W
        assert (run.path[step + 1] - W).abs().max() < 1e-9


def test_tensors_that_are_not_projected_get_plain_adam_without_the_scale():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    recipe = rw.catalog.galore(rank=2, scale=0.25)
    optimizer = BlockOptimizer({"head": {"weight": ours}}, recipe.steps(), 0.1, plain=["head"])
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0)
    for _ in range(4):
        gradient = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    assert (ours - theirs).abs().max() < 1e-9
