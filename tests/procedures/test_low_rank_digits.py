"""Real scans of digits: networks trained from scratch in low rank shrink, and read as well as full ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rankwise

datasets = pytest.importorskip("sklearn.datasets")
pytestmark = pytest.mark.slow
WHERE, WHOLE, EPOCHS, ROWS, HELD = ["2", "5"], ["0", "7"], 12, 64, 397


def data() -> tuple[Tensor, Tensor]:
    images, labels = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 8 - 1
    return x, torch.tensor(labels)[order]


def trained(text: str, lr: float) -> tuple[float, rankwise.Handle]:
    """Held-out accuracy after a few epochs."""
    x, y = data()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()]
        model = nn.Sequential(*layers, nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
    handle = rankwise.adapt_(model, rankwise.compose(text), where=WHERE, train_also=WHOLE)
    optimizer = handle.optimizer(lr=lr)
    generator = torch.Generator().manual_seed(1)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x) - HELD, generator=generator).split(ROWS):
            handle.backward(lambda rows=rows: cross_entropy(model(x[HELD + rows]), y[HELD + rows]))
            optimizer.step()
            handle.after_step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return float((model(x[:HELD]).argmax(1) == y[:HELD]).float().mean()), handle


def kept(handle: rankwise.Handle) -> float:
    """Numbers of the low-rank layers at their present ranks, as a share of the full ones'."""
    numbers = full = 0
    for site, target in handle.targets.items():
        entry = handle.parameterization(site)
        if hasattr(entry, "kernel"):
            core, bases = entry.factors()
            numbers += core.numel() + sum(U.numel() for U in bases)
        else:
            numbers += entry.active * (target.m + target.n)
        full += target.m * target.n
    return numbers / full


def test_networks_shrink_and_read_as_well() -> None:
    torch.set_num_threads(1)
    full, _ = trained("full + sgd", 0.1)
    assert full > 0.95
    for text, lr, share in (
        ("dlrt(rank=12, tolerance=0.2)", 0.1, 0.25),
        ("tucker_dlrt(tolerance=0.2)", 0.1, 0.25),
        ("condlr(compression=0.75, momentum=0.3)", 0.1, 0.3),
    ):
        accuracy, handle = trained(text, lr)
        assert accuracy > full - 0.02
        assert kept(handle) < share
