"""The `weight` binding: modules for torch's parametrize that compute a layer's weight, and bias, from the frozen ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from rankwise.core.combinators import Scaled, Sum
from rankwise.core.errors import ActivationError
from rankwise.core.operators import Dense, Operator
from rankwise.core.targets import Target

if TYPE_CHECKING:
    from rankwise.core.bindings import Adapters


class ReparameterizedWeight(nn.Module):
    """The `weight` binding: the weight tensor as a function of the frozen one."""

    def __init__(self, adapters: Adapters, target: Target) -> None:
        super().__init__()
        object.__setattr__(self, "adapters", adapters)  # a child of the layer already
        self.layout = target.layout

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, in the shape of the frozen one."""
        adapters: Adapters = self.adapters  # type: ignore[assignment]
        if adapters.rows is not None:
            raise ActivationError("one adapter per row needs binding='path': a weight is the same for all rows")
        frozen = Dense(self.layout.to_matrix(weight))
        terms: list[Operator] = [frozen]
        selection = tuple((name, factor) for name, factor in adapters.active if name not in adapters.merged)
        if not selection:
            return weight
        if len(selection) == 1 and selection[0][1] == 1.0:
            matrix = adapters[selection[0][0]].effective(frozen).dense()
        else:
            for name, factor in selection:
                terms += [Scaled(adapters[name].effective(frozen), factor), Scaled(frozen, -factor)]
            matrix = Sum(*terms).dense()
        return self.layout.from_matrix(matrix.to(weight.dtype), weight)


class ReparameterizedBias(nn.Module):
    """The `weight` binding of a bias, for methods that change it."""

    def __init__(self, adapters: Adapters) -> None:
        super().__init__()
        object.__setattr__(self, "adapters", adapters)  # a child of the layer already

    def forward(self, bias: Tensor) -> Tensor:
        """The adapted bias (m,)."""
        adapters: Adapters = self.adapters  # type: ignore[assignment]
        untouched = bias if adapters.stash_bias is None else adapters.stash_bias
        for name, weight in adapters.active:
            if name not in adapters.merged and adapters[name].changes_bias:
                bias = bias + weight * (adapters[name].adapted_bias(untouched) - untouched)
        return bias
