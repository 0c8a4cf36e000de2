"""Several updates into one: updates of one site, whole adapters, and the result back onto a model."""

from rankwise.merging.adapters import MergeResult, as_adapter, merge_adapters
from rankwise.merging.combination import linear, task_arithmetic
from rankwise.merging.exact import cat, svd
from rankwise.merging.iteris import iteris

__all__ = ["MergeResult", "as_adapter", "cat", "iteris", "linear", "merge_adapters", "svd", "task_arithmetic"]
