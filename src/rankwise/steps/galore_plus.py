"""GaLore+: GaLore with a basis that is quick to find, shared by the heads of an attention layer, and a sparse correction.

    Q = leading right singular vectors of G_i (r, n), by a randomized range finder        G (m, n) = [G_1; …; G_h], h heads
    direction = scale · N Q,  N = Adam(G Qᵀ);  at Ω, round(density · m n) places: scale · κ · Adam(G)

At each refresh one head i is drawn, and its basis serves all heads of the layer, always on the input side: the gradients of the
heads of one layer are assumed to be alike. Layers without heads take the side that shortens the shorter dimension, with the
whole gradient. Ω corrects where the projection loses most: during the first `warmup` steps |G − G QᵀQ| is summed up, and its
largest places become Ω, which then is fixed, and from there on the moments of the gradient itself are kept there (κ: see
`sparse_moments`). Under SGD with density 1 the step is SGD on the whole gradient.

State as GaLore, and at Ω two numbers and one index per place: 3 · density · m n for AdamW (int32 indices); during
the warm-up m n numbers for the sum. A refresh costs O((m/h) n (r + p)), no decomposition of the whole gradient.

*Differs*: the paper keeps the lost parts of the moments and expands in them to first order; its text could not be had. Here the
moments of G are kept at Ω, in the same room: no V^(−3/2), which has no bound, and no harm from a new basis. The defaults of
`iterations` and `oversampling` are ours.

Liao, Li, Xu, Li, Liu, He: GaLore+: Boosting Low-Rank Adaptation for LLMs with Cross-Head Projection, 2024, arXiv:2412.19820.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.piece import Piece, register
from rankwise.core.randomness import generator_for
from rankwise.core.step import Block, State, Step, site_name_of
from rankwise.steps.bases import Kept, randomized_basis
from rankwise.steps.projection import Projection
from rankwise.steps.projector import inner_steps, projected
from rankwise.steps.sparse_moments import moments_at_places


@register("step")
def galore_plus(
    *,
    rank: int = 32,
    scale: float = 0.25,
    refresh: int = 200,
    side: str = "std",
    heads: int = 1,
    head_layers: tuple[str, ...] = (),
    iterations: int = 2,
    oversampling: int = 8,
    density: float = 0.012,
    warmup: int | None = None,
    weight_decay: float = 0.0,
    inner: Piece | None = None,
    seed: int = 0,
) -> Step:
    """Adam, or another step, in a subspace found from one head, with its moments corrected at a few places.

    Args:
        rank: r.
        scale: α, factor of the direction.
        refresh: steps between two bases.
        side: of layers without heads: "std", "reverse_std", "left", "right" or "full".
        heads: h, how many parts of equal size the output of a layer has.
        head_layers: the layers that have heads, the last part of the name or the whole; empty: all.
        iterations: power steps of the range finder.
        oversampling: p, directions drawn beyond the rank.
        density: share of places that are corrected; 0: none.
        warmup: steps after which those are chosen; None: `refresh`.
        weight_decay: λ, decoupled, on the whole weight.
        inner: the step run in the subspace, as a piece; None means AdamW.
        seed: of the range finder and of the heads.

    Raises:
        ArgumentError: a number out of range, an option that could have no effect, an unfit `inner`, or heads that do not fit a
            layer (when training starts).

    Example:
        >>> rankwise.compose("full + galore_plus(rank=4, heads=2, head_layers=('q_proj', 'k_proj'))")
    """
    if min(heads, iterations + 1, oversampling + 1) < 1 or not 0.0 <= density <= 1.0 or (warmup is not None and warmup < 0):
        raise ArgumentError(
            "galore_plus needs heads >= 1, iterations >= 0, oversampling >= 0, density in [0, 1] and warmup >= 0, not "
            f"{heads}, {iterations}, {oversampling}, {density} and {warmup}"
        )
    if head_layers and heads == 1:
        raise ArgumentError("galore_plus: head_layers has no effect with heads=1; say how many heads these layers have")
    within, outside = inner_steps("galore_plus", inner, weight_decay)
    known = {} if inner is None else inner.arguments
    correction = moments_at_places(
        within,
        density=density,
        warmup=refresh if warmup is None else warmup,
        scale=scale,
        betas=tuple(known.get("betas", (0.9, 0.999))),
        eps=float(known.get("eps", 1e-8)),
    )

    def with_heads(count: int, side: str) -> Step:
        def basis(gradient: Tensor, rank: int, side: str, kept: Kept) -> Projection:
            generator = generator_for(int(kept["seed"]), int(kept["step"]))
            drawn = int(torch.randint(count, (), generator=generator)) if count > 1 else 0
            one = gradient.chunk(count)[drawn]  # (m/h, n)
            return randomized_basis(one, rank, side, iterations=iterations, oversampling=oversampling, generator=generator)

        return projected(
            name="galore_plus",
            inner=within,
            rank=rank,
            scale=scale,
            refresh=refresh,
            side=side,
            weight_decay=weight_decay,
            basis=basis,
            correction=correction,
            plain=outside,
            seed=seed,
        )

    shared, whole = with_heads(heads, "right"), with_heads(1, side)  # the heads' common basis is that of their input

    def has_heads(site: str) -> bool:
        named = not head_layers or site in head_layers or site.rsplit(".", 1)[-1] in head_layers
        return named and heads > 1

    def of(block: Block) -> Step:
        return shared if has_heads(site_name_of(block)) else whole

    def problem_at(site: str, m: int, n: int) -> Problem | None:
        if not has_heads(site) or (m % heads == 0 and m // heads >= rank):
            return None
        return Problem(
            piece="step galore_plus",
            needs=f"outputs that are heads={heads} parts of at least rank={rank}",
            has=f"the layer has {m}",
            remedy="name the layers with heads in head_layers, or lower the rank",
            sites=(site,),
        )

    def init(block: Block) -> State:
        weight = block.get("weight")
        refused = None if weight is None or weight.dim() != 2 else problem_at(site_name_of(block), *weight.shape)
        if refused is not None:
            raise ArgumentError(f"galore_plus needs {refused.needs}, and {refused.has}; {refused.remedy}")
        return of(block).init(block)

    def update(gradients: Block, state: State, parameters: Block) -> Block:
        return of(parameters).update(gradients, state, parameters)

    return whole._replace(init=init, update=update, layers=tuple(head_layers), problem_at=problem_at)
