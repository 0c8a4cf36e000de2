"""TRP: a network is trained at full rank, and every few steps its weights are cut to a truncated SVD, so that they stay near.

    every `interval` steps, after the step:   W <- T(W) = U_r Σ_r V_rᵀ,  M(W) = U Σ Vᵀ;     W (m, n) trained whole
    in the one step that follows:             G <- G + λ U_r V_rᵀ

M is one of three ways to read a kernel as a matrix (see `matricize.py`); "filter" cuts every output's own (in, k·k) matrix. T
keeps the least r with Σ_{i≤r} σ_i² ≥ e Σ σ_i² ("energy" e), all σ_i ≥ t ("threshold"), or a fraction of min(rows, columns).
U_r V_rᵀ is a sub-gradient of the nuclear norm at T(W), so it pulls the kept singular values down, each by η λ. Between cuts the
step is any full-rank one, which makes W full rank again; nothing is trained but the weight, and memory grows by the
sub-gradient. The SVD of a layer costs O(m n min(m, n)) every `interval` steps. Trained numbers m·n. Layers whose kernel has one
entry, and linear ones, are their own channel matrix whatever M is. Moments are not projected.

Right after a cut the network *is* of low rank: `compression.deploy_` puts the small layers of M in each layer's place, after a
last cut by threshold or energy. With e = 1 and λ = 0 nothing happens, to the bit.

Not a penalty at every step: its strength over a run goes with 1 / `interval`.

*Differs* from the release: it cuts before a step and takes the sub-gradient in the same one; here the cut ends the step before
that, so that what is saved after a cut is of low rank, and weights are never cut before the first step. All layers named in
`where` are cut, where the release leaves out strides, 1×1 kernels and first layers.

Xu, Li, Zhang, Wen, Wang, Qi, Chen, Lin, Xiong: TRP: Trained Rank Pruning for Efficient Deep Neural Networks, 2018-2020,
arXiv:1812.02402, 2004.14566.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankwise.approximations.spectral_cut import cut, kept, truncate
from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.protocols import Assign, Decision, Procedure
from rankwise.core.sharding import sharded_like, whole
from rankwise.core.step import Block
from rankwise.procedures.matricize import check_kind, fold, has_kernel, unfold

__all__ = ["TRP", "truncate"]


@register("procedure")
class TRP(Procedure):
    """Cuts every weight at the end of each `interval`-th step.

    Args:
        interval: steps between cuts.
        matricization: "channel", "spatial" or "filter".
        energy, threshold, fraction: the criterion, as for `truncate`.
        nuclear: λ, of the sub-gradient in the step after a cut; 0 for none.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __init__(
        self,
        *,
        interval: int = 20,
        matricization: str = "channel",
        energy: float = 0.9,
        threshold: float | None = None,
        fraction: float | None = None,
        nuclear: float = 3e-4,
    ) -> None:
        if interval < 1 or nuclear < 0:
            raise ArgumentError(f"interval is at least 1 step and nuclear at least 0, not {interval} and {nuclear}")
        self.criterion = {"energy": energy, "threshold": threshold, "fraction": fraction}
        kept(torch.ones(1), **self.criterion)  # refuses a bad one now and not after `interval` steps
        self.interval, self.matricization, self.nuclear = interval, check_kind(matricization), nuclear
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._subgradients: dict[str, Tensor] = {}  # site -> (m, n), from a cut to the step after it

    def begin(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Remembers the kernels' shapes."""
        self._shapes = dict(shapes)

    def kind_at(self, site: str) -> str:
        """How this layer's weight is read."""
        return self.matricization if has_kernel(self._shapes[site]) else "channel"

    @torch.no_grad()
    def before_step(self, step: int, blocks: Mapping[str, Block]) -> None:
        """Adds λ U_r V_rᵀ in the step after a cut."""
        for site, direction in self._subgradients.items():
            weight = blocks[site]["weight"] if "weight" in blocks.get(site, {}) else None
            if weight is not None:
                extra = sharded_like(direction, weight) * self.nuclear
                weight.grad = extra if weight.grad is None else weight.grad.add_(extra)

    @torch.no_grad()
    def decide(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        """The truncated weights at the end of an interval."""
        self._subgradients = {}
        decided: dict[str, Decision] = {}
        if (step + 1) % self.interval:
            return decided
        for site, block in blocks.items():
            if "weight" in block:
                weight, kind = whole(block["weight"].detach()), self.kind_at(site)  # (m, n)
                truncated, direction, _ = cut(unfold(weight.reshape(self._shapes[site]), kind), **self.criterion)
                decided[site] = Assign({"weight": fold(truncated, kind, self._shapes[site]).reshape(weight.shape)})
                if self.nuclear:
                    self._subgradients[site] = fold(direction, kind, self._shapes[site]).reshape(weight.shape)
        return decided

    def state_dict(self) -> dict[str, Any]:
        """The sub-gradients still to be added."""
        return {"subgradients": dict(self._subgradients)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._subgradients = dict(state["subgradients"])
