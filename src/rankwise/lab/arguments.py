"""What a person passes to a comparison, checked, and what the comparison says of itself."""

from __future__ import annotations

import platform
import re
import zlib
from collections.abc import Sequence
from typing import Any

import torch

from rankwise.core.compose import compose
from rankwise.core.errors import ArgumentError
from rankwise.core.recipe import Recipe
from rankwise.lab import store, sweep

SWEEP_SEED = 1_000_033  # no seed of the final runs: the rate is not tuned on the order it is judged on


def slug(recipe: str) -> str:
    """A folder name for a recipe: its words, and a check sum where signs had to go."""
    words = re.sub(r"[^A-Za-z0-9_.=]+", "-", recipe).strip("-")
    return words if words == recipe else f"{words}-{zlib.crc32(recipe.encode()):08x}"


def versions() -> dict[str, Any]:
    """What the numbers were made with."""
    import rankwise

    return {
        "rankwise": rankwise.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    }


def seed_list(seeds: int | Sequence[int]) -> list[int]:
    """The seeds, from a count or as named."""
    found = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if not found or len(set(found)) != len(found) or min(found) < 0 or SWEEP_SEED in found:
        raise ArgumentError(f"seeds must be a positive count or different numbers >= 0; got {seeds!r}")
    return found


def named_recipes(texts: Sequence[str]) -> dict[str, Recipe]:
    """Text -> recipe; two texts that mean the same are refused."""
    if not texts:
        raise ArgumentError("compare needs at least one recipe, such as --recipes lora dora")
    found: dict[str, Recipe] = {}
    for text in map(str.strip, texts):
        recipe = compose(text)
        twin = next((name for name, other in found.items() if _meaning(other) == _meaning(recipe)), None)
        if twin is not None or text == store.COMPARISON:
            raise ArgumentError(f"the recipes {twin!r} and {text!r} are the same; name each once")
        found[text] = recipe
    return found


def _meaning(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in recipe.to_json().items() if key not in ("name", "own")}


def named_rates(rates: str | Sequence[float]) -> list[float]:
    """The rates a person named."""
    if isinstance(rates, str):
        raise ArgumentError(f"learning rates are 'auto' or numbers, not {rates!r}")
    return sweep.checked_rates(rates)
