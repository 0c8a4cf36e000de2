"""Reading what stored adapters did to their base without loading the model: for methods that learn from earlier adapters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rankwise.core import decisions
from rankwise.core.bank import BANKS, Bank
from rankwise.core.checkpoint import JSON_NAME, read
from rankwise.core.errors import CheckpointError, FingerprintError, did_you_mean
from rankwise.core.fingerprint import tensor_hash
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
    def update(self, site: str, weight: Callable[[], Tensor] | None = None) -> Operator:
        """W' - W (m, n) at a site.

        Args:
            site: its name.
            weight: gives W (m, n), which methods that are not additive need; not called for others.

        Raises:
            CheckpointError: no such site, or an update that cannot be told without the model.
        """
        self.check_size(site, *self.sizes.get(site, (0, 0)))
        entry = self._entry(site)
        if entry.replacement is None and entry.facts.additive:
            return entry.total_update(Dense(torch.zeros(self.sizes[site])))
        if weight is None:
            raise CheckpointError(f"{self.folder}: {self.recipe.name} at {site} cannot be read without the weight under it")
        return entry.total_update(Dense(weight()))

    def check_base(self, site: str, hashes: Collection[str]) -> None:
        """Refuses a weight other than the one the adapter was trained on: directions of two bases have nothing in common.

        Args:
            site: the layer.
            hashes: of the weight in each orientation it can have in a layer, from `weight_hashes`.

        Raises:
            FingerprintError: it differs.
        """
        if self.fingerprint.get(site) not in hashes:
            raise FingerprintError(
                f"{self.folder} was trained on another base: the weight of {site} differs. Directions of different bases have "
                "nothing in common; take adapters of one base"
            )

    def check_size(self, site: str, m: int, n: int) -> None:
        """Refuses a layer of another size.

        Raises:
            CheckpointError: no such layer.
            FingerprintError: it has another size.
        """
        if site not in self.sizes:
            raise CheckpointError(f"{self.folder} does not adapt {site!r}. {did_you_mean(site, self.sizes)}")
        if self.sizes[site] != (m, n):
            there = "×".join(map(str, self.sizes[site]))
            raise FingerprintError(
                f"{self.folder} was trained on another base: {site} is {there} there and {m}×{n} here; take adapters of "
                "one base"
            )

    def _entry(self, site: str) -> Parameterization:
        m, n = self.sizes[site]
        mine = {key.removeprefix(f"{site}."): value for key, value in self.tensors.items() if key.startswith(f"{site}.")}
        held = [*mine.values(), *self.tensors.values()]  # its own first; some sites have shared tensors alone
        dtype = next((value.dtype for value in held if value.is_floating_point()), torch.float32)
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
        entry.make_room({key: tuple(value.shape) for key, value in mine.items()})
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


def weight_hashes(weight: Tensor, shape: tuple[int, ...] = ()) -> frozenset[str]:
    """Hashes of W (m, n) as the layers that mean this matrix hold it: as it is, turned, or with the modes of a kernel."""
    forms = [weight, weight.t(), *([weight.reshape(shape)] if len(shape) > 2 else [])]
    return frozenset(tensor_hash(form) for form in forms)


def stored_updates(folders: Sequence[str], site: Site) -> list[LowRank]:
    """The exact factors of stored updates at one layer of the same base, scale folded in, in their files' precision.

    Raises:
        CheckpointError: no such layer in a file, or an update that has no factors.
        FingerprintError: an adapter of another base.
    """
    found, hashes = [], weight_hashes(site.weight(), site.shape) if folders else frozenset()
    for folder in folders:
        pair = stored_update(folder, site)
        _read_once(folder, _changed(folder)).check_base(site.name, hashes)
        found.append(pair)
    return found


def stored_update(folder: str, site: Site) -> LowRank:
    """As `stored_updates`, of one folder and without comparing the weights."""
    stored = _read_once(folder, _changed(folder))
    stored.check_size(site.name, site.m, site.n)
    factors = as_low_rank(stored.update(site.name, lambda: site.weight().cpu()))
    if factors is None:
        raise CheckpointError(
            f"{folder} holds {stored.recipe.name!r}, whose update has no factors; take an adapter of low rank"
        )
    pair = factors.folded()
    return LowRank(pair.B.detach(), pair.A.detach())


def _changed(folder: str) -> int:
    """When the file was written; 0 where there is none."""
    path = Path(folder) / JSON_NAME
    return path.stat().st_mtime_ns if path.is_file() else 0


@functools.lru_cache(maxsize=32)
def _read_once(folder: str, changed: int) -> StoredAdapter:
    """Read for the first of many layers; `changed` tells versions of the file apart."""
    return read_stored(folder)
