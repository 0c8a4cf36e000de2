"""The frozen linear layer and a low-rank update in one autograd node.

    y = W x + b + s · B A x          x (T, n), W (m, n) frozen, B (m, r), A (r, n), b (m,)

Plain autograd would pass over the (T, m) output twice more in forward and the (T, n) input gradient once more in backward.
Here the update is accumulated by the matrix product itself, the scale touches only (T, r) numbers, and what is kept for
backward is x (shared with the layers that read the same x) and z = A x; with A frozen, z alone. Under dropout the update reads
its own x̃, which such layers share too, so that it is made, and its gradient passed on to x, once for all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankwise.core.errors import TrainingError
from rankwise.core.transforms import transformed


def can_fuse(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the fused node gives what plain autograd gives: a frozen layer, not compiled, no torch.func, no forward mode."""
    return not (
        weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or torch.compiler.is_compiling()
        or transformed()
        or type(x) is not Tensor
    )


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    B: Tensor,
    A: Tensor,
    scale: float,
    thinned: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """Y = gain ∘ (W x + scale · B A x̃) + b; x (…, n) -> (…, m).

    `thinned`, of x's shape, is the update's own input x̃ under dropout, x where there is none; `gain` (m,) is one where there
    is none.
    """
    flat = x.reshape(-1, x.shape[-1])
    branch = None if thinned is None else thinned.reshape(-1, x.shape[-1])
    y = _LowRankLinear.apply(flat, branch, weight, bias, B, A, scale, gain)
    return y.reshape(*x.shape[:-1], y.shape[-1])


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        B: Tensor,
        A: Tensor,
        scale: float,
        gain: Tensor | None,
    ) -> Tensor:
        read = x if branch is None else branch
        low_B, low_A = B.to(x.dtype), A.to(x.dtype)
        z = (low_A @ read.t()).t()  # (T, r); thin matrices go first, it is faster
        y = x @ weight.t() if bias is None or gain is not None else torch.addmm(bias, x, weight.t())  # (T, m)
        y.addmm_(z, low_B.t(), alpha=scale)
        _, _, _, _, need_B, need_A, _, need_gain = ctx.needs_input_grad
        ctx.save_for_backward(
            read if need_A else None,  # with A frozen (LoRA-FA) no (T, n) tensor is kept
            x if need_gain and branch is not None else None,
            weight,
            B,  # the masters: copies in x's dtype would be kept beside them
            A,
            z if need_B else None,
            gain,
            y if need_gain else None,
        )
        ctx.scale, ctx.branched = scale, branch is not None
        if gain is None:
            return y
        return y * gain if bias is None else torch.addcmul(bias, y, gain)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients  # (T, m)
        read, x, weight, B, A, z, gain, y = ctx.saved_tensors
        need_x, need_branch, _, _, need_B, need_A, _, _ = ctx.needs_input_grad
        scale, branched = ctx.scale, ctx.branched
        B, A = B.to(gradient.dtype), A.to(gradient.dtype)
        x_gradient = branch_gradient = B_gradient = A_gradient = gain_gradient = None
        again = torch.is_grad_enabled()  # a second derivative is wanted: nothing is written in place, and what was
        if again:  # computed in forward is computed again, so that it depends on the inputs
            if read is None:
                raise TrainingError(
                    "second derivatives through this layer need tensors that are not kept (A is frozen, or the first layer "
                    "computes in half precision); take them with torch.func, or adapt with binding='weight'"
                )
            z = (A @ read.t()).t()
            if y is not None:
                y = (x if branched else read) @ weight.t() + (z @ B.t()) * scale
        if gain is not None:
            product = gradient * y if y is not None else None  # (T, m)
            gain_gradient = None if product is None else product.sum(0)  # (m,)
            gradient = gradient * gain if again or product is None else torch.mul(gradient, gain, out=product)
        if need_B:
            B_gradient = (z.t() @ gradient).t()  # (m, r)
            B_gradient = B_gradient if scale == 1.0 else B_gradient * scale
        if need_A or need_x or need_branch:
            z_gradient = gradient @ B  # (T, r)
            z_gradient = z_gradient if scale == 1.0 else z_gradient * scale
            if need_A:
                A_gradient = z_gradient.t() @ read  # (r, n)
            if need_branch:
                branch_gradient = z_gradient @ A  # (T, n)
            if need_x:
                x_gradient = gradient @ weight  # (T, n)
                if not branched:
                    x_gradient = torch.addmm(x_gradient, z_gradient, A) if again else x_gradient.addmm_(z_gradient, A)
        return x_gradient, branch_gradient, None, None, B_gradient, A_gradient, None, gain_gradient
