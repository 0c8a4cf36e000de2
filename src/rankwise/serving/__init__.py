"""Many adapters on one model at once: a bank of stacked factors, and batches with a different adapter per row."""

from rankwise.serving.bank import AdapterBank
from rankwise.serving.plan import BatchPlan
from rankwise.serving.server import Server

__all__ = ["AdapterBank", "BatchPlan", "Server"]
