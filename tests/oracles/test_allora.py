"""ALLoRA against its spec (arXiv:2410.09692): the backward of the update scaled by 1/√(‖row‖ + 1/η²) per output row.

The coefficient is read off the library's function, its use off the gradients of real adapted layers.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankwise.steps import allora
from tests.oracles.tools_training import SITE, adapted, normal, put, relative, roles_of

M, N, RANK = 7, 5, 3


def coefficients(B: Tensor, A: Tensor, scale: float, eta_squared: float) -> Tensor:
    """From the explicit product."""
    return ((scale * B @ A).norm(dim=1) + 1 / eta_squared) ** -0.5


def layer(eta_squared: float, *, scale: float = 1.0, more: str = "", method: str = "allora"):
    """An adapted layer ready to train with SGD, at a generic point, and its base weight."""
    weight = normal(0, M, N)
    step = f" + allora(eta_squared={eta_squared}{more})" if method == "allora" else ""
    model, handle = adapted(weight, f"lora(rank={RANK}, alpha={RANK * scale}){step} + sgd")
    optimizer = handle.optimizer(0.05)
    put(handle, {"B": normal(1, M, RANK), "A": normal(2, RANK, N)})
    return model, handle, optimizer, weight


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_1_gram_trick_gives_the_norms_of_the_rows(scale: float) -> None:
    B, A = normal(3, 50, 4).requires_grad_(), normal(4, 4, 30).requires_grad_()
    found = allora.row_coefficients(B, A, scale, 10.0)
    assert relative(found, coefficients(B.detach(), A.detach(), scale, 10.0)) < 1e-6
    assert not found.requires_grad
    at_zero = allora.row_coefficients(torch.zeros(50, 4, dtype=torch.float64), A.detach(), scale, 10.0)
    assert torch.allclose(at_zero, torch.full((50,), 10.0**0.5, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("eta_squared", [1.0, 9.0, 100.0])
def test_2_first_step_is_that_of_lora_with_a_rate_times_eta(eta_squared: float) -> None:
    x, g, lr = normal(5, 11, N), normal(6, 11, M), 0.05
    after = {}
    for method in ("lora", "allora"):
        model, handle, _, _ = layer(eta_squared, method=method)
        put(handle, {"B": torch.zeros(M, RANK)})
        optimizer = handle.optimizer(lr * (eta_squared**0.5 if method == "lora" else 1.0))
        (model(x) * g).sum().backward()
        optimizer.step()
        after[method] = roles_of(handle)
    assert relative(after["allora"]["B"], after["lora"]["B"]) < 1e-12
    assert float(after["lora"]["B"].norm()) > 0.1
    assert torch.equal(after["allora"]["A"], normal(2, RANK, N))


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("more", ["", ", scale_input_grad=True"])
def test_3_gradients_carry_the_coefficients_and_the_forward_does_not(scale: float, more: str) -> None:
    model, handle, _, weight = layer(4.0, scale=scale, more=more)
    B, A = roles_of(handle)["B"], roles_of(handle)["A"]
    x, g = normal(7, 11, N), normal(8, 11, M)
    y = model(x)
    assert relative(y, x @ (weight + scale * B @ A).T) < 1e-13
    (y * g).sum().backward()
    G, c = g.T @ x, coefficients(B, A, scale, 4.0)[:, None]
    trained = handle.blocks()[SITE]
    assert relative(trained["B"].grad, scale * c * G @ A.T) < 1e-6
    assert relative(trained["A"].grad, scale * B.T @ (c * G)) < 1e-6
    assert relative(trained["A"].grad, scale * B.T @ G) > 0.01  # a step that only rescaled rows of g_B would leave this


@pytest.mark.parametrize("eta_squared", [1e-3, 0.1])
def test_4_small_eta_is_lora_with_a_rate_times_eta(eta_squared: float) -> None:
    """The relative bound holds for g_B row by row; in g_A rows cancel, so that its scale is ‖B‖·‖G‖, not ‖Bᵀ G‖."""
    model, handle, _, _ = layer(eta_squared)
    B, A = roles_of(handle)["B"], roles_of(handle)["A"]
    x, g, eta = normal(9, 11, N), normal(10, 11, M), eta_squared**0.5
    (model(x) * g).sum().backward()
    G, bound = g.T @ x, float((B @ A).norm(dim=1).max()) * eta_squared / 2
    trained = handle.blocks()[SITE]
    assert relative(trained["B"].grad, eta * G @ A.T) < bound
    gap = float((trained["A"].grad - eta * B.T @ G).norm())
    assert gap < bound * eta * float(torch.linalg.matrix_norm(B, 2) * G.norm())
    assert gap > 0.0


def test_5_a_doubled_factor_lowers_each_coefficient_by_at_most_root_two() -> None:
    B, A = normal(11, 40, RANK), normal(12, RANK, N)
    B = B * torch.logspace(-6, 3, 40, dtype=torch.float64)[:, None]
    ratio = allora.row_coefficients(2 * B, A, 1.0, 10.0) / allora.row_coefficients(B, A, 1.0, 10.0)
    assert float(ratio.max()) <= 1 + 1e-12
    assert float(ratio.min()) >= 0.5**0.5 - 1e-12
    assert float(ratio.max()) > 0.999
    assert float(ratio.min()) < 0.7072


@pytest.mark.parametrize("scaled", [False, True])
def test_6_input_gradient_is_the_merged_layers_unless_asked_otherwise(scaled: bool) -> None:
    model, handle, _, weight = layer(4.0, more=f", scale_input_grad={scaled}")
    B, A = roles_of(handle)["B"], roles_of(handle)["A"]
    x, g = normal(13, 11, N).requires_grad_(), normal(14, 11, M)
    (model(x) * g).sum().backward()
    c = coefficients(B, A, 1.0, 4.0)
    assert relative(x.grad, g @ weight + ((c * g) if scaled else g) @ B @ A) < 1e-6
    assert relative((c * g) @ B @ A, g @ B @ A) > 0.1


def test_7_a_larger_eta_leaves_zero_faster() -> None:
    """½‖B A - T‖² as a layer on the identity, from B = 0."""
    target = 0.3 * normal(15, M, N)
    steps = []
    for eta in (1.0, 2.0, 4.0):
        model, handle = adapted(torch.zeros(M, N, dtype=torch.float64), f"lora(rank={N}) + allora(eta_squared={eta**2}) + sgd")
        put(handle, {"B": torch.zeros(M, N), "A": 0.5 * normal(16, N, N)})
        optimizer = handle.optimizer(0.01)
        eye, start = torch.eye(N, dtype=torch.float64), 0.5 * float((target**2).sum())
        count = 0
        while count < 2000:
            loss = 0.5 * (model(eye) - target.T).square().sum()
            if float(loss) <= start / 2:
                break
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            count += 1
        steps.append(count)
    assert 2000 > steps[0] > steps[1] > steps[2] > 1
