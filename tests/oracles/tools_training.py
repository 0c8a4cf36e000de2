"""Small helpers of the oracles about starts, steps, perturbations, schedules, compression and matrix problems.

They only feed the library and do textbook linear algebra; every reference value is computed in the tests themselves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.handle import Handle
from rankwise.core.operators import LowRank
from rankwise.core.optimizer import BlockOptimizer
from rankwise.core.protocols import RankSchedule
from rankwise.core.recipe import Recipe
from rankwise.core.statistics import LayerStatistics, MomentCollector
from rankwise.core.step import Step

SITE = "layer"


def drawn(seed: int) -> torch.Generator:
    """A private generator."""
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    """Gaussian numbers in float64 from a private generator."""
    return torch.randn(*shape, generator=drawn(seed), dtype=torch.float64)


def orthonormal(seed: int, rows: int, columns: int) -> Tensor:
    """(rows, columns) with orthonormal columns."""
    return torch.linalg.qr(normal(seed, rows, columns))[0]


def with_spectrum(seed: int, m: int, n: int, values: Iterable[float]) -> Tensor:
    """(m, n) with these singular values."""
    S = torch.tensor(list(values), dtype=torch.float64)
    return (orthonormal(seed, m, len(S)) * S) @ orthonormal(seed + 1000, n, len(S)).T


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of this rank, [M]_r."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖."""
    return float(torch.linalg.norm(found.detach() - expected.detach()) / torch.linalg.norm(expected.detach()))


def sine_of_angle(first: Tensor, second: Tensor) -> float:
    """Sine of the largest principal angle between two column spaces of one dimension."""
    P, Q = torch.linalg.qr(first)[0], torch.linalg.qr(second)[0]
    return float(torch.linalg.matrix_norm(P - Q @ (Q.T @ P), 2))


def statistics_of(
    weight: Tensor, *, gradient: Tensor | None = None, inputs: Iterable[Tensor] | None = None, site: str = SITE
) -> LayerStatistics:
    """Statistics of one layer, put together by hand."""
    collector = None
    if inputs is not None:
        collector = MomentCollector(weight.shape[1])
        for rows in inputs:
            collector.add(rows)
    return LayerStatistics(site, weight, gradient=gradient, inputs=collector)


def started(recipe: Recipe, statistics: LayerStatistics, rank: int, *, scale: float = 1.0, seed: int = 0) -> LowRank:
    """What a recipe's start gives, called by itself."""
    assert recipe.start is not None
    factors = recipe.start.build()(statistics, rank, generator=drawn(seed), scale=scale)
    assert factors.scale == 1.0
    return factors


def layer_model(weight: Tensor, **more: Tensor) -> nn.Sequential:
    """A model of one linear layer named "layer" (and others, one after the other), without bias."""
    layers = OrderedDict[str, nn.Module]()
    for name, matrix in {SITE: weight, **more}.items():
        m, n = matrix.shape
        layer = nn.Linear(n, m, bias=False, dtype=matrix.dtype)
        with torch.no_grad():
            layer.weight.copy_(matrix)
        layers[name] = layer
    return nn.Sequential(layers)


def adapted(weight: Tensor, recipe: Recipe | str, **options: Any) -> tuple[nn.Sequential, Handle]:
    """One adapted linear layer."""
    model = layer_model(weight)
    chosen = rankwise.compose(recipe) if isinstance(recipe, str) else recipe
    return model, rankwise.adapt_(model, chosen, **options)


def put(handle: Handle, values: Mapping[str, Tensor], site: str = SITE) -> None:
    """Writes trained tensors."""
    with torch.no_grad():
        for role, value in values.items():
            handle.parameterization(site).roles()[role].copy_(value)


def roles_of(handle: Handle, site: str = SITE) -> dict[str, Tensor]:
    """Copies of the trained tensors."""
    return {role: tensor.detach().clone() for role, tensor in handle.parameterization(site).roles().items()}


def block_of(**tensors: Tensor) -> dict[str, nn.Parameter]:
    """A block of fresh parameters."""
    return {role: nn.Parameter(tensor.clone()) for role, tensor in tensors.items()}


def optimizer_on(blocks: Mapping[str, Mapping[str, nn.Parameter]], recipe: str | Iterable[Step], lr: float) -> BlockOptimizer:
    """The library's optimizer shell on blocks made by hand."""
    steps = rankwise.compose(recipe).steps() if isinstance(recipe, str) else list(recipe)
    return BlockOptimizer(blocks, steps, lr)


def factor_gradients(block: Mapping[str, nn.Parameter], gradient: Tensor, scale: float = 1.0) -> None:
    """Puts g_B = s G Aᵀ and g_A = s Bᵀ G into `.grad`."""
    B, A = block["B"].detach(), block["A"].detach()
    block["B"].grad, block["A"].grad = scale * gradient @ A.T, scale * B.T @ gradient


def directions(recipe: str, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """What the one step called `name` of a recipe makes of gradients at these parameters, from a fresh state."""
    (step,) = [step for step in rankwise.compose(recipe).steps() if step.name == name]
    return dict(step.update(dict(gradients), step.init(parameters), parameters))


def product(block: Mapping[str, Tensor]) -> Tensor:
    """B A."""
    return (block["B"] @ block["A"]).detach().clone()


def schedule_of(recipe: Recipe) -> Any:
    """The recipe's schedule, built."""
    assert recipe.schedule is not None
    schedule: RankSchedule = recipe.schedule.build()
    return schedule
