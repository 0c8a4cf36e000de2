"""A kernel in Tucker form with one rank per mode, in place of the weight.

    W' = C ×_i U_i over the modes i that have a basis        U_i (d_i, r_i) with orthonormal columns, C (r_0, r_1, k, …)

The modes of W are (out, in, kernel…); two of them make a linear layer, C its S. Modes without a basis stay whole in C.

K_i = U_i S_i with Mat_i(C)ᵀ = Q_i S_iᵀ, so that Mat_i(W) = K_i V_iᵀ with orthonormal V_i, has a gradient Mat_i(G) V_i that does
not vanish with S_i. One backward gives those of all modes: with bars for values without gradient, the terms

    Σ_i C_i ×_i (U_i - Ū_i) ×_{j≠i} Ū_j,   Mat_i(C_i) = Q_iᵀ

are zero and only carry them. `core` and `U_i` are made at the largest sizes; the leading parts are in use.

Not a method: see `tucker_integrated.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.approximations.starting import check_choice
from rankwise.approximations.truncated_svd import truncated_svd
from rankwise.core.combinators import Sum
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import Operator
from rankwise.core.parameterization import Parameterization, Site
from rankwise.core.structured import Tucker
from rankwise.parameterizations.factored import REPLACED, STARTS
from rankwise.parameterizations.integrator import basis, multiplied, placed


class TuckerFactors(Parameterization):
    """Interface: holds C and the bases.

    Args:
        site: the layer.
        ranks: at the start, one for every mode or one per mode of `modes`, never more than the mode's size; None is half of it.
        max_rank: R of every mode; None is half of its size, and the rank at the start at least.
        modes: those with a basis.
        start: "svd" (the higher-order one, of the weight), or "random" of the weight's norm.
    """

    facts = REPLACED

    def __init__(
        self,
        site: Site,
        *,
        ranks: int | Sequence[int] | None = None,
        max_rank: int | None = None,
        modes: Sequence[int] = (0, 1),
        start: str = "svd",
    ) -> None:
        super().__init__()
        check_choice("start", start, STARTS)
        self.modes = tuple(mode for mode in sorted(modes) if mode < len(site.shape))
        begun = dict(zip(sorted(modes), _per_mode(ranks, modes), strict=True))
        sizes = list(site.shape)  # of the core in use
        self.most: dict[int, int] = {}
        for mode in self.modes:
            size, wanted = site.shape[mode], begun[mode]
            half = max(1, size // 2)
            self.most[mode] = max(half, wanted or 1) if max_rank is None else max_rank
            self.most[mode] = min(self.most[mode], size)
            sizes[mode] = min(wanted or half, self.most[mode])
        sizes = consistent(sizes, self.modes)
        rooms = [min(2 * self.most.get(mode, size), size) for mode, size in enumerate(site.shape)]
        core, bases = self._begun(site, sizes, start)
        self.core = nn.Parameter(placed(core, site.zeros(*rooms)))
        for mode in self.modes:
            self.register_parameter(f"U_{mode}", nn.Parameter(placed(bases[mode], site.zeros(site.shape[mode], rooms[mode]))))
        self.core_only = False
        self.activate(sizes)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        """What every layer has; a convolution may add U_2, ….

        Raises:
            ArgumentError: the modes or ranks are none.
        """
        modes, max_rank = arguments.get("modes", (0, 1)), arguments.get("max_rank")
        if not modes or len(set(modes)) < len(modes) or min(modes) not in (0, 1):
            raise ArgumentError(f"modes are different numbers of dimensions, 0 (out) or 1 (in) among them, not {modes}")
        given = [*_per_mode(arguments.get("ranks"), modes), max_rank]
        if any(rank is not None and rank < 1 for rank in given):
            raise ArgumentError(f"ranks and max_rank are at least 1, not {arguments.get('ranks')} and {max_rank}")
        return frozenset({"core", *(f"U_{mode}" for mode in modes if mode < 2)})

    def _begun(self, site: Site, sizes: Sequence[int], start: str) -> tuple[Tensor, dict[int, Tensor]]:
        """The core and bases (d_i, r_i) to start from; zeros where a file will fill them."""
        bases = {mode: site.zeros(site.shape[mode], sizes[mode]) for mode in self.modes}
        if site.blank:
            return site.zeros(*sizes), bases
        weight = site.weight().reshape(site.shape)
        for mode in self.modes:
            if start == "svd":
                bases[mode] = truncated_svd(unfolded(weight, mode), sizes[mode]).U
            else:
                bases[mode] = basis(site.normal(*bases[mode].shape, purpose=f"U_{mode}"))
        if start == "random":
            core = site.normal(*sizes, purpose="core")
            return core * (weight.norm() / core.norm()), bases
        turns = [bases[mode].mT if mode in bases else None for mode in range(weight.dim())]
        return multiplied(weight, turns), bases

    @property
    def active(self) -> tuple[int, ...]:
        """The ranks in use, one per mode with a basis."""
        return tuple(self.get_buffer(f"columns_{mode}").shape[0] for mode in self.modes)

    def activate(self, ranks: Sequence[int]) -> None:
        """Uses the first columns from now on; ranks by mode, others left aside."""
        for mode in self.modes:
            self.register_buffer(f"columns_{mode}", torch.arange(ranks[mode], device=self.core.device))
        self.rank = max(self.active)

    def factors(self) -> tuple[Tensor, list[Tensor]]:
        """The core (r_0, r_1, k, …) and the bases [U_0, U_1, …] at the present ranks."""
        ranks = dict(zip(self.modes, self.active, strict=True))
        core = self.core[tuple(slice(ranks.get(mode)) for mode in range(self.core.dim()))]
        return core, [self.get_parameter(f"U_{mode}")[:, :rank] for mode, rank in ranks.items()]

    def kernel(self) -> Tensor:
        """W' with its modes kept, (out, in, kernel…)."""
        core, bases = self.factors()
        return multiplied(core, self.by_mode(bases))

    def forward(self, base: Operator) -> Operator:
        core, bases = self.factors()
        if not torch.is_grad_enabled() or not any(U.requires_grad for U in bases):
            return self._tucker(core, bases)
        fixed = [U.detach() for U in bases]
        if self.core_only:  # the bases stay in the graph, since DDP waits for their gradients
            return self._tucker(core + 0.0 * torch.stack([U[0, 0] for U in bases]).sum(), fixed)
        terms = [self._tucker(core, fixed)]
        for index, mode in enumerate(self.modes):
            moved = [*fixed[:index], bases[index] - fixed[index], *fixed[index + 1 :]]
            terms.append(self._tucker(_row_basis(core.detach(), mode), moved))
        return Sum(*terms)

    def _tucker(self, core: Tensor, bases: Sequence[Tensor]) -> Tucker:
        found = self.by_mode(bases)
        whole = (torch.eye(size, dtype=core.dtype, device=core.device) for size in core.shape)
        return Tucker(core, *(eye if U is None else U for U, eye in zip(found, whole, strict=True)))

    def by_mode(self, bases: Sequence[Tensor]) -> list[Tensor | None]:
        kept = dict(zip(self.modes, bases, strict=True))
        return [kept.get(mode) for mode in range(self.core.dim())]

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if all(f"columns_{mode}" in shapes for mode in self.modes):
            self.activate([shapes.get(f"columns_{mode}", (0,))[0] for mode in range(self.core.dim())])


