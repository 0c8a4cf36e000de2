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

GRADIENT, CLIPPING, MOMENTS, DIRECTION = "gradient", "clipping", "moments", "direction"  # the stages of a chain, in order


class SiteBlock(dict[str, Tensor]):
    """The trained tensors of one site by role, and what a step may know of the site.

    Args:
        tensors: by role.
        site: its name.
        scale: s of the update s · B A; 1 where there is none.
        shape: of the layer's weight in matrix orientation, (out, in, kernel…); empty where there is none.
        rates: the learning rate of this step, and the one that its schedule started from.
    """

    def __init__(
        self,
        tensors: Block | None = None,
        *,
        site: str = "",
        scale: float = 1.0,
        shape: tuple[int, ...] = (),
        rates: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__(tensors or {})
        self.site, self.scale, self.shape, self.rates = site, scale, shape, rates


def scale_of(block: Block) -> float:
    """The scale s of the block's update; 1 for a plain mapping."""
    return block.scale if isinstance(block, SiteBlock) else 1.0


def site_name_of(block: Block) -> str:
    """The site's name; empty for a plain mapping."""
    return block.site if isinstance(block, SiteBlock) else ""


def shape_of(block: Block) -> tuple[int, ...]:
    """The shape of the layer's weight, (out, in, kernel…); empty for a plain mapping."""
    return block.shape if isinstance(block, SiteBlock) else ()


def rates_of(block: Block) -> tuple[float, float]:
    """The learning rate of this step, and the one that its schedule started from; 1 and 1 for a plain mapping."""
    return block.rates if isinstance(block, SiteBlock) else (1.0, 1.0)


def _nothing(block: Block) -> State:
    return {role: {} for role in block}


class Step(NamedTuple):
    """One gradient transformation.

    Attributes:
        init: block -> state.
        update: (gradients, state, parameters) -> directions, in the same roles; may change the state in place.
        name: for messages.
        stage: "gradient" (before moments: preconditioners), "clipping", "moments" (Adam, SGD, projected Adam), "direction"
            (after).
        roles: roles that must be present; the step is refused elsewhere.
        preconditions: whether it preconditions the gradient; two of those in one chain are refused.
        plain: what blocks without these roles (a classification head) get instead; None means they are left alone.
        rank: the rank it projects to, which must fit every layer; None where it has none.
        order: roles the shell moves one after the other, so that later ones see earlier ones moved; empty: all at once.
        after: called when the tensors have moved, (state, parameters) -> factors to multiply tensors by, per role.
        rescaled: how this step's state of one tensor follows when that tensor is multiplied by a factor; None: not at all.
    """

    init: Callable[[Block], State]
    update: Callable[[Block, State, Block], Block]
    name: str
    stage: str
    roles: frozenset[str] = frozenset()
    preconditions: bool = False
    plain: Any = None
    rank: int | None = None
    order: tuple[str, ...] = ()
    after: Callable[[State, Block], dict[str, Tensor]] | None = None
    rescaled: Callable[[dict[str, Tensor], Tensor], None] | None = None


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
    """Runs steps one after the other, in the order of their stages. State is kept under "<step's name>.<name>"."""
    order = (GRADIENT, CLIPPING, MOMENTS, DIRECTION)
    ordered = sorted(steps, key=lambda step: order.index(step.stage))
    named: list[tuple[str, Step]] = []  # prefix of the state's names, step
    for step in ordered:
        repeated = sum(step.name == other.name for _, other in named)
        named.append((f"{step.name}{repeated + 1 if repeated else ''}.", step))

    def part_of(state: State, prefix: str) -> State:
        return {role: _with_prefix(tensors, prefix) for role, tensors in state.items()}

    def init(block: Block) -> State:
        state: State = {role: {} for role in block}
        for prefix, step in named:
            _put_back(state, step.init(block), prefix)
        return state

    def update(gradients: Block, state: State, parameters: Block) -> Block:
        for prefix, step in named:
            part = part_of(state, prefix)
            gradients = step.update(gradients, part, parameters)
            _put_back(state, part, prefix)
        return gradients

    def after(state: State, parameters: Block) -> dict[str, Tensor]:
        factors: dict[str, Tensor] = {}
        for prefix, step in named:
            if step.after is not None:
                for role, factor in step.after(part_of(state, prefix), parameters).items():
                    factors[role] = factors[role] * factor if role in factors else factor
        return factors

    def rescaled(tensors: dict[str, Tensor], factor: Tensor) -> None:
        for prefix, step in named:
            if step.rescaled is not None:
                step.rescaled(_with_prefix(tensors, prefix), factor)

    return Step(
        init,
        update,
        " + ".join(step.name for step in ordered),
        MOMENTS,
        frozenset().union(*(step.roles for step in ordered)),
        order=next((step.order for step in ordered if step.order), ()),
        after=after if any(step.after is not None for step in ordered) else None,
        rescaled=rescaled,
    )


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _put_back(state: State, part: State, prefix: str) -> None:
    for role, tensors in part.items():
        for name, tensor in tensors.items():
            state[role][prefix + name] = tensor


def for_roles(steps: Iterable[Step], roles: Iterable[str]) -> list[Step]:
    """The chain for a block that trains only these roles: steps that need others give way to what they name as `plain`."""
    present = frozenset(roles)
    kept = [step if step.roles <= present else step.plain for step in steps]
    return [step for step in kept if step is not None]


class BlockOptimizer(torch.optim.Optimizer):
    """Runs a chain of steps on named blocks; for the rest an ordinary torch optimizer.

    Args:
        blocks: site -> block; parameters are read from here once, afterwards from `param_groups`.
        steps: the chain for adapter blocks.
        lr: learning rate.
        plain: site names whose blocks are ordinary tensors (a head), whose tensors have no roles: steps that need some are
            left out there, or replaced by what they name as `plain`.
        before: called at the start of every step, to check that nothing was forgotten.
        facts: site -> an empty `SiteBlock` that says what is known of it.
    """

    def __init__(
        self,
        blocks: Mapping[str, Mapping[str, torch.nn.Parameter]],
        steps: Iterable[Step],
        lr: float,
        *,
        plain: Iterable[str] = (),
        before: Callable[[], None] | None = None,
        facts: Mapping[str, SiteBlock] | None = None,
    ) -> None:
        steps = list(steps)
        self._facts = dict(facts or {})
        self._steps, self._chains = steps, {}
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
                known = self._facts.get(site) or SiteBlock(site=site)
                trained = {role: tensor for role, tensor in block.items() if tensor.grad is not None}
                if not trained:
                    continue
                rates = (float(group["lr"]), float(group.get("initial_lr", self.defaults["lr"])))
                parameters = SiteBlock(trained, site=site, scale=known.scale, shape=known.shape, rates=rates)
                self._step_block(site, parameters, float(group["lr"]))
        return loss

    def _chain_for(self, roles: frozenset[str]) -> Step:
        """The chain for a block with these roles. A frozen role leaves out the steps that need it, not the whole block."""
        if roles not in self._chains:
            self._chains[roles] = chain(*for_roles(self._steps, roles))
        return self._chains[roles]

    def _step_block(self, site: str, parameters: SiteBlock, lr: float) -> None:
        step = self._chain_for(frozenset() if site in self._plain else frozenset(parameters))
        fresh = [role for role, tensor in parameters.items() if not self.state[tensor]]
        if fresh:
            started = step.init(parameters)
            for role in fresh:
                self.state[parameters[role]].update(started[role])
        gradients = {role: tensor.grad for role, tensor in parameters.items() if tensor.grad is not None}
        state: State = {role: self.state[tensor] for role, tensor in parameters.items()}
        turns: list[tuple[str, ...]] = [(role,) for role in step.order if role in parameters]
        turns.append(tuple(role for role in parameters if role not in step.order))
        for turn in turns:
            directions = step.update({role: gradients[role] for role in turn}, state, parameters)
            for role in turn:
                parameters[role].add_(directions[role].to(parameters[role].dtype), alpha=-lr)
        if step.after is not None and step.rescaled is not None:
            for role, factor in step.after(state, parameters).items():
                parameters[role].mul_(factor)
                step.rescaled(state[role], factor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, copied and to the bit: torch would cast state to the dtype of its tensor.

        Counters (0-d tensors) stay where they are; the rest goes to the device of the tensor that it belongs to.
        """
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        for index, tensor in zip(indices, tensors, strict=True):
            kept: dict[str, Tensor] = state_dict["state"].get(index, {})
            if not kept:  # an entry without state would outlive its tensor where a wrapper (FSDP2) replaces the tensors
                continue
            self.state[tensor] = {
                name: value.clone() if value.dim() == 0 else value.to(tensor.device, copy=True) for name, value in kept.items()
            }


def _blocks_of(group: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in zip(group["param_names"], group["params"], strict=True):
        site, role = name.rsplit(".", 1)
        blocks.setdefault(site, {})[role] = tensor
    return blocks
