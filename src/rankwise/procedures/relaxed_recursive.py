"""Relaxed recursive transformer: a stack of L layers becomes K = L / B layers looped B times, with a LoRA per depth.

    h_l = f(h_{l-1}; Φ'_{l mod K}),   W_l ≈ W'_{l mod K} + B_l A_l        l = 0 … L-1, B_l (m, r), A_l (r, n), no scale

All parameters of a position are shared over the loops, norms and biases included. W' is the mean of the tied layers
("average"), a copy of K layers at equal steps with the first and the last among them ("stepwise"), of the first K ("lower"), or
random numbers as large as the tied layers' ("random"; norms and biases are averaged there). B_l A_l starts as the truncated SVD
of what sharing lost, R_l = W_l - W', with B_l = U S and A_l = Vᵀ. Where a depth was copied, R_l = 0, and with start="zero",
A_l is N(0, 1/n) and B_l zero. r is clipped to min(m, n) map by map; r = 0 is the strictly recursive model.

Shared weights and factors are all trained, and each tensor is met once by optimizer, clipping and state dict; the gradient of a
shared weight is the sum over its depths. The KV cache is per depth. FLOPs are those of all L layers and 2r(m + n) per map and
token; numbers are 1/B of the stack and r(m + n) per depth and map. `unroll_()` gives the ordinary L-layer model.

Not an adapter beside a frozen base: shrinking loses something that only training on much text wins back. "stepwise" with
factors of medium rank starts worse than with none (the paper's U-shape); take "average" with factors. transformers'
`save_pretrained` cannot write the looped form: `save` here, or `unroll_()` first. Depths that share may not be sharded apart.

*Differs*: vectors="own" leaves norms and biases to each depth. With it full rank is exact for any model; with "tied" only where
the norms and biases of tied layers agree, which those of trained models do not. Convolutions in a layer get factors as well;
fused experts are shared without any (`without_factors`). Missing is what the paper adds around the method: distillation, losses
at early exits, and batches whose rows are at different depths.

Bae, Fisch, Harutyunyan, Ji, Kim, Schuster: Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA,
2024, arXiv:2410.20672.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankwise.approximations.truncated_svd import truncated_svd
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import LowRank
from rankwise.core.randomness import generator_for
from rankwise.procedures.layer_tying import check_loops, find_stack, linear_maps, wide
from rankwise.procedures.looped_model import Plan, RelaxedRecursive

SHARED = ("average", "stepwise", "lower", "random")
STARTS = ("svd", "zero")
VECTORS = ("tied", "own")


@torch.no_grad()
def relaxed_recursive(
    model: nn.Module,
    *,
    loops: int = 2,
    rank: int = 64,
    shared: str = "average",
    start: str = "svd",
    layers: str | None = None,
    vectors: str = "tied",
    seed: int = 0,
) -> RelaxedRecursive:
    """Ties the layers of a model into blocks looped several times, with low-rank factors at every depth, in place.

    Args:
        model: a transformer, or any model with a ModuleList of equal layers that run one after the other.
        loops: B, a divisor of the number of layers.
        rank: r of every depth's factors; 0 for none.
        shared: how the shared weights start: "average", "stepwise", "lower" or "random".
        start: of the factors: "svd" of what sharing lost, or "zero".
        layers: name of the list of layers. Default: the longest one.
        vectors: norms and biases "tied" like the weights, or each depth's "own".
        seed: of the random numbers.

    Raises:
        ArgumentError: an argument out of range.
        TargetError: no such list of layers, or one that cannot be looped.
    """
    for name, value, options in (("shared", shared, SHARED), ("start", start, STARTS), ("vectors", vectors, VECTORS)):
        if value not in options:
            raise ArgumentError(f"{name} is one of {', '.join(options)}, not {value!r}")
    if rank < 0:
        raise ArgumentError(f"rank is 0 (no factors) or more, not {rank}")
    stack, blocks = find_stack(model, layers)
    check_loops(len(blocks), loops)
    count = len(blocks) // loops
    maps = {f"{path}.weight".lstrip("."): (path, target) for path, target in linear_maps(blocks[0], stack).items()}
    values: dict[tuple[int, str], Tensor] = {}
    factors: dict[tuple[int, str], LowRank] = {}
    for name, first in blocks[0].named_parameters():
        if vectors == "own" and first.dim() < 2:
            continue
        every = [block.get_parameter(name).detach() for block in blocks]
        for k in range(count):
            values[k, name] = value = _shared(every, k, count, shared, generator_for(seed, stack, k, name))
            if name not in maps or not rank:
                continue
            path, target = maps[name]
            for depth in range(k, len(blocks), count):
                residual = wide(target.layout.to_matrix(every[depth])) - wide(target.layout.to_matrix(value))  # (m, n)
                generator = generator_for(seed, stack, depth, name, "A")
                factors[depth, path] = _factors(residual, min(rank, *residual.shape), start, generator)
    for (k, name), value in values.items():
        blocks[k].get_parameter(name).copy_(value).requires_grad_(True)
    return RelaxedRecursive(model, Plan(layers=stack, loops=loops, rank=rank, vectors=vectors), blocks, factors)


def _shared(every: list[Tensor], k: int, count: int, how: str, generator: torch.Generator) -> Tensor:
    """The shared tensor at position k of `count`, rounded as it will be kept."""
    if how in ("stepwise", "lower"):
        source = k if how == "lower" else k * (len(every) - 1) // max(count - 1, 1)
        return every[source].clone()
    tied = torch.stack(every[k::count]).double()  # (B, …)
    mean = tied.mean(0)
    if how == "average" or mean.dim() < 2:
        return mean.to(every[k].dtype)
    noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64).to(mean.device)
    return (noise * tied.square().mean().sqrt()).to(every[k].dtype)


def _factors(residual: Tensor, rank: int, start: str, generator: torch.Generator) -> LowRank:
    """B (m, r), A (r, n): the best of rank r, or zero where asked for or nothing is left."""
    if start == "svd" and residual.any():
        U, S, Vh = truncated_svd(residual, rank)
        return LowRank((U * S).contiguous(), Vh.contiguous())
    m, n = residual.shape
    A = torch.randn(rank, n, generator=generator, dtype=torch.float64) * n**-0.5  # (r, n)
    return LowRank(residual.new_zeros(m, rank), A.to(residual))
