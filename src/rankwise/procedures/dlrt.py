"""DLRT: a layer W = U S Vᵀ trained on the manifold of low-rank matrices, its rank found on the way.

    K, L  K₁ = U S - η G V,  L₁ = V Sᵀ - η Gᵀ U        G = dL/dW at W, never formed; U (m, r), S (r, r), V (n, r)
    bases U₁ = orth [U | K₁] (m, 2r),  V₁ = orth [V | L₁] (n, 2r);   S~ = (U₁ᵀ U) S (Vᵀ V₁), so that U₁ S~ V₁ᵀ = W
    S     S₁ = S~ - η dL/dS at (U₁, S~, V₁): the gradient is taken a second time, and heads move here too
    cut   S₁ = P diag(d) Qᵀ;  r' = the fewest with ‖d_{r'+1…}‖ <= tolerance ‖d‖ (absolute: <= tolerance);  U = U₁ P, V = V₁ Q

The step of W is -η P_U G P_V with the projectors on both bases: its error does not grow with 1/σ_min as that of descent on two
factors does, and the loss falls but for the cut. `adaptive=False` keeps r, with U₁ = orth K₁ and V₁ = orth L₁. The start is the
SVD of the weight or random; `keep_base` trains U S Vᵀ beside the weight, from zero. Tensors are made once at the largest width,
2R columns, so that optimizers, files and DDP never see others: give max_rank where memory is short. Export: exact at rank r
with `keep_base`, else the weight is replaced. Cost: two forward-backwards per step, a QR of O((m + n) r²), an SVD of O(r³);
trained 2R(m + n) + 4R² numbers.

*Differs*: K and L gradients come from one backward (see `factored.py`), so that a step costs 2 forward-backwards and not 3; the
wide basis is spanned by [U | G V], the same space as [U | K₁] at any rate and without its cancellation; S is moved by the
recipe's step (SGD here), and its moments m follow the basis as (U₁ᵀ U) m (Vᵀ V₁); biases move only under `train_also`. The
released code swaps V₁ Q for V₁ Qᵀ. Moments of eight bits and sketches cannot follow, and begin anew in every step. At a fixed
rank not for a gradient scaler, whose factor the K and L steps would take. With `frozen_bases_after` DDP needs
find_unused_parameters=True from there on.

Schotthöfer, Zangrando, Kusch, Ceruti, Tudisco: Low-rank lottery tickets: finding efficient low-rank neural networks via matrix
differential equations, 2022, arXiv:2205.13571.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.protocols import Decision, Procedure, Renew
from rankwise.core.step import Block


@register("procedure")
class DLRT(Procedure):
    """Widens the bases of every layer between the two passes of a step, and cuts the layer after it.

    Args:
        tolerance: what a cut may change, as a share of ‖S‖.
        absolute: whether `tolerance` is the norm itself.
        min_rank: least rank to cut to.
        frozen_bases_after: steps after which U and V stay and S alone is trained, one forward-backward per step; None: never.

    Example:
        >>> handle = rankwise.adapt_(model, rankwise.compose("dlrt(rank=16, tolerance=0.1)"))
        >>> loss = handle.backward(lambda: model(**batch).loss)
    """

    renews: ClassVar[frozenset[str]] = frozenset({"augment", "truncate"})
    second_pass = True

    def __init__(
        self,
        *,
        tolerance: float = 0.1,
        absolute: bool = False,
        min_rank: int = 2,
        frozen_bases_after: int | None = None,
    ) -> None:
        if not tolerance >= 0 or (tolerance >= 1 and not absolute):
            raise ArgumentError(f"tolerance is a share of the norm in [0, 1), or 0 or more if absolute, not {tolerance}")
        if min_rank < 1 or (frozen_bases_after is not None and frozen_bases_after < 1):
            raise ArgumentError(
                f"min_rank is at least 1 and frozen_bases_after 1 step or more, not {min_rank} and {frozen_bases_after}"
            )
        self._cut = {"tolerance": tolerance, "absolute": absolute, "min_rank": min_rank}
        self._last, self._widened = frozen_bases_after, False

    def before_step(self, step: int, blocks: Mapping[str, Block]) -> None:
        """In the second pass, drops the gradients of the bases: these move in no other way than the integrator's."""
        self.second_pass = self._last is None or step < self._last
        if self._widened or not self.second_pass:
            for block in blocks.values():
                for role, tensor in block.items():
                    if role.startswith(BASES):
                        tensor.grad = None

    def between(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        """Widens every layer that trains its bases."""
        self._widened = True
        return dict.fromkeys(blocks, Renew("augment", {"learning_rate": learning_rate}))

    def decide(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        """Cuts what was widened."""
        if not self._widened:
            return {}
        self._widened = False
        return dict.fromkeys(blocks, Renew("truncate", {**self._cut, "freeze": step + 1 == self._last}))


BASES = ("U", "V")  # names of the roles that hold bases begin so
