"""What the handle does around one optimizer step: the order of calls, the check for NaN, the second gradient of SAM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.core.calls import Blocks, some_gradient
from rankwise.core.errors import ArgumentError, TrainingError, did_you_mean
from rankwise.core.optimizer import BlockOptimizer
from rankwise.core.protocols import Perturbation, Procedure
from rankwise.core.sharding import reshard, whole
from rankwise.core.step import SiteBlock, Step
from rankwise.core.wrapped import refuse_sharded

if TYPE_CHECKING:
    from rankwise.core.handle import Handle


def optimizer_of(handle: Handle, lr: float, per_layer: bool, overrides: Mapping[str, Any]) -> BlockOptimizer:
    """The optimizer of a recipe; see `Handle.optimizer`."""
    from rankwise.core.adapt import steps_with  # a chain of steps needs the recipe's signatures, which adapt.py reads

    plain = handle.plain_blocks()
    blocks = {**handle.blocks(), **plain}
    if not blocks:
        raise TrainingError(
            f"no tensor of adapter {handle.name!r} is trained; it was loaded with trainable=False or for inference, or frozen"
        )
    refuse_sharded(handle)
    steps, facts = steps_with(handle.recipe, overrides), {}
    if per_layer:
        refuse_per_layer(handle, steps)
    known = {name for site in handle.targets for name in (site, site.rpartition(".")[2])}
    for step in steps:
        for name in step.layers:
            if name not in known:
                raise ArgumentError(f"{step.name} names the layer {name!r}, which is not adapted. {did_you_mean(name, known)}")
    for site, target in handle.targets.items():
        entry = handle.parameterization(site)
        entry.gradient_gain = next((step.gain for step in steps if step.gain is not None), None)
        facts[site] = SiteBlock(site=site, scale=entry.scale, shape=target.mode_shape())
    return BlockOptimizer(blocks, steps, lr, plain=plain, before=handle.before_step, facts=facts, per_layer=per_layer)


def backward(handle: Handle, closure: Callable[[], Tensor]) -> Tensor:
    """Forward and backward of one step as the recipe wants them; see `Handle.backward`."""
    part = handle.perturbation
    if part is None or not part.forward_only:
        handle.masks.forget()  # forwards before this one, for looking at the model, are no part of the step
        loss = closure()
        loss.backward()
        handle.after_backward(lambda: closure().backward())
        return loss.detach()
    everything = {**handle.blocks(), **handle.plain_blocks()}
    handle.calls.before_backward_part(everything)

    def evaluate() -> Tensor:
        reshard(handle.model)
        return closure()

    with evaluating(handle.model):
        loss = part.estimate(everything, evaluate, learning_rate=handle.learning_rate)
    reshard(handle.model)
    check_finite(everything, handle.step_count)
    _add_regularizers(handle)
    handle.calls.after_backward_part(everything)
    return loss.detach()


def after_backward(handle: Handle, replay: Callable[[], Any] | None, finite: bool) -> None:
    """What works between backward and step; see `Handle.after_backward`."""
    part, procedure = handle.perturbation, handle.procedure
    if part is not None and part.forward_only:
        raise TrainingError(
            f"{type(part).__name__} takes no backward: call loss = handle.backward(lambda: loss of this batch) in place of "
            "loss.backward() and handle.after_backward()"
        )
    everything = {**handle.blocks(), **handle.plain_blocks()}
    handle.calls.before_backward_part(everything)
    if finite:
        check_finite(everything, handle.step_count)
    _add_regularizers(handle)
    if procedure is not None and procedure.second_pass:
        gradient_at_new_point(handle, procedure, everything, replay)
    elif part is not None and part.second_pass:
        second_gradient(handle, part, everything, replay)
    if handle.masks.recording and finite:
        check_finite(everything, handle.step_count)
    if part is not None and not part.second_pass:
        part.move(handle.blocks(), learning_rate=handle.learning_rate)
    handle.masks.forget()
    handle.calls.after_backward_part({**handle.blocks(), **handle.plain_blocks()})


def _add_regularizers(handle: Handle) -> None:
    """Adds what belongs to the loss but not to the batch."""
    for part in (handle.schedule, handle.procedure):
        if part is not None:
            part.before_step(handle.step_count, handle.blocks())


def check_finite(blocks: Blocks, step: int) -> None:
    """Looks for NaN and infinity in the gradients.

    Raises:
        TrainingError: names the first tensor that has some.
    """
    for site, block in blocks.items():
        for role, tensor in block.items():
            if tensor.grad is not None and not torch.isfinite(whole(tensor.grad)).all():
                raise TrainingError(
                    f"step {step}: the gradient of {site}.{role} holds NaN or infinity. The weights are "
                    "those of the last good step; lower the learning rate, or look for NaN in this batch"
                )


def second_gradient(handle: Handle, perturbation: Perturbation, blocks: Blocks, replay: Callable[[], Any] | None) -> None:
    """Moves, takes the gradients again with the dropout masks of the first pass, and moves back to the bit.

    Args:
        handle: whose model and masks.
        perturbation: a two-pass one.
        blocks: every trained tensor.
        replay: runs the forwards and backwards of this step again.

    Raises:
        TrainingError: there is no replay, or it is not the step again.
    """
    _check_replay(replay, perturbation)
    perturbation.move(blocks, learning_rate=handle.learning_rate)
    try:
        _take_again(handle, blocks, replay)
        _add_regularizers(handle)
    finally:
        perturbation.restore(blocks)


def gradient_at_new_point(handle: Handle, procedure: Procedure, blocks: Blocks, replay: Callable[[], Any] | None) -> None:
    """Carries out what the procedure decides between the passes, and takes the gradients again where that has led.

    Args:
        handle, blocks, replay: as for `second_gradient`.
        procedure: a two-pass one.

    Raises:
        TrainingError: there is no replay, or it is not the step again.
    """
    _check_replay(replay, procedure)
    decided = procedure.between(handle.step_count, handle.blocks(), learning_rate=handle.learning_rate)
    with torch.no_grad():
        handle.apply_(decided)
    _take_again(handle, {**blocks, **handle.blocks()}, replay)
    _add_regularizers(handle)


def _check_replay(replay: Callable[[], Any] | None, part: Perturbation | Procedure) -> None:
    if replay is None:
        raise TrainingError(
            f"{type(part).__name__} takes the gradient a second time; pass a function that runs forward and "
            "backward of this batch again: handle.after_backward(lambda: model(**batch).loss.backward()), or let "
            "handle.backward(lambda: model(**batch).loss) do both"
        )


def _take_again(handle: Handle, blocks: Blocks, replay: Callable[[], Any] | None) -> None:
    for block in blocks.values():
        for tensor in block.values():
            tensor.grad = None
    with handle.masks.replayed(), running_statistics_kept(handle.model), torch.enable_grad():
        if replay is not None:
            replay()
    if some_gradient(blocks) is None:
        raise TrainingError("the replay gave no gradient; it has to run forward and backward: lambda: loss(batch).backward()")


def refuse_per_layer(handle: Handle, steps: Iterable[Step]) -> None:
    """Checks that nothing needs all gradients at once.

    Raises:
        TrainingError: something does.
    """
    clipping = [step.name for step in steps if step.across is not None]
    parts = [type(part).__name__ for part in (handle.schedule, handle.perturbation, handle.procedure) if part is not None]
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        parts.append("the averaging of gradients over processes")
    if clipping or parts:
        raise TrainingError(
            "per_layer=True moves each layer inside backward, where the gradients of the others are not there yet, but "
            f"{handle.recipe.name!r} has {' and '.join([*clipping, *parts])}, which works between backward and step; leave "
            "per_layer out"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; modes come back as they were, module by module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Brings the running statistics of normalization layers back afterwards."""
    kept = [
        (buffer, buffer.clone())
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for buffer in module.buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
