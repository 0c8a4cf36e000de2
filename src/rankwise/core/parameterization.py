"""The contract of a parameterization: a map from the frozen operator to the adapted one, and what it declares about itself.

A method states its roles (the names of its trained tensors), how a start can be put into it, and facts that select the
shared checks. It never mentions a layer class, a dtype policy, a device or an optimizer; the binding does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankwise.core.bank import Bank
from rankwise.core.combinators import Sum
from rankwise.core.errors import Problem
from rankwise.core.gain import Gain, with_gain
from rankwise.core.operators import Dense, LowRank, Operator
from rankwise.core.queries import as_low_rank
from rankwise.core.sites import Site
from rankwise.core.statistics import Statistic

PRODUCT = "product"  # a start that gives B A ≠ 0, placed so that the update equals it
INPUT = "input"  # a start that gives the input factor A alone, with B = 0
OUTPUT = "output"  # a start that gives the output factor B alone, with A = 0, and trains both
FROZEN_OUTPUT = "frozen output"  # the same, where B then has to stay as it starts
PAIR = "pair"  # a start that gives two factors which both have to train; their product alone would not do
ALL_LAYOUTS = frozenset({"linear", "conv", "embedding"})


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a parameterization declares; facts select the contract's checks and never change the maths.

    Attributes:
        additive: W' = W + update, with an update that does not depend on W.
        starts_at_base: the first forward equals the frozen layer's.
        exact_lora_export: `as_low_rank` of the update is exact.
        same_in_evaluation: evaluation acts with the trained tensors as they are, dropout aside.
        layouts: the layer kinds it works on.
        expected_failures: contract check -> reason.
    """

    additive: bool = True
    starts_at_base: bool = True
    exact_lora_export: bool = True
    same_in_evaluation: bool = True
    layouts: frozenset[str] = ALL_LAYOUTS
    expected_failures: Mapping[str, str] = field(default_factory=dict)


class Replacement(nn.Module, ABC):
    """Interface: what stands in the weight's place while an adapter made for it is on (LoftQ's dequantized weight).

    Its buffers are stored with the adapter; from them and the untouched weight it gives the same matrix again.
    """

    @abstractmethod
    def forward(self, untouched: Tensor) -> Tensor:
        """The replacing matrix (m, n) for the untouched one, in the same dtype."""


