"""Three ways to the same sum: y_t + B_g A_g x_t for every row t with its own adapter g, rows of the base left alone.

    loop        adapter by adapter through `LowRank.apply` on the rows that use it: the reference, for every layout
    gathered    A[g] (k, R, n) and B[g] (k, m, R) gathered, two batched products: few launches, memory k R (m + n)
    segmented   one pair of products per adapter over all of its rows: no gathering; for every layout

A and B are the stacks (slots, R, n) and (slots, m, R), zero beyond an adapter's true rank, the scale folded into B. All three
are differentiable in the stacks and in x; where no gradient is wanted, the sum is written into y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.core.layouts import Layout, LinearLayout
from rankwise.core.operators import LowRank, compute_dtype
from rankwise.serving.plan import BatchPlan, Segment

BACKENDS = ("loop", "gathered", "segmented")


def loop(y: Tensor, x: Tensor, A: Tensor, B: Tensor, plan: BatchPlan, layout: Layout) -> Tensor:
    """The reference: adapters one after the other, each on its own rows."""
    for slot in plan.distinct:
        rows = plan.active[plan.gather == slot]
        part = LowRank(B[slot], A[slot]).apply(x.index_select(0, rows), layout)
        y = y.index_add(0, rows, part.to(y.dtype))
    return y


def gathered(y: Tensor, x: Tensor, A: Tensor, B: Tensor, plan: BatchPlan, layout: Layout) -> Tensor:
    """Batched products over gathered factors. Linear layers only."""
    if not plan.gather.numel():
        return y
    dtype = compute_dtype(x, A.dtype)
    if plan.consecutive:
        first = plan.slots[int(plan.active[0])]
        A, B = A.narrow(0, first, plan.gather.numel()), B.narrow(0, first, plan.gather.numel())
    else:
        A, B = A.index_select(0, plan.gather), B.index_select(0, plan.gather)  # (k, R, n), (k, m, R)
    rows = (x if plan.all_active else x.index_select(0, plan.active)).to(dtype)
    flat = rows.reshape(rows.shape[0], -1, rows.shape[-1])  # (k, tokens, n)
    z = torch.bmm(flat, A.to(dtype).transpose(1, 2))  # (k, tokens, R)
    B = B.to(dtype).transpose(1, 2)  # (k, R, m)
    if plan.all_active and y.dtype == dtype and y.is_contiguous():
        wide = y.view(y.shape[0], -1, y.shape[-1])
        return (wide.baddbmm_(z, B) if _in_place(y, z, B) else torch.baddbmm(wide, z, B)).view(y.shape)
    part = torch.bmm(z, B).reshape(rows.shape[0], *y.shape[1:]).to(y.dtype)
    if plan.all_active:
        return y + part
    return y.index_add_(0, plan.active, part) if _in_place(y, part) else y.index_add(0, plan.active, part)


def segmented(y: Tensor, x: Tensor, A: Tensor, B: Tensor, plan: BatchPlan, layout: Layout) -> Tensor:
    """One pair of products per adapter in use, over all of its rows."""
    dtype = compute_dtype(x, A.dtype)
    if not plan.segments:
        return y
    if isinstance(layout, LinearLayout) and y.dtype == dtype and y.is_contiguous() and _in_place(y, x, A, B):
        for segment in plan.segments:
            _add_segment(y, x, A[segment.slot].to(dtype), B[segment.slot].to(dtype), segment)
        return y
    ordered = x.index_select(0, plan.order)
    parts = []
    for segment in plan.segments:
        part = ordered[segment.start : segment.stop]
        z = layout.project(part.to(dtype) if part.is_floating_point() else part, A[segment.slot].to(dtype))
        parts.append(layout.expand(z, B[segment.slot].to(dtype)))
    joined = torch.cat(parts).to(y.dtype)
    places = torch.cat([segment.rows for segment in plan.segments])  # rows of the batch, segment by segment
    return y.index_add_(0, places, joined) if _in_place(y, joined) else y.index_add(0, places, joined)


def _add_segment(y: Tensor, x: Tensor, A: Tensor, B: Tensor, segment: Segment) -> None:
    """Adds one adapter (A (R, n), B (m, R)) to its rows of y, through views where the rows stand in a run."""
    if segment.first is not None:
        stop = segment.first + segment.stop - segment.start
        z = x[segment.first : stop].reshape(-1, x.shape[-1]).to(A.dtype) @ A.t()  # (tokens of the segment, R)
        y[segment.first : stop].view(-1, y.shape[-1]).addmm_(z, B.t())
        return
    z = x.index_select(0, segment.rows).reshape(-1, x.shape[-1]).to(A.dtype) @ A.t()
    y.index_add_(0, segment.rows, (z @ B.t()).reshape(-1, *y.shape[1:]))


def pick(plan: BatchPlan, x: Tensor, A: Tensor, B: Tensor, layout: Layout) -> str:
    """The faster way for these shapes, by a rule in numbers moved.

    Gathering copies k R (m + n) numbers and starts two products in all; segments start two products per adapter, which cost as
    much as copying `_LAUNCH` numbers, and read and write scattered rows once more. On one CPU core, over 162 combinations of
    n = m in {512, 2048}, R in {8, 16, 64}, 1 to 32 rows of 1 to 32 tokens, and rows that are distinct, scattered or in runs,
    the rule's choice takes 1.02 of the better way's time on average, 1.43 at worst; always segments 1.19, always gathering 3.0.
    """
    if not isinstance(layout, LinearLayout):
        return "segmented"
    tokens = x.numel() // max(1, x.shape[-1] * plan.rows)  # of one row
    width = A.shape[-1] + B.shape[1]  # n + m
    copied = 0 if plan.consecutive else plan.gather.numel() * A.shape[1] * width
    return (
        "gathered" if copied + _LAUNCH <= len(plan.segments) * _LAUNCH + 1.5 * plan.scattered * tokens * width else "segmented"
    )


_LAUNCH = 64_000
RUN = {"loop": loop, "gathered": gathered, "segmented": segmented}


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _in_place(*tensors: Tensor) -> bool:
    """Whether y may be written: nobody will ask for a gradient, and nothing is being traced."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
