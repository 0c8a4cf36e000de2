"""Reading what stored adapters did to their base without loading the model: for methods that learn from earlier adapters."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rankwise.core import decisions
from rankwise.core.bank import BANKS, Bank
from rankwise.core.checkpoint import JSON_NAME, read
from rankwise.core.errors import CheckpointError, did_you_mean
from rankwise.core.layouts import LinearLayout
from rankwise.core.operators import Dense, LowRank, Operator
from rankwise.core.parameterization import Parameterization, Site
from rankwise.core.protocols import Replacing
from rankwise.core.queries import as_low_rank
from rankwise.core.recipe import Recipe


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in a folder.

    Attributes:
        folder: where it was read.
        recipe: what it is.
        sizes: site -> (m, n).
        fingerprint: site -> hash of the weight it was trained on.
        tensors: key -> tensor, as stored.
        description: the rest of the file.
    """

    folder: Path
    recipe: Recipe
    sizes: dict[str, tuple[int, int]]
    fingerprint: dict[str, str]
    tensors: dict[str, Tensor]
    description: dict[str, Any]

    @torch.no_grad()
    def update(self, site: str, weight: Tensor | None = None) -> Operator:
        """W' - W (m, n) at a site.

        Args:
            site: its name.
            weight: W (m, n), which methods that are not additive need.

        Raises:
            CheckpointError: no such site, or an update that cannot be told without the model.
        """
        if site not in self.sizes:
            raise CheckpointError(f"{self.folder} does not adapt {site!r}. {did_you_mean(site, self.sizes)}")
        entry = self._entry(site)
        if weight is None and (entry.replacement is not None or not entry.facts.additive):
            raise CheckpointError(f"{self.folder}: {self.recipe.name} at {site} cannot be read without the weight under it")
        untouched = Dense(torch.zeros(self.sizes[site]) if weight is None else weight)
        return entry.total_update(untouched)

    def _entry(self, site: str) -> Parameterization:
        m, n = self.sizes[site]
        mine = {key.removeprefix(f"{site}."): value for key, value in self.tensors.items() if key.startswith(f"{site}.")}
        dtype = next((value.dtype for value in mine.values() if value.is_floating_point()), torch.float32)
        blank = functools.partial(torch.zeros, m, n)
        place = Site(name=site, m=m, n=n, layout=LinearLayout(), weight=blank, dtype=dtype, shape=(m, n), blank=True)
        place = dataclasses.replace(place, seed=int(self.description["seed"]), bank=self._bank(place))
        method: Any = self.recipe.method
        entry: Parameterization = method(place, **self.recipe.arguments_at(site))
        start = None if self.recipe.start is None else self.recipe.start.build()
        if start is not None and start.mode == "simulated":
            entry.replacement = cast(Replacing, start).blank(m, n, entry.rank).to(dtype)
        rank = int(self.description["sites"][site]["rank"])
        if 0 <= rank < entry.rank:
            decisions.resize(entry, torch.arange(entry.rank) < rank, None)
        for part in {"carried_B", "carried_A"} & set(mine):
            setattr(entry, part, torch.zeros_like(mine[part]))
        here = entry.state_dict()
        if {key: value.shape for key, value in here.items()} != {key: value.shape for key, value in mine.items()}:
            raise CheckpointError(
                f"{self.folder}: {self.recipe.name} at {site} cannot be read without its layer; use an adapter that depends on "
                "nothing but the sizes of the weight (lora, dora, lora_xs)"
            )
        entry.load_state_dict(mine)
        return entry

    def _bank(self, place: Site) -> Bank | None:
        """The shared tensors of the file, drawn again where it holds their seed."""
        described = self.description.get("bank")
        if described is None:
            return None
        if described.get("seed") is None:
            bank: Bank | None = Bank.blank(described, place.zeros(1))
        else:
            seed = int(self.description["seed"])
            sites = [
                dataclasses.replace(place, name=name, m=m, n=n, shape=(m, n), seed=seed) for name, (m, n) in self.sizes.items()
            ]
            bank = self.recipe.method.shared(sites, **self.recipe.parameterization.arguments)
        if bank is None:
            raise CheckpointError(
                f"{self.folder} describes shared tensors that {self.recipe.name} does not have; it is damaged"
            )
        if described.get("seed") is not None:
            bank.check(described)
        held = {key.removeprefix(f"{BANKS}."): value for key, value in self.tensors.items() if key.startswith(f"{BANKS}.")}
        bank.load_state_dict(held, assign=True)
        return bank


def read_stored(directory: str | Path) -> StoredAdapter:
    """Reads a folder that `handle.save` wrote.

    Raises:
        CheckpointError: missing, damaged or foreign files.
    """
    folder = Path(directory)
    description, tensors = read(folder)
    try:
        recipe = Recipe.from_json(description["recipe"])
        sizes = {str(site): (int(known["m"]), int(known["n"])) for site, known in description["sites"].items()}
        fingerprint = {str(site): str(value) for site, value in description["fingerprint"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / JSON_NAME} lacks {error}; it is damaged") from error
    return StoredAdapter(folder, recipe, sizes, fingerprint, tensors, description)


def stored_update(folder: str | Path, site: Site) -> LowRank:
    """The exact factors of a stored update at one layer of the same base, scale folded in, in the file's precision.

    Raises:
        CheckpointError: no such layer in the file, another size, or an update that has no factors.
    """
    stored = _read_once(
        str(folder), (Path(folder) / JSON_NAME).stat().st_mtime_ns if (Path(folder) / JSON_NAME).is_file() else 0
    )
    if site.name in stored.sizes and stored.sizes[site.name] != (site.m, site.n):
        m, n = stored.sizes[site.name]
        raise CheckpointError(f"{folder}: {site.name} is {m}×{n} in the file and {site.m}×{site.n} here; another base?")
    factors = as_low_rank(stored.update(site.name))
    if factors is None:
        raise CheckpointError(
            f"{folder} holds {stored.recipe.name!r}, whose update has no factors; take an adapter of low rank"
        )
    pair = factors.folded()
    return LowRank(pair.B.detach(), pair.A.detach())


@functools.lru_cache(maxsize=4)
def _read_once(folder: str, changed: int) -> StoredAdapter:
    """Read for the first of many layers; `changed` tells versions of the file apart."""
    return read_stored(folder)
