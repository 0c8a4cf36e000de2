"""Small helpers of the oracle tests: layers, generic trained tensors, and the gradient of the effective weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.core.parameterization import Parameterization
from rankwise.core.recipe import Recipe

DOUBLE = torch.float64


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    """Gaussian numbers from a private generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


class One(nn.Module):
    """A model with one layer, called `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def linear(m: int, n: int, *, seed: int = 0, bias: bool = True, dtype: torch.dtype = DOUBLE) -> nn.Linear:
    """A linear layer (m, n) with Gaussian entries."""
    layer = nn.Linear(n, m, bias=bias).to(dtype)
    with torch.no_grad():
        for k, tensor in enumerate(layer.parameters()):
            tensor.copy_(randn(*tensor.shape, seed=1000 + 10 * seed + k, dtype=dtype))
    return layer


def adapted(recipe: Recipe, layer: nn.Module, *, seed: int = 0) -> tuple[One, rw.Handle, Parameterization]:
    """(model, handle, parameterization of the one site)."""
    model = One(layer)
    handle = rw.adapt_(model, recipe, where=["layer"], seed=seed)
    return model, handle, handle.parameterization("layer")


def fill(handle: rw.Handle, *, seed: int = 5, size: float = 1.0) -> None:
    """Puts every trained tensor at a generic point."""
    with torch.no_grad():
        k = 0
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.copy_(randn(*tensor.shape, seed=seed + 97 * k) * size)
                k += 1


def put(tensor: Tensor, value: Tensor | float) -> None:
    """Writes a value into a trained or frozen tensor."""
    with torch.no_grad():
        tensor.copy_(torch.as_tensor(value, dtype=tensor.dtype).expand_as(tensor))


def backward(model: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """Backward of ⟨g, model(x)⟩ for x (T, n), g (T, m); returns G = dL/dW' = gᵀ x (m, n)."""
    model.zero_grad()
    (model(x) * g).sum().backward()
    return g.t() @ x


def grad(tensor: Tensor) -> Tensor:
    """The gradient of a trained tensor, which must be there."""
    assert tensor.grad is not None
    return tensor.grad


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """‖actual - expected‖ <= tolerance · ‖expected‖ (absolute where expected is zero), and shapes agree."""
    assert actual.shape == expected.shape
    error, size = float((actual - expected).detach().norm()), float(expected.detach().norm())
    assert error <= tolerance * (size if size > 0 else 1.0), f"relative error {error / (size or 1.0):.3g} > {tolerance}"


def central_difference(function, tensor: Tensor, step: float = 1e-6) -> Tensor:
    """Finite-difference gradient of a scalar function of one tensor."""
    result = torch.zeros_like(tensor)
    for k in range(tensor.numel()):
        e = torch.zeros(tensor.numel(), dtype=tensor.dtype)
        e[k] = step
        e = e.reshape(tensor.shape)
        result.view(-1)[k] = (function(tensor + e) - function(tensor - e)) / (2 * step)
    return result
