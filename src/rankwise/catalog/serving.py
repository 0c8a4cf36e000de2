"""Serving: many adapters on one model, a different one per row of the batch."""

from __future__ import annotations

from rankwise.core.catalog import Reference, entry
from rankwise.serving import AdapterBank


@entry(
    "serving",
    title="Adapter bank",
    formula="y_t = W x_t + B_{g_t} A_{g_t} x_t, g_t the adapter of row t",
    reference=Reference("Wen, Chaudhuri", "Batched Low-Rank Adaptation of Foundation Models", 2023, "2312.05677"),
    trained="r(m + n) per adapter, if trained",
    cost="2r(m + n) FLOPs per token, whatever the number of adapters",
    merges="nothing is merged",
    exports="each adapter exactly, by bank.updates(name)",
    when="When requests of many users, or many runs of a sweep, share one base.",
    tiny={"slots": 3, "max_rank": 4},
)
def multi_adapter_serving(*, slots: int = 8, max_rank: int = 16, backend: str = "auto") -> AdapterBank:
    """Adapters as stacked tensors: instant switching, and one batch with a different adapter per row."""
    return AdapterBank(slots=slots, max_rank=max_rank, backend=backend)
