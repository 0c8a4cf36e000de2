"""LoRA-SB against its spec (arXiv:2411.19557)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.handle import Handle
from tests.oracles.tools_training import SITE, adapted, layer_model, normal, put, relative, statistics_of, truncated

M, N, RANK, RATE = 8, 6, 3, 1e-2


def started_model(weight: Tensor, G: Tensor, rank: int = RANK) -> tuple[nn.Sequential, Handle]:
    recipe = rankwise.catalog.lora_sb(rank=rank, learning_rate=RATE)
    return adapted(weight, recipe, statistics={SITE: statistics_of(weight, gradient=G)})


def frozen_factors(handle: Handle, site: str = SITE) -> tuple[Tensor, Tensor, Tensor]:
    """B (m, r), R (r, r), A (r, n): the frozen frames are read off the update's response to R."""
    entry = handle.parameterization(site)
    R = entry.roles()["R"]
    kept, r = R.detach().clone(), R.shape[0]
    named = dict(entry.named_buffers())
    (B,) = [t for name, t in named.items() if name.rsplit(".", 1)[-1] == "B"]
    (A,) = [t for name, t in named.items() if name.rsplit(".", 1)[-1] == "A"]
    assert B.shape[1] == A.shape[0] == r
    return B, kept, A


def test_1_frames_are_orthonormal_and_the_core_diagonal() -> None:
    weight, G = normal(0, M, N), normal(1, M, N)
    _, handle = started_model(weight, G)
    B, R, A = frozen_factors(handle)
    eye = torch.eye(RANK, dtype=torch.float64)
    assert float((B.T @ B - eye).abs().max()) < 1e-5
    assert float((A @ A.T - eye).abs().max()) < 1e-5
    assert float((R - torch.diag(R.diagonal())).abs().max()) < 1e-5 * float(R.abs().max())
    assert torch.all(R.diagonal() >= 0)
    assert torch.all(R.diagonal().diff() <= 0)


def test_1_single_precision() -> None:
    weight, G = normal(2, M, N).float(), normal(3, M, N).float()
    _, handle = started_model(weight, G)
    B, _, A = frozen_factors(handle)
    assert B.dtype == A.dtype == torch.float32
    assert float((B.T @ B - torch.eye(RANK)).abs().max()) < 1e-5
    assert float((A @ A.T - torch.eye(RANK)).abs().max()) < 1e-5


def test_2_start_is_the_best_approximation_of_the_first_adam_step() -> None:
    weight, G = normal(4, M, N), normal(5, M, N)
    _, handle = started_model(weight, G)
    D0 = -RATE * torch.sign(G)
    start = handle.update_of(SITE).dense().detach()
    S = torch.linalg.svdvals(D0)
    left = float(((start - D0) ** 2).sum())
    assert abs(left / float((S[RANK:] ** 2).sum()) - 1) < 1e-4
    assert relative(start, truncated(D0, RANK)) < 1e-10
    for seed in range(50):  # no other matrix of this rank is closer
        nearby = truncated(D0 + 0.3 * RATE * normal(100 + seed, M, N), RANK)
        assert float(((nearby - D0) ** 2).sum()) >= left


def test_2_full_rank_is_one_sign_step() -> None:
    weight, G = normal(6, M, N), normal(7, M, N)
    G[2, 3] = 0.0  # sign(0) = 0
    model, handle = started_model(weight, G, rank=N)
    reached = weight + handle.update_of(SITE).dense().detach()
    assert float((reached - (weight - RATE * torch.sign(G))).abs().max()) < 1e-12
    x = normal(8, 4, N)
    assert relative(model(x), x @ (weight - RATE * torch.sign(G)).T) < 1e-12
    assert torch.equal(model.get_parameter("layer.weight").detach(), weight)


