"""Writing updates into the weight and taking them out again to the bit.

The untouched weight is kept (`Adapters.stash`) from the first change on and copied back at the end; nothing is ever
subtracted. Merging computes in float32 or wider and casts once.
"""

from __future__ import annotations

import warnings
from typing import cast

import torch
from torch import Tensor, nn

from rankwise.core.bindings import Adapters, detach
from rankwise.core.errors import MergeError, shorten
from rankwise.core.operators import LowRank
from rankwise.core.parameterization import Replacement
from rankwise.core.targets import Target, bias_parameter, is_quantized, tied_with


def refuse_merge(model: nn.Module, targets: dict[str, Target], name: str) -> None:
    """Raises before anything is touched.

    Raises:
        MergeError: the adapter is merged already, a weight is tied or quantized, or a trained tensor is not finite.
    """
    for site, target in targets.items():
        adapters = _adapters(target)
        if name in adapters.merged:
            raise MergeError(f"adapter {name!r} is merged already; call unmerge_() first, merging twice would add it twice")
        if is_quantized(target.module):
            raise MergeError(refusal_to_write(target))
        refuse_tied(model, target)
        bias = bias_parameter(target.module)
        sharing = [key for key, tensor in model.named_parameters(remove_duplicate=False) if tensor is bias]
        if adapters[name].changes_bias and len(sharing) > 1:
            raise MergeError(
                f"{' and '.join(sharing)} are one tensor, and {name!r} changes the bias of {site}; untie them first"
            )
        for role, tensor in adapters[name].named_parameters():
            if not torch.isfinite(tensor).all():
                raise MergeError(f"{site}.{role} holds NaN or infinity; the weight was not touched. Load an earlier checkpoint")


def refuse_tied(model: nn.Module, target: Target) -> None:
    """Raises where writing into a weight would change another layer too.

    Raises:
        MergeError: the weight is tied.
    """
    others = tied_with(model, target.name)
    if others:
        raise MergeError(
            f"{target.name}.weight is the same tensor as {shorten(others)}, so merging into {target.name} would change both. "
            f"Untie them first (give {target.name} a copy of the weight), or leave {target.name} unmerged and serve the "
            "adapter beside it (of a start: mode='offset')"
        )


def merge_site(target: Target, name: str) -> None:
    """Writes the adapter into the weight of one site, on top of what is merged there."""
    adapters = _adapters(target)
    _write(target, (*adapters.merged, name))


def unmerge_site(target: Target, name: str) -> None:
    """Takes the adapter out of the weight of one site; without other parts the untouched weight comes back to the bit."""
    adapters = _adapters(target)
    if name not in adapters.merged:
        raise MergeError(f"adapter {name!r} is not merged, so there is nothing to take out; call merge_() first")
    _write(target, tuple(other for other in adapters.merged if other != name))


def absorb_site(target: Target, name: str, part: LowRank) -> None:
    """Adds a frozen low-rank part to the weight of one site and to what the adapter carries."""
    _refuse_merged(target)
    _adapters(target)[name].carry(part, absorbed=True)
    _write(target, ())


def replace_site(target: Target, name: str, replacement: Replacement) -> None:
    """Puts what an adapter was made for in the weight's place."""
    _refuse_merged(target)
    entry = _adapters(target)[name]
    entry.replacement, entry.absorbed = replacement, True
    _write(target, ())


def _refuse_merged(target: Target) -> None:
    merged = _adapters(target).merged
    if merged:
        raise MergeError(f"{merged} is merged; unmerge before a start or a restart rewrites the weight")


@torch.no_grad()
def report_rounding(target: Target) -> None:
    """Warns where the weight's dtype cannot hold the sum: the layer is off by the rounding from then on."""
    weight, adapters = target.parameter(), _adapters(target)
    if adapters.stash is None or weight.dtype not in (torch.bfloat16, torch.float16):
        return
    exact = _standing(adapters, adapters.layout.to_matrix(adapters.stash).float())  # (m, n)
    error = float((adapters.layout.to_matrix(weight).float() - exact).norm() / adapters.layout.to_matrix(adapters.stash).norm())
    warnings.warn(
        f"{target.name}: what was absorbed into the weight rounds to {str(weight.dtype).removeprefix('torch.')}, which moves "
        f"it by {100 * error:.3f} %. To avoid it load the base in float32, or keep the part beside it (where there is one, "
        "mode='offset')",
        stacklevel=2,
    )


