"""VeRA: one frozen random pair for all layers; each layer trains two vectors between and after it.

    W' = W + diag(b) B[:m] diag(d) A[:, :n]        A (r, n_max), B (m_max, r) frozen; d (r,), b (m,) trained

A is drawn first and then B, kaiming-uniform with gain √2, U(±√(6 / fan_in)) with fan_in n_max and r, from one private seeded
CPU generator; layers see leading slices, as views. d starts at `d_initial`, b at zero, so W' = W at the start; there is no
α/r. `train="d"` or "b" trains one vector alone (d alone starts at 0 with b = 1, so that W' = W as well), `share=False` draws a
pair per layer, as in the paper's ablations. Trained numbers m + r per layer; FLOPs are those of LoRA at the same, here
large, r. Exactly LoRA of rank r. A checkpoint holds the seed and a hash of A and B; `save_projections` stores them instead,
for adapters that must outlive a change of torch's generators.

Not Tied-LoRA, which trains the shared pair.

Kopiczko, Blankevoort, Asano: VeRA: Vector-based Random Matrix Adaptation, 2023, arXiv:2310.11454.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.bank import Bank
from rankwise.core.combinators import Dropped
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import Chain, Operator
from rankwise.core.parameterization import Additive, Site
from rankwise.core.piece import register


@register("parameterization")
class SharedBank(Additive):
    """W' = W + diag(b) B diag(d) A, with A and B shared by all layers.

    Args:
        site: the layer.
        rank: r.
        d_initial: where every entry of d starts.
        dropout: probability of dropping an input of the update's branch.
        train: "both" vectors, or "d" or "b" alone.
        share: one pair (A, B) for all layers, or one per layer.
        save_projections: keep A and B in checkpoints, instead of their seed and hash (always, where they are not shared).
    """

    b: Tensor
    d: Tensor
    bank: Bank | None

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 256,
        d_initial: float = 0.1,
        dropout: float = 0.0,
        train: str = "both",
        share: bool = True,
        save_projections: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ArgumentError(f"dropout is a probability in [0, 1), not {dropout}")
        self.rank, self.dropout, self.thin = rank, dropout, site.thin
        self.m, self.n, self.d_initial = site.m, site.n, d_initial if train != "d" else 0.0
        trained = self.roles_of(train=train)
        vectors = {"d": torch.full_like(site.zeros(rank), self.d_initial), "b": site.zeros(site.m)}  # (r,), (m,)
        for role, vector in vectors.items():
            if role in trained:
                self.register_parameter(role, nn.Parameter(vector))
            else:
                self.register_buffer(role, vector + 1 if role == "b" else vector)
        # The model's root holds the shared bank as a child; a bank of the layer's own is a child here.
        object.__setattr__(self, "bank", site.bank if share else None)
        if not share:
            seed = int(torch.randint(2**31, (1,), generator=site.generator("bank")))
            self.own_bank = _draw([site], rank, seed, stored=True)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        train = arguments.get("train", "both")
        if train not in ("both", "d", "b"):
            raise ArgumentError(f"train is both, d or b, not {train!r}")
        return frozenset({"b", "d"} if train == "both" else {train})

    @classmethod
    def width_of(cls, m: int, n: int, **arguments: Any) -> int | None:
        return None  # random projections may be wider than the layer

    @classmethod
    def shared(cls, sites: Sequence[Site], **arguments: Any) -> Bank | None:
        if not arguments.get("share", True):
            return None
        rank = arguments.get("rank", 256)
        return _draw(sites, rank, sites[0].seed, arguments.get("save_projections", False))

    def projections(self) -> tuple[Tensor, Tensor]:
        """B (m, r) and A (r, n), views of the bank."""
        bank: Any = self.own_bank if self.bank is None else self.bank
        return bank["B"][: self.m], bank["A"][:, : self.n]

    def update(self) -> Operator:
        B, A = self.projections()
        update = Chain(self.b, B, self.d, A)
        return Dropped(update, self.dropout, self.thin) if self.training and self.dropout and self.thin else update

    def restart(self, site: Site) -> None:
        zero, other = (self.d, self.b) if "b" not in self._parameters else (self.b, self.d)
        other.fill_(1.0 if other is self.b else self.d_initial)
        zero.zero_()


def _draw(sites: Sequence[Site], rank: int, seed: int, stored: bool) -> Bank:
    """A (r, n_max), then B (m_max, r), for these layers."""
    if rank < 1:
        raise ArgumentError(f"rank is at least 1, not {rank}")
    first = sites[0]
    sizes = {"A": (rank, max(site.n for site in sites)), "B": (max(site.m for site in sites), rank)}

    def draw(name: str, *size: int, generator: torch.Generator) -> Tensor:
        values = torch.rand(*size, generator=generator, dtype=torch.float64) * 2 - 1
        return first.cast(values * math.sqrt(6 / size[1]))  # fan_in is the second size of both

    bank = Bank.drawn(sizes, draw, seed=seed)
    return Bank({name: bank[name] for name in sizes}) if stored else bank
