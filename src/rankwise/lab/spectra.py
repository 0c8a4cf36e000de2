"""Singular values of what training did to each layer, and two numbers that sum them up.

effective rank  exp(-Σ p log p) with p = σ / Σσ: how many directions share the update
stable rank     ‖ΔW‖²_F / σ₁²: how many directions as strong as the strongest would make it
"""

from __future__ import annotations

from typing import Any

import torch

from rankwise.core.handle import Handle
from rankwise.core.operators import Operator
from rankwise.core.queries import as_low_rank, svd

KEPT = 32  # singular values kept per layer


def layer_spectra(handle: Handle) -> dict[str, dict[str, Any]]:
    """Site -> its largest singular values, norm, effective and stable rank."""
    return {site: _summary(update) for site, update in handle.updates().items()}


@torch.no_grad()
def _summary(update: Operator) -> dict[str, Any]:
    values = (svd(update).S if as_low_rank(update) is not None else torch.linalg.svdvals(update.dense().float())).double()
    total, top = float(values.sum()), float(values[0])
    if top == 0.0:
        return {"values": [0.0], "norm": 0.0, "effective_rank": 0.0, "stable_rank": 0.0}
    share = values[values > 0] / total
    return {
        "values": [float(f"{value:.5g}") for value in values[:KEPT].tolist()],
        "norm": float(values.norm()),
        "effective_rank": float(torch.exp(-(share * share.log()).sum())),
        "stable_rank": float(values.square().sum() / top**2),
    }
