"""ReLoRA: low-rank updates are absorbed into the weight every few steps and begin again, so that their sum has a high rank.

    cycle c:  y = (W_c + s·B A) x        B (m, r), A (r, n) trained
    its end:  W_{c+1} = W_c + s·B A;  B <- 0, A drawn anew;  moments zeroed, or their largest 1 - q fraction kept

After K cycles the whole change has rank up to K r. The function does not move at a restart (dropout aside). The optimizer's
step counter is kept: with zeroed moments the first Adam step has size η (1 - β₁)/√(1 - β₂), three times too large for the usual
β, and the jagged learning rate of `relora_schedule` meets that. Whatever else is trained goes on untouched.

The factors of past cycles are carried: `handle.update_of` is the whole change, and a save loads onto the plain base. Absorbing
always starts from the untouched weight in float32 or wider, so a bf16 weight does not lose small updates. A quantized or a tied
weight is not written: there the past acts beside it.

Trained numbers r(m + n); no extra FLOPs; carried are at most min(m, n)(m + n) numbers per layer.

*Differs* from the release: A is never zero at a restart (with B it would stay there); the restart comes right after step
`interval`, before the step whose learning rate is 0, and not one later.

Lialin, Shivagunde, Muckatira, Rumshisky: Stack More Layers Differently: High-Rank Training Through Low-Rank Updates, 2023,
arXiv:2307.05695.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.protocols import Decision, Procedure, Restart
from rankwise.core.step import Block


@register("procedure")
class ReLoRA(Procedure):
    """Restarts every `interval` steps.

    Args:
        interval: optimizer steps of a cycle.
        moments: "reset" zeroes them, a number q in (0, 1) prunes the smallest fraction q by magnitude.
    """

    restarts: ClassVar[bool] = True

    def __init__(self, *, interval: int = 1000, moments: str | float = "reset") -> None:
        if interval < 1:
            raise ArgumentError(f"interval is at least 1 step, not {interval}")
        if moments != "reset" and (isinstance(moments, str) or not 0 < moments < 1):
            raise ArgumentError(f"moments is 'reset' or a fraction to prune in (0, 1), not {moments!r}")
        self.interval, self.moments = interval, moments

    def decide(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        """Restarts every site at the end of a cycle."""
        if (step + 1) % self.interval:
            return {}
        return dict.fromkeys(blocks, Restart(self.moments))


def relora_schedule(total: int, warmup: int, interval: int, restart_warmup: int, floor: float = 0.1) -> Callable[[int], float]:
    """The jagged cosine, for `torch.optim.lr_scheduler.LambdaLR`: a factor of the learning rate per step number.

    Rises linearly over `warmup` steps, falls as a cosine to `floor` at `total`, and after every restart starts at 0 and climbs
    back to the cosine within `restart_warmup` steps.

    Args:
        total: steps of the run.
        warmup: steps of the first rise, before the first restart.
        interval: steps of a cycle, as for `ReLoRA`.
        restart_warmup: steps of the rise after a restart.
        floor: where the cosine ends.

    Raises:
        ArgumentError: the phases do not fit into each other.
    """
    if not (0 <= warmup < total and warmup <= interval and 0 <= restart_warmup < interval and 0 <= floor <= 1):
        raise ArgumentError(
            "relora_schedule needs warmup < total, warmup <= interval, restart_warmup < interval and floor in [0, 1]; they are "
            f"warmup={warmup}, total={total}, interval={interval}, restart_warmup={restart_warmup}, floor={floor}"
        )

    def envelope(step: int) -> float:
        done = min(1.0, (step - warmup) / (total - warmup))
        return floor + (1 - floor) / 2 * (1 + math.cos(math.pi * done))

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        since = step % interval
        if step >= interval and since < restart_warmup:
            return since / restart_warmup * envelope(step - since + restart_warmup)
        return envelope(step)

    return factor
