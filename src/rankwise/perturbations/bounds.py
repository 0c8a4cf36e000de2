"""The bounded diagonals of sharpness-aware minimization, and which of its options matter where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.sharding import whole
from rankwise.perturbations.ascent import total
from rankwise.perturbations.averages import wide

BOUNDS = frozenset({"smoothing", "damping", "condition"})
DIRECTIONS = {"gradient": frozenset(), "average": frozenset({"theta"}), "noise": BOUNDS | {"power"}}  # and what they read
METRICS = {"none": frozenset(), "weights": frozenset(), "fisher": BOUNDS}
DEFAULTS = {"theta": 0.9, "smoothing": 0.9, "power": 2.0, "damping": 1e-3, "condition": 1e3}


def check_options(direction: str, metric: str, options: Mapping[str, float]) -> None:
    """Refuses unknown choices, values out of range, and options that nothing reads.

    Raises:
        ArgumentError: names the option and what it may be.
    """
    for name, value, known in (("direction", direction, DIRECTIONS), ("metric", metric, METRICS)):
        if value not in known:
            raise ArgumentError(f"{name} is one of {', '.join(known)}, not {value!r}")
    read = DIRECTIONS[direction] | METRICS[metric]
    for name, value in options.items():
        if name not in read and value != DEFAULTS[name]:
            readers = [f"direction={key!r}" for key, reads in DIRECTIONS.items() if name in reads]
            readers += [f"metric={key!r}" for key, reads in METRICS.items() if name in reads]
            raise ArgumentError(
                f"{name}={value:g} has no effect with direction={direction!r} and metric={metric!r}; it belongs to "
                f"{' and '.join(readers)}"
            )
    theta, smoothing, power, damping, condition = (options[name] for name in DEFAULTS)
    if not (0 <= theta <= 1 and 0 <= smoothing < 1 and power >= 0 and damping >= 0 and condition >= 1):
        raise ArgumentError(
            "theta lies in [0, 1], smoothing in [0, 1), power >= 0, damping >= 0 and condition >= 1, not "
            f"{theta:g}, {smoothing:g}, {power:g}, {damping:g} and {condition:g}"
        )
    if damping == 0 and math.isinf(condition):
        raise ArgumentError("damping=0 with condition=inf divides by zero where no gradient was seen; bound one of them")


def bounded_inverse(
    values: Sequence[Tensor | None], like: Sequence[Tensor], *, power: float, damping: float, condition: float, scale: bool
) -> list[Tensor] | None:
    """The diagonal diag(values)^(-power/2) over all tensors together; None where it is the identity, or nothing is known.

    Args:
        values: numbers >= 0 per entry; None for a tensor of which nothing is known yet, which counts as average.
        like: tensors of the same shapes.
        power: p.
        damping: added, relative to the mean of all values.
        condition: largest ratio of two entries of the result; those of the smallest values are cut.
        scale: whether the result's size matters; without, the mean of all values is taken as 1.
    """
    known = [value for value in values if value is not None]
    if not known or power == 0:
        return None
    mean = total(whole(value.sum()) for value in known) / sum(value.numel() for value in known)  # ()
    largest = torch.stack([whole(value.max()).to(mean.device) for value in known]).max()  # ()
    mean, largest = torch.stack([mean, largest]).tolist()
    if mean == 0.0 or not math.isfinite(largest):
        return None
    floor = (largest / mean + damping) * condition ** (-2.0 / power)
    relative = (torch.ones_like(wide(g)) if value is None else value / mean for value, g in zip(values, like, strict=True))
    factor = mean ** (-0.5 * power) if scale else 1.0
    return [(value + damping).clamp_(min=floor).pow_(-0.5 * power).mul_(factor) for value in relative]
