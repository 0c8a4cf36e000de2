"""A batch with one adapter per row in one pass, for the kinds of operators that have one; `Routed` loops over the others.

    low-rank updates    base(x) + s · B[rows] A[rows] x, two batched products beside one run of the frozen layer
    gains               base(x) ∘ g[rows], or base(g[rows] ∘ x)
    output rotations    R[rows] base(x), where the rotation's own kind has such a pass

Tensors of the named adapters are stacked and gathered, so that gradients return to the adapters by row and those of adapters
without rows are exactly zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.core.combinators import ColumnScale, Rotated, RowScale, Sum, _row_passes, row_pass
from rankwise.core.layouts import Layout, LinearLayout
from rankwise.core.operators import Base, LowRank, Operator, compute_dtype


def gathered(tensors: Sequence[Tensor], rows: Tensor, like: Tensor) -> Tensor:
    """(batch, 1…, k): for each row of `like` (batch, …, k) its own one of some vectors (k,), ready to broadcast."""
    chosen = torch.stack(list(tensors)).index_select(0, rows)  # (batch, k)
    return chosen.to(like.dtype).reshape(len(chosen), *(1 for _ in like.shape[2:]), chosen.shape[-1])


@row_pass(Sum)
def _(parts: Sequence[Operator], rows: Tensor, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor | None:
    if not isinstance(layout, LinearLayout):
        return None
    base, pairs = None, []
    for part in parts:
        first, *rest = part.terms if isinstance(part, Sum) else (part,)
        if not isinstance(first, Base) or not all(isinstance(term, LowRank) for term in rest):
            return None
        base = first
        pairs.append([term.folded() for term in rest if isinstance(term, LowRank)])
    width = max(sum(pair.rank for pair in own) for own in pairs)
    if base is None or width == 0:
        return None
    y = base.affine(x, layout, bias)
    (m, n), like = base.shape, next(pair for own in pairs for pair in own)
    B = torch.stack([_padded([pair.B.t() for pair in own], width, like.B, m) for own in pairs])  # (adapters, r, m)
    A = torch.stack([_padded([pair.A for pair in own], width, like.A, n) for own in pairs])  # (adapters, r, n)
    B, A = (factor.to(y.dtype).index_select(0, rows) for factor in (B, A))  # (batch, r, ·)
    z = torch.bmm(x.to(y.dtype).reshape(len(rows), -1, n), A.mT)  # (batch, tokens, r)
    return torch.baddbmm(y.reshape(len(rows), -1, m), z, B).reshape(y.shape)


def _padded(factors: list[Tensor], width: int, like: Tensor, size: int) -> Tensor:
    """(width, size): the factors stacked, with zeros below; an adapter that is the frozen layer has none."""
    stacked = torch.cat([like.new_zeros(0, size), *factors])
    return F.pad(stacked, (0, 0, 0, width - len(stacked)))


@row_pass(RowScale)
def _(parts: Sequence[Operator], rows: Tensor, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor | None:
    found = _gains(parts, RowScale) if isinstance(layout, LinearLayout) else None
    if found is None:
        return None
    base, gains = found
    y = base.apply(x, layout)
    y = y * gathered(gains, rows, y)
    return y if bias is None else layout.add_bias(y, bias.to(y.dtype))


@row_pass(ColumnScale)
def _(parts: Sequence[Operator], rows: Tensor, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor | None:
    found = _gains(parts, ColumnScale) if isinstance(layout, LinearLayout) else None
    if found is None:
        return None
    base, gains = found
    x = x.to(compute_dtype(x, x.dtype))
    return base.affine(x * gathered(gains, rows, x), layout, bias)


def _gains(parts: Sequence[Operator], kind: type[RowScale] | type[ColumnScale]) -> tuple[Base, list[Tensor]] | None:
    """The frozen layer and one gain per part, ones for the layer itself; None where a part is something else."""
    scaled = [part for part in parts if isinstance(part, kind)]
    base = scaled[0].inner
    if not isinstance(base, Base) or any(not isinstance(part.inner, Base) for part in scaled):
        return None
    if any(not isinstance(part, kind | Base) for part in parts):
        return None
    ones = torch.ones_like(scaled[0].scale)
    return base, [part.scale if isinstance(part, kind) else ones for part in parts]


@row_pass(Rotated)
def _(parts: Sequence[Operator], rows: Tensor, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor | None:
    turned = [part for part in parts if isinstance(part, Rotated) and part.side == "output" and isinstance(part.inner, Base)]
    if len(turned) < len(parts) or not isinstance(layout, LinearLayout):
        return None
    rotations = [part.rotation for part in turned]
    run = _row_passes.get(type(rotations[0]))
    if run is None:
        return None
    y = run(rotations, rows, turned[0].inner.apply(x, layout), layout, None)
    return y if y is None or bias is None else layout.add_bias(y, bias.to(y.dtype))
