"""Operators made of operators: sums, scalings, rotations, dropout, and one operator per row of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rankwise.core.errors import ActivationError
from rankwise.core.layouts import ConvLayout, EmbeddingLayout, Layout, LinearLayout
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
    """diag(scale) · inner, scale (m,): one factor per output.

    The bias stays outside. With `whole` the frozen layer's output is scaled bias and all, and `affine` is only called with
    the bias that the method's `adapted_bias` gives.
    """

    def __init__(self, inner: Operator, scale: Tensor, *, whole: bool = False) -> None:
        self.inner, self.scale, self.whole = inner, scale, whole

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def dense(self) -> Tensor:
        return self.inner.dense() * self.scale[:, None]

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        y = self.inner.apply(x, layout)
        return layout.scale_output(y, self.scale.to(y.dtype))

    def affine(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
        if self.whole and isinstance(self.inner, Base):
            y = self.inner.forward(x)
            return layout.scale_output(y, self.scale.to(y.dtype))
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
        if isinstance(layout, EmbeddingLayout):  # the factor of each token is looked up like its column
            y = self.inner.apply(x, layout)
            return y * layout.project(x, self.scale.to(y.dtype)[None])
        if not isinstance(layout, LinearLayout):
            return super().apply(x, layout)
        return self.inner.apply(self._scaled(x), layout)

    def affine(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
        if not isinstance(layout, LinearLayout):
            return super().affine(x, layout, bias)
        return self.inner.affine(self._scaled(x), layout, bias)

    def _scaled(self, x: Tensor) -> Tensor:
        return x * self.scale.to(compute_dtype(x, x.dtype))


class Rotated(Operator):
    """inner · rotation (side="input", rotation (n, n)) or rotation · inner (side="output", rotation (m, m)).

    `whole`, for the output side: see `RowScale`.
    """

    def __init__(self, inner: Operator, rotation: Operator, *, side: str, whole: bool = False) -> None:
        self.inner, self.rotation, self.side, self.whole = inner, rotation, side, whole

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def dense(self) -> Tensor:
        inner = self.inner.dense()
        inner = inner.to(torch.promote_types(inner.dtype, torch.float32))  # a half-precision base meets float32 masters
        if self.side == "input":  # rows of `inner` are turned, so that no dense rotation is made where it has a faster way
            return self.rotation.transposed().apply(inner, LinearLayout())
        return self.rotation.apply(inner.t(), LinearLayout()).t()

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if self.side == "input" and isinstance(layout, LinearLayout):
            return self.inner.apply(self.rotation.apply(x, layout), layout)
        if self.side == "output" and not isinstance(layout, ConvLayout):
            return self.rotation.apply(self.inner.apply(x, layout), LinearLayout())
        return super().apply(x, layout)

    def affine(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
        if self.side == "input" and isinstance(layout, LinearLayout):
            return self.inner.affine(self.rotation.apply(x, layout), layout, bias)
        if self.whole and isinstance(self.inner, Base) and not isinstance(layout, ConvLayout):
            return self.rotation.apply(self.inner.forward(x), LinearLayout())
        return super().affine(x, layout, bias)


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
        kept: what multiplies the result; 1 - probability undoes the rescaling of x̃.
    """

    def __init__(self, inner: Operator, probability: float, thin: Callable[[Tensor, float], Tensor], kept: float = 1.0) -> None:
        self.inner, self.probability, self.thin, self.kept = inner, probability, thin, kept

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def dense(self) -> Tensor:
        return self.inner.dense()

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if not x.is_floating_point():  # token numbers cannot be thinned; drop the looked-up channels instead
            y = self.thin(self.inner.apply(x, layout), self.probability)
        else:
            y = self.inner.apply(self.thin(x, self.probability), layout)
        return y if self.kept == 1.0 else y * self.kept

    def add_to_base(self, base: Base, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor | None:
        """See `LowRank.add_to_base`."""
        if not isinstance(self.inner, LowRank) or not isinstance(layout, LinearLayout) or self.kept != 1.0:
            return None
        return self.inner.add_to_base(base, x, layout, bias, self.thin(x, self.probability))


RowPass = Callable[[Sequence[Operator], Tensor, Tensor, Layout, Tensor | None], Tensor | None]
_row_passes: dict[type[Operator], RowPass] = {}


def row_pass(kind: type[Operator]) -> Callable[[RowPass], RowPass]:
    """Registers how a batch with one operator of this kind per row runs in one pass.

    The function takes (operators, rows, x, layout, bias), row i using operators[rows[i]], some of which may be the frozen
    layer itself, and gives the output with the bias (m,) added where there is one, or None where it does not apply.
    """

    def keep(function: RowPass) -> RowPass:
        _row_passes[kind] = function
        return function

    return keep


class Routed(Operator):
    """A different operator for each row of the batch: row i uses operators[rows[i]].

    Kinds of operators may offer one pass for the whole batch (`row_pass`); the loop here is the reference. `dense()` is
    refused, since there is no one matrix. `serving` holds many low-rank updates.

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
        self._check(x)
        y = self.together(x, layout, None)
        return self._scatter(x, lambda index, part: self.operators[index].apply(part, layout)) if y is None else y

    def affine(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
        self._check(x)
        biases = [bias] * len(self.operators) if self.biases is None else self.biases
        own = [other for other in biases if other is not None]
        common = all(other is own[0] for other in own)
        y = self.together(x, layout, own[0] if own and common else None)
        if y is None:
            return self._scatter(x, lambda index, part: self.operators[index].affine(part, layout, biases[index]))
        if common:
            return y
        chosen = torch.stack(own).index_select(0, self.rows)  # (batch, m)
        return y + chosen.to(y.dtype).reshape(len(chosen), *(1 for _ in y.shape[2:]), y.shape[-1])

    def together(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor | None:
        """All rows in one pass, or None where the operators' kind has none."""
        kind = next((type(part) for part in self.operators if not isinstance(part, Base)), Base)
        return _row_passes[kind](self.operators, self.rows, x, layout, bias) if kind in _row_passes else None

    def _check(self, x: Tensor) -> None:
        if self.rows.shape[0] != x.shape[0]:
            raise ActivationError(
                f"the batch has {x.shape[0]} rows, but {self.rows.shape[0]} adapter names were given; give one name per row"
            )

    def _scatter(self, x: Tensor, run: Callable[[int, Tensor], Tensor]) -> Tensor:
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
