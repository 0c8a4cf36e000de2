"""Many adapters as stacked tensors, a different one for each row of the batch: per site A (G, R, n) and B (G, m, R), G slots.

    y_t = W x_t + B_{g_t} A_{g_t} x_t        g_t the slot of row t, or none: then y_t is the frozen layer's, to the bit

R is the largest rank the bank takes; smaller ones are padded with zeros, which change nothing, and their true rank is kept. The
scale s is folded into B once and for all. Switching adapters is a change of index. Adapters are registered, evicted (the least
recently used one that is not pinned, when all slots are taken) and pinned by name. With `requires_grad_()` the stacks train:
each adapter's gradient comes from its own rows only, padding and unused slots get exactly zero.

Not FLoRA's multiplicative adapters W ∘ (B A), which need no batched product and are another kind of update.

*Differs* from Punica and vLLM: plain torch products instead of kernels; from S-LoRA: no paging between host and device.

Wen, Chaudhuri: Batched Low-Rank Adaptation of Foundation Models, 2023, arXiv:2312.05677. Chen et al.: Punica: Multi-Tenant
LoRA Serving, 2023, arXiv:2310.18547. Sheng et al.: S-LoRA, 2023, arXiv:2311.03285.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.core.errors import ActivationError, ArgumentError, did_you_mean, shorten
from rankwise.core.operators import LowRank, Operator
from rankwise.core.queries import as_low_rank
from rankwise.serving.backends import BACKENDS
from rankwise.serving.folders import read_adapter
from rankwise.serving.plan import BASE, BatchPlan
from rankwise.serving.server import Server

Rows = Sequence[str | None] | str | None


class AdapterBank(nn.Module):
    """Adapters in slots.

    Args:
        slots: G, how many fit.
        max_rank: R, the largest rank of any update.
        backend: "auto" picks by shapes; or "loop", "gathered", "segmented".
        dtype: of the stacks; None takes the first adapter's.
        device: of the stacks.

    Attributes:
        names: name -> slot, the least recently used first.
        pinned: names that are never evicted on their own.
    """

    def __init__(
        self,
        *,
        slots: int = 8,
        max_rank: int = 16,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if slots < 1 or max_rank < 1:
            raise ArgumentError(f"slots and max_rank are at least 1, not {slots} and {max_rank}")
        if backend not in ("auto", *BACKENDS):
            raise ArgumentError(f"no backend {backend!r}. {did_you_mean(backend, ('auto', *BACKENDS))}")
        self.slots, self.max_rank, self.backend = slots, max_rank, backend
        self._dtype, self._device = dtype, torch.device(device)
        self.A, self.B = nn.ParameterList(), nn.ParameterList()  # (G, R, n) and (G, m, R) per site
        self.sites: dict[str, int] = {}  # site -> place in A and B
        self.names: OrderedDict[str, int] = OrderedDict()
        self.pinned: set[str] = set()
        self.fingerprints: dict[str, dict[str, str]] = {}
        self._ranks: dict[str, dict[str, int]] = {}  # name -> site -> true rank
        self._evicted: set[str] = set()
        self._rows: BatchPlan | int | None = None  # a plan, or one slot for all rows
        self._whole: BatchPlan | None = None  # the plan of the latter, for the last size of batch
        self._used: set[int] = set()  # slots that ever held an adapter; the others are zero

    # -- what is in it -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def register(
        self, name: str, updates: Mapping[str, Operator], *, pinned: bool = False, fingerprint: Mapping[str, str] | None = None
    ) -> int:
        """Puts an adapter into a free slot, or into that of the least recently used one that is not pinned.

        Args:
            name: of the adapter here.
            updates: site -> update with exact factors, such as `handle.updates()`. Sites it lacks stay on the base.
            pinned: never evict it on its own.
            fingerprint: site -> hash of the weight it was trained on, checked by `serve`.

        Returns:
            The slot.

        Raises:
            ActivationError: the name is taken, every slot is pinned, or an update does not fit.
        """
        if name in self.names:
            raise ActivationError(
                f"{name!r} is in the bank already (slot {self.names[name]}); evict it first, or choose another name"
            )
        pairs = {site: self._checked(name, site, update) for site, update in updates.items()}
        if not pairs:
            raise ActivationError(f"adapter {name!r} has no sites")
        for site, pair in pairs.items():
            if site not in self.sites:
                self._add_site(site, pair)
        slot = self._free_slot(name)
        stacks_A, stacks_B = list(self.A), list(self.B)
        for site, place in self.sites.items() if slot in self._used else ():
            rank = pairs[site].rank if site in pairs else 0
            stacks_A[place][slot, rank:].zero_()
            stacks_B[place][slot, :, rank:].zero_()
        for site, pair in pairs.items():
            place = self.sites[site]
            stacks_A[place][slot, : pair.rank].copy_(pair.A)
            room = stacks_B[place][slot, :, : pair.rank]  # (m, r)
            if pair.scale == 1.0 or pair.B.dtype != room.dtype or pair.B.device != room.device:
                room.copy_(pair.B * pair.scale)
            else:
                torch.mul(pair.B, pair.scale, out=room)
        self._used.add(slot)
        self.names[name] = slot
        self._ranks[name] = {site: pair.rank for site, pair in pairs.items()}
        self.fingerprints[name] = dict(fingerprint or {})
        self._evicted.discard(name)
        if pinned:
            self.pinned.add(name)
        return slot

    def load(self, directory: str | Path, name: str | None = None, *, pinned: bool = False) -> int:
        """Registers an adapter from a folder that `handle.save` wrote, under the folder's name by default."""
        stored = read_adapter(directory)
        return self.register(name or Path(directory).name, stored.updates, pinned=pinned, fingerprint=stored.fingerprint)

    def load_many(self, directories: Iterable[str | Path]) -> dict[str, int]:
        """Registers many folders; name -> slot."""
        return {Path(directory).name: self.load(directory) for directory in directories}

    def evict(self, name: str) -> None:
        """Frees the slot of an adapter, pinned or not; rows cannot name it any more."""
        slot = self._slot(name)
        if (isinstance(self._rows, BatchPlan) and slot in self._rows.distinct) or self._rows == slot:
            raise ActivationError(f"{name!r} is in use by the current rows; leave the with-block, or use(None), first")
        del self.names[name], self._ranks[name], self.fingerprints[name]
        self.pinned.discard(name)
        self._evicted.add(name)

    def pin(self, name: str, pinned: bool = True) -> None:
        """Protects an adapter from eviction by `register`, or gives it free again."""
        self._slot(name)
        (self.pinned.add if pinned else self.pinned.discard)(name)

    def update_of(self, site: str, name: str) -> LowRank:
        """The factors (B, A) of an adapter at a site, views of the stacks cut to the true rank."""
        slot, place = self._slot(name), self._place(site)
        rank = self._ranks[name].get(site, 0)
        return LowRank(self.B[place][slot][:, :rank], self.A[place][slot][:rank])

    def updates(self, name: str) -> dict[str, LowRank]:
        """Site -> factors of an adapter: what merging, exporting and `as_adapter` take."""
        self._slot(name)
        return {site: self.update_of(site, name) for site in self._ranks[name]}

    # -- acting --------------------------------------------------------------------------------------------------------

    def serve(self, model: nn.Module, *, any_base: bool = False) -> Server:
        """Binds the bank to a model; the result is a context manager, and `detach()` unbinds it. See `Server`."""
        return Server(self, model, any_base=any_base)

    def use(self, rows: Rows) -> None:
        """Chooses for the next batches: one name per row (None: the base), one name for all rows, or None for the base.

        Raises:
            ActivationError: a name is not in the bank.
        """
        if rows is None:
            self._rows = None
            return
        names = [rows] if isinstance(rows, str) else rows
        slots = [BASE if name is None else self._slot(name) for name in names]
        for name in dict.fromkeys(name for name in names if name is not None):
            self.names.move_to_end(name)
        self._rows = slots[0] if isinstance(rows, str) else BatchPlan(slots, self._device)

    @contextmanager
    def rows(self, rows: Rows) -> Iterator[None]:
        """`use` for the length of a with-block."""
        before = self._rows
        self.use(rows)
        try:
            yield
        finally:
            self._rows = before

    def plan(self, rows: int) -> BatchPlan | None:
        """The plan for a batch of this many rows, made once and shared by all layers; None for the base.

        Raises:
            ActivationError: another number of names was given.
        """
        if isinstance(self._rows, int):
            if self._whole is None or (self._whole.rows, self._whole.slots[:1]) != (rows, (self._rows,)):
                self._whole = BatchPlan([self._rows] * rows, self._device)
            return self._whole
        if self._rows is not None and self._rows.rows != rows:
            raise ActivationError(
                f"the batch has {rows} rows, but {self._rows.rows} adapter names were given; give one name (or None) per row"
            )
        return self._rows

    # -- inside --------------------------------------------------------------------------------------------------------

    def _slot(self, name: str) -> int:
        if name not in self.names:
            gone = f"{name!r} was evicted; register it again. " if name in self._evicted else ""
            raise ActivationError(f"{gone}No adapter {name!r} in the bank. {did_you_mean(name, self.names)}")
        return self.names[name]

    def _place(self, site: str) -> int:
        if site not in self.sites:
            raise ActivationError(f"the bank has no site {site!r}. {did_you_mean(site, self.sites)}")
        return self.sites[site]

    def _free_slot(self, name: str) -> int:
        taken = set(self.names.values())
        if len(taken) < self.slots:
            return next(slot for slot in range(self.slots) if slot not in taken)
        busy = self._rows.distinct if isinstance(self._rows, BatchPlan) else (self._rows,)
        victim = next((other for other, slot in self.names.items() if other not in self.pinned and slot not in busy), None)
        if victim is None:
            raise ActivationError(
                f"no slot for {name!r}: all {self.slots} hold pinned adapters or those of the current rows "
                f"({shorten(list(self.names))}); evict one, or make the bank with more slots"
            )
        slot = self.names[victim]
        self.evict(victim)
        return slot

    def _checked(self, name: str, site: str, update: Operator) -> LowRank:
        pair = as_low_rank(update)
        if pair is None:
            raise ActivationError(
                f"{name!r} has no exact low-rank factors at {site} ({type(update).__name__}); serve it with "
                "activate_ on its own, or register the best substitute, rankwise.merging.svd([update], rank=…)"
            )
        if pair.rank > self.max_rank:
            raise ActivationError(
                f"{name!r} has rank {pair.rank} at {site}, the bank takes up to max_rank={self.max_rank}; make it with a "
                "larger max_rank, or cut the update with rankwise.merging.svd([update], rank=…)"
            )
        if site in self.sites:
            place = self.sites[site]
            shape = (self.B[place].shape[1], self.A[place].shape[2])
            if pair.shape != shape:
                raise ActivationError(f"{name!r} is {pair.shape} at {site}, the bank's others are {shape}; another base?")
        return pair

    def _add_site(self, site: str, pair: LowRank) -> None:
        m, n = pair.shape
        self._dtype = pair.A.dtype if self._dtype is None else self._dtype
        trains = any(parameter.requires_grad for parameter in self.A)
        options: Any = {"dtype": self._dtype, "device": self._device}
        self.sites[site] = len(self.A)
        self.A.append(nn.Parameter(_zeros(self.slots, self.max_rank, n, **options), requires_grad=trains))
        self.B.append(nn.Parameter(_zeros(self.slots, m, self.max_rank, **options), requires_grad=trains))

    def extra_repr(self) -> str:
        """Slots in use, and sites."""
        used = f"{len(self.names)} of {self.slots} slots"
        return f"{used}, max_rank={self.max_rank}, {len(self.sites)} sites, backend={self.backend}"


def _zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that the operating system hands out page by page when they are written, so that an empty slot takes no memory."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
