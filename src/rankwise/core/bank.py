"""Tensors shared by sites of an adapter (VeRA, RandLoRA, Tied-LoRA, LoTR, VB-LoRA): one module at the model's root.

Sites hold a reference that is not registered as a child, so the state dict, optimizers, DDP and FSDP2 meet each tensor once.
A seeded bank is drawn by a private CPU generator and saved as (seed, sizes, hash), not as tensors. Where only some sites share
(layers of equal shape), the bank has one child bank per group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.errors import CheckpointError
from rankwise.core.randomness import generator_for

BANKS = "rankwise_banks"  # the child of the model's root that holds shared tensors


class Bank(nn.Module):
    """Shared tensors by name. Frozen ones are buffers, trained ones parameters.

    Args:
        tensors: name -> tensor, in the order they were drawn.
        seed: where the tensors can be drawn again; None for a bank that must be stored.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, seed: int | None = None) -> None:
        super().__init__()
        self.seed = seed
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor, persistent=seed is None)
        self.digest = digest(dict(tensors))

    @classmethod
    def drawn(cls, sizes: Mapping[str, tuple[int, ...]], draw: Callable[..., Tensor], *, seed: int) -> Bank:
        """A seeded bank: `draw(name, *sizes, generator=…)` for each name in order, all from one private CPU generator."""
        generator = generator_for(seed, "bank")
        return cls({name: draw(name, *size, generator=generator) for name, size in sizes.items()}, seed=seed)

    @classmethod
    def grouped(cls, groups: Mapping[str, Mapping[str, Tensor]]) -> Bank:
        """A bank of banks, one per group of sites: `bank.group(name)["A"]`. Group names are identifiers."""
        bank = cls({})
        for name, tensors in groups.items():
            bank.add_module(name, cls(tensors))
        return bank

    def roles(self) -> dict[str, nn.Parameter]:
        """Its own trained tensors by name, those of its groups left out."""
        return dict(self.named_parameters(recurse=False))

    @classmethod
    def blank(cls, described: Mapping[str, Any], like: Tensor) -> Bank:
        """A bank of zeros as `describe` wrote it, to be filled from a file; `like` gives dtype and device."""
        bank, trained = cls({}), set(described.get("trained", ()))
        for key, size in dict(described["sizes"]).items():
            *groups, name = key.split(".")
            owner = bank
            for group in groups:
                if group not in owner._modules:
                    owner.add_module(group, cls({}))
                owner = owner.group(group)
            tensor = torch.zeros(*size, dtype=like.dtype, device=like.device)
            if key in trained:
                owner.register_parameter(name, nn.Parameter(tensor))
            else:
                owner.register_buffer(name, tensor)
        return bank

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, name)

    def group(self, name: str) -> Bank:
        """The bank of one group."""
        found = self._modules[name]
        assert isinstance(found, Bank)
        return found

    def describe(self) -> dict[str, Any]:
        """What a checkpoint writes: sizes and hash, and the seed where there is one."""
        named = [*self.named_buffers(), *self.named_parameters()]
        sizes = {name: list(tensor.shape) for name, tensor in named}
        trained = [name for name, _ in self.named_parameters()]
        return {"seed": self.seed, "sizes": sizes, "trained": trained, "digest": self.digest}

    def check(self, described: Mapping[str, Any]) -> None:
        """Compares this bank with what a checkpoint wrote.

        Raises:
            CheckpointError: the tensors drawn here are not those the adapter was trained with.
        """
        here = self.describe()
        if here["sizes"] != described.get("sizes") or (self.seed is not None and here["digest"] != described.get("digest")):
            raise CheckpointError(
                f"the shared tensors drawn here ({here}) are not those of the file ({dict(described)}); the adapter must be "
                "loaded onto the same layers, with a torch that draws the same numbers from the same seed"
            )


class Banks(nn.ModuleDict):
    """The banks of a model by adapter name. As the last child of an nn.Sequential it passes on what it is given."""

    def forward(self, x: Any) -> Any:
        """The input as it is."""
        return x


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash over names, sizes and values (rounded to bfloat16, so that it survives a change of dtype)."""
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        total.update(f"{name}{tuple(tensor.shape)}".encode())
        total.update(to_bytes(tensor))
    return total.hexdigest()[:32]


def to_bytes(tensor: Tensor) -> bytes:
    """The values rounded to bfloat16, as bytes."""
    plain = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    return plain.view(torch.int16).numpy().tobytes()


def bank_of(model: nn.Module, name: str) -> Bank | None:
    """The shared tensors of the named adapter on a model, or None."""
    banks = model._modules.get(BANKS)
    bank = None if banks is None else banks._modules.get(name)
    return bank if isinstance(bank, Bank) else None


def attach_bank(model: nn.Module, name: str, bank: Bank) -> None:
    """Puts the shared tensors of an adapter at the model's root."""
    if BANKS not in model._modules:
        model.add_module(BANKS, Banks())
    model._modules[BANKS][name] = bank  # type: ignore[index]


def detach_bank(model: nn.Module, name: str) -> None:
    """Takes them away again, where there are some."""
    banks = model._modules.get(BANKS)
    if banks is not None and name in banks._modules:
        del banks._modules[name]
        if not banks._modules:
            del model._modules[BANKS]
