"""Several updates into one: operators of one site (`cat`, `svd`, `linear`, `task_arithmetic`), whole adapters, and back onto a model."""

from rankwise.merging.adapters import MergeResult, as_adapter, merge_adapters
from rankwise.merging.exact import cat, svd
from rankwise.merging.iteris import iteris
from rankwise.merging.linear import linear, task_arithmetic

__all__ = ["MergeResult", "as_adapter", "cat", "iteris", "linear", "merge_adapters", "svd", "task_arithmetic"]
