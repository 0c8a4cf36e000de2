"""RefLoRA: steps as if the update were factored, before each of them, in the best way for the loss's upper bound.

With P = AAᵀ and Q = BᵀB (r, r), every pair (BT⁻¹, TA) gives the same update. Writing S = TᵀT, the bound tr(S⁻¹Q) + tr(SP) is
smallest at the geometric mean S = P⁻¹ # Q, the solution of S P S = Q, where it equals 2‖BA‖_* . The factors need not be
touched:

    matrix:  g_A <- S⁻¹ g_A,   g_B <- g_B S            stage "gradient", factors as they are
    scalar:  A <- √σ A,  B <- B/√σ,  σ = ‖B‖_F/‖A‖_F    after the step; moments follow: m_A/√σ, v_A/σ, m_B·√σ, v_B·σ

Either way the step does not depend on how BA was factored (the scalar one: on the balance of the norms). S is undefined while
B is zero, hence `warmup` plain steps; afterwards every `interval`-th step acts. With warmup = 0 the scalar variant balances
the pair before the first step too, while there are no moments yet, so that the whole run is invariant; a factor that is zero
leaves both variants plain. State: one counter per factor. Cost O(r²(m + n) + r³) per layer and step, O(r(m + n)) for the
scalar variant.

It is not a regularizer: BA is the same before and after. A balanced pair (BᵀB = AAᵀ) gives S = I, plain LoRA. Clip gradients
after it, not before, or the invariance is lost.

*Differs*: the release balances the scalar variant only after steps; the explicit matrix form is left out, since Adam's second
moment has no exact rule under a full T.

Zhang, Li, Giannakis: RefLoRA: Refactored Low-Rank Adaptation for Efficient Fine-Tuning of Large Models, 2025 (NeurIPS).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.step import GRADIENT, Block, State, Step, on_whole
from rankwise.steps.grams import at_least_single, geometric_mean


@register("step")
def reflora(*, warmup: int = 100, interval: int = 1, variant: str = "matrix") -> Step:
    """Preconditions A and B with the geometric mean of their Grams ("matrix"), or balances their norms ("scalar").

    Args:
        warmup: plain steps at the start.
        interval: act at every so many steps afterwards.
        variant: "matrix" or "scalar".

    Example:
        >>> rankwise.compose("dora(rank=8) + reflora(warmup=20)")
    """
    if variant not in ("matrix", "scalar"):
        raise ArgumentError(f"reflora: variant is 'matrix' or 'scalar', not {variant!r}")
    if warmup < 0 or interval < 1:
        raise ArgumentError(f"reflora needs warmup >= 0 and interval >= 1, not warmup={warmup}, interval={interval}")

    def init(block: Block) -> State:
        return {role: {"step": torch.zeros((), dtype=torch.float32)} if role in ("A", "B") else {} for role in block}

    def acts(done: float) -> bool:
        return done >= warmup and (done - warmup) % interval == 0

    def count(state: State) -> int:
        done = int(state["B"]["step"])
        for role in ("A", "B"):
            state[role]["step"] += 1
        return done

    def precondition(gradients: Block, state: State, parameters: Block) -> Block:
        if not acts(count(state)):
            return gradients
        A, B = at_least_single(parameters["A"]), at_least_single(parameters["B"])
        S, inverse = geometric_mean(A @ A.mT, B.mT @ B)  # (r, r), (r, r)
        defined = torch.logical_and(A.any(), B.any())
        identity = torch.eye(S.shape[0], dtype=S.dtype, device=S.device)
        S, inverse = torch.where(defined, S, identity), torch.where(defined, inverse, identity)
        return {**gradients, "A": inverse @ at_least_single(gradients["A"]), "B": at_least_single(gradients["B"]) @ S}

    def start_balanced(gradients: Block, state: State, parameters: Block) -> Block:
        if count(state) > 0 or warmup > 0:
            return gradients
        factors = _balancing(parameters)
        for role, factor in factors.items():
            parameters[role].mul_(factor)
        return {role: gradient / factors[role] if role in factors else gradient for role, gradient in gradients.items()}

    def after(state: State, parameters: Block) -> dict[str, Tensor]:
        return _balancing(parameters) if acts(float(state["B"]["step"]) - 1) else {}

    step = Step(init, precondition, "reflora", GRADIENT, frozenset({"A", "B"}), preconditions=True)
    return on_whole(step) if variant == "matrix" else step._replace(update=start_balanced, after=after)


def _balancing(parameters: Block) -> dict[str, Tensor]:
    """By what to multiply A and B so that their norms agree and BA stays; ones where a factor is zero."""
    a, b = torch.linalg.matrix_norm(parameters["A"]), torch.linalg.matrix_norm(parameters["B"])
    root = torch.where((a > 0) & (b > 0), b / torch.where(a > 0, a, 1.0), 1.0).sqrt()  # √σ
    return {"A": root, "B": 1.0 / root}