def test_3_equivalent_gradient_is_the_projection() -> None:
    weight, probe = normal(9, M, N), normal(10, M, N)
    model, handle = started_model(weight, probe)
    B, _, A = frozen_factors(handle)
    x, cotangent = normal(11, 5, N), normal(12, 5, M)
    (model(x) * cotangent).sum().backward()
    G = cotangent.T @ x
    g_R = handle.parameterization(SITE).roles()["R"].grad
    assert g_R is not None
    assert handle.parameterization(SITE).scale == 1.0
    assert relative(B @ g_R @ A, B @ B.T @ G @ A.T @ A) < 1e-12
    inner = float((B @ g_R @ A * G).sum())
    assert inner >= 0
    assert abs(inner / float((g_R**2).sum()) - 1) < 1e-12


def core_model(weight: Tensor, scale: float) -> tuple[nn.Sequential, Handle]:
    """LoRA-XS between frames that are not orthonormal (A = S V^T), on a layer of 6 x 5, rank 2."""
    return adapted(weight, f"lora_xs(rank=2, alpha={2 * scale}) + sgd")


def corrected(g_R: Tensor, B: Tensor, A: Tensor, s: float) -> Tensor:
    """(1/s²) (BᵀB)⁻¹ g_R (AAᵀ)⁻¹."""
    return torch.linalg.inv(B.T @ B) @ g_R @ torch.linalg.inv(A @ A.T) / s**2


@pytest.mark.parametrize("s", [1.0, 2.5])
def test_4_correction_is_the_least_squares_answer(s: float) -> None:
    weight = normal(13, 6, 5)
    model, handle = core_model(weight, s)
    B, _, A = frozen_factors(handle)
    assert float((A @ A.T - torch.eye(2, dtype=torch.float64)).abs().max()) > 0.1
    x, cotangent = normal(14, 4, 5), normal(15, 4, 6)
    (model(x) * cotangent).sum().backward()
    G = cotangent.T @ x
    g_R = handle.parameterization(SITE).roles()["R"].grad
    assert g_R is not None
    found = corrected(g_R, B, A, s)
    design = np.kron((s * B).numpy(), A.T.numpy())  # rows of vec(s B g A), row-major
    best = np.linalg.lstsq(design, G.reshape(-1).numpy(), rcond=None)[0].reshape(2, 2)
    assert relative(found, torch.from_numpy(best)) < 1e-10


def test_5_scale_drops_out_of_corrected_descent() -> None:
    weight, target = normal(16, 6, 5), normal(17, 6, 5)
    x, R0, lr = torch.eye(5, dtype=torch.float64), normal(18, 2, 2), 0.1

    def trajectory(s: float, R_start: Tensor) -> list[Tensor]:
        model, handle = core_model(weight, s)
        B, _, A = frozen_factors(handle)
        put(handle, {"R": R_start})
        optimizer, reached = handle.optimizer(lr), []
        R = handle.parameterization(SITE).roles()["R"]
        for _ in range(20):
            (0.5 * ((model(x).T - target) ** 2).sum() + model(x).sin().sum()).backward()
            assert R.grad is not None
            R.grad = corrected(R.grad, B, A, s)
            handle.after_backward()
            optimizer.step()
            handle.after_step()
            optimizer.zero_grad()
            reached.append(weight + handle.update_of(SITE).dense().detach())
        return reached

    plain, c = trajectory(1.0, R0), 3.0
    for first, second in zip(plain, trajectory(c, R0 / c), strict=True):
        assert relative(second, first) < 1e-8
    assert relative(plain[-1], plain[0]) > 1e-3


def test_6_count_of_trained_numbers() -> None:
    """Mistral-7B at r = 96: 32 blocks of 7 maps. The count does not depend on the maps' sizes, so small ones stand in."""
    sizes = {f"map{i}": normal(20 + i, 96, 96) for i in range(6)}
    model = layer_model(normal(19, 96, 96), **sizes)
    statistics = {
        name: statistics_of(module.weight.detach(), gradient=normal(30, 96, 96), site=name)
        for name, module in model.named_children()
        if isinstance(module, nn.Linear)
    }
    handle = rankwise.adapt_(model, rankwise.catalog.lora_sb(rank=96), statistics=statistics)
    assert 32 * handle.trained_numbers == 2_064_384
