"""LoRA-GGPO: one-pass flatness by noise on the whole weight, larger on rows where the weight and its gradient are large.

    W'   W + s B A                       the adapted weight (m, n)
    E    E_ij ~ N(0, v_i)                added to W' in training: y = (W' + E) x; not in eval, not when merged
    v    σ²/n (‖W_i‖² + ‖s (BA)_i‖² + β ‖Ĝ_i‖²), (m,)      so that E‖E_i‖² = σ² (‖W'_i‖² + β ‖G_i‖²), a cross term dropped
    Ĝ    s (B g_A + g_B A)               what the last step's gradients say of dL/dW'; 0 in the first step

`variant="kohya"` is what a popular trainer does: std_i = (σ √(w̄² + ‖s (BA)_i‖²) + β ‖Ĝ_i‖²) / √m, w̄ the mean row norm of W.
E is the same for a whole step (all micro-batches, layers that gradient checkpointing runs again), another in the next; it is
drawn from (seed, process, site, step), and once more in backward, so that nothing of its size is kept. Data-parallel processes
draw different noise on purpose. Norms come from r x r Grams. β = 0 is random perturbation (Flat-LoRA); σ = 0 is plain LoRA to
the bit. It is no second pass and no penalty. Of updates of low rank that are not a plain B A (gates, blocks), Ĝ is the change
along all gradients, by forward-mode differentiation. A frozen factor has no gradient.

Trained numbers and export: those of the parameterization. State: m numbers per layer. Cost: one forward and backward, in which
x Eᵀ and its transpose take as many FLOPs as the frozen layer's, and 2mn random numbers per layer and step.

*Differs* from the trainer of "kohya": there w̄ is the mean over 1000 rows, and the gradient with respect to x leaves E out.

Chang, Guo, Chang, Wu: LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided Perturbation Optimization,
2025, arXiv:2502.14538.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from rankwise.core.errors import ArgumentError, Problem, TrainingError, did_you_mean
from rankwise.core.parameterization import Parameterization
from rankwise.core.piece import register
from rankwise.core.protocols import Perturbation
from rankwise.core.recipe import Recipe
from rankwise.core.sharding import is_sharded, whole
from rankwise.core.step import Block
from rankwise.perturbations.directions import tangents
from rankwise.perturbations.rows import gradient_row_squares, product_row_squares, row_variances
from rankwise.perturbations.site_noise import SiteNoise, factors_of

__all__ = ["GradientGuidedNoise", "gradient_row_squares", "product_row_squares", "row_variances"]
VARIANTS = ("paper", "kohya")


@register("perturbation")
class GradientGuidedNoise(Perturbation):
    """Noise on the adapted weight in training mode.

    Args:
        sigma: σ.
        beta: β.
        variant: "paper" or "kohya".
        seed: of the noise.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"A", "B"})

    def __init__(self, *, sigma: float = 0.03, beta: float = 0.01, variant: str = "paper", seed: int = 0) -> None:
        if variant not in VARIANTS:
            raise ArgumentError(f"variant is one of {', '.join(VARIANTS)}, not {variant!r}")
        if not (sigma >= 0 and beta >= 0):
            raise ArgumentError(f"sigma and beta cannot be negative, they are {sigma} and {beta}")
        self.sigma, self.beta, self.variant, self.seed = sigma, beta, variant, seed
        self.steps = 0
        self.sites: dict[str, SiteNoise] = {}

    @classmethod
    def problems_with(cls, recipe: Recipe, **arguments: Any) -> list[Problem]:
        """The update must have factors."""
        facts = recipe.method.facts_of(**recipe.parameterization.arguments)
        if facts.additive and facts.exact_lora_export:
            return []
        return [
            Problem(
                piece=cls.__name__,
                needs="a parameterization W' = W + an update of low rank, whose row norms come from its factors",
                has=f"{recipe.parameterization.name} is another",
                remedy="use lora or rslora, or sam for flatness with any parameterization",
            )
        ]

    def around(self, site: str) -> SiteNoise:
        """Adds the site's noise."""
        self.sites[site] = SiteNoise(self.sigma, self.beta, self.variant, (self.seed, "noise", site))
        return self.sites[site]

    def variances(self, site: str) -> Tensor:
        """V (m,) of this step, once its forward has run, else of the next one.

        Raises:
            TrainingError: no forward in training mode has met the site yet.
            ArgumentError: there is no such site.
        """
        if site not in self.sites:
            raise ArgumentError(f"no site {site!r}. {did_you_mean(site, self.sites)}")
        return self.sites[site].variances()

    @torch.no_grad()
    def move(self, blocks: Mapping[str, Block], *, learning_rate: float) -> None:
        """Moves nothing; reads off the row norms of Ĝ for the next step."""
        if not self.beta:
            return
        bound: list[tuple[SiteNoise, Parameterization]] = []
        for site, noise in self.sites.items():
            entry, block = noise.entry(), blocks.get(site, {})
            if entry is not None and noise.plain and {"A", "B"} <= block.keys():
                noise.guide(*_factors(block), entry.scale)
            elif entry is not None:
                bound.append((noise, entry))
        if not bound:
            return
        trained = [tensor for block in blocks.values() for tensor in block.values() if tensor.grad is not None]
        if any(is_sharded(tensor) for tensor in trained):
            raise TrainingError(
                "lora_ggpo on sharded parameters (FSDP) needs both factors of lora or rslora; use these, or DDP"
            )
        with tangents((tensor, tensor.grad) for tensor in trained if tensor.grad is not None):
            for noise, entry in bound:
                factors = factors_of(entry)
                B, A = unpack_dual(factors.B), unpack_dual(factors.A)
                g_B, g_A = (torch.zeros_like(part.primal) if part.tangent is None else part.tangent for part in (B, A))
                noise.guide(B.primal, A.primal, g_B, g_A, factors.scale)

    def advance(self) -> None:
        """The next step has other noise."""
        self.steps += 1
        for noise in self.sites.values():
            noise.step, noise.used = self.steps, None

    def state_dict(self) -> dict[str, Any]:
        """The step, and the row norms of Ĝ."""
        gradients = {site: noise.gradient for site, noise in self.sites.items() if noise.gradient is not None}
        return {"steps": self.steps, "gradients": gradients}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the noise of that step."""
        self.steps = int(state["steps"])
        for site, noise in self.sites.items():
            noise.step, noise.used, noise.gradient = self.steps, None, state["gradients"].get(site)


def _factors(block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """B, A and their gradients, whole."""
    B, A = block["B"], block["A"]
    gradients = [torch.zeros_like(part) if part.grad is None else part.grad for part in (B, A)]
    return whole(B), whole(A), whole(gradients[0]), whole(gradients[1])
