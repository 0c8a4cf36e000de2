"""Relaxed recursion of a pretrained encoder on real data: exact at full rank, trained, saved, loaded and unrolled again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rankwise
from rankwise.procedures.looped_model import RelaxedRecursive
from tests.real.test_every_entry import encoder

pytestmark = pytest.mark.slow


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_a_pretrained_encoder_is_looped_trained_and_unrolled(tmp_path: Path) -> None:
    subject = encoder()
    batch = subject.batches[0]
    model = subject.fresh().eval()
    with torch.no_grad():
        expected = subject.outputs(model, batch)
    exact, tied = (
        rankwise.catalog.relaxed_recursive(subject.fresh().eval(), loops=2, rank=384, vectors=vectors)
        for vectors in ("own", "tied")
    )
    with torch.no_grad():
        assert error(subject.outputs(exact.model, batch), expected) < 1e-4
        assert error(subject.outputs(tied.model, batch), expected) > 1e-2  # trained norms and biases do not agree over depths
    looped = rankwise.catalog.relaxed_recursive(subject.fresh(), loops=2, rank=8)
    stack = sum(tensor.numel() for tensor in looped.model.bert.encoder.parameters())
    assert stack < 0.6 * sum(tensor.numel() for tensor in model.bert.encoder.parameters())
    optimizer = torch.optim.AdamW(looped.model.parameters(), lr=1e-3)
    looped.model.eval()  # no dropout, so that the loss of the batch tells
    first = subject.loss(looped.model, batch)
    for _ in range(5):
        optimizer.zero_grad()
        subject.loss(looped.model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        trained = subject.outputs(looped.model, batch)
        assert subject.loss(looped.model, batch) < 0.9 * first
        looped.save(tmp_path)
        loaded = RelaxedRecursive.load(subject.fresh().eval(), tmp_path)
        assert torch.equal(subject.outputs(loaded.model, batch), trained)
        assert error(subject.outputs(looped.unroll_(), batch), trained) < 1e-5
