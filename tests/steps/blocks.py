"""A pair of factors on the quadratic ½‖BA - M‖², stepped by hand."""

import torch

from rankwise.core.optimizer import BlockOptimizer


def pair(m=7, n=6, r=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(m, r, generator=generator, dtype=torch.float64).to(dtype)
    A = torch.randn(r, n, generator=generator, dtype=torch.float64).to(dtype)
    M = torch.randn(m, n, generator=generator, dtype=torch.float64).to(dtype)
    return B, A, M


def train(steps, B, A, M, *, lr=0.01, count=1):
    block = {"A": torch.nn.Parameter(A.clone()), "B": torch.nn.Parameter(B.clone())}
    optimizer = BlockOptimizer({"site": block}, steps, lr)
    for _ in range(count):
        step(optimizer, block, M)
    return block, optimizer


def step(optimizer, block, M):
    G = (block["B"] @ block["A"] - M).detach()
    block["B"].grad, block["A"].grad = G @ block["A"].detach().mT, block["B"].detach().mT @ G
    optimizer.step()


def product(block):
    return (block["B"] @ block["A"]).detach()