class Parameterization(nn.Module, ABC):
    """Interface: `forward(base) -> adapted operator`. Trained tensors are its parameters, frozen ones its buffers."""

    facts: ClassVar[Facts] = Facts()
    carried_B: Tensor | None
    carried_A: Tensor | None
    replacement: Replacement | None

    def __init__(self) -> None:
        super().__init__()
        self.rank = 0
        self.scale = 1.0
        # A frozen low-rank part of the base that this adapter brought along: minus its start ("offset"), or factors that
        # were absorbed into the weight. See `Adapters` for who applies it.
        self.register_buffer("carried_B", None)
        self.register_buffer("carried_A", None)
        self.replacement = None  # where there is one, it is absorbed
        self.gradient_gain: Gain | None = None  # see `Step.gain`
        self.around: Callable[[Parameterization, Operator], Operator] | None = None  # see `Perturbation.around`
        self.absorbed = False

    @classmethod
    @abstractmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        """Names of the trained tensors for these arguments, known without building anything."""

    @classmethod
    def facts_of(cls, **arguments: Any) -> Facts:
        """The facts for these arguments, where some of them change what holds (a start beside the base)."""
        return cls.facts

    @classmethod
    def start_kinds(cls, **arguments: Any) -> frozenset[str]:
        """Kinds of start it can hold, of those named above (`PRODUCT`, `INPUT`, …). Empty: it has a start of its own."""
        return frozenset()

    @classmethod
    def needs_of(cls, **arguments: Any) -> frozenset[Statistic]:
        """Statistics that building a site reads (`Site.statistics`)."""
        return frozenset()

    @classmethod
    def restarts(cls, **arguments: Any) -> bool:
        """Whether a site can be absorbed into the weight and begin again: additive with exact factors, and has a `restart`."""
        return cls.restart is not Parameterization.restart and cls.facts.additive and cls.facts.exact_lora_export

    @classmethod
    def narrows(cls, **arguments: Any) -> bool:
        """Whether `restart` begins at whatever rank is left: every tensor of it is a role A, B or gate."""
        return False

    @classmethod
    def renewals(cls) -> frozenset[str]:
        """What `renew` can do."""
        return frozenset()

    @classmethod
    def gate_starts_open(cls, **arguments: Any) -> bool:
        """Whether the role "gate", where there is one, starts away from zero."""
        return True

    @classmethod
    def prunable(cls, **arguments: Any) -> bool:
        """Whether zeros in its trained tensors lead to the base: not where these hold it, or a start that is subtracted."""
        return True

    @classmethod
    def width_of(cls, m: int, n: int, **arguments: Any) -> int | None:
        """The rank asked for, where it must not exceed min(m, n); None where any value fits."""
        return arguments.get("rank")

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        """Reasons why this site cannot take these arguments, beyond rank and layer kind."""
        return []

    @classmethod
    def shared(cls, sites: Sequence[Site], **arguments: Any) -> Bank | None:
        """Tensors that all sites of the adapter share, made before any site is built."""
        return None

    @abstractmethod
    def forward(self, base: Operator) -> Operator:
        """The adapted operator. The whole method."""

    def adapted_bias(self, bias: Tensor) -> Tensor:
        """The bias (m,) of the adapted layer; most methods leave it as it is."""
        return bias

    @property
    def changes_bias(self) -> bool:
        """Whether the method says anything about the bias."""
        return type(self).adapted_bias is not Parameterization.adapted_bias

    def update(self) -> Operator:
        """The low-rank part W' - W would have if nothing else were trained (for additive methods: the whole update)."""
        raise TypeError(f"{type(self).__name__} has no additive part; this is a bug in rankwise")

    def load_factors(self, factors: LowRank) -> None:
        """Puts a start in: afterwards `update()` equals scale · B A of `factors`, or `factors.A` is the input factor."""
        raise TypeError(f"{type(self).__name__} cannot hold a start; this is a bug in rankwise")

    def refresh(self, base: Operator) -> None:
        """Recomputes what was read off the base, after a start has moved it."""

    def filled(self, weight: Tensor) -> None:
        """A file has filled the tensors that are stored; reads the others off the frozen matrix (m, n) again."""

    def restart(self, site: Site) -> None:
        """Draws the trained tensors again, from a freshly seeded site, so that `update()` is zero; see `restarts`."""
        raise TypeError(f"{type(self).__name__} cannot be restarted; this is a bug in rankwise")

    def renew(self, what: str, generator: torch.Generator, **arguments: Any) -> Mapping[str, Callable[[Tensor], Tensor] | None]:
        """Does what a `Renew` decision asks for; it may replace its tensors by others.

        Returns:
            Roles whose tensors mean something else now -> how a gradient of that tensor, and so its moments, follow; None: its
            state is forgotten.
        """
        raise TypeError(f"{type(self).__name__} cannot {what}; this is a bug in rankwise")

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Before a file fills the tensors: brings names and shapes to those in the file."""

    def roles(self) -> dict[str, nn.Parameter]:
        """Trained tensors by role: the last part of the parameter's name."""
        named: dict[str, nn.Parameter] = {}
        for name, parameter in self.named_parameters():
            role = name.rsplit(".", 1)[-1]
            if role in named:
                raise TypeError(f"{type(self).__name__} has two tensors with role {role!r}; this is a bug in rankwise")
            named[role] = parameter
        return named

    def carried(self) -> LowRank | None:
        """The frozen low-rank part that came with this adapter, or None."""
        if self.carried_B is None or self.carried_A is None:
            return None
        return LowRank(self.carried_B, self.carried_A)

    def carry(self, part: LowRank, *, absorbed: bool) -> None:
        """Adds a frozen low-rank part to what is carried, as factors as long as these are no wider than the matrix."""
        new = part.folded()
        old = self.carried()
        B = new.B.detach().clone() if old is None else torch.cat([old.B, new.B.detach()], dim=1)  # (m, k)
        A = new.A.detach().clone() if old is None else torch.cat([old.A, new.A.detach()], dim=0)  # (k, n)
        m, n = part.shape
        if B.shape[1] > min(m, n):  # many restarts: the product itself is smaller now
            product = B @ A  # (m, n)
            identity = torch.eye(min(m, n), dtype=B.dtype, device=B.device)
            B, A = (product, identity) if n <= m else (identity, product)
        self.carried_B, self.carried_A, self.absorbed = B, A, absorbed

    def effective(self, base: Operator) -> Operator:
        """The adapted operator on this base, with what is carried applied unless the weight holds it already."""
        carried = self.carried()
        adapted = self.forward(base if carried is None or self.absorbed else Sum(base, carried))
        return adapted if self.around is None or not self.training else self.around(self, adapted)

    def moved(self, untouched: Operator) -> Operator | None:
        """What this adapter changed in the base beside its own work: what it carries, and what replaces the weight."""
        carried = self.carried()
        if self.replacement is None:
            return carried
        rest = _Difference(Dense(self.replacement(untouched.dense())), untouched)
        return rest if carried is None else Sum(rest, carried)

    def total_update(self, untouched: Operator) -> Operator:
        """W' - W₀ against the untouched layer: low rank where the method is additive, a dense difference elsewhere."""
        moved = self.moved(untouched)
        if self.facts.additive:
            return self.update() if moved is None else Sum(self.update(), moved)
        return _Difference(self.forward(untouched if moved is None else Sum(untouched, moved)), untouched)


class Additive(Parameterization):
    """Interface: W' = W + update()."""

    @abstractmethod
    def update(self) -> Operator:
        """W' - W."""

    def forward(self, base: Operator) -> Operator:
        update = self.update()
        if self.gradient_gain is not None and self.training and torch.is_grad_enabled():
            update = with_gain(update, self.gradient_gain)
        return Sum(base, update)

    def low_rank(self) -> LowRank | None:
        """The exact factors of the update, or None."""
        return as_low_rank(self.update())


class _Difference(Operator):
    """adapted - base: what a method that is not additive did to the weight."""

    def __init__(self, adapted: Operator, base: Operator) -> None:
        self.adapted, self.base = adapted, base

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    def dense(self) -> Tensor:
        return self.adapted.dense() - self.base.dense()
