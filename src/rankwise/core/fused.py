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
    x: Tensor, weight: Tensor, bias: Tensor | None, B: Tensor, A: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Y = W x + b + scale · B A (mask ∘ x); x (…, n) -> (…, m). `mask`, of x's shape, carries dropout and its rescaling."""
    flat = x.reshape(-1, x.shape[-1])
    flat_mask = None if mask is None else mask.reshape(-1, x.shape[-1])
    y = _LowRankLinear.apply(flat, weight, bias, B, A, scale, flat_mask)
    return y.reshape(*x.shape[:-1], y.shape[-1])


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, B: Tensor, A: Tensor, scale: float, mask: Tensor | None
    ) -> Tensor:
        branch = x if mask is None else x * mask
        z = (A @ branch.t()).t()  # (T, r)
        y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())  # (T, m)
        y.addmm_(z, B.t(), alpha=scale)
        need_x, _, _, need_B, need_A, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need_A else None,  # with A frozen (LoRA-FA) no (T, n) tensor is kept
            weight if need_x else None,
            B if need_A or need_x else None,
            A if need_x else None,
            z if need_B else None,
            mask if need_A or need_x else None,
        )
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients  # (T, m)
        x, weight, B, A, z, mask = ctx.saved_tensors
        need_x, _, _, need_B, need_A, _, _ = ctx.needs_input_grad
        x_gradient = B_gradient = A_gradient = None
        if need_B:
            B_gradient = (z.t() @ gradient).t() * ctx.scale  # (m, r); the thin matrix first, which is faster
        if need_A or need_x:
            z_gradient = (gradient @ B) * ctx.scale  # (T, r)
            if need_A:
                A_gradient = z_gradient.t() @ (x if mask is None else x * mask)  # (r, n)
            if need_x:
                x_gradient = gradient @ weight  # (T, n)
                if mask is None:
                    x_gradient = (
                        torch.addmm(x_gradient, z_gradient, A)
                        if torch.is_grad_enabled()
                        else (x_gradient.addmm_(z_gradient, A))
                    )
                else:
                    x_gradient = x_gradient + (z_gradient @ A) * mask
        return x_gradient, None, None, B_gradient, A_gradient, None, None
