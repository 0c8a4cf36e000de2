"""rankwise: low-rank adaptation of models as one small algebra.

recipe = rankwise.catalog.lora(rank=8)
handle = rankwise.adapt_(model, recipe)
optimizer = handle.optimizer(lr=2e-4)
for batch in batches:
model(**batch).loss.backward(); handle.after_backward()
optimizer.step(); handle.after_step(); optimizer.zero_grad()
handle.save("runs/a"); handle.merge_()
"""

from rankwise import catalog, interop
from rankwise.core.adapt import adapt_, collect, problems
from rankwise.core.bindings import activate_, effective_weights, functional_call, switched_off
from rankwise.core.checkpoint import load_
from rankwise.core.compose import compose
from rankwise.core.errors import RankwiseError
from rankwise.core.handle import Handle
from rankwise.core.operators import LowRank, Operator
from rankwise.core.recipe import Recipe
from rankwise.core.statistics import Statistic

__version__ = "0.1.0"

__all__ = [
    "Handle",
    "LowRank",
    "Operator",
    "RankwiseError",
    "Recipe",
    "Statistic",
    "activate_",
    "adapt_",
    "catalog",
    "collect",
    "compose",
    "effective_weights",
    "functional_call",
    "interop",
    "load_",
    "problems",
    "switched_off",
]
