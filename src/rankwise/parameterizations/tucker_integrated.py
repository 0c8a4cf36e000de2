"""TDLRT: DLRT for kernels in Tucker form, with one rank per mode; the procedure is that of `procedures/dlrt.py`.

    W' = C ×_i U_i          C (r_0, r_1, k, …), U_i (d_i, r_i): d_0 outputs, d_1 inputs; the modes of the kernel stay whole
    K_i    from one backward, all modes at the same W (`tucker_factored.py`);  U_i <- orth [U_i | dL/dK_i] (d_i, 2r_i)
    core   C~ = C ×_i (U_i_newᵀ U_i), so that W' stays;  C <- C~ - η dL/dC, by a second gradient
    cut    per mode the SVD of Mat_i(C), all of one C: the fewest with a tail <= tolerance ‖C‖;  U_i <- U_i P_i, C <- C ×_i P_iᵀ

A convolution runs as three: 1×1 down to r_1 channels, the kernel from r_1 to r_0, 1×1 up. Two modes make a linear layer, where
this is DLRT. The error of a cut is at most √d · tolerance ‖C‖ for d modes. Ranks start at half of every mode, and r_i is never
more than the product of the others. The moments of C follow the bases. Trained ∏ 2R_i + Σ 2R_i d_i numbers, R_i = d_i/2.

*Differs*: one backward gives the gradients of all K_i, so that a step costs 2 forward-backwards and not d + 2; bases are
spanned by [U_i | dL/dK_i], the space of [U_i | K_i]. In a grouped convolution mode 1 is the inputs of one group.

Zangrando, Schotthöfer, Ceruti, Kusch, Tudisco: Rank-adaptive spectral pruning of convolutional layers during training, 2023,
arXiv:2305.19059; later Geometry-aware training of factorized layers in tensor Tucker format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rankwise.core.piece import register
from rankwise.parameterizations.integrator import basis, fewest, multiplied, placed, turned
from rankwise.parameterizations.tucker_factored import TuckerFactors, consistent, unfolded


@register("parameterization")
class TuckerIntegrated(TuckerFactors):
    """W' = C ×_i U_i, whose bases are widened between the passes of a step, and cut after it.

    Args:
        site: the layer.
        ranks, max_rank, modes, start: as for `TuckerFactors`.
    """

    @classmethod
    def renewals(cls) -> frozenset[str]:
        return frozenset({"augment", "truncate"})

    def renew(self, what: str, generator: torch.Generator, **arguments: Any) -> Mapping[str, Callable[[Tensor], Tensor] | None]:
        return self._augment() if what == "augment" else self._truncate(**arguments)

    def _augment(self) -> dict[str, Callable[[Tensor], Tensor] | None]:
        """New bases (d_i, w_i) spanned by [U_i | gradient of K_i], and the core in them."""
        core, bases = self.factors()
        gradients = [self.get_parameter(f"U_{mode}").grad for mode in self.modes]
        if any(g is None for g in gradients):
            return {}
        wide = [
            basis(torch.cat([U, g[:, : U.shape[1]]], dim=1))[:, : U.shape[0]]
            for U, g in zip(bases, gradients, strict=True)
            if g is not None
        ]
        turns = self.by_mode([new.mT @ old for new, old in zip(wide, bases, strict=True)])  # (w_i, r_i)
        self._put(multiplied(core, turns), wide)
        self.core_only = True
        return {"core": partial(turned, matrices=turns)}

    def _truncate(
        self, *, tolerance: float, absolute: bool, min_rank: int, freeze: bool = False
    ) -> dict[str, Callable[[Tensor], Tensor] | None]:
        """The higher-order SVD of the core, all modes from the same core, and the cut."""
        found: dict[str, Callable[[Tensor], Tensor] | None] = {}
        if self.core_only:
            core, bases = self.factors()
            triplets = [torch.linalg.svd(unfolded(core, mode), full_matrices=False) for mode in self.modes]
            ranks = list(core.shape)
            for mode, (_, d, _) in zip(self.modes, triplets, strict=True):
                ranks[mode] = fewest(d, tolerance, absolute=absolute, least=min_rank, most=self.most[mode])
            ranks = consistent(ranks, self.modes)
            cut = [P[:, : ranks[mode]] for mode, (P, _, _) in zip(self.modes, triplets, strict=True)]  # (w_i, r_i)
            turns = self.by_mode([P.mT for P in cut])
            self._put(multiplied(core, turns), [U @ P for U, P in zip(bases, cut, strict=True)])
            found = {"core": partial(turned, matrices=turns)}
        self.core_only = False
        if freeze:
            for mode in self.modes:
                self.get_parameter(f"U_{mode}").requires_grad_(False)
        return found

    def _put(self, core: Tensor, bases: Sequence[Tensor]) -> None:
        self.activate(core.shape)
        self.core.copy_(placed(core, self.core))
        for mode, U in zip(self.modes, bases, strict=True):
            trained = self.get_parameter(f"U_{mode}")
            trained.copy_(placed(U, trained))
