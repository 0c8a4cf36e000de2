"""One gradient projector: any step that makes updates, run inside a small subspace of a trained matrix's gradient.

A weight (m, n) keeps bases with orthonormal columns or rows, P (m, r) on the left and/or Q (r, n) on the right:

    R = Pᵀ G  |  G Qᵀ  |  Pᵀ G Qᵀ      the inner step sees R and keeps its moments in R's shape: N
    direction = scale · (P N  |  N Q  |  P N Q) + limited residual + decay · W

Published methods differ in five choices, each a function here: the side (`side_of`), where the basis comes from (`Basis`),
what becomes of the moments when it changes (`Transport`), what is done with the gradient outside the subspace (`Residual`)
and how its growth is held (`Limiter`). State of one matrix: its bases, the inner step's state, one counter, whatever the
choices keep. Tensors that are no matrix are given to the inner step as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.step import MOMENTS, Block, State, Step
from rankwise.steps.grams import at_least_single
from rankwise.steps.projection import SIDES, Projection, side_of

INNER = "inner."  # prefix of the inner step's state
Kept = dict[str, Tensor]  # the state of one matrix


Basis = Callable[[Tensor, int, str, Kept], Projection]  # (gradient (m, n), rank, side, state) -> new bases
Transport = Callable[[Kept, Projection, Projection], None]  # (state, old, new): moves the inner state over, in place
Residual = Callable[[Tensor, Tensor, Tensor, Projection], Tensor | None]  # (G, R, N, bases) -> direction outside, (m, n)
Limiter = Callable[[Tensor, Kept], Tensor]  # (residual direction, state) -> the same, held back


def svd_basis(gradient: Tensor, rank: int, side: str, kept: Kept) -> Projection:
    """The leading singular vectors of the gradient of this very step, in at least float32.

    Their signs are arbitrary and moments outlive a change of basis, so each vector's largest entry is made positive: the
    result then depends neither on the linear algebra library nor on whether W or Wᵀ is trained.
    """
    U, _, Vh = torch.linalg.svd(at_least_single(gradient), full_matrices=False)
    P = _signed(U[:, :rank].mT).mT.contiguous() if side in ("left", "full") else None  # (m, r)
    Q = _signed(Vh[:rank]).contiguous() if side in ("right", "full") else None  # (r, n)
    return Projection(P, Q)


def _signed(rows: Tensor) -> Tensor:
    """The rows (r, k), each with its largest entry positive."""
    return rows * torch.gather(rows, 1, rows.abs().argmax(dim=1, keepdim=True)).sign()


def keep_moments(kept: Kept, old: Projection, new: Projection) -> None:
    """Leaves the moments as they are when the basis changes, although their coordinates then mean something else."""


def no_residual(G: Tensor, R: Tensor, N: Tensor, projection: Projection) -> Tensor | None:
    """Drops the part of the gradient outside the subspace."""
    return None


def no_limit(residual: Tensor, kept: Kept) -> Tensor:
    """Lets the residual grow as it will."""
    return residual


def projected(
    *,
    name: str,
    inner: Step,
    rank: int,
    scale: float,
    refresh: int,
    side: str = "std",
    weight_decay: float = 0.0,
    basis: Basis = svd_basis,
    transport: Transport = keep_moments,
    residual: Residual = no_residual,
    limiter: Limiter = no_limit,
    plain: Step | None = None,
) -> Step:
    """A step of stage "moments" that runs `inner` in the subspace; for blocks with a trained `weight`.

    Args:
        name: for messages and the state's names.
        inner: what makes the update from the small gradient; must not decay, since it never sees the weight.
        rank: r.
        scale: factor of the direction inside the subspace.
        refresh: a new basis at steps 0, refresh, 2·refresh, …
        side: one of `SIDES`.
        weight_decay: decoupled, of the whole matrix.
        basis: where the basis comes from.
        transport: what becomes of the moments when it changes.
        residual: what is done with the gradient outside.
        limiter: how the growth of that part is held.
        plain: for blocks without a `weight` role.

    Raises:
        ArgumentError: an unknown side, a number out of range, or (when training starts) a rank larger than the matrix.
    """
    if side not in SIDES:
        raise ArgumentError(f"{name}: side is one of {', '.join(SIDES)}, not {side!r}")
    if rank < 1 or refresh < 1 or weight_decay < 0.0:
        raise ArgumentError(
            f"{name} needs rank >= 1, refresh >= 1 and weight_decay >= 0, not rank={rank}, refresh={refresh}, "
            f"weight_decay={weight_decay}"
        )

    def init(block: Block) -> State:
        state: State = {}
        for role, tensor in block.items():
            small = tensor if tensor.dim() != 2 else tensor.new_zeros(_small_shape(tensor, rank, side, name))
            kept = {f"{INNER}{key}": value for key, value in inner.init({role: small})[role].items()}
            state[role] = kept | ({"step": torch.zeros((), dtype=torch.float32)} if tensor.dim() == 2 else {})
        return state

    def update(gradients: Block, state: State, parameters: Block) -> Block:
        directions: dict[str, Tensor] = {}
        for role, gradient in gradients.items():
            kept = state[role]
            if gradient.dim() == 2:
                direction = inside(role, at_least_single(gradient), kept)
            else:
                direction = run_inner(role, gradient, kept)
            decays = weight_decay and parameters[role].dim() > 1
            directions[role] = direction.add(parameters[role], alpha=weight_decay) if decays else direction
        return directions

    def inside(role: str, G: Tensor, kept: Kept) -> Tensor:
        if int(kept["step"]) % refresh == 0:
            old, new = Projection(kept.get("P"), kept.get("Q")), basis(G, rank, side_of(side, *G.shape), kept)
            if old != Projection(None, None):
                transport(kept, old, new)
            kept.update({key: value for key, value in new._asdict().items() if value is not None})
        kept["step"] += 1
        projection = Projection(kept.get("P"), kept.get("Q"))
        R = projection.down(G)  # (r, n), (m, r) or (r, r)
        N = run_inner(role, R, kept)
        outside = residual(G, R, N, projection)
        direction = projection.up(N).mul_(scale)  # (m, n)
        return direction if outside is None else direction.add_(limiter(outside, kept))

    def run_inner(role: str, gradient: Tensor, kept: Kept) -> Tensor:
        part = {key[len(INNER) :]: value for key, value in kept.items() if key.startswith(INNER)}
        direction = inner.update({role: gradient}, {role: part}, {role: gradient})[role]
        kept.update({f"{INNER}{key}": value for key, value in part.items()})
        return direction

    return Step(init, update, name, MOMENTS, frozenset({"weight"}), plain=plain, rank=rank)


def _small_shape(weight: Tensor, rank: int, rule: str, name: str) -> tuple[int, int]:
    m, n = weight.shape
    if rank > min(m, n):
        raise ArgumentError(
            f"{name}: rank={rank} is larger than a weight of {m} × {n} has; use rank={min(m, n)} or less, or leave the "
            "layer out with where="
        )
    side = side_of(rule, m, n)
    return (rank if side in ("left", "full") else m, rank if side in ("right", "full") else n)
