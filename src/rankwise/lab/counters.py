"""Exact costs of one training step, by counting instead of timing: they are the same on a busy machine and on an idle one.

    FLOPs         of forward and backward, a second pass (SAM) included, the optimizer's own arithmetic left out
    saved bytes   what autograd keeps between forward and backward; weights are not counted, shared storage counts once
    trained       numbers with a gradient, the head apart
    state         numbers the optimizer keeps for them, the head's apart

The frozen base is the yardstick: the same batch, backward down to the first adapted layer, no adapter. For LoRA on a linear
layer of (m, n) the extra cost is 2 r (m + n) FLOPs per token forward and 4 r (m + n) backward (2 r (2m + n) where the layer's
input needs no gradient), and r numbers per token more to keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from rankwise.core.errors import TrainingError
from rankwise.core.handle import Handle
from rankwise.core.statistics import default_loss

Loss = Callable[[nn.Module, Any], Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """What one training step costs; see the module's text for the units."""

    flops: int
    saved_bytes: int
    trained: int = 0
    head: int = 0
    state: int = 0

    def relative_to(self, base: Cost) -> dict[str, float]:
        """FLOPs and saved bytes as multiples of the frozen base's."""
        return {"flops": self.flops / max(base.flops, 1), "saved_bytes": self.saved_bytes / max(base.saved_bytes, 1)}

    def to_json(self) -> dict[str, int]:
        """A JSON-ready mapping."""
        return asdict(self)


def _product_in_place(y: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    rows, inner = left[-2:]
    batch = left[0] if len(left) == 3 else 1
    return 2 * batch * rows * inner * right[-1]


def _matrix_vector(matrix: Shape, vector: Shape, *_: Any, **__: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _plus_matrix_vector(y: Shape, matrix: Shape, vector: Shape, *_: Any, **__: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


_aten = torch.ops.aten
# torch's table lacks the in-place products that the fused low-rank layer uses, matrix times vector, and attention on a CPU
FORMULAS: Mapping[Any, Callable[..., int]] = {
    _aten.addmm_: _product_in_place,
    _aten.baddbmm_: _product_in_place,
    _aten.addbmm: _product_in_place,
    _aten.addbmm_: _product_in_place,
    _aten.mv: _matrix_vector,
    _aten.addmv: _plus_matrix_vector,
    _aten.addmv_: _plus_matrix_vector,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def flops_of(work: Callable[[], Any]) -> int:
    """FLOPs (two per multiply-add) of the matrix products, convolutions and attention inside `work`."""
    counter = FlopCounterMode(display=False, custom_mapping=dict(FORMULAS))
    with counter:
        work()
    return int(counter.get_total_flops())


class SavedBytes:
    """Adds up what autograd keeps for backward while it is active, each storage once, without the given tensors."""

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        self._ignored = {part.untyped_storage().data_ptr() for tensor in ignored for part in _storages(tensor.detach())}
        self._kept: dict[int, Tensor] = {}  # holding the tensors keeps their addresses from being used again
        self._hooks: Any = None

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        for part in _storages(tensor.detach()):
            address = part.untyped_storage().data_ptr()
            if address and address not in self._ignored:
                self._kept.setdefault(address, part)
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def frozen_cost(model: nn.Module, sites: Iterable[str], batch: Any, *, loss: Loss = default_loss) -> Cost:
    """Cost of the model without an adapter, with backward running down to the first of `sites`.

    Args:
        model: the base. Flags of its parameters are put back afterwards.
        sites: names of the layers that would be adapted.
        batch: one batch.
        loss: gives the scalar loss of a batch.

    Raises:
        TrainingError: the loss is not finite.
    """
    wanted, flags = set(sites), {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks = [module.register_forward_hook(_wants_gradient) for name, module in model.named_modules() if name in wanted]
    try:
        model.requires_grad_(False)
        with _training(model):
            with torch.no_grad():
                value = float(loss(model, batch))
            if not math.isfinite(value):
                raise TrainingError(f"the frozen base has the loss {value} on the first batch; look for NaN in data and model")
            flops = flops_of(lambda: loss(model, batch).backward())
            saved = _saved_bytes(model, batch, loss)
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
    return Cost(flops, saved)


def training_cost(handle: Handle, batch: Any, *, learning_rate: float = 1e-6, loss: Loss = default_loss) -> Cost:
    """Cost of one training step of an adapter. Takes the step, so use a model made for counting.

    Args:
        handle: the adapter.
        batch: one batch.
        learning_rate: of that step.
        loss: gives the scalar loss of a batch.

    Raises:
        TrainingError: no trained tensor got a gradient.
    """
    model = handle.model
    optimizer = handle.optimizer(lr=learning_rate)

    saved = SavedBytes([*model.parameters(), *model.buffers()])

    first = [saved]  # what is kept is counted once, also where the loss is asked for several times

    def closure() -> Tensor:
        with first.pop() if first else nullcontext():
            return loss(model, batch)

    with _training(model):
        flops = flops_of(lambda: handle.backward(closure))
        if all(tensor.grad is None for block in handle.blocks().values() for tensor in block.values()):
            raise TrainingError(
                f"{handle.recipe.name}: no trained tensor got a gradient; the loss does not depend on the adapter"
            )
        optimizer.step()
    adapter = [tensor for block in handle.blocks().values() for tensor in block.values()]
    state = sum(value.numel() for tensor in adapter for value in optimizer.state[tensor].values() if _is_array(value))
    head = sum(parameter.numel() for parameter in handle.auxiliary.values())
    return Cost(flops, saved.total, handle.trained_numbers, head, state)


def _saved_bytes(model: nn.Module, batch: Any, loss: Loss) -> int:
    with SavedBytes([*model.parameters(), *model.buffers()]) as saved:
        value = loss(model, batch)
    total = saved.total
    value.backward()
    return total


def _wants_gradient(module: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, Tensor) and output.is_floating_point() and not output.requires_grad:
        output.requires_grad_(True)
    return output


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode, with the global generator left as it was (a model's own dropout draws from it)."""
    was = model.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.train()
        try:
            yield
        finally:
            model.train(was)


def _storages(tensor: Tensor) -> list[Tensor]:
    """The tensor, or the parts that a sparse one is made of."""
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._values(), tensor._indices()]
    return [tensor.values(), tensor.crow_indices(), tensor.col_indices()]
