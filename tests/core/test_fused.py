"""The fused node against plain autograd: values, gradients and second derivatives, and what it keeps for backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankwise.core.errors import TrainingError
from rankwise.core.fused import low_rank_linear


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_gain", [True, False])
@pytest.mark.parametrize("with_mask", [True, False])
def test_first_and_second_derivatives(with_bias: bool, with_gain: bool, with_mask: bool) -> None:
    x, W, b, B, A, gain, mask = tensors((5, 4), (3, 4), (3,), (3, 2), (2, 4), (3,), (5, 4))
    bias, mask = b if with_bias else None, mask if with_mask else None
    trained = [t.requires_grad_() for t in (x, B, A, *([gain] if with_gain else []))]

    def fused(x: Tensor, B: Tensor, A: Tensor, gain: Tensor | None = None) -> Tensor:
        return low_rank_linear(x, W, bias, B, A, 0.7, None if mask is None else x * mask, gain)

    branch = x if mask is None else x * mask
    plain = x @ W.t() + 0.7 * branch @ A.t() @ B.t()
    plain = (plain * gain if with_gain else plain) + (b if with_bias else 0)
    torch.testing.assert_close(fused(*trained), plain, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(fused, trained)
    assert torch.autograd.gradgradcheck(fused, trained)


def test_with_the_input_factor_frozen_no_input_is_kept_and_second_derivatives_are_refused() -> None:
    x, W, B, A = tensors((7, 5), (3, 5), (3, 2), (2, 5))
    x.requires_grad_()
    B.requires_grad_()
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = low_rank_linear(x, W, None, B, A, 1.0)
    assert (7, 5) not in kept and (7, 2) in kept
    with pytest.raises(TrainingError, match="take them with"):
        torch.autograd.grad(y.square().sum(), [B], create_graph=True)
