"""Cuttlefish: a network trains at full rank until the stable ranks of its weights rest, then is factorized once at these ranks.

    sr(W) = ⌊‖W‖_F² / σ_1²⌋     counted at the end of each "epoch" of `interval` steps
    a layer rests once the mean |slope| of the smoothed counts is ≤ `threshold`;  when all rest, in one switch
    W = U Σ Vᵀ  ->  B A,  B = U_r Σ_r^½ (m, r),  A = Σ_r^½ V_rᵀ (r, n),  r = ⌈k · sr / sr_0⌉,  at most k = min(m, n)

sr_0 belongs to the weight before the first step: the rule is scaled so that a weight as random as that keeps its full rank;
`rule="plain"` takes r = sr. Counts are smoothed by an exponential mean of span `window`, slopes are central differences, the
last 11 of them count (all where the window is shorter), and a layer that rests stays at rest. Afterwards the decay of the
factors is that of their product: the penalty (λ/2)‖B A‖_F² adds λ B (A Aᵀ) to the gradient of B and λ (BᵀB) A to that of A.

Trained numbers m·n before, r(m + n) after; one spectral norm per layer and epoch, one SVD per layer at the switch, which
forgets the optimizer's state of these layers. Everything else is left as it is. `layers` names those to factorize;
`rankwise.compression.slow_layers` finds the ones that would be faster (the paper's rule for the first layers, left whole).

Not a rank search: no loss is looked at.

*Differs* from the release: it makes the threshold 2.5 and 5 times larger for the last two layers and the last one of two
architectures; not here. A layer that the rule leaves with more numbers than the matrix is factorized all the same
(`compression.deploy_` multiplies it back).

Wang, Agarwal, U-chupala, Tanaka, Xing, Papailiopoulos: Cuttlefish: Low-Rank Model Training without All the Tuning, 2023,
arXiv:2305.02538.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankwise.approximations.starting import check_choice
from rankwise.core.errors import ArgumentError, did_you_mean
from rankwise.core.piece import register
from rankwise.core.protocols import Decision, Procedure, Renew
from rankwise.core.sharding import whole
from rankwise.core.step import Block
from rankwise.procedures.stable_ranks import RULES, Watch, stable_rank, target_rank

__all__ = ["Cuttlefish", "Watch", "frobenius_gradient", "stable_rank", "target_rank"]


def frobenius_gradient(B: Tensor, A: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Of (λ/2)‖B A‖_F²: λ B (A Aᵀ) (m, r) and λ (BᵀB) A (r, n)."""
    return lam * (B @ (A @ A.mT)), lam * ((B.mT @ B) @ A)


@register("procedure")
class Cuttlefish(Procedure):
    """Watches stable ranks and factorizes all layers when they rest.

    Args:
        interval: steps of an epoch.
        window: span of the mean, and epochs that are watched at least.
        threshold: largest mean slope at rest.
        rule: "scaled" or "plain".
        frobenius_decay: λ, after the switch.
        layers: names of the layers to factorize, whole or their last part; None for all.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"weight"})
    renews: ClassVar[frozenset[str]] = frozenset({"factorize"})

    def __init__(
        self,
        *,
        interval: int = 100,
        window: int = 15,
        threshold: float = 0.1,
        rule: str = "scaled",
        frobenius_decay: float = 1e-4,
        layers: Sequence[str] | None = None,
    ) -> None:
        if interval < 1 or frobenius_decay < 0:
            raise ArgumentError(
                f"interval is at least 1 step and frobenius_decay at least 0, not {interval} and {frobenius_decay}"
            )
        self.interval, self.window, self.threshold = interval, window, threshold
        self.rule, self.frobenius_decay = check_choice("rule", rule, RULES), frobenius_decay
        self.layers = None if layers is None else (layers,) if isinstance(layers, str) else tuple(layers)
        Watch(window, threshold)  # refuses bad ones now
        self.watches: dict[str, Watch] = {}
        self.start: dict[str, int] = {}  # site -> sr_0
        self.switched = False

    def begin(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Chooses the layers.

        Raises:
            ArgumentError: a name fits none of the adapted ones.
        """
        chosen = list(shapes) if self.layers is None else []
        for wanted in self.layers or ():
            found = [site for site in shapes if site == wanted or site.endswith(f".{wanted}")]
            if not found:
                raise ArgumentError(f"layers: {wanted!r} is none of the adapted layers. {did_you_mean(wanted, shapes)}")
            chosen += found
        self.watches = {site: Watch(self.window, self.threshold) for site in shapes if site in chosen}

    @torch.no_grad()
    def before_step(self, step: int, blocks: Mapping[str, Block]) -> None:
        """Counts sr_0 before the first step; later adds the decay of the products to the factors' gradients."""
        if not self.start and not self.switched:
            self.start = {site: stable_rank(whole(blocks[site]["weight"])) for site in self._whole_ones(blocks)}
        for site in self.watches if self.switched and self.frobenius_decay else ():
            block = blocks.get(site, {})
            if "B" in block and "A" in block:
                for role, extra in zip("BA", frobenius_gradient(block["B"], block["A"], self.frobenius_decay), strict=True):
                    tensor = block[role]
                    tensor.grad = extra if tensor.grad is None else tensor.grad.add_(extra)

    @torch.no_grad()
    def decide(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        """At the end of an epoch: counts, and factorizes when every layer rests."""
        there = self._whole_ones(blocks)
        if self.switched or not there or (step + 1) % self.interval:
            return {}
        ranks = {site: stable_rank(whole(blocks[site]["weight"])) for site in there}
        rests = [self.watches[site].add(rank) for site, rank in ranks.items()]
        if not all(rests):
            return {}
        self.switched = True
        shapes = {site: min(blocks[site]["weight"].shape) for site in there}
        return {
            site: Renew("factorize", {"rank": target_rank(shapes[site], self.start[site], rank, self.rule)})
            for site, rank in ranks.items()
        }

    def _whole_ones(self, blocks: Mapping[str, Block]) -> list[str]:
        return [site for site in self.watches if "weight" in blocks.get(site, {})]

    def state_dict(self) -> dict[str, Any]:
        """What was counted, and whether the switch has happened."""
        watches = {site: watch.state_dict() for site, watch in self.watches.items()}
        return {"start": dict(self.start), "watches": watches, "switched": self.switched}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.start, self.switched = dict(state["start"]), bool(state["switched"])
        for site, kept in state["watches"].items():
            self.watches[site].load_state_dict(kept)
