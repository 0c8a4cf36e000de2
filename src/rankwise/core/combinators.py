"""Operators made of operators: sums, scalings, rotations, dropout, and one operator per row of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rankwise.core.errors import ActivationError
from rankwise.core.layouts import Layout, LinearLayout
from rankwise.core.operators import Base, LowRank, Operator, compute_dtype


class Sum(Operator):
    """Σ terms. A frozen layer in first place runs its own forward, bias and all; the other terms are added to its output."""

    def __init__(self, *terms: Operator) -> None:
        flat: list[Operator] = []
        for term in terms:
            flat.extend(term.terms if isinstance(term, Sum) else (term,))
        self.terms = tuple(flat)

    @property
    def shape(self) -> tuple[int, int]:
        return self.terms[0].shape

    def dense(self) -> Tensor:
        total = self.terms[0].dense()
        for term in self.terms[1:]:
            total = total + term.dense()
        return total

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        return self._run(x, layout, None, linear_only=True)

    def affine(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
        return self._run(x, layout, bias, linear_only=False)

    def _run(self, x: Tensor, layout: Layout, bias: Tensor | None, *, linear_only: bool) -> Tensor:
        first, rest = self.terms[0], self.terms[1:]
        y = None
        if isinstance(first, Base) and rest:
            y = rest[0].add_to_base(first, x, layout, bias)
            if y is not None:
                rest = rest[1:]
        if y is None:
            y = first.apply(x, layout) if linear_only else first.affine(x, layout, bias)
        for term in rest:
            y = term.add_to(y, x, layout)
        return y


class Scaled(Operator):
    """factor · inner."""

    def __init__(self, inner: Operator, factor: float | Tensor) -> None:
        self.inner, self.factor = inner, factor

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def dense(self) -> Tensor:
        return self.inner.dense() * self.factor

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        y = self.inner.apply(x, layout)
        return y * (self.factor.to(y.dtype) if isinstance(self.factor, Tensor) else self.factor)


class RowScale(Operator):
    """diag(scale) · inner, scale (m,): one factor per output. The bias stays outside."""

    def __init__(self, inner: Operator, scale: Tensor) -> None:
        self.inner, self.scale = inner, scale

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def dense(self) -> Tensor:
        return self.inner.dense() * self.scale[:, None]

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        y = self.inner.apply(x, layout)
        return layout.scale_output(y, self.scale.to(y.dtype))

    def affine(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
        terms = self.inner.terms if isinstance(self.inner, Sum) else ()
        if len(terms) == 2 and isinstance(terms[0], Base) and isinstance(terms[1], LowRank):
            fused = terms[1].add_to_base(terms[0], x, layout, bias, gain=self.scale)
            if fused is not None:
                return fused
        if bias is None or not isinstance(layout, LinearLayout):
            return super().affine(x, layout, bias)
        y = self.inner.apply(x, layout)
        return torch.addcmul(bias.to(y.dtype), y, self.scale.to(y.dtype))


class ColumnScale(Operator):
    """inner · diag(scale), scale (n,): one factor per input."""

    def __init__(self, inner: Operator, scale: Tensor) -> None:
        self.inner, self.scale = inner, scale

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def dense(self) -> Tensor:
        return self.inner.dense() * self.scale

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if not isinstance(layout, LinearLayout):
            return super().apply(x, layout)
        return self.inner.apply(x * self.scale.to(compute_dtype(x, x.dtype)), layout)


class Rotated(Operator):
    """inner · rotation (side="input", rotation (n, n)) or rotation · inner (side="output", rotation (m, m))."""

    def __init__(self, inner: Operator, rotation: Operator, *, side: str) -> None:
        self.inner, self.rotation, self.side = inner, rotation, side

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def dense(self) -> Tensor:
        inner, rotation = self.inner.dense(), self.rotation.dense()
        wide = torch.promote_types(inner.dtype, rotation.dtype)  # a half-precision base meets float32 masters
        inner, rotation = inner.to(wide), rotation.to(wide)
        return inner @ rotation if self.side == "input" else rotation @ inner

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if not isinstance(layout, LinearLayout):
            return super().apply(x, layout)
        if self.side == "input":
            return self.inner.apply(self.rotation.apply(x, LinearLayout()), layout)
        return self.rotation.apply(self.inner.apply(x, layout), LinearLayout())


class Hadamard(Operator):
    """left ∘ right, entry by entry."""

    def __init__(self, left: Operator, right: Operator) -> None:
        self.left, self.right = left, right

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape

    def dense(self) -> Tensor:
        return self.left.dense() * self.right.dense()


class Dropped(Operator):
    """inner, on inputs that dropout has thinned: E[apply] = inner.apply, and `dense` is that expectation.

    Args:
        inner: the operator.
        probability: of dropping an input.
        thin: x, probability -> x̃, as `Site.thin` does (see `MaskStream`).
    """

    def __init__(self, inner: Operator, probability: float, thin: Callable[[Tensor, float], Tensor]) -> None:
        self.inner, self.probability, self.thin = inner, probability, thin

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def dense(self) -> Tensor:
        return self.inner.dense()

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if not x.is_floating_point():  # token numbers cannot be thinned; drop the looked-up channels instead
            return self.thin(self.inner.apply(x, layout), self.probability)
        return self.inner.apply(self.thin(x, self.probability), layout)

    def add_to_base(self, base: Base, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor | None:
        """See `LowRank.add_to_base`."""
        if not isinstance(self.inner, LowRank) or not isinstance(layout, LinearLayout):
            return None
        return self.inner.add_to_base(base, x, layout, bias, self.thin(x, self.probability))


class Routed(Operator):
    """A different operator for each row of the batch: row i uses operators[rows[i]]. This loop is the reference.

    `dense()` is refused, since there is no one matrix. `serving` has the fast ways for low-rank updates.

    Args:
        operators: one per choice.
        rows: (batch,) the choice of each row.
        biases: one per choice, where methods change the bias; None: all use the layer's.
    """

    def __init__(self, operators: Sequence[Operator], rows: Tensor, biases: Sequence[Tensor | None] | None = None) -> None:
        self.operators, self.rows, self.biases = tuple(operators), rows, biases

    @property
    def shape(self) -> tuple[int, int]:
        return self.operators[0].shape

    def dense(self) -> Tensor:
        raise TypeError("a routed operator has one matrix per row of the batch; take dense() of one of its operators")

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        return self._scatter(x, lambda index, part: self.operators[index].apply(part, layout))

    def affine(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
        biases = [bias] * len(self.operators) if self.biases is None else self.biases
        return self._scatter(x, lambda index, part: self.operators[index].affine(part, layout, biases[index]))

    def _scatter(self, x: Tensor, run: Callable[[int, Tensor], Tensor]) -> Tensor:
        if self.rows.shape[0] != x.shape[0]:
            raise ActivationError(
                f"the batch has {x.shape[0]} rows, but {self.rows.shape[0]} adapter names were given; give one name per row"
            )
        result: Tensor | None = None
        for index in torch.unique(self.rows).tolist():
            chosen = (self.rows == index).nonzero().squeeze(1)
            part = run(index, x.index_select(0, chosen))
            if result is None:
                result = part.new_zeros((x.shape[0], *part.shape[1:]))
            result = result.index_copy(0, chosen, part)
        if result is None:  # an empty batch
            return run(0, x)
        return result
