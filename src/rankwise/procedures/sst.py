"""SST: a weight kept as its singular triplets; all values train at every step, and a sampled few of the vectors.

    W' = Σ_i S_i u_i v_iᵀ, i = 1 … k = min(m, n)                 from the exact SVD of W, so that W' = W at first
    every step      S_i for all i by u_iᵀ G v_i;  u_i, v_i for i in the active set I, |I| = r, by G v_i and Gᵀ u_i
                    S <- max(S, 0);  u_i, v_i <- unit length
    every interval  a new I, drawn without replacement with p_i = ½ (1/k + S_i/Σ S); the moments of the vectors begin again,
                    and the learning rate rises anew over `warmup` steps
    every ⌈k/r⌉ intervals   U, S, V <- the SVD of U diag(S) Vᵀ, which makes the vectors orthogonal again; all moments forgotten

The gradients of vectors are enhanced: without the factor S_i of the true ones, small values would never learn (`factored.py`
says how). W' changes at full rank in every step. Trained r(m + n) + k numbers, kept k(m + n + 1); optimizer state for the
trained only. A forward takes 2k(m + n) FLOPs per token in place of 2mn, and r(m + n) more in training twice over.

Not of low rank, and not a LoRA of W. For bf16 weights all is kept in float32.

*Differs*: the frozen weight stays in memory, so that `detach_` gives it back. Interval, rounds and warm-up are known from
descriptions only. Whether S keeps its moments when vectors are swapped is not said: here it does.

Zhao, Zhang, Li, Liu, Cannistraci: Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks, 2024,
arXiv:2405.15481.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.protocols import Decision, Procedure, Renew
from rankwise.core.step import Block
from rankwise.parameterizations.sampled_triplets import probabilities

__all__ = ["SST", "probabilities"]


@register("procedure")
class SST(Procedure):
    """Keeps vectors at unit length, samples others every interval, and decomposes anew every few intervals.

    Args:
        interval: steps with one active set.
        iterations: intervals between decompositions; None is ⌈k/r⌉, site by site.
    """

    renews: ClassVar[frozenset[str]] = frozenset({"normalize", "sample", "resvd"})

    def __init__(self, *, interval: int = 200, iterations: int | None = None) -> None:
        if interval < 1 or (iterations is not None and iterations < 1):
            raise ArgumentError(f"interval and iterations are at least 1, not {interval} and {iterations}")
        self.interval, self.iterations = interval, iterations

    def decide(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        """One of the three at every site, after every step."""
        return {site: Renew(self._due(step + 1, block)) for site, block in blocks.items() if "U_active" in block}

    def _due(self, done: int, block: Block) -> str:
        if done % self.interval:
            return "normalize"
        rounds = self.iterations or -(-block["S"].shape[0] // block["U_active"].shape[1])
        return "sample" if done // self.interval % rounds else "resvd"
