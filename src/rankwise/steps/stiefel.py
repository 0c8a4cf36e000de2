"""Stiefel-Adam: Adam along the orthogonal group, for SODA's rotations; AdamW for whatever is trained beside them.

For a square orthogonal X with gradient G, at step t:

    S = Xᵀ G                                Y ← β₁ Y + (1 - β₁)(S - Sᵀ)          P ← β₂ P + (1 - β₂)(S - Sᵀ)²
    X ← retract(X - η X D)                  D = Y/(1 - β₁ᵗ) / (√(P/(1 - β₂ᵗ)) + ε)

S - Sᵀ is the gradient in the canonical metric, written at the identity, where moments of different steps may be added. D is
skew, as P is symmetric, so the move is along the group; the retraction brings X back on it: "newton_schulz" takes the nearest
orthogonal matrix by Newton and Schulz's iteration (a few products of tiny matrices), "cayley" and "exponential" follow the
group's own curves X (I + ηD/2)⁻¹(I - ηD/2) and X exp(-ηD). det X never changes sign. State: two numbers per trained number
(three with the last two, which keep X).

The shell moves tensors by -η times a direction; here that is the Euler step, and the retraction follows once they have moved.

*Differs* from the release only in that one step serves both kinds of tensors (the release: two optimizers with one rate), and
that weight decay never reaches a rotation.

Kong, Wang, Tao: Momentum Stiefel Optimizer, with Applications to Suitably-Orthogonal Attention, and Optimal Transport, 2022,
arXiv:2205.14173. Zhang et al.: Spectrum-Aware Parameter Efficient Fine-Tuning for Diffusion Models, 2024, arXiv:2405.21050.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.step import MOMENTS, Block, State, Step, on_whole
from rankwise.steps.moments import adamw

ROTATIONS = frozenset({"Q_1", "Q_2", "Q_3"})
RETRACTIONS = ("newton_schulz", "cayley", "exponential")
ITERATIONS = 100


@register("step")
def stiefel_adam(*, betas: tuple[float, float] = (0.9, 0.99), epsilon: float = 1e-5, retraction: str = "newton_schulz") -> Step:
    """Stiefel-Adam on Q_1, Q_2, Q_3; AdamW with its own defaults on the rest.

    Args:
        betas: β₁ and β₂.
        epsilon: ε.
        retraction: "newton_schulz", "cayley" or "exponential".

    Example:
        >>> rankwise.compose("soda + stiefel_adam(retraction='cayley')")
    """
    first, second = betas
    if not (0.0 <= first < 1.0 and 0.0 <= second < 1.0 and epsilon >= 0.0):
        raise ArgumentError(f"stiefel_adam needs betas in [0, 1) and epsilon >= 0, not betas={betas}, epsilon={epsilon}")
    if retraction not in RETRACTIONS:
        raise ArgumentError(f"retraction is one of {', '.join(RETRACTIONS)}, not {retraction!r}")
    rest = adamw()

    def init(block: Block) -> State:
        state = rest.init({role: tensor for role, tensor in block.items() if role not in ROTATIONS})
        for role, X in block.items():
            if role in ROTATIONS:
                state[role] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "momentum": torch.zeros_like(X),  # Y (n_i, n_i)
                    "square": torch.zeros_like(X),  # P (n_i, n_i)
                }
                if retraction != "newton_schulz":
                    state[role]["before"] = X.detach().clone()
        return state

    def update(gradients: Block, state: State, parameters: Block) -> Block:
        directions = dict(rest.update({r: g for r, g in gradients.items() if r not in ROTATIONS}, state, parameters))
        for role, G in gradients.items():
            if role in ROTATIONS:
                directions[role] = _direction(G, state[role], parameters[role])
        return directions

    def _direction(G: Tensor, kept: dict[str, Tensor], X: Tensor) -> Tensor:
        """X D (n_i, n_i)."""
        kept["step"] += 1
        count, S = float(kept["step"]), X.t() @ G
        tangent = S - S.t()
        kept["momentum"].lerp_(tangent, 1 - first)
        kept["square"].mul_(second).addcmul_(tangent, tangent, value=1 - second)
        if "before" in kept:
            kept["before"].copy_(X)
        root = (kept["square"] / (1 - second**count)).sqrt() + epsilon
        # A tangent of zeros (a rotation of size 1) with epsilon 0 is no direction, not 0 / 0.
        return X @ torch.where(root > 0, kept["momentum"] / (1 - first**count) / root, 0.0)

    def after(state: State, parameters: Block) -> dict[str, Tensor]:
        for role, moved in parameters.items():
            if role in ROTATIONS:
                moved.copy_(_retracted(moved, state[role].get("before"), retraction))
        return {}

    step = Step(init, update, "stiefel_adam", MOMENTS, roles=ROTATIONS, plain=rest, after=after, rescaled=rest.rescaled)
    return on_whole(step)


def _retracted(moved: Tensor, before: Tensor | None, retraction: str) -> Tensor:
    """The orthogonal matrix for an Euler step `moved` = X (I + S), S skew."""
    if before is None:
        return nearest_orthogonal(moved)
    S = before.t() @ moved
    S = (S - S.t()) / 2  # what rounding left beside the skew part, I included, is dropped
    if retraction == "exponential":
        return nearest_orthogonal(before @ torch.linalg.matrix_exp(S))  # rounding of many steps would add up
    identity = torch.eye(S.shape[0], dtype=S.dtype, device=S.device)
    return nearest_orthogonal(before @ torch.linalg.solve(identity - S / 2, identity + S / 2))


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal factor M (MᵀM)^-½ of an invertible square matrix, by Newton and Schulz's iteration.

    It converges for singular values in (0, √3), into which a first scaling by a bound of the largest brings them.
    """
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    gram = matrix.t() @ matrix
    X = matrix / gram.abs().sum(1).max().sqrt().clamp_min(1.0)  # the largest row sum of |MᵀM| is at least σ₁²
    tolerance = 4 * torch.finfo(matrix.dtype).eps
    for _ in range(ITERATIONS):
        rest = identity - X.t() @ X
        if rest.abs().max() <= tolerance:
            break
        X = X + X @ rest / 2
    return X
