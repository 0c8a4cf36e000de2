"""VB-LoRA: the factors of every layer are cut into pieces of length b, each a mix of a few vectors of one trained bank.

    W' = W + B A - B₀ A₀        A[k, jb:(j+1)b] = Σ_i w_i vectors[ids_i],  w = softmax of the `top` largest of logits_A[k, j]

and likewise B[ib:(i+1)b, k] from logits_B[i, k]. vectors (h, b) are shared by all layers; logits_A (r, n/b, h), logits_B (m/b,
r, h) belong to a layer; all are trained. Which vectors are chosen may change in every step; the gradient goes to the chosen
logits and to the bank. vectors start at U(±0.02), logits at N(0, 0.1²), so that B₀ A₀ is small and not zero: "compensated"
takes it off again, kept as choices and weights over a frozen copy of the bank, so that W' = W. "paper" leaves it in. With
`top` = 1 pieces are vectors of the bank as they are, and logits never move. b divides m and n. Trained numbers hb + r h (m +
n) / b per layer; after training `compact` stores only the choices (see `vector_bank_compact`), hb + r (m + n) / b · (2k - 1).
FLOPs 2r(m + n) per token, twice that when compensated. Exactly LoRA of rank r, or 2r.

*Differs*: the release leaves B₀ A₀ in (start="paper"). A convolution's n counts channels · kernel.

Li, Han, Ji: VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks, 2024, arXiv:2405.15179.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.bank import Bank
from rankwise.core.errors import ArgumentError, Problem, TrainingError
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import Additive, Facts, Site
from rankwise.core.piece import register

BOUND, STD = 0.02, 0.1  # of vectors and logits at the start


@register("parameterization")
class VectorBank(Additive):
    """W' = W + B A, pieces of B and A mixed from a shared bank of vectors.

    Args:
        site: the layer.
        rank: r.
        vectors: h, how many the bank has.
        length: b, how long they are.
        top: how many each piece mixes.
        start: "compensated" (W' = W) or "paper".
    """

    bank: Bank
    start_ids_A: Tensor
    start_ids_B: Tensor
    start_weights_A: Tensor
    start_weights_B: Tensor

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 4,
        vectors: int = 256,
        length: int = 256,
        top: int = 2,
        start: str = "compensated",
    ) -> None:
        super().__init__()
        if start not in ("compensated", "paper"):
            raise ArgumentError(f"start is compensated or paper, not {start!r}")
        assert site.bank is not None
        object.__setattr__(self, "bank", site.bank)  # a child of the model's root already
        self.rank, self.top, self.compensated, self.compact = rank, top, start == "compensated", False
        self.logits_A = nn.Parameter(site.normal(rank, site.n // length, vectors, std=STD, purpose="A"))  # (r, n/b, h)
        self.logits_B = nn.Parameter(site.normal(site.m // length, rank, vectors, std=STD, purpose="B"))  # (m/b, r, h)
        if self.compensated:
            for letter, logits in (("A", self.logits_A), ("B", self.logits_B)):
                ids, weights = chosen(logits.detach(), top)
                self.register_buffer(f"start_ids_{letter}", ids.to(torch.int32))  # (…, top)
                self.register_buffer(f"start_weights_{letter}", weights)  # (…, top)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"vectors", "logits_A", "logits_B"})

    @classmethod
    def facts_of(cls, **arguments: Any) -> Facts:
        still = {"every_tensor_trains": "the softmax of one logit is one"} if arguments.get("top", 2) == 1 else {}
        compensated = arguments.get("start", "compensated") == "compensated"
        return dataclasses.replace(cls.facts, starts_at_base=compensated, expected_failures=still)

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        length, count, top = (arguments.get(key, default) for key, default in (("length", 256), ("vectors", 256), ("top", 2)))
        found = []
        if length < 1 or site.m % length or site.n % length:
            fits = [b for b in range(1, min(site.m, site.n, max(length, 1)) + 1) if site.m % b == 0 and site.n % b == 0]
            has = f"length is {length} for a layer of {site.m} × {site.n}"
            found.append(("a length that divides m and n", has, f"use a common divisor, such as length={fits[-1]}"))
        if not 1 <= top <= count:
            found.append(("1 <= top <= vectors", f"top is {top} of {count} vectors", f"use top={max(1, min(top, count))}"))
        return [Problem(piece="vblora", needs=n, has=h, remedy=r, sites=(site.name,)) for n, h, r in found]

    @classmethod
    def shared(cls, sites: Sequence[Site], **arguments: Any) -> Bank | None:
        size = arguments.get("vectors", 256), arguments.get("length", 256)
        vectors = dataclasses.replace(sites[0], name="bank").uniform(*size, bound=BOUND)  # (h, b)
        compensated = arguments.get("start", "compensated") == "compensated"
        frozen = {"start_vectors": vectors.clone()} if compensated else {}
        return Bank({"vectors": nn.Parameter(vectors), **frozen})

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (m, r) and A (r, n)."""
        if self.compact and torch.is_grad_enabled() and self.logits_A.requires_grad:
            raise TrainingError(
                "this VB-LoRA was loaded from its compact form, where all but the chosen logits are lost, so it cannot be "
                "trained on; load the folder that handle.save wrote"
            )
        vectors = self.bank["vectors"]
        return mixed(vectors, *chosen(self.logits_B, self.top), "B"), mixed(vectors, *chosen(self.logits_A, self.top), "A")

    def update(self) -> Operator:
        B, A = self.factors()
        if not self.compensated:
            return LowRank(B, A)
        vectors = self.bank["start_vectors"]
        start_B = mixed(vectors, self.start_ids_B, self.start_weights_B, "B")  # (m, r)
        start_A = mixed(vectors, self.start_ids_A, self.start_weights_A, "A")  # (r, n)
        return LowRank(torch.cat([B, -start_B], dim=1), torch.cat([A, start_A]))


def chosen(logits: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Numbers (…, top) and weights (…, top) of the vectors that logits (…, h) choose."""
    values, ids = logits.topk(top)
    return ids, values.softmax(-1)


def mixed(vectors: Tensor, ids: Tensor, weights: Tensor, factor: str) -> Tensor:
    """The factor "A" (r, n) or "B" (m, r) from choices (r, n/b, top) or (m/b, r, top) out of vectors (h, b)."""
    pieces = (weights.unsqueeze(-1) * vectors[ids.long()]).sum(-2)  # (r, n/b, b) or (m/b, r, b)
    return pieces.flatten(1) if factor == "A" else pieces.transpose(1, 2).flatten(0, 1)
