"""Small models with random weights, the same on every call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TOKENS, WIDTH = 48, 16


def llama(layers: int = 2, seed: int = 0, **settings: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=TOKENS,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            initializer_range=0.2,
            **settings,
        )
        return LlamaForCausalLM(config)


class ConvNet(nn.Module):
    """Two convolutions and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, (3, 2), stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def conv_net(seed: int = 0) -> ConvNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ConvNet()


def tokens(rows: int = 2, length: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(0, TOKENS, (rows, length), generator=torch.Generator().manual_seed(seed))


def images(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(seed))


def stir(model: nn.Module, seed: int = 3, size: float = 0.2) -> None:
    """Moves every trained tensor to a generic point, far from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
