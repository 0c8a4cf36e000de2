"""Tied-LoRA: one pair (B, A) for all layers of a role, scaled for each layer by two vectors.

    W' = W + s · diag(v) B diag(u) A        A (r, n), B (m, r) shared in a group; u (r,), v (m,) per layer

A group are the layers of one shape whose names end alike (q_proj of all blocks). `train` names which of the four are
trained: "ABuv" is the paper's best (TL6), "AB" ties a plain LoRA (TL5), "uv" is VeRA with a pair per group. Those not trained
stay as they start and are stored. A starts at U(±1/√n); a trained B at zero with u = v = 1; a frozen B at U(±1/√r), and then
the zero is in v, else in u, else in A: W' = W, and something always has a gradient. s = α / r. Trained numbers per group of
L layers, all four: r(m + n) + L(r + m). FLOPs as LoRA, 2r(m + n) per token. Exactly LoRA of rank r.

The gradient of a shared tensor is the sum over its layers, so a rate a little below LoRA's is a sane start. Weight decay
pulls u and v towards 0, not towards the 1 they start at: leave it off when they are trained.

Not VeRA, whose pair is frozen and sliced for every shape. *Differs*: the paper adapts fused QKV layers only, and neither its
scale nor its start of a frozen B could be read; the four switches stand for its TL1 to TL6.

Renduchintala, Konuk, Kuchaiev: Tied-LoRA: Enhancing Parameter Efficiency of LoRA with Weight Tying, 2023, arXiv:2311.09578.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rankwise.core.bank import Bank
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import Chain, Operator
from rankwise.core.parameterization import Additive, Site
from rankwise.core.piece import register
from rankwise.parameterizations.scaling import scale_of

LETTERS = ("A", "B", "u", "v")


def group_of(site: Site) -> str:
    """The name of a layer's group: the last part of its name, and its shape."""
    return f"group_{site.name.rpartition('.')[2]}_{site.m}_{site.n}"


@register("parameterization")
class TiedLoRA(Additive):
    """W' = W + s · diag(v) B diag(u) A, with A and B of a group.

    Args:
        site: the layer.
        rank: r.
        alpha: numerator of s = alpha / r; None means r.
        train: the trained ones of A, B, u, v.
    """

    u: Tensor
    v: Tensor
    bank: Bank

    def __init__(self, site: Site, *, rank: int = 8, alpha: float | None = None, train: str = "ABuv") -> None:
        super().__init__()
        assert site.bank is not None
        self.rank, self.scale, self.group = rank, scale_of("lora", alpha, rank), group_of(site)
        object.__setattr__(self, "bank", site.bank)  # a child of the model's root already
        zero, trained = _zero_of(train), self.roles_of(train=train)
        for role, size in (("u", rank), ("v", site.m)):
            start = site.zeros(size) if role == zero else site.zeros(size) + 1  # (r,), (m,)
            if role in trained:
                self.register_parameter(role, nn.Parameter(start))
            else:
                self.register_buffer(role, start)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        train = str(arguments.get("train", "ABuv"))
        if not train or set(train) - set(LETTERS) or len(set(train)) < len(train):
            raise ArgumentError(f"train is a choice of the letters {', '.join(LETTERS)}, such as 'ABuv' or 'uv'; not {train!r}")
        return frozenset(train)

    @classmethod
    def shared(cls, sites: Sequence[Site], **arguments: Any) -> Bank | None:
        rank, train = arguments.get("rank", 8), arguments.get("train", "ABuv")
        trained, zero = cls.roles_of(train=train), _zero_of(train)
        groups: dict[str, dict[str, Tensor]] = {}
        for site in sites:
            name = group_of(site)
            if name in groups:
                continue
            drawn = dataclasses.replace(site, name=name)  # the same numbers whichever layer of the group comes first
            A = drawn.uniform(rank, site.n, bound=float(zero != "A") / math.sqrt(site.n), purpose="A")  # (r, n)
            B = drawn.uniform(site.m, rank, bound=float(zero != "B") / math.sqrt(rank), purpose="B")  # (m, r)
            groups[name] = {role: nn.Parameter(factor) if role in trained else factor for role, factor in (("A", A), ("B", B))}
        return Bank.grouped(groups)

    @property
    def A(self) -> Tensor:  # noqa: N802 - the letter of the formula
        """A (r, n) of the group."""
        return self.bank.group(self.group)["A"]

    @property
    def B(self) -> Tensor:  # noqa: N802 - the letter of the formula
        """B (m, r) of the group."""
        return self.bank.group(self.group)["B"]

    def update(self) -> Operator:
        return Chain(self.v, self.B, self.u, self.A, scale=self.scale)


def _zero_of(train: str) -> str:
    """Where the zero sits at the start: in a trained tensor beside three that are not zero."""
    return next(letter for letter in "BvuA" if letter in train)
