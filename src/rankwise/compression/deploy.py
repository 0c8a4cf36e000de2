"""`deploy_`: a trained adapter becomes ordinary layers, small ones where that saves numbers, and is taken off.

    adapted matrix B A (Maestro, Cuttlefish after its switch, factored layers)   channel_chain
    core and factors of a kernel (Tucker)                                        tucker_chain, or channel_chain if smaller
    any other matrix                                                             its numerical rank, or what a criterion keeps,
                                                                                 in one of the three forms of `matricize.py`

A layer whose small ones would hold as many numbers as the matrix, or more, stays one layer with the adapted weight. Without a
criterion the outputs stay the same to rounding; with one, singular values are left out of the layers of the last kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankwise.approximations.spectral_cut import kept
from rankwise.compression.chains import channel_chain, filter_chain, spatial_chain, tucker_chain
from rankwise.compression.compress import replace
from rankwise.core.bypass import bypass_of
from rankwise.core.errors import ArgumentError, MergeError, shorten
from rankwise.core.handle import Handle
from rankwise.core.layouts import ConvLayout
from rankwise.core.merge import refuse_merge
from rankwise.core.operators import LowRank, Operator
from rankwise.core.queries import as_low_rank
from rankwise.core.structured import Tucker
from rankwise.core.targets import Target, bias_parameter
from rankwise.core.training import evaluating
from rankwise.procedures.matricize import check_kind, has_kernel, unfold
from rankwise.procedures.trp import TRP

DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class DeployedLayer:
    """What stands in the place of one adapted layer.

    Attributes:
        site: its name.
        form: "channel", "spatial", "filter", "tucker" or "dense".
        rank: of the small layers, (r_out, r_in) for tucker; of a dense layer, the one that was found.
        numbers_before, numbers_after: in the weights; the bias is in both.
    """

    site: str
    form: str
    rank: int | tuple[int, int]
    numbers_before: int
    numbers_after: int


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """All layers; `str()` is a table."""

    layers: tuple[DeployedLayer, ...]

    @property
    def numbers_before(self) -> int:
        """In the weights of the adapted layers."""
        return sum(layer.numbers_before for layer in self.layers)

    @property
    def numbers_after(self) -> int:
        """In what stands there now."""
        return sum(layer.numbers_after for layer in self.layers)

    def __str__(self) -> str:
        width = max([4, *(len(layer.site) for layer in self.layers)])
        lines = [f"{len(self.layers)} layers, {self.numbers_before:,} -> {self.numbers_after:,} numbers"]
        lines.append(f"  {'site':{width}}  {'form':>8} {'rank':>9} {'before':>12} {'after':>12}")
        for layer in self.layers:
            rank = "×".join(map(str, layer.rank)) if isinstance(layer.rank, tuple) else str(layer.rank)
            lines.append(
                f"  {layer.site:{width}}  {layer.form:>8} {rank:>9} {layer.numbers_before:>12,} {layer.numbers_after:>12,}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Plan:
    """What was found at a site while the adapter was on."""

    matrix: Tensor  # (m, n)
    bias: Tensor | None
    forms: list[tuple[str, int | tuple[int, int], Any]]  # form, rank, what the chain is made of
    whole: bool  # whether something reads the weight without calling the layer


def deploy_(
    handle: Handle,
    *,
    energy: float | None = None,
    threshold: float | None = None,
    fraction: float | None = None,
    matricization: str | None = None,
) -> Deployment:
    """Puts ordinary layers in the adapted layers' places and takes the adapter off, in place.

    Args:
        handle: of the only adapter on its layers, trained.
        energy, threshold, fraction: what is kept of a matrix that is not held in factors, as for `spectral_cut.kept`. None of
            them: everything but rounding.
        matricization: how such a kernel is read, "channel", "spatial" or "filter"; None is TRP's own, else "channel".

    Raises:
        ArgumentError: several criteria.
        MergeError: a weight is tied or quantized, a number is not finite, or another adapter is on a layer.
    """
    if sum(value is not None for value in (energy, threshold, fraction)) > 1:
        raise ArgumentError("give one of energy=, threshold= and fraction=")
    criterion = {"energy": 1.0 if energy is None else energy, "threshold": threshold, "fraction": fraction}
    kept(torch.ones(1), **criterion)
    own = handle.procedure.matricization if isinstance(handle.procedure, TRP) else "channel"
    kind = check_kind(own if matricization is None else matricization)
    numerical = energy is None and threshold is None and fraction is None
    others = sorted({name for site in handle.targets for name in handle.adapters(site)} - {handle.name})
    if others:
        raise MergeError(f"adapters {shorten(others)} are on these layers too; take them off first, each by its detach_()")
    if handle.merged:
        handle.unmerge_()
    refuse_merge(handle.model, handle.targets, handle.name)
    with evaluating(handle.model):
        plans = {site: _plan(handle, site, kind, None if numerical else criterion) for site in handle.targets}
    handle.detach_()
    return Deployment(layers=tuple(_put(handle.model, handle.targets[site], plan) for site, plan in plans.items()))


def _plan(handle: Handle, site: str, kind: str, criterion: dict[str, float | None] | None) -> _Plan:
    target, adapters = handle.targets[site], handle.adapters(site)
    operator = handle.parameterization(site).effective(adapters.base(target.module))
    bias = adapters.bias(target.module, ((handle.name, 1.0),))
    matrix = operator.dense().detach().clone()
    forms = _forms(target, operator, matrix, kind, criterion)
    return _Plan(matrix, None if bias is None else bias.detach().clone(), forms, bypass_of(handle.model, site) is not None)


def _forms(target: Target, operator: Operator, matrix: Tensor, kind: str, criterion: Any) -> list[Any]:
    """The ways to split the layer."""
    forms: list[Any] = []
    if isinstance(operator, Tucker) and _modes_fit(target, operator):
        core, (U_out, U_in, *kernel) = operator.core * operator.scale, operator.factors
        for mode, factor in enumerate(kernel, start=2):
            core = (core.movedim(mode, -1) @ factor.mT).movedim(-1, mode)
        forms.append(("tucker", (U_out.shape[1], U_in.shape[1]), (core.clone(), U_out.clone(), U_in.clone())))
    factors = as_low_rank(operator)
    if factors is not None:
        pair = factors.folded()
        return [*forms, ("channel", pair.rank, LowRank(pair.B.clone(), pair.A.clone()))]
    shape = target.mode_shape()
    kind = kind if has_kernel(shape) else "channel"
    unfolded = unfold(matrix.reshape(shape), kind).double()
    if kind == "channel":
        U, S, Vh = torch.linalg.svd(unfolded, full_matrices=False)
        rank = int(_kept(S, unfolded, matrix.dtype, criterion).sum())
        return [("channel", rank, LowRank((U[:, :rank] * S[:rank]).to(matrix), Vh[:rank].to(matrix)))]
    S = torch.linalg.svdvals(unfolded)  # (k,), or (m, k) for filters
    rank = max(1, int(_kept(S, unfolded, matrix.dtype, criterion).sum(-1).max()))
    layout = cast(ConvLayout, target.layout)
    if kind == "spatial":  # a group has fewer columns than all together, and no larger a rank
        rank = min(rank, matrix.numel() // (layout.groups * layout.channels * layout.kernel[0]))
    return [(kind, rank, None)]


def _modes_fit(target: Target, operator: Tucker) -> bool:
    """Whether the factors belong to the modes of the weight, and every output sees every input."""
    sizes = tuple(factor.shape[0] for factor in operator.factors)
    return sizes == target.mode_shape() and target.layout.kind != "embedding" and getattr(target.layout, "groups", 1) == 1


def _kept(S: Tensor, matrix: Tensor, dtype: torch.dtype, criterion: Any) -> Tensor:
    """The mask of a criterion, or of what is more than rounding in the weight's dtype."""
    if criterion is not None:
        return kept(S, **criterion)
    return S[..., :1] * torch.finfo(dtype).eps * max(matrix.shape[-2:]) < S


