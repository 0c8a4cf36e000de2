"""Flora's accumulation: gradients of micro-batches are added up under a random projection, and each is freed at once.

    C <- C + R G_k  (k = 1 … τ)        .grad = RᵀC / τ

G_k is the (m, n) gradient of micro-batch k, R (r, m) with entries N(0, 1/r) for m < n, and C G Rᵀ (m, r) otherwise. Between two
micro-batches r max(m, n) numbers are kept instead of m n. R is drawn from the seed and changes with every optimizer step; it is
never stored. E[RᵀR] = I, so the gradient is right in the mean, with a variance of (min(m, n) + 1)/r times its square.

Hao, Cao, Mou: Flora: Low-Rank Adapters Are Secretly Gradient Compressors, 2024, arXiv:2402.03293.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rankwise.core.errors import ArgumentError, TrainingError
from rankwise.steps.grams import at_least_single
from rankwise.steps.projection import Projection
from rankwise.steps.random_projection import derived_seed, projection_of


class CompressedAccumulation:
    """Takes every gradient inside backward as soon as it is there; `decompress` gives the mean back before the step.

    Matrices with a side below the rank, and tensors that are no matrices, are added up whole. Gradients are taken as each
    process has them: under DistributedDataParallel, which averages in backward, leave it out.

    Args:
        parameters: tensors to accumulate.
        rank: r.
        seed: of the projections.

    Raises:
        ArgumentError: no tensor, or a rank below 1.

    Example:
        >>> accumulation = CompressedAccumulation(handle.model.parameters(), rank=128, seed=0)
        >>> for batch in micro_batches:
        ...     model(**batch).loss.backward()
        >>> accumulation.decompress()
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rank: int, seed: int = 0) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if not self.parameters or rank < 1:
            raise ArgumentError(f"accumulation needs trained tensors and rank >= 1, not {len(self.parameters)} and rank={rank}")
        self.rank, self.seed, self.steps = rank, seed, 0
        self._sums: dict[int, Tensor] = {}
        self._counts = [0] * len(self.parameters)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._take(index))
            for index, parameter in enumerate(self.parameters)
        ]

    def accumulate(self) -> None:
        """Takes what is in `.grad` as one micro-batch; needed only for gradients that no backward put there."""
        for index in range(len(self.parameters)):
            self._take(index)

    @torch.no_grad()
    def decompress(self) -> None:
        """Puts RᵀC / τ into every `.grad`, forgets C and goes on to the next R.

        Raises:
            TrainingError: nothing was accumulated.
        """
        count = max(self._counts)
        if count == 0:
            raise TrainingError("there is no gradient to decompress; run backward for every micro-batch first")
        for index, total in self._sums.items():
            parameter = self.parameters[index]
            projection = self._projection(index)
            mean = (total if projection is None else projection.up(total)) / count
            parameter.grad = mean.to(parameter.dtype)
        self._sums.clear()
        self._counts = [0] * len(self.parameters)
        self.steps += 1

    def remove(self) -> None:
        """Leaves gradients alone from now on."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _take(self, index: int) -> None:
        parameter = self.parameters[index]
        if parameter.grad is None:
            return
        gradient, projection = at_least_single(parameter.grad), self._projection(index)
        small = gradient if projection is None else projection.down(gradient)
        self._sums[index] = self._sums[index].add_(small) if index in self._sums else small
        self._counts[index] += 1
        parameter.grad = None

    def _projection(self, index: int) -> Projection | None:
        parameter = self.parameters[index]
        if parameter.dim() != 2 or min(parameter.shape) < self.rank:
            return None
        (m, n), own = parameter.shape, derived_seed(self.seed, "accumulation", index, self.steps)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        return projection_of(m, n, self.rank, own, device=parameter.device, dtype=wide)