def _per_mode(ranks: int | Sequence[int] | None, modes: Sequence[int]) -> list[int | None]:
    if ranks is None or isinstance(ranks, int):
        return [ranks] * len(modes)
    if len(ranks) != len(modes):
        raise ArgumentError(f"ranks holds one number per mode, {len(modes)} for modes={tuple(modes)}, not {tuple(ranks)}")
    return list(ranks)


def consistent(ranks: Sequence[int], modes: Sequence[int]) -> list[int]:
    """Ranks none of which is larger than the product of the others, which its unfolding could not have."""
    ranks = list(ranks)
    for mode in sorted(modes, key=lambda mode: -ranks[mode]):
        ranks[mode] = min(ranks[mode], math.prod(ranks) // ranks[mode])
    return ranks


def unfolded(tensor: Tensor, mode: int) -> Tensor:
    """Mat_mode (d, product of the others)."""
    return tensor.movedim(mode, 0).flatten(1)


def _row_basis(core: Tensor, mode: int) -> Tensor:
    """A core whose unfolding has orthonormal rows with the span of this one's: Q_iᵀ folded."""
    moved = core.movedim(mode, 0)
    Q = torch.linalg.qr(moved.flatten(1).mT)[0]  # (product of the others, r_i)
    return Q.mT.reshape(moved.shape).movedim(0, mode)
