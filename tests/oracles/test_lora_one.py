"""LoRA-One against its spec (arXiv:2502.01235)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rankwise
from tests.oracles.tools_training import (
    SITE,
    adapted,
    block_of,
    factor_gradients,
    normal,
    optimizer_on,
    product,
    put,
    relative,
    sine_of_angle,
    started,
    statistics_of,
    truncated,
    with_spectrum,
)

M, N, RANK = 5, 7, 2


def start(gradient: Tensor, *, gamma: float = 128.0, scale: float = 1.0, rank: int = RANK) -> tuple[Tensor, Tensor]:
    recipe = rankwise.catalog.lora_one(rank=rank, gamma=gamma)
    factors = started(recipe, statistics_of(torch.zeros_like(gradient), gradient=gradient), rank, scale=scale)
    return factors.B, factors.A


@pytest.mark.parametrize(("gamma", "alpha"), [(128.0, 16.0), (3.0, 4.0)])
def test_1_start_is_one_truncated_descent_step(gamma: float, alpha: float) -> None:
    weight, G = normal(0, M, N), normal(1, M, N)
    recipe = rankwise.catalog.lora_one(rank=RANK, alpha=alpha, gamma=gamma)
    _, handle = adapted(weight, recipe, statistics={SITE: statistics_of(weight, gradient=G)})
    s, S1 = alpha / RANK**0.5, torch.linalg.matrix_norm(G, 2)
    assert relative(handle.update_of(SITE).dense(), -s / (gamma * S1) * truncated(G, RANK)) < 1e-10


def test_2_balance() -> None:
    G, gamma = normal(2, M, N), 128.0
    S = torch.linalg.svdvals(G)
    B, A = start(G, gamma=gamma)
    expected = torch.diag(S[:RANK]) / (gamma * S[0])
    assert torch.allclose(B.T @ B, expected, atol=1e-14)
    assert torch.allclose(A @ A.T, expected, atol=1e-14)
    assert abs(float(torch.linalg.matrix_norm(B, 2)) - gamma**-0.5) < 1e-12


@pytest.mark.parametrize("factor", [1e-6, 0.5, 3.0, 1e6])
def test_3_scale_of_the_gradient_drops_out_and_its_sign_does_not(factor: float) -> None:
    G = normal(3, M, N)
    B, A = start(G)
    B_scaled, A_scaled = start(factor * G)
    assert relative(B_scaled, B) < 1e-12
    assert relative(A_scaled, A) < 1e-12
    B_up, A_up = start(-G)
    assert relative(B_up @ A_up, -B @ A) < 1e-12


def test_4_quadratic_is_solved_before_training() -> None:
    weight = normal(4, M, N)
    best = weight + with_spectrum(5, M, N, [3.0, 1.3])
    G = weight - best  # of ½‖W - W*‖²
    alpha = 16.0
    gamma = float(alpha / RANK**0.5 / torch.linalg.matrix_norm(G, 2))  # s/(γ S₁) = 1
    recipe = rankwise.catalog.lora_one(rank=RANK, alpha=alpha, gamma=gamma)
    _, handle = adapted(weight, recipe, statistics={SITE: statistics_of(weight, gradient=G)})
    reached = weight + handle.update_of(SITE).dense().detach()
    assert 0.5 * float(((reached - best) ** 2).sum()) < 1e-20


def test_5_loss_falls_to_first_order_and_rises_for_the_other_sign() -> None:
    weight, x, y = normal(6, M, N), normal(7, 20, N), normal(8, 20, M)

    def loss(W: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-y * (x @ W.T)).mean()

    leaf = weight.clone().requires_grad_()
    (G,) = torch.autograd.grad(loss(leaf), leaf)
    S = torch.linalg.svdvals(G)
    remainders = {}
    for sign in (1.0, -1.0):
        for gamma in (1e3, 2e3):
            B, A = start(sign * G, gamma=gamma)
            predicted = -sign * float((S[:RANK] ** 2).sum() / (gamma * S[0]))
            found = float(loss(weight + B @ A) - loss(weight))
            assert found * sign < 0
            remainders[sign, gamma] = found - predicted
            assert abs(remainders[sign, gamma]) < 0.02 * abs(predicted)
    for sign in (1.0, -1.0):  # what is left is of second order: halving the step quarters it
        assert abs(remainders[sign, 1e3] / remainders[sign, 2e3] - 4) < 0.1


@pytest.mark.parametrize("rank_of_gradient", [1, 2])
def test_6_plain_lora_finds_the_left_space_in_one_step(rank_of_gradient: int) -> None:
    weight, lr = normal(9, M, N), 0.1
    cotangent, x = normal(10, rank_of_gradient, M), normal(11, rank_of_gradient, N)
    model, handle = adapted(weight, f"lora(rank={RANK}, alpha={2 * RANK}) + sgd")
    A = handle.parameterization(SITE).roles()["A"].detach().clone()
    optimizer = handle.optimizer(lr)
    (model(x) * cotangent).sum().backward()
    G = cotangent.T @ x
    optimizer.step()
    roles = handle.parameterization(SITE).roles()
    B1 = roles["B"].detach()
    assert relative(B1, -lr * 2.0 * G @ A.T) < 1e-12
    assert torch.equal(roles["A"].detach(), A)
    B0, _ = start(G)
    left = torch.linalg.svd(G)[0][:, :rank_of_gradient]
    for B in (B1, B0):
        assert int(torch.linalg.matrix_rank(B, rtol=1e-7)) == rank_of_gradient  # roots of rounding are 1e-8
        assert sine_of_angle(torch.linalg.svd(B)[0][:, :rank_of_gradient], left) < 1e-8


def test_7_preconditioned_step_does_not_see_the_factorization() -> None:
    B, A, G, T, lr = normal(12, M, RANK), normal(13, RANK, N), normal(14, M, N), normal(15, RANK, RANK), 0.05
    reached = []
    for pair in (block_of(B=B, A=A), block_of(B=B @ torch.linalg.inv(T), A=T @ A)):
        optimizer = optimizer_on({SITE: pair}, "lora + sgd + scaled_gd(damping=0.0)", lr)
        factor_gradients(pair, G)
        optimizer.step()
        reached.append(product(pair))
    assert relative(reached[1], reached[0]) < 1e-9
    assert relative(reached[0], B @ A) > 1e-3


def test_start_leaves_the_weight_and_the_first_output_moves() -> None:
    """The definition's "W0 not modified, no offset": the first output is that of the moved weight."""
    weight, G, x = normal(16, M, N), normal(17, M, N), normal(18, 3, N)
    recipe = rankwise.catalog.lora_one(rank=RANK)
    model, handle = adapted(weight, recipe, statistics={SITE: statistics_of(weight, gradient=G)})
    assert torch.equal(model.get_parameter("layer.weight").detach(), weight)
    s = 16.0 / RANK**0.5
    B, A = start(G, scale=s)
    assert relative(model(x), x @ (weight + s * B @ A).T) < 1e-12
    put(handle, {"B": torch.zeros(M, RANK)})
    assert relative(model(x), x @ weight.T) < 1e-14
