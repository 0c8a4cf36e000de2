"""Gradient transformations on blocks, chained, and the one optimizer shell that runs them.

A block is the tensors of one site by role, {"A": (r, n), "B": (m, r)} or {"weight": (m, n)}. A `Step` turns gradients into
directions; the shell takes p <- p - lr · direction. State lives per tensor, {role: {name: Tensor}}, so that schedulers,
`state_dict`, sharding and resuming work as for any torch optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Block = Mapping[str, Tensor]
State = dict[str, dict[str, Tensor]]  # role -> name -> tensor

GRADIENT, MOMENTS, DIRECTION = "gradient", "moments", "direction"  # the three stages of a chain, in order


def _nothing(block: Block) -> State:
    return {role: {} for role in block}


class Step(NamedTuple):
    """One gradient transformation.

    Attributes:
        init: block -> state.
        update: (gradients, state, parameters) -> directions, in the same roles; may change the state in place.
        name: for messages.
        stage: "gradient" (before moments: preconditioners), "moments" (Adam, SGD, projected Adam), "direction" (after).
        roles: roles that must be present; the step is refused elsewhere.
        preconditions: whether it preconditions the gradient; two of those in one chain are refused.
        plain: what blocks without these roles (a classification head) get instead; None means they are left alone.
    """

    init: Callable[[Block], State]
    update: Callable[[Block, State, Block], Block]
    name: str
    stage: str
    roles: frozenset[str] = frozenset()
    preconditions: bool = False
    plain: Any = None


def stateless(
    update: Callable[[Block, State, Block], Block],
    *,
    name: str,
    stage: str,
    roles: Iterable[str] = (),
    preconditions: bool = False,
) -> Step:
    """A step without state."""
    return Step(_nothing, update, name, stage, frozenset(roles), preconditions)


def chain(*steps: Step) -> Step:
    """Runs steps one after the other, in the order of their stages."""
    order = (GRADIENT, MOMENTS, DIRECTION)
    ordered = sorted(steps, key=lambda step: order.index(step.stage))

    def init(block: Block) -> State:
        state: State = {role: {} for role in block}
        for index, step in enumerate(ordered):
            for role, tensors in step.init(block).items():
                state[role].update({f"{index}.{name}": tensor for name, tensor in tensors.items()})
        return state

    def update(gradients: Block, state: State, parameters: Block) -> Block:
        for index, step in enumerate(ordered):
            prefix = f"{index}."
            part: State = {
                role: {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
                for role, tensors in state.items()
            }
            gradients = step.update(gradients, part, parameters)
            for role, tensors in part.items():
                state[role].update({f"{prefix}{name}": tensor for name, tensor in tensors.items()})
        return gradients

    roles = frozenset().union(*(step.roles for step in ordered))
    return Step(init, update, " + ".join(step.name for step in ordered), MOMENTS, roles)


def for_plain_blocks(steps: Iterable[Step]) -> list[Step]:
    """The chain for tensors that belong to no adapter: steps that need roles give way to what they name as `plain`."""
    kept = []
    for step in steps:
        if not step.roles:
            kept.append(step)
        elif step.plain is not None:
            kept.append(step.plain)
    return kept


class BlockOptimizer(torch.optim.Optimizer):
    """Runs a chain of steps on named blocks; for the rest an ordinary torch optimizer.

    Args:
        blocks: site -> block; parameters are read from here once, afterwards from `param_groups`.
        steps: the chain for adapter blocks.
        lr: learning rate.
        plain: site names whose blocks are ordinary tensors (a head), which get the chain of `for_plain_blocks`.
        before: called at the start of every step, to check that nothing was forgotten.
    """

    def __init__(
        self,
        blocks: Mapping[str, Mapping[str, torch.nn.Parameter]],
        steps: Iterable[Step],
        lr: float,
        *,
        plain: Iterable[str] = (),
        before: Callable[[], None] | None = None,
    ) -> None:
        steps = list(steps)
        self._steps, self._plain_steps = chain(*steps), chain(*for_plain_blocks(steps))
        self._plain, self._before = frozenset(plain), before
        named = [(f"{site}.{role}", tensor) for site, block in blocks.items() for role, tensor in block.items()]
        super().__init__(named, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. The closure, where given, computes the loss and the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._before is not None:
            self._before()
        for group in self.param_groups:
            for site, block in _blocks_of(group).items():
                parameters = {role: tensor for role, tensor in block.items() if tensor.grad is not None}
                if not parameters:
                    continue
                self._step_block(site, parameters, float(group["lr"]))
        return loss

    def _step_block(self, site: str, parameters: dict[str, Tensor], lr: float) -> None:
        step = self._plain_steps if site in self._plain else self._steps
        if not all(role in parameters for role in step.roles):
            return  # a frozen role: the pieces that need it have nothing to do at this site
        if any(not self.state[tensor] for tensor in parameters.values()):
            for role, tensors in step.init(parameters).items():
                self.state[parameters[role]].update(tensors)
        gradients = {role: tensor.grad for role, tensor in parameters.items() if tensor.grad is not None}
        state: State = {role: self.state[tensor] for role, tensor in parameters.items()}
        directions = step.update(gradients, state, parameters)
        for role, tensor in parameters.items():
            tensor.add_(directions[role].to(tensor.dtype), alpha=-lr)


def _blocks_of(group: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in zip(group["param_names"], group["params"], strict=True):
        site, role = name.rsplit(".", 1)
        blocks.setdefault(site, {})[role] = tensor
    return blocks
