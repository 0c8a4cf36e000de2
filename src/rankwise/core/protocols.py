"""The other pieces a recipe or a user composes, as interfaces. Parameterizations and steps have files of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from rankwise.core.errors import Problem
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import Parameterization, Replacement
from rankwise.core.statistics import LayerStatistics, Statistic
from rankwise.core.step import Block

if TYPE_CHECKING:
    from rankwise.core.recipe import Recipe


@runtime_checkable
class Approximation(Protocol):
    """Statistics and a rank in, a low-rank operator out: starts, compressors and compensators are all of this form.

    Attributes:
        needs: statistics it reads.
        kind: "product" where B A ≠ 0, "input" where B = 0 and only A is meant, and the others of `core.parameterization`.
        shifted: as a start, the published method begins away from the base on purpose (LoRA-One, LoRA-SB).
        mode: as a start that is not shifted, "offset" (keep W, subtract the frozen start) or "absorb" (rewrite W);
            "none" where B A = 0 leaves nothing to subtract; "simulated" where something else takes W's place, see `Replacing`.
    """

    needs: frozenset[Statistic]
    kind: str
    shifted: bool
    mode: str

    def __call__(self, statistics: LayerStatistics, rank: int, *, generator: torch.Generator, scale: float = 1.0) -> LowRank:
        """Factors (B, A). As a start they are loaded as they are, and the layer applies scale · B A."""
        ...


class Replacing(Approximation, Protocol):
    """A start of mode "simulated": it replaces the weight, and its factors belong to what stands there then."""

    def with_base(
        self, statistics: LayerStatistics, rank: int, *, generator: torch.Generator, scale: float = 1.0
    ) -> tuple[LowRank, Replacement]:
        """The factors, and what replaces the weight."""
        ...

    def blank(self, m: int, n: int, rank: int) -> Replacement:
        """A replacement whose buffers will be filled from a file."""
        ...


class Perturbation(ABC):  # noqa: B024  (one either moves, estimates or wraps)
    """Interface: moves the trained tensors between backward and the optimizer's step.

    With `second_pass`, the gradients are taken again at the moved point and `restore` brings the tensors back to the bit.
    Without, the move stays (BAR's rescaling). With `forward_only` there is no backward at all: `estimate` makes the gradients.
    """

    roles: ClassVar[frozenset[str]] = frozenset()
    second_pass: bool = False
    forward_only: bool = False

    @classmethod
    def problems_with(cls, recipe: Recipe, **arguments: Any) -> list[Problem]:
        """Reasons why it cannot work with the other pieces of a recipe, beyond roles; arguments are its own."""
        return []

    def move(self, blocks: Mapping[str, Block], *, learning_rate: float) -> None:  # noqa: B027  (some only wrap or estimate)
        """Moves the tensors in place, reading their `.grad`."""

    def estimate(self, blocks: Mapping[str, Block], evaluate: Callable[[], Tensor], *, learning_rate: float) -> Tensor:
        """Puts an estimate into every `.grad` from losses alone, and leaves the tensors as they were to the bit.

        `evaluate` gives the loss of this batch, without dropout, wherever the tensors are. Returns the loss to report.
        """
        raise TypeError(f"{type(self).__name__} estimates no gradients; this is a bug in rankwise")

    def around(self, site: str) -> Callable[[Parameterization, Operator], Operator] | None:
        """What wraps the adapted operator of a site in training mode: (parameterization, adapted) -> operator; picklable."""
        return None

    def restore(self, blocks: Mapping[str, Block]) -> None:  # noqa: B027  (only two-pass perturbations restore)
        """Undoes `move` exactly."""

    def advance(self) -> None:  # noqa: B027  (most have no clock)
        """Called after every optimizer step."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors to resume from."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  (most have no state)
        """Takes back what `state_dict` gave."""


@dataclass(frozen=True)
class Keep:
    """Leave the site as it is."""


@dataclass(frozen=True)
class Mask:
    """Zero the gate where keep (r,) is False; factors and optimizer state stay, so that a rank can return."""

    keep: Tensor


@dataclass(frozen=True)
class Resize:
    """Cut the site down to the ranks where keep (r,) is True; optimizer state is cut with it."""

    keep: Tensor


@dataclass(frozen=True)
class Freeze:
    """Stop training these roles."""

    roles: frozenset[str]


@dataclass(frozen=True)
class Restart:
    """Absorb the update into the frozen weight and begin again at zero; `moments` says what becomes of optimizer state.

    moments: "reset" zeroes them; a number q in (0, 1) keeps the largest 1 - q fraction by magnitude; "fresh" forgets the
        counters too.
    rank: to begin again with, at most the present one; None keeps it.
    """

    moments: str | float = "reset"
    rank: int | None = None


@dataclass(frozen=True)
class Assign:
    """Put these values into the trained tensors of these roles; optimizer state stays."""

    values: Mapping[str, Tensor]


@dataclass(frozen=True)
class Renew:
    """Let the parameterization do something of its own, such as a new basis or another rank; see `Parameterization.renew`."""

    what: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


Decision = Keep | Mask | Resize | Freeze | Restart | Assign | Renew


class RankSchedule(ABC):
    """Interface: a pure decision per site; the handle carries it out, optimizer state too.

    Attributes:
        roles: trained tensors it needs.
        shrinks_gates: whether it pulls gates to zero, so that one starting there would never leave.
        prunes: whether it cuts directions away, which a start that moved a part of the weight into them does not survive.
    """

    roles: ClassVar[frozenset[str]] = frozenset()
    shrinks_gates: ClassVar[bool] = False
    prunes: ClassVar[bool] = False

    def before_step(self, step: int, blocks: Mapping[str, Block]) -> None:  # noqa: B027  (most add nothing)
        """After backward: may add the gradient of a regularizer to `.grad`."""

    @abstractmethod
    def decide(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        """After the optimizer's step number `step` (from 0), with the gradients still there. Sites left out are kept."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors to resume from."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  (some have no state)
        """Takes back what `state_dict` gave."""

    def unfinished(self, step: int) -> str | None:
        """Why the schedule has not done its work after `step` steps, or None."""
        return None


class Procedure(ABC):
    """Interface: a method that owns the loop or the network, built from the other pieces.

    Attributes:
        roles: trained tensors it needs.
        restarts: whether it begins sites again (`Restart`), which not every parameterization can.
        narrows: whether it begins them again with a smaller rank.
        renews: what it asks of sites (`Renew`); only parameterizations that can are legal.
        second_pass: whether the gradients are taken again after `between`.
        separate: whether every process trains tensors of its own, so that no wrapper may make them the same.
    """

    roles: ClassVar[frozenset[str]] = frozenset()
    restarts: ClassVar[bool] = False
    narrows: bool = False
    renews: ClassVar[frozenset[str]] = frozenset()
    second_pass: bool = False
    separate: ClassVar[bool] = False

    def begin(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Decision] | None:
        """Called once, with the shape (out, in, kernel…) of every site; what it decides is carried out at once."""
        return None

    def before_step(self, step: int, blocks: Mapping[str, Block]) -> None:  # noqa: B027  (most add nothing)
        """After backward: may add the gradient of a regularizer to `.grad`."""

    def after_step(self, step: int, beside: Mapping[str, Block]) -> None:  # noqa: B027  (most leave those alone)
        """After the optimizer's step, with the tensors that are trained whole beside the adapter."""

    def between(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        """With `second_pass`: after the first backward, its gradients still there. They are taken again afterwards."""
        return {}

    @abstractmethod
    def decide(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        """After the optimizer's step number `step` (from 0). Sites left out are kept."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors to resume from."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  (some have no state)
        """Takes back what `state_dict` gave."""


class Merger(Protocol):
    """Several updates of one site into one."""

    def __call__(self, updates: Sequence[Operator], weights: Sequence[float]) -> Operator:
        """Σ-like combination of updates (m, n) with user weights."""
        ...


class Budget(Protocol):
    """How many ranks each site gets out of a total."""

    def __call__(self, spectra: Mapping[str, Tensor], total: int) -> dict[str, int]:
        """spectra: site -> (k,) importances, descending; the result sums to at most `total`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a certificate says. Measured and proven are never one number, and a bound never stands without its assumptions.

    Attributes:
        name: of the certificate.
        measured: numbers read off the model or data.
        bound: the proven number, or None for a diagnostic.
        unit: of bound and of the measured numbers it is about.
        assumptions: under which the bound holds.
        vacuous: True where the bound says nothing here (a risk gap above 1, say); None without a bound.
        where: sites or data it was computed on.
        reading: one sentence on what the numbers tell a person.
    """

    name: str
    measured: Mapping[str, float]
    assumptions: tuple[str, ...]
    where: str
    reading: str
    bound: float | None = None
    unit: str = ""
    vacuous: bool | None = None
    table: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    def __str__(self) -> str:
        lines = [f"{self.name} ({self.where})"]
        lines += [f"  measured  {key} = {value:.6g}" for key, value in self.measured.items()]
        if self.bound is not None:
            said = "vacuous here" if self.vacuous else "not vacuous here"
            lines.append(f"  bound     {self.bound:.6g} {self.unit} ({said})")
        lines += [f"  assumes   {assumption}" for assumption in self.assumptions]
        lines.append(f"  reading   {self.reading}")
        return "\n".join(lines)


class Certificate(Protocol):
    """Reads operators or numbers and reports; never changes a model."""

    def __call__(self, *arguments: Any, **options: Any) -> Report:
        """The report."""
        ...


Replay = Callable[[], Any]  # runs the forward and backward of the current step again
