"""What an adapter covers, in words: every layer adapted, trained whole, or left out with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankwise.core.handle import Handle


def coverage_of(handle: Handle) -> str:
    """One line per layer."""
    count, numbers = len(handle.targets), handle.trained_numbers
    lines = [f"adapter {handle.name!r}: {handle.recipe.name} on {count} layers, {numbers:,} numbers"]
    for site, target in handle.targets.items():
        roles = ", ".join(f"{role} {tuple(p.shape)}" for role, p in handle.parameterization(site).roles().items())
        lines.append(f"  adapted      {site}  {type(target.module).__name__} {target.m}×{target.n}  {roles}")
    if handle.bank is not None:
        lines += [f"  shared       {name}  {tuple(p.shape)}" for name, p in handle.bank.named_parameters()]
    lines += [f"  trained too  {name}  {tuple(p.shape)}" for name, p in handle.auxiliary.items()]
    lines += [f"  left out     {name}  {reason}" for name, reason in handle.skipped.items()]
    unfinished = handle.unfinished()
    lines += [] if unfinished is None else [f"  unfinished   {unfinished}"]
    return "\n".join(lines)


def summary_of(handle: Handle) -> str:
    """One line for the whole adapter."""
    trained, total = handle.trained_numbers, sum(p.numel() for p in handle.model.parameters())
    extra = f" and {len(handle.auxiliary)} whole tensors" if handle.auxiliary else ""
    left = f", {len(handle.skipped)} layers left out (see coverage())" if handle.skipped else ""
    return (
        f"Handle({handle.name!r}: {handle.recipe.name} on {len(handle.targets)} layers{extra}, "
        f"{trained:,} of {total:,} numbers trained{left})"
    )