def _standing(adapters: Adapters, untouched: Tensor) -> Tensor:
    """The matrix (m, n) that the weight should hold for what is replaced and absorbed."""
    entries = [adapters[name] for name in adapters if adapters[name].absorbed]
    matrix = untouched
    for replacement in (entry.replacement for entry in entries if entry.replacement is not None):
        new = replacement(untouched)
        matrix = new if matrix is untouched else matrix + (new - untouched)  # a single one stands there to the bit
    for carried in (entry.carried() for entry in entries):
        matrix = matrix if carried is None else matrix + carried.dense().to(matrix.dtype)
    return matrix


def rewrite(target: Target) -> None:
    """Writes the weight again from the untouched one and what is absorbed and merged now."""
    _write(target, _adapters(target).merged)


def restore_site(target: Target) -> None:
    """Brings the untouched weight back to the bit."""
    adapters = _adapters(target)
    if adapters.stash is not None:
        with torch.no_grad():
            target.parameter().copy_(adapters.stash)
        adapters.stash = None
    _write_bias(target, ())
    adapters.merged = ()


@torch.no_grad()
def _write_bias(target: Target, merged: tuple[str, ...]) -> None:
    """Sets the bias to that of the merged adapters, or back to the untouched one."""
    adapters, bias = _adapters(target), bias_parameter(target.module)
    if bias is None:
        return
    if adapters.stash_bias is not None:
        bias.copy_(adapters.stash_bias)
        adapters.stash_bias = None
    changing = [adapters[name] for name in merged if adapters[name].changes_bias]
    if not changing:
        return
    untouched = bias.detach().clone()
    adapters.stash_bias = untouched
    wide = untouched.to(torch.promote_types(bias.dtype, torch.float32))
    bias.copy_(wide + sum(entry.adapted_bias(wide) - wide for entry in changing))


@torch.no_grad()
def _write(target: Target, merged: tuple[str, ...]) -> None:
    """Sets the weight to: untouched weight + absorbed parts + updates of the merged adapters."""
    adapters, parameter = _adapters(target), target.parameter()
    if not parameter.is_floating_point() or type(parameter) is not nn.Parameter:
        raise MergeError(refusal_to_write(target))
    if adapters.stash is None:
        adapters.stash = parameter.detach().clone()
    parameter.copy_(adapters.stash)
    adapters.merged = ()
    wide = torch.promote_types(parameter.dtype, torch.float32)
    untouched = adapters.layout.to_matrix(adapters.stash).to(wide)
    absorbed = any(entry.absorbed for entry in adapters.values())
    if absorbed:
        parameter.copy_(adapters.layout.from_matrix(_standing(adapters, untouched), parameter))
    if merged:
        matrix = adapters.combined(target.module, tuple((name, 1.0) for name in merged)).dense().to(wide)
        if not torch.isfinite(matrix).all():
            parameter.copy_(adapters.stash)
            raise MergeError(f"the merged weight of {target.name} is not finite; the weight was not changed")
        parameter.copy_(adapters.layout.from_matrix(matrix, parameter))
    _write_bias(target, merged)
    adapters.merged = merged
    if not merged and not absorbed:
        parameter.copy_(adapters.stash)
        adapters.stash = None


def refusal_to_write(target: Target) -> str:
    """Why nothing is written into a quantized weight, and the ways out."""
    return (
        f"{target.name} is quantized ({type(target.parameter()).__name__}): writing into it would round once more, and not be "
        "undone. Keep the adapter beside it (of a start: mode='offset'), or load the base dequantized to merge"
    )


def _adapters(target: Target) -> Adapters:
    return cast(Adapters, target.module._modules["adapter"])


def merge_sites(model: nn.Module, targets: dict[str, Target], name: str) -> None:
    """Merges the adapter at all its sites, or at none.

    Raises:
        MergeError: merged already, a weight is tied, or a number is not finite.
    """
    refuse_merge(model, targets, name)
    done: list[Target] = []
    try:
        for target in targets.values():
            merge_site(target, name)
            done.append(target)
    except MergeError:
        for target in done:
            unmerge_site(target, name)
        raise


def take_off(target: Target, name: str) -> None:
    """Removes the adapter from one layer; without others, the layer is what it was before, to the bit."""
    adapters = _adapters(target)
    if name in adapters.merged:
        unmerge_site(target, name)
    adapters.active = tuple(pair for pair in adapters.active if pair[0] != name)
    if len(adapters) == 1:
        restore_site(target)
    detach(target, name)
    if len(adapters) and adapters.stash is not None:  # others are merged or absorbed: write their parts alone
        rewrite(target)
