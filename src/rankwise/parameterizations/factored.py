"""Layers of the form U S Vᵀ, in place of a weight or beside it: what DLRT, CondLR and SST train.

    W' = U S Vᵀ,  or  W + U S Vᵀ with `keep_base`          U (m, r), V (n, r) with orthonormal columns, S (r, r) or (r,)

Start "svd": the r leading triplets of W, S = diag(σ). "random": bases of Gaussian matrices, S the sorted |N(0, 1)|. Beside a
weight S starts at zero, so that W' = W. In a convolution n = in·kernel: V holds r kernels and U is pointwise. The tensors can
be larger than what is used, so that a rank can grow without new ones: `active` counts the columns in use, the rest is zero.

Autograd's gradients of U and V carry S, G V Sᵀ and Gᵀ U S, and vanish with its small values. Integrators and spectral training
need the bare ones. With bars for values without gradient,

    W' = [Ū S + (U - Ū)] V̄ᵀ + Ū (V - V̄)ᵀ          g_U = G V,  g_V = Gᵀ U,  g_S = Uᵀ G V

has the same value: the differences are zero and only carry gradients. One pair of factors twice as wide, so every kind of layer
and binding has it; without gradients it is the plain pair (U S, Vᵀ).

Not a method: see `procedures/dlrt.py`, `steps/condlr.py`, `procedures/sst.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.approximations.starting import check_choice
from rankwise.approximations.truncated_svd import truncated_svd
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import Facts, Parameterization, Site
from rankwise.core.piece import register

STARTS = ("svd", "random")
TURNED = {"half_precision_value": "the singular vectors of a rounded weight are turned against those of the exact one"}
REPLACED = Facts(
    additive=False,
    starts_at_base=False,
    exact_lora_export=False,
    expected_failures={"starts_at_base": "the weight is replaced by one of low rank", **TURNED},
)


def triplets(site: Site, rank: int, start: str = "svd") -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), S (r,), V (n, r) to start from; zeros where a file will fill them.

    Raises:
        ArgumentError: there is no such start.
        StatisticsError: the weight holds NaN or infinity.
    """
    check_choice("start", start, STARTS)
    if site.blank:
        return site.zeros(site.m, rank), site.zeros(rank), site.zeros(site.n, rank)
    if start == "svd":
        U, S, Vh = truncated_svd(site.weight(), rank)
        return site.cast(U).contiguous(), site.cast(S), site.cast(Vh.mT).contiguous()
    values = torch.randn(rank, generator=site.generator("S"), dtype=torch.float64).abs()  # (r,)
    U, V = (_random_basis(site, size, rank, name) for size, name in ((site.m, "U"), (site.n, "V")))
    return U, site.cast(values.sort(descending=True).values), V


def _random_basis(site: Site, size: int, rank: int, name: str) -> Tensor:
    drawn = torch.randn(size, rank, generator=site.generator(name), dtype=torch.float64)
    return site.cast(torch.linalg.qr(drawn)[0]).contiguous()  # (size, r)


def bare(U: Tensor, S: Tensor, V: Tensor) -> LowRank:
    """U S Vᵀ (m, n), S a matrix or a diagonal, whose tensors get the gradients G V, Uᵀ G V and Gᵀ U."""
    U_fixed, V_fixed = U.detach(), V.detach()
    left = (U_fixed * S if S.dim() == 1 else U_fixed @ S) + (U - U_fixed)  # (m, r)
    return LowRank(torch.cat([left, U_fixed], dim=1), torch.cat([V_fixed.mT, (V - V_fixed).mT], dim=0))


class Factors(Parameterization):
    """Interface: holds U, S, V and the number of columns in use.

    Args:
        site: the layer.
        rank: r at the start.
        room: columns of the tensors.
        start: "svd" or "random".
        idle: whether S starts at zero.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    columns: Tensor

    def __init__(self, site: Site, *, rank: int, room: int, start: str, idle: bool = False) -> None:
        super().__init__()
        self.rank = rank
        U, values, V = triplets(site, rank, start)
        self.U, self.V = (nn.Parameter(_widened(tensor, room)) for tensor in (U, V))  # (m, room), (n, room)
        core = site.zeros(room, room)
        if not idle:
            core[:rank, :rank] = torch.diag(values)
        self.S = nn.Parameter(core)  # (room, room)
        self.register_buffer("columns", torch.arange(rank, device=site.device))

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"U", "S", "V"})

    @property
    def active(self) -> int:
        """Columns in use: the present rank. Read off the shape of a buffer, so that files keep it and no device is asked."""
        return self.columns.shape[0]

    def activate(self, count: int) -> None:
        """Uses the first `count` columns from now on."""
        self.rank, self.columns = count, torch.arange(count, device=self.columns.device)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, r), S (r, r), V (n, r) at the present rank."""
        r = self.active
        return self.U[:, :r], self.S[:r, :r], self.V[:, :r]

    def product(self) -> LowRank:
        """U S Vᵀ (m, n) as the pair (U S, Vᵀ)."""
        U, S, V = self.factors()
        return LowRank(U @ S, V.mT)

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if "columns" in shapes:
            self.activate(shapes["columns"][0])


def _widened(tensor: Tensor, room: int) -> Tensor:
    """(k, r) -> (k, room), zeros behind."""
    wide = tensor.new_zeros(tensor.shape[0], room)
    wide[:, : tensor.shape[1]] = tensor
    return wide


@register("parameterization")
class Factored(Factors):
    """W' = U S Vᵀ with the gradients of autograd, at a fixed rank.

    Args:
        site: the layer.
        rank: r; None takes it from `compression`.
        compression: share of the singular values left out, r = ⌈(1 - compression) min(m, n)⌉.
        start: "svd" or "random".
    """

    facts = REPLACED

    def __init__(self, site: Site, *, rank: int | None = None, compression: float = 0.5, start: str = "svd") -> None:
        width = self.width_of(site.m, site.n, rank=rank, compression=compression)
        super().__init__(site, rank=width, room=width, start=start)

    @classmethod
    def width_of(cls, m: int, n: int, **arguments: Any) -> int:
        rank, compression = arguments.get("rank"), arguments.get("compression", 0.5)
        if not 0 <= compression < 1:
            raise ArgumentError(f"compression is a share of the singular values in [0, 1), not {compression}")
        return math.ceil(round((1 - compression) * min(m, n), 9)) if rank is None else rank

    def forward(self, base: Operator) -> Operator:
        return self.product()
