"""RAC-LoRA: a chain of short blocks, each with one factor drawn anew and frozen and the other trained from zero.

    block t:  y = (W_t + s·B A) x          side "B": A (r, n) ~ D frozen, B (m, r) from 0;  side "A": B ~ D frozen, A from 0
    its end:  W_{t+1} = W_t + s·B A;  a new draw;  the trained factor and its moments back to 0

D is Gaussian with variance 1/r, so that E[AᵀA] = I, or orthonormal rows (columns of B), so that E[AᵀA] = (r/d) I and a step of
SGD goes as far with an alpha √(d/r) times as large. The function does not move at a draw.
LoRA's memory, half its trained numbers; after T blocks the update has rank up to T r, and it is exact at that rank. The chain
provably reaches the solution of full fine-tuning, which no chain with both factors trained is known to do: in the metric of the
sketch a step multiplies the gradient by a random projector H, with E[H] = (r/d) I, d = n for side "B" and m for side "A". See
`chain_rate` for what follows. A plain gradient step has s² AᵀA (B Bᵀ) in the place of H: with Gaussian draws the stable step
size is about 1 / (L s² (1 + (d + 1)/r)). Restart the learning rate per block with `relora_schedule`.

Not ReLoRA, which trains both factors; nor LoRA-FA, which is a single block.

*Differs*: hyperparameters of the experiments are not published; the defaults are ours. One side for the whole run.

Malinovsky, Michieli, Hammoud, Ceritli, Elesedy, Ozay, Richtárik: Randomized Asymmetric Chain of LoRA: The First Meaningful
Theoretical Framework for Low-Rank Adaptation, 2024, arXiv:2410.08305.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.protocols import Decision, Procedure
from rankwise.core.step import Block
from rankwise.procedures.relora import ReLoRA


@register("procedure")
class RACLoRA(Procedure):
    """A new block every `interval` steps; the parameterization has one frozen factor, which each block draws anew.

    Args:
        interval: optimizer steps of a block.
        moments: "reset" zeroes them, a number q in (0, 1) prunes the smallest fraction q by magnitude.
    """

    restarts: ClassVar[bool] = True

    def __init__(self, *, interval: int = 100, moments: str | float = "reset") -> None:
        self._chain = ReLoRA(interval=interval, moments=moments)

    def decide(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        """Begins a block at every site at once."""
        return self._chain.decide(step, blocks, learning_rate=learning_rate)


def chain_rate(size: int, rank: int, blocks: int, *, step: float = 1.0, curvature: float = 1.0) -> float:
    """The factor (1 − γ μ r/d)^T by which the expected error shrinks over T blocks.

    With γ ≤ 1/L and the Polyak-Łojasiewicz constant μ it bounds E[f_T − f*] / (f_0 − f*). For f = ½‖W − W*‖² with each block
    solved exactly (γ = μ = 1) it is E‖W_T − W*‖² / ‖W_0 − W*‖² itself.

    Args:
        size: d, the side of the weight that the drawn factor faces: n for side "B", m for side "A".
        rank: r.
        blocks: T.
        step: γ, of a step in the metric of the sketch.
        curvature: μ.

    Raises:
        ArgumentError: a rank that the side does not have, or γ μ outside (0, 1], where the bound says nothing.
    """
    if not 1 <= rank <= size or blocks < 0:
        raise ArgumentError(f"rank is 1 to {size} and blocks 0 or more, not {rank} and {blocks}")
    if not 0 < step * curvature <= 1:
        raise ArgumentError(f"step times curvature is in (0, 1], since μ ≤ L and γ ≤ 1/L; it is {step * curvature:g}")
    return (1.0 - step * curvature * rank / size) ** blocks


def chain_gradient_bound(size: int, rank: int, blocks: int, *, gap: float, step: float) -> float:
    """The bound 2 (f_0 − f*) d / (r γ T) on min_t E‖∇f(W_t)‖², for smooth losses without convexity and γ ≤ 1/L.

    Args:
        size, rank, blocks: d, r and T, as for `chain_rate`.
        gap: f_0 − f*.
        step: γ.

    Raises:
        ArgumentError: a value out of range.
    """
    if not 1 <= rank <= size or blocks < 1 or gap < 0 or step <= 0:
        raise ArgumentError(
            f"rank is 1 to {size}, blocks and step are positive, gap is 0 or more; they are {rank}, {blocks}, {step} and {gap}"
        )
    return 2.0 * gap * size / (rank * step * blocks)
