"""A weight, and a list of gradients (or functions of the weight) that a chain of steps follows, by hand."""

import torch

from rankwise.core.optimizer import BlockOptimizer


def draws(m, n, count, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m, n, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def run(steps, W, gradients, lr=0.1, site="site"):
    """The weight after every step, and the state in the end."""
    weight = torch.nn.Parameter(W.clone())
    optimizer = BlockOptimizer({site: {"weight": weight}}, steps, lr)
    path = []
    for gradient in gradients:
        weight.grad = gradient(weight.detach()) if callable(gradient) else gradient.clone()
        optimizer.step()
        path.append(weight.detach().clone())
    return path, optimizer.state[weight]


def moves(path, W, lr=0.1):
    """The directions that made a path."""
    return [(before - after) / lr for before, after in zip([W, *path], path, strict=False)]


def numbers(state):
    return sum(value.numel() for value in state.values() if value.dim() > 0)
