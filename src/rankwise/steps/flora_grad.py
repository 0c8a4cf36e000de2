"""Flora: momentum of a whole weight kept under a random projection that is drawn again from a seed.

    U = G / √V (Adafactor), or G              direction = (1 - β) U + β Rᵀ C, clipped to root mean square d
    every κ steps  C <- R' Rᵀ C, R <- R'      C <- β C + (1 - β) R U

G, U are (m, n); R (r, m) with entries N(0, 1/r) shortens the smaller side, C (r, n) (m > n: C (m, r) on the right). E[RᵀR] = I,
so what is compressed and decompressed is right in the mean, off by √((m + 1)/r) in size; with a new R every κ steps the sum of
all updates is of full rank. The present U enters whole, only history is compressed; β = 0 is the base step itself. State:
r max(m, n) for C and m + n for V, against 2 m n for Adam; R is never stored. Cost O(m n r) per step and r min(m, n) random
numbers per use. Gradients over micro-batches are compressed by `compressed_accumulation.CompressedAccumulation`.

It is no adapter and exports nothing; the gradient itself stays (m, n). A LoRA whose A is random and frozen does the same with
an R that never changes. Not to be confused with the federated FLoRA.

*Differs* from the release: weights of any aspect ratio are compressed (there: up to 4:1), so leave embeddings out with
`where=`; the step is relative to the weight's size only with `scale_parameter=True`, decay never; entries of R agree on every
device. Tensors beside a `weight` (a head) get the same step without compression.

Hao, Cao, Mou: Flora: Low-Rank Adapters Are Secretly Gradient Compressors, 2024, arXiv:2402.03293.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.sharding import sharded_like, whole
from rankwise.core.step import MOMENTS, Block, State, Step, site_name_of
from rankwise.steps.adafactor import LEAST, Kept, clipped, preconditioned, rms, second_moments
from rankwise.steps.compressed_accumulation import CompressedAccumulation
from rankwise.steps.grams import at_least_single
from rankwise.steps.projection import Projection, side_of
from rankwise.steps.random_projection import derived_seed, projection_of

__all__ = ["CompressedAccumulation", "flora_grad"]
BASES = ("adafactor", "sgd")
MOMENTUM = "inner.exp_avg"  # C, named as what other projections keep in their subspace


@register("step")
def flora_grad(
    *,
    rank: int = 128,
    interval: int = 1000,
    momentum: float = 0.9,
    decay_rate: float = -0.8,
    clip: float = 1.0,
    base: str = "adafactor",
    scale_parameter: bool = False,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> Step:
    """Adafactor, or SGD, with momentum under a random projection.

    Args:
        rank: r; its error has a size of √(min(m, n)/r), so not tiny.
        interval: κ, steps between two projections. Each transfer lengthens C by √(min(m, n)/r), which β^κ has to outweigh.
        momentum: β.
        decay_rate: γ; the second moment forgets by 1 - t^γ.
        clip: d, largest root mean square of a step; infinity for none.
        base: "adafactor" or "sgd".
        scale_parameter: multiply the step by the root mean square of the weight (at least 1e-3).
        weight_decay: λ, decoupled.
        seed: of the projections.

    Raises:
        ArgumentError: a number out of range, or a decay rate that the base "sgd" does not use.

    Example:
        >>> rankwise.compose("full + flora_grad(rank=4)")
    """
    if base not in BASES:
        raise ArgumentError(f"flora_grad: base is one of {', '.join(BASES)}, not {base!r}")
    if rank < 1 or interval < 1 or not (0.0 <= momentum < 1.0 and weight_decay >= 0.0 and decay_rate < 0.0 < clip):
        raise ArgumentError(
            "flora_grad needs rank >= 1, interval >= 1, momentum in [0, 1), decay_rate < 0, clip > 0 and weight_decay >= 0, "
            f"not rank={rank}, interval={interval}, momentum={momentum}, decay_rate={decay_rate}, clip={clip}, "
            f"weight_decay={weight_decay}"
        )
    if base == "sgd" and decay_rate != -0.8:
        raise ArgumentError("flora_grad: decay_rate belongs to base='adafactor'; leave it out with base='sgd'")

    def made(compress: bool) -> Step:
        def init(block: Block) -> State:
            return {role: started(tensor) for role, tensor in block.items()}

        def started(tensor: Tensor) -> Kept:
            like = at_least_single(torch.empty(0, dtype=tensor.dtype, device=tensor.device))  # plain, however it is sharded
            kept = {"step": torch.zeros((), dtype=torch.float32)}
            if base == "adafactor":
                kept |= second_moments(tensor, like)
            if momentum:
                kept[MOMENTUM] = like.new_zeros(_compressed(tensor, rank) if compress else tuple(tensor.shape))
            return kept

        def update(gradients: Block, state: State, parameters: Block) -> Block:
            directions = {}
            for role, gradient in gradients.items():
                key = f"{site_name_of(parameters)}.{role}"
                G, W = at_least_single(whole(gradient)), whole(parameters[role])
                directions[role] = sharded_like(direction(G, W, state[role], key), gradient)
            return directions

        def direction(G: Tensor, W: Tensor, kept: Kept, key: str) -> Tensor:
            kept["step"] += 1
            count = int(kept["step"])
            U = preconditioned(G, kept, count, decay_rate) if base == "adafactor" else G
            step = U.mul(1.0 - momentum).add_(remembered(U, kept, count, key), alpha=momentum) if momentum else U
            step = clipped(step, clip)
            step = step * rms(at_least_single(W)).clamp_min(LEAST) if scale_parameter else step
            return step.add(W, alpha=weight_decay) if weight_decay and W.dim() > 1 else step

        def remembered(U: Tensor, kept: Kept, count: int, key: str) -> Tensor:
            """What C stood for before this step; then moves C on."""
            C = kept[MOMENTUM]
            if not compress or U.dim() != 2:
                kept[MOMENTUM] = torch.lerp(C, U, 1.0 - momentum)
                return C

            def drawn(window: int) -> Projection:
                (m, n), own = U.shape, derived_seed(seed, "flora_grad", key, window)
                return projection_of(m, n, rank, own, device=U.device, dtype=U.dtype)

            R = drawn((count - 1) // interval)
            old = R.up(C)  # (m, n)
            if count % interval == 0:
                R = drawn(count // interval)
                C.copy_(R.down(old))
            C.lerp_(R.down(U), 1.0 - momentum)
            return old

        roles = frozenset({"weight"}) if compress else frozenset[str]()
        return Step(init, update, "flora_grad", MOMENTS, roles, rank=rank if compress else None)

    return made(True)._replace(plain=made(False))


def _compressed(weight: Tensor, rank: int) -> tuple[int, ...]:
    """The shape of C."""
    if weight.dim() != 2:
        return tuple(weight.shape)
    m, n = weight.shape
    if rank > min(m, n):
        remedy = f"use rank={min(m, n)} or less, or leave the layer out with where="
        raise ArgumentError(f"flora_grad: rank={rank} is larger than a weight of {m} × {n} has; {remedy}")
    return (rank, n) if side_of("std", m, n) == "left" else (m, rank)
