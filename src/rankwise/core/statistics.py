"""What starts, compressors and mergers know about a layer, gathered in one streamed pass over data.

    WEIGHT        W (m, n), always there
    GRADIENT      G = dL/dW (m, n), the mean over batches
    INPUT_GRAM    Σ x xᵀ (n, n) with Σ x (n,) and the number of tokens
    OUTPUT_GRAM   Σ y yᵀ (m, m) with Σ y (m,)

Gradients are added to a float32 buffer on the CPU as soon as each is ready and then freed, so one layer's gradient is alive
at a time. Grams of layers that read the same tensor are computed once. Padded tokens do not count.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.errors import StatisticsError, TrainingError
from rankwise.core.targets import is_quantized


class Statistic(enum.Enum):
    """What an approximation may ask for."""

    WEIGHT = "WEIGHT"
    GRADIENT = "GRADIENT"
    INPUT_GRAM = "INPUT_GRAM"
    OUTPUT_GRAM = "OUTPUT_GRAM"


class MomentCollector:
    """Counts, sums and Gram matrices of rows, accumulated in float64: the one collector for all that need moments.

    Args:
        width: number of columns d.
        other: columns of a second variable z seen with each row x; then Σ x zᵀ (d, other) is kept as well.
    """

    def __init__(self, width: int, other: int | None = None) -> None:
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64)  # Σ x
        self.gram = torch.zeros(width, width, dtype=torch.float64)  # Σ x xᵀ
        self.cross = None if other is None else torch.zeros(width, other, dtype=torch.float64)  # Σ x zᵀ

    def add(self, rows: Tensor, others: Tensor | None = None) -> None:
        """Adds rows (tokens, d), and the rows (tokens, other) seen with them."""
        wide = rows.detach().to("cpu", torch.float64)
        self.count += wide.shape[0]
        self.total += wide.sum(0)
        self.gram += wide.t() @ wide
        if self.cross is not None:
            if others is None:
                raise TypeError("a collector of cross moments needs both variables; this is a bug in rankwise")
            self.cross += wide.t() @ others.detach().to("cpu", torch.float64)

    def covariance(self) -> Tensor:
        """The centered second moment, Σ (x - x̄)(x - x̄)ᵀ (d, d)."""
        return self.gram - torch.outer(self.total, self.total) / max(self.count, 1)


@dataclass
class LayerStatistics:
    """Statistics of one layer. Asking for one that was not collected is an error that says what to pass to `collect`.

    Attributes:
        site: its name.
        weight: W (m, n).
        gradient, inputs, outputs: what was collected.
        frozen: the numbers (m, n) that stand in the layer, where it is quantized and `weight` may be from before that.
    """

    site: str
    weight: Tensor
    gradient: Tensor | None = None
    inputs: MomentCollector | None = None
    outputs: MomentCollector | None = None
    frozen: Tensor | None = None

    def require_gradient(self) -> Tensor:
        """G (m, n), the mean gradient."""
        return self._present(self.gradient, Statistic.GRADIENT)

    def require_inputs(self) -> MomentCollector:
        """Moments of the layer's inputs."""
        return self._present(self.inputs, Statistic.INPUT_GRAM)

    def require_outputs(self) -> MomentCollector:
        """Moments of the layer's outputs."""
        return self._present(self.outputs, Statistic.OUTPUT_GRAM)

    def _present(self, value: Any, statistic: Statistic) -> Any:
        if value is None:
            raise StatisticsError(
                f"{self.site}: {statistic.value} was not collected; "
                f"call rankwise.collect(model, batches, {{Statistic.{statistic.value}}}) and pass the result as statistics="
            )
        return value


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a transformers-style model: `model(**batch).loss`, or of a pair `(inputs, targets)` with cross entropy."""
    if isinstance(batch, Mapping):
        output = model(**batch)
        loss = output["loss"] if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            raise StatisticsError(
                "the model returned no loss for a batch; add labels to it, or pass loss=function(model, batch)"
            )
        return loss
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets)


def collect_at(
    model: nn.Module,
    sites: Mapping[str, Any],
    batches: Iterable[Any],
    needs: Iterable[Statistic],
    *,
    loss: Callable[[nn.Module, Any], Tensor] = default_loss,
) -> dict[str, LayerStatistics]:
    """Collects statistics at the given sites (name -> `Target`) in one pass. See `rankwise.collect`."""
    wanted = frozenset(needs)
    result = {name: LayerStatistics(name, target.matrix()) for name, target in sites.items()}
    if not wanted - {Statistic.WEIGHT}:
        return result
    hooks: list[Any] = []
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # train mode moves running statistics
    current: dict[str, Any] = {"mask": None, "tokens": None, "grams": {}}
    if Statistic.GRADIENT in wanted:
        model.train()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for name, target in sites.items():
            hooks.append(_gradient_hook(target, result[name]))
    else:
        model.eval()
    for name, target in sites.items():
        hooks.extend(_moment_hooks(target, result[name], wanted, current))
    seen = 0
    try:
        for batch in batches:
            current["mask"], current["grams"] = token_mask(batch), {}
            if Statistic.GRADIENT in wanted:
                value = loss(model, batch)
                if not torch.isfinite(value):
                    raise TrainingError(f"the loss of probe batch {seen} is {value.item()}; look at that batch for NaN")
                value.backward()
            else:
                with torch.no_grad():
                    model(**batch) if isinstance(batch, Mapping) else model(batch[0])
            seen += 1
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            if Statistic.GRADIENT in wanted:
                parameter.grad = None
        model.train(training)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    if not seen:
        raise StatisticsError("collect was given no batches; pass at least one")
    for name, statistics in result.items():
        if Statistic.GRADIENT in wanted:
            if statistics.gradient is None:
                raise StatisticsError(f"{name} got no gradient: the loss does not depend on it; leave it out of where=")
            statistics.gradient /= seen
    return result


def _gradient_hook(target: Any, statistics: LayerStatistics) -> Any:
    weight = target.parameter()
    if is_quantized(target.module):
        raise StatisticsError(
            f"{statistics.site}: a quantized weight ({type(weight).__name__}) has no gradient; collect on the model before it "
            "is quantized and pass the result as statistics="
        )
    weight.requires_grad_(True)

    def receive(parameter: Tensor) -> None:
        gradient = parameter.grad
        parameter.grad = None
        if gradient is None:
            return
        part = target.layout.to_matrix(gradient).detach().to("cpu", torch.promote_types(gradient.dtype, torch.float32))
        statistics.gradient = part.clone() if statistics.gradient is None else statistics.gradient + part

    return weight.register_post_accumulate_grad_hook(receive)


def _moment_hooks(target: Any, statistics: LayerStatistics, wanted: frozenset[Statistic], current: dict[str, Any]) -> list[Any]:
    hooks = []
    if Statistic.INPUT_GRAM in wanted:
        statistics.inputs = MomentCollector(target.n)
    if Statistic.OUTPUT_GRAM in wanted:
        statistics.outputs = MomentCollector(target.m)

    def receive(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        x = inputs[0]
        mask = current["mask"]
        if statistics.inputs is not None:
            key = (id(x), x._version, target.layout)
            found = current["grams"].get(key)
            if found is None or found[0] is not x:
                fresh = MomentCollector(target.n)
                fresh.add(kept_rows(target.layout.input_rows(x), x, mask))
                found = current["grams"][key] = (x, fresh)
            _merge(statistics.inputs, found[1])
        if statistics.outputs is not None:
            statistics.outputs.add(kept_rows(target.layout.output_rows(output), x, mask))

    if statistics.inputs is not None or statistics.outputs is not None:
        hooks.append(target.module.register_forward_hook(receive))
    return hooks


def _merge(collector: MomentCollector, other: MomentCollector) -> None:
    collector.count += other.count
    collector.total += other.total
    collector.gram += other.gram


def token_mask(batch: Any) -> Tensor | None:
    """The (batch, tokens) mask of a batch, or None."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def kept_rows(rows: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """Drops rows of padded tokens, where x is (batch, tokens, …) like the mask."""
    if mask is None or x.dim() < 2 or tuple(x.shape[:2]) != tuple(mask.shape):
        return rows
    return rows[mask.reshape(-1).bool().to(rows.device)]
