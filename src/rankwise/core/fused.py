"""The frozen linear layer and a low-rank update in one autograd node.

    y = W x + b + s · B A x          x (T, n), W (m, n) frozen, B (m, r), A (r, n), b (m,)

Plain autograd would pass over the (T, m) output twice more in forward and the (T, n) input gradient once more in backward.
Here the update is accumulated by the matrix product itself, the scale touches only (T, r) numbers, and what is kept for
backward is x (shared with the layers that read the same x) and z = A x; with A frozen, z alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankwise.core.errors import TrainingError


def can_fuse(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the fused node gives what plain autograd gives: a frozen layer, outside of compilation and torch.func."""
    return not (
        weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or type(x) is not Tensor
    )


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    B: Tensor,
    A: Tensor,
    scale: float,
    mask: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """Y = gain ∘ (W x + scale · B A (mask ∘ x)) + b; x (…, n) -> (…, m).

    `mask`, of x's shape, carries dropout and its rescaling; `gain` (m,) is one where there is none.
    """
    flat = x.reshape(-1, x.shape[-1])
    flat_mask = None if mask is None else mask.reshape(-1, x.shape[-1])
    y = _LowRankLinear.apply(flat, weight, bias, B, A, scale, flat_mask, gain)
    return y.reshape(*x.shape[:-1], y.shape[-1])


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        B: Tensor,
        A: Tensor,
        scale: float,
        mask: Tensor | None,
        gain: Tensor | None,
    ) -> Tensor:
        branch = x if mask is None else x * mask
        z = (A @ branch.t()).t()  # (T, r); thin matrices go first, it is faster
        y = x @ weight.t() if bias is None or gain is not None else torch.addmm(bias, x, weight.t())  # (T, m)
        y.addmm_(z, B.t(), alpha=scale)
        need_x, _, _, need_B, need_A, _, _, need_gain = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need_A else None,  # with A frozen (LoRA-FA) no (T, n) tensor is kept
            weight,
            B if need_x or need_A or B.is_leaf else None,  # a copy in half precision is kept only where it is needed
            A if need_x or A.is_leaf else None,
            z if need_B else None,
            mask if need_x or need_A else None,
            gain,
            y if need_gain else None,
        )
        ctx.scale = scale
        if gain is None:
            return y
        return y * gain if bias is None else torch.addcmul(bias, y, gain)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients  # (T, m)
        x, weight, B, A, z, mask, gain, y = ctx.saved_tensors
        need_x, _, _, need_B, need_A, _, _, need_gain = ctx.needs_input_grad
        x_gradient = B_gradient = A_gradient = gain_gradient = None
        again = torch.is_grad_enabled()  # a second derivative is wanted: nothing is written in place, and what was
        if again:  # computed in forward is computed again, so that it depends on the inputs
            if x is None or A is None or B is None:
                raise TrainingError(
                    "second derivatives through this layer need tensors that are not kept (A is frozen, or the first layer "
                    "computes in half precision); take them with torch.func, or adapt with binding='weight'"
                )
            z = (A @ (x if mask is None else x * mask).t()).t()
            y = None if gain is None else x @ weight.t() + (z @ B.t()) * ctx.scale
        if gain is not None:
            product = gradient * y if need_gain and y is not None else None  # (T, m)
            gain_gradient = None if product is None else product.sum(0)  # (m,)
            gradient = gradient * gain if again or product is None else torch.mul(gradient, gain, out=product)
        if need_B:
            B_gradient = (z.t() @ gradient).t() * ctx.scale  # (m, r)
        if need_A or need_x:
            z_gradient = (gradient @ B) * ctx.scale  # (T, r)
            if need_A:
                A_gradient = z_gradient.t() @ (x if mask is None else x * mask)  # (r, n)
            if need_x:
                x_gradient = gradient @ weight  # (T, n)
                if mask is not None:
                    x_gradient = x_gradient + (z_gradient @ A) * mask
                elif again:
                    x_gradient = torch.addmm(x_gradient, z_gradient, A)
                else:
                    x_gradient.addmm_(z_gradient, A)
        return x_gradient, None, None, B_gradient, A_gradient, None, None, gain_gradient
