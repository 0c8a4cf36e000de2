"""Tensors that training may have sharded over devices (DTensor): read whole, and plain ones brought into their form."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over a device mesh."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on this device; the tensor itself where it is not sharded. A collective call where it is."""
    return cast(Tensor, tensor.full_tensor()) if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharded_like(plain: Tensor, reference: Tensor) -> Tensor:
    """A plain tensor (the same on every device) on the device, in the dtype and with the sharding of another."""
    if is_sharded(plain) or not is_sharded(reference):
        return plain.to(device=reference.device, dtype=reference.dtype)
    from torch.distributed.tensor import distribute_tensor

    moved = plain.to(device=reference.device, dtype=reference.dtype)
    return distribute_tensor(moved, reference.device_mesh, reference.placements)  # type: ignore[attr-defined]


def spread_like(plain: Tensor, reference: Tensor) -> Tensor:
    """A plain tensor (the same on every device) with the sharding of another, its own dtype kept."""
    if is_sharded(plain) or not is_sharded(reference):
        return plain
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(plain, reference.device_mesh, reference.placements)  # type: ignore[attr-defined]


def reshard(model: nn.Module) -> None:
    """Lets go of whole tensors that FSDP2 kept from a forward without backward, since the sharded ones change."""
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()  # type: ignore[operator]


def local_part(tensor: Tensor) -> Tensor:
    """What this device has of a tensor; the tensor itself where it is not sharded. For work number by number."""
    return cast(Tensor, tensor.to_local()) if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_as(part: Tensor, reference: Tensor) -> Tensor:
    """Undoes `local_part`: the part of this device, as a tensor sharded like the reference."""
    if not is_sharded(reference):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = reference.device_mesh, reference.placements  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=reference.shape, stride=reference.stride())
