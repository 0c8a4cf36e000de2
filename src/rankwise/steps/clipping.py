"""Gradient clipping over all trained tensors together, per factor, or by what the step does to W.

    global      g <- g min(1, c / ‖g‖)                      one norm over every trained tensor
    per_role    the same with one norm per role             A is not clipped because B's gradient is large
    effective   per layer, ‖s (d_B A + B d_A)‖_F <= c       the size of the change of W, for the step d = g

Factor gradients G Aᵀ and BᵀG scale with the other factor, so under one global c the factor whose partner is large is clipped
first; the effective norm does not depend on how BA was factored. It comes from r × r Grams, no (m, n) matrix. Runs behind
preconditioners and in front of moments; decoupled decay is not clipped. With `quantile` p, c follows the p-quantile of
the norms seen: it rises by a factor e^{p/10} when exceeded and falls by e^{-(1-p)/10} otherwise, starting at the first norm. A
norm that is not finite leaves the gradients as they are, for the check of the loop to see. State per tensor: the last norm, the
limit in use and how often it clipped.

`vanishing_penalty` is the paper's regularizer Ω of recurrent chains: how far each step's backward factor is from keeping norms.

Pascanu, Mikolov, Bengio: On the difficulty of training Recurrent Neural Networks, 2012, arXiv:1211.5063.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.sharding import whole
from rankwise.core.step import CLIPPING, Block, Sites, State, Step, scale_of
from rankwise.steps.grams import at_least_single

MODES = ("global", "per_role", "effective")
PACE = 0.1
Member = tuple[str, str]  # site, role


@register("step")
def clip(*, max_norm: float = 1.0, mode: str = "global", quantile: float | None = None) -> Step:
    """Rescales gradients whose norm exceeds a limit.

    Args:
        max_norm: c.
        mode: "global", "per_role" or "effective".
        quantile: p; the limit then follows the p-quantile of the norms, and `max_norm` is not used.

    Example:
        >>> rankwise.compose("lora + theory_gradient_clipping(max_norm=0.5, mode='effective')")
    """
    if mode not in MODES:
        raise ArgumentError(f"clip: mode is one of {', '.join(MODES)}, not {mode!r}")
    if not max_norm > 0.0 or (quantile is not None and not 0.0 < quantile < 1.0):
        raise ArgumentError(f"clip needs max_norm > 0 and quantile in (0, 1) or None, not {max_norm} and {quantile}")

    def init(block: Block) -> State:
        names = ("norm", "limit", "clipped")
        return {
            role: {name: torch.zeros((), dtype=torch.float32, device=tensor.device) for name in names}
            for role, tensor in block.items()
        }

    def across(gradients: Sites, parameters: Sites, states: Mapping[str, State]) -> Sites:
        changed: dict[str, dict[str, Tensor]] = {site: dict(block) for site, block in gradients.items()}
        for members, norm in _groups(gradients, parameters, mode):
            kept = [states[site][role] for site, role in members]
            limit = _followed(kept[0]["limit"], norm, quantile) if quantile else torch.full_like(norm, max_norm)
            factor = torch.where(torch.isfinite(norm), (limit / norm.clamp_min(1e-300)).clamp_max(1.0), 1.0)  # ()
            for own, (site, role) in zip(kept, members, strict=True):
                gradient = changed[site][role]
                changed[site][role] = torch.where(factor < 1.0, gradient * factor.to(gradient.dtype), gradient)
                own["norm"].copy_(norm)
                own["limit"].copy_(limit)
                own["clipped"] += factor < 1.0
        return changed

    def unchanged(gradients: Block, state: State, parameters: Block) -> Block:
        return gradients

    return Step(init, unchanged, "clip", CLIPPING, across=across)


def _groups(gradients: Sites, parameters: Sites, mode: str) -> list[tuple[list[Member], Tensor]]:
    """Tensors that are clipped together, with their norm ()."""
    members = [(site, role) for site, block in gradients.items() for role in block]
    if mode == "global":
        return [(members, _norm([gradients[site][role] for site, role in members]))] if members else []
    if mode == "per_role":
        roles = dict.fromkeys(role for _, role in members)
        together = [[member for member in members if member[1] == role] for role in roles]
        return [(group, _norm([gradients[site][role] for site, role in group])) for group in together]
    found: list[tuple[list[Member], Tensor]] = []
    for site, block in gradients.items():
        pair = {"A", "B"} <= block.keys()
        if pair:
            own = parameters[site]
            norm = effective_norm(own["B"], own["A"], block["B"], block["A"], scale_of(own))
            found.append(([(site, "A"), (site, "B")], norm))
        found += [([(site, role)], _norm([g])) for role, g in block.items() if not (pair and role in ("A", "B"))]
    return found


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    squares = [whole(at_least_single(tensor).square().sum()) for tensor in tensors]
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


def _followed(limit: Tensor, norm: Tensor, quantile: float) -> Tensor:
    pace = torch.where(norm > limit, math.exp(PACE * quantile), math.exp(-PACE * (1.0 - quantile)))
    return torch.where(limit > 0, limit * pace, norm)


def effective_norm(B: Tensor, A: Tensor, d_B: Tensor, d_A: Tensor, scale: float) -> Tensor:
    """‖s (d_B A + B d_A)‖_F () through r × r Grams."""
    B, A, d_B, d_A = (at_least_single(tensor) for tensor in (B, A, d_B, d_A))
    squares = ((d_B.mT @ d_B) * (A @ A.mT)).sum() + ((B.mT @ B) * (d_A @ d_A.mT)).sum()
    cross = ((d_B.mT @ B) * (A @ d_A.mT)).sum()
    return abs(scale) * whole(squares + 2.0 * cross).clamp_min(0.0).sqrt()


def vanishing_penalty(states: Sequence[Tensor], loss: Tensor) -> Tensor:
    """Ω = Σ_k (‖δ_{k+1} ∂x_{k+1}/∂x_k‖ / ‖δ_{k+1}‖ - 1)², δ = dE/dx a constant: zero where norms are kept on the way back.

    Args:
        states: x_1 … x_T of a recurrent chain, each made from the one before, with their graph.
        loss: E (), made from the states.
    """
    deltas = torch.autograd.grad(loss, list(states), retain_graph=True)
    total = loss.new_zeros(())
    for before, after, delta in zip(states[:-1], states[1:], deltas[1:], strict=True):
        (back,) = torch.autograd.grad(after, before, delta.detach(), create_graph=True)
        total = total + (back.norm() / delta.detach().norm() - 1.0).square()
    return total
