"""Small models for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import rankwise


def mlp(layers: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))).to(dtype)


def inputs(rows: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def adapted(model: nn.Module, recipe: str = "lora(rank=2)", seed: int = 2, **options: Any) -> rankwise.Handle:
    """An adapter at a generic point."""
    handle = rankwise.adapt_(model, rankwise.compose(recipe), **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype) * 0.3)
    return handle


class Tied(nn.Module):
    """A language model in small: the output head shares the embedding's tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 12, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.body(self.embedding(tokens)))


def tied() -> Tied:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tied().double()