@torch.no_grad()
def _put(model: nn.Module, target: Target, plan: _Plan) -> DeployedLayer:
    """Writes the adapted weight into the layer, and replaces it where small layers save numbers."""
    layer, weight = target.module, target.parameter()
    weight.copy_(target.layout.from_matrix(plan.matrix, weight))
    bias = bias_parameter(layer)
    if bias is not None and plan.bias is not None:
        bias.copy_(plan.bias)
    before = target.m * target.n
    best, best_form = before, (DENSE, plan.forms[-1][1], None)
    for form in [] if plan.whole else plan.forms:
        numbers = _numbers(target, *form)
        if numbers < best:
            best, best_form = numbers, form
    form, rank, parts = best_form
    if form != DENSE:
        replace(model, layer, _chain(layer, form, rank, parts))
    return DeployedLayer(site=target.name, form=form, rank=rank, numbers_before=before, numbers_after=best)


def _chain(layer: nn.Module, form: str, rank: Any, parts: Any) -> nn.Module:
    match form:
        case "channel":
            return channel_chain(layer, parts.B, parts.A)
        case "tucker":
            return tucker_chain(layer, *parts)
        case "spatial":
            return spatial_chain(layer, rank)
    return filter_chain(layer, rank)


def _numbers(target: Target, form: str, rank: Any, parts: Any) -> int:
    """In the weights of the small layers."""
    m, n = target.m, target.n
    if form == "tucker":
        core, U_out, U_in = cast(Sequence[Tensor], parts)
        return core.numel() + U_out.numel() + U_in.numel()
    if form == "channel":
        return max(rank, 1) * (m + n)
    layout = cast(ConvLayout, target.layout)
    if form == "filter":
        return m * rank * (layout.channels + n // layout.channels)
    first = layout.kernel[0]
    return rank * (layout.groups * layout.channels * first + m * (n // (layout.channels * first)))
