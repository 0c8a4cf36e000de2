"""One gradient projector: any step that makes updates, run inside a small subspace of a trained matrix's gradient.

A weight (m, n) has bases, P (m, r) on the left and/or Q (r, n) on the right:

    R = Pᵀ G  |  G Qᵀ  |  Pᵀ G Qᵀ      the inner step sees R and keeps its moments in R's shape: N
    direction = scale · (P N  |  N Q  |  P N Q) + limited residual + decay · W

Published methods differ in their choices, each a function: the side (`side_of`), where the basis comes from and whether it is
kept (`Basis`), when it is renewed (`refresh`), what becomes of the moments then (`Transport`), how it drifts after a step
(`Drift`), what is done with the gradient outside the subspace (`Residual`), how the growth of that is held (`Limiter`), and
what is corrected in the end (`Correction`). State of one matrix: its bases, the inner step's state, one counter, a seed where
something is drawn, whatever the choices keep; all in at least float32. What is trained beside the weight is given to the inner
step as it is. A matrix that is sharded over devices is gathered, and every device does the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import Piece, piece
from rankwise.core.sharding import spread_like, whole
from rankwise.core.step import MOMENTS, Block, State, Step, site_name_of
from rankwise.steps.bases import Basis, Kept, svd_basis
from rankwise.steps.grams import at_least_single
from rankwise.steps.growth import Limiter, no_limit
from rankwise.steps.moments import adamw
from rankwise.steps.projection import SIDES, Projection, side_of
from rankwise.steps.random_projection import derived_seed

INNER = "inner."  # prefix of the inner step's state
Transport = Callable[[Kept, Projection, Projection], None]  # (state, old, new): moves the inner state over, in place
Residual = Callable[[Tensor, Tensor, Tensor, Projection], Tensor | None]  # (G, R, N, bases) -> direction outside, (m, n)
Correction = Callable[[Tensor, Tensor, Projection, Kept], Tensor]  # (direction, G, bases, state) -> direction
Drift = Callable[[Tensor, Projection, Kept, Block], None]  # (G, bases, state, parameters): moves the bases in the state


def keep_moments(kept: Kept, old: Projection, new: Projection) -> None:
    """Leaves the moments as they are when the basis changes, although their coordinates then mean something else."""


def no_residual(G: Tensor, R: Tensor, N: Tensor, projection: Projection) -> Tensor | None:
    """Drops the part of the gradient outside the subspace."""
    return None


def inner_steps(name: str, inner: Piece | None, weight_decay: float) -> tuple[Step, Step]:
    """The step to run in the subspace, and the same with decay for blocks without a `weight` role.

    Args:
        name: of the method, for messages.
        inner: a piece that makes an update; None means AdamW.
        weight_decay: of the method.

    Raises:
        ArgumentError: `inner` makes no update, or has a decay, which in the subspace would have no weight to act on.
    """
    within = adamw() if inner is None else inner.build()
    if within.stage != MOMENTS or within.roles:
        raise ArgumentError(f"{name}: inner is a step that makes the update of any tensor (adamw, sgd), not {within.name!r}")
    if inner is not None and inner.arguments.get("weight_decay"):
        raise ArgumentError(f"{name}: inner sees only the projected gradient; give weight_decay to {name} itself")
    outside = piece(adamw) if inner is None else inner
    if weight_decay:
        outside = Piece(outside.shelf, outside.name, {**outside.arguments, "weight_decay": weight_decay})
    return within, outside.build()


def projected(
    *,
    name: str,
    inner: Step,
    rank: int,
    scale: float | None,
    refresh: int | None,
    side: str = "std",
    weight_decay: float = 0.0,
    basis: Basis = svd_basis,
    stored: bool = True,
    transport: Transport = keep_moments,
    residual: Residual = no_residual,
    limiter: Limiter = no_limit,
    correction: Correction | None = None,
    drift: Drift | None = None,
    plain: Step | None = None,
    seed: int | None = None,
) -> Step:
    """A step of stage "moments" that runs `inner` in the subspace; for blocks with a trained `weight`.

    Args:
        name: for messages and the state's names.
        inner: what makes the update from the small gradient; must not decay, since it never sees the weight.
        rank: r.
        scale: factor of the direction inside the subspace; None: it is used by the residual only.
        refresh: a new basis at steps 0, refresh, 2·refresh, …; None: only at step 0.
        side: one of `SIDES`.
        weight_decay: decoupled, of the whole matrix.
        basis: where the basis comes from.
        stored: whether the bases are kept; if not, `basis` is asked at every step and there is no transport.
        transport: what becomes of the moments when the basis changes.
        residual: what is done with the gradient outside.
        limiter: how the growth of that part is held.
        correction: has the last word on the direction.
        drift: moves the bases after a step.
        plain: for blocks without a `weight` role.
        seed: if given, each matrix has its own "seed" in its state, made of this, the site's name and the role.

    Raises:
        ArgumentError: an unknown side, a number out of range, or (when training starts) a rank larger than the matrix.
    """
    if side not in SIDES:
        raise ArgumentError(f"{name}: side is one of {', '.join(SIDES)}, not {side!r}")
    if rank < 1 or (refresh is not None and refresh < 1) or weight_decay < 0.0:
        raise ArgumentError(
            f"{name} needs rank >= 1, refresh >= 1 and weight_decay >= 0, not rank={rank}, refresh={refresh}, "
            f"weight_decay={weight_decay}"
        )

    def projects(role: str, tensor: Tensor) -> bool:
        return role == "weight" and tensor.dim() == 2

    def init(block: Block) -> State:
        state: State = {}
        for role, tensor in block.items():
            small = _small(tensor, rank, side, name) if projects(role, tensor) else tensor
            kept = {f"{INNER}{key}": value for key, value in inner.init({role: small})[role].items()}
            if projects(role, tensor):
                kept["step"] = torch.zeros((), dtype=torch.float32)
                if seed is not None:
                    kept["seed"] = torch.tensor(derived_seed(seed, site_name_of(block), role))
            state[role] = kept
        return state

    def update(gradients: Block, state: State, parameters: Block) -> Block:
        directions: dict[str, Tensor] = {}
        for role, gradient in gradients.items():
            kept = state[role]
            if projects(role, gradient):
                direction = inside(role, at_least_single(whole(gradient)), kept, parameters)
                direction = spread_like(direction, gradient)
            else:
                direction = run_inner(inner, role, gradient, kept)
            decays = weight_decay and parameters[role].dim() > 1
            directions[role] = direction.add(parameters[role], alpha=weight_decay) if decays else direction
        return directions

    def inside(role: str, G: Tensor, kept: Kept, parameters: Block) -> Tensor:
        projection = bases(G, kept)
        kept["step"] += 1
        R = projection.down(G)  # (r, n), (m, r) or (r, r)
        N = run_inner(inner, role, R, kept)
        outside = residual(G, R, N, projection)
        if scale is None:
            direction = torch.zeros_like(G) if outside is None else limiter(outside, kept)
        else:
            direction = projection.up(N).mul_(scale)  # (m, n)
            direction = direction if outside is None else direction.add_(limiter(outside, kept))
        if correction is not None:
            direction = correction(direction, G, projection, kept)
        if drift is not None:
            drift(G, projection, kept, parameters)
        return direction

    def bases(G: Tensor, kept: Kept) -> Projection:
        count = int(kept["step"])
        if not stored:
            return basis(G, rank, side_of(side, *G.shape), kept)
        old = Projection(kept.get("P"), kept.get("Q"))
        if count % refresh if refresh is not None else count:
            return old
        new = basis(G, rank, side_of(side, *G.shape), kept)
        if old != Projection(None, None):
            transport(kept, old, new)
        kept.update({key: value for key, value in new._asdict().items() if value is not None})
        return new

    return Step(init, update, name, MOMENTS, frozenset({"weight"}), plain=plain, rank=rank)


def run_inner(inner: Step, role: str, gradient: Tensor, kept: Kept, prefix: str = INNER) -> Tensor:
    """One update of the inner step, on a gradient of any shape; its state is what `kept` has under the prefix."""
    part = {key[len(prefix) :]: value for key, value in kept.items() if key.startswith(prefix)}
    direction = inner.update({role: gradient}, {role: part}, {role: gradient})[role]
    kept.update({f"{prefix}{key}": value for key, value in part.items()})
    return direction


def _small(weight: Tensor, rank: int, rule: str, name: str) -> Tensor:
    m, n = weight.shape
    if rank > min(m, n):
        raise ArgumentError(
            f"{name}: rank={rank} is larger than a weight of {m} × {n} has; use rank={min(m, n)} or less, or leave the "
            "layer out with where="
        )
    side = side_of(rule, m, n)
    shape = (rank if side in ("left", "full") else m, rank if side in ("right", "full") else n)
    return torch.zeros(shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
