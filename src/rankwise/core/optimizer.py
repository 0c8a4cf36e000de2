"""The one optimizer: a chain of steps on named blocks, and a torch optimizer to schedulers, loops and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.errors import TrainingError
from rankwise.core.step import CLIPPING, GRADIENT, SiteBlock, State, Step, chain, for_roles, part_of, put_back


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
        per_layer: whether each block moves during backward, as soon as its gradients are there, which are then freed.
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
        per_layer: bool = False,
    ) -> None:
        steps = list(steps)
        self._steps, self._chains, self._facts = steps, {}, dict(facts or {})
        self._plain, self._before, self.per_layer = frozenset(plain), before, per_layer
        self._names: dict[tuple[str, frozenset[str]], dict[str, frozenset[str]]] = {}  # of the state that a chain begins with
        named = [(f"{site}.{role}", tensor) for site, block in blocks.items() for role, tensor in block.items()]
        super().__init__(named, {"lr": lr})
        if per_layer:
            for group in self.param_groups:
                for tensor in group["params"]:
                    self._step_in_backward(group, tensor)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. The closure, where given, computes the loss and the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._before is not None:
            self._before()
        clipped = self._clipped() if any(step.across is not None for step in self._steps) else {}
        for group, parameters in self._moving():
            self._step_block(parameters, float(group["lr"]), clipped.get(parameters.site))
        return loss

    def exchange(self, site: str, old: Mapping[str, nn.Parameter], new: Mapping[str, nn.Parameter]) -> None:
        """Puts the new tensors of a site in the old ones' places, in the order in which a new optimizer would have them.

        State is stored by place. Tensors that are new have no state yet.
        """
        if old.keys() == new.keys() and all(new[role] is tensor for role, tensor in old.items()):
            return
        added = {role: tensor for role, tensor in new.items() if tensor.requires_grad and old.get(role) is not tensor}
        for group in self.param_groups:
            pairs = [*zip(group["param_names"], group["params"], strict=True)]
            mine = [index for index, (_, tensor) in enumerate(pairs) if any(tensor is other for other in old.values())]
            if not mine:
                continue
            there = [pairs[index][1] for index in mine]
            kept = {role: tensor for role, tensor in new.items() if any(tensor is other for other in there)}
            others = [pair for index, pair in enumerate(pairs) if index not in mine]
            others[mine[0] : mine[0]] = [(f"{site}.{role}", new[role]) for role in new if role in kept or role in added]
            group["param_names"], group["params"] = [name for name, _ in others], [tensor for _, tensor in others]
            for tensor in there:
                if not any(tensor is other for other in kept.values()):
                    self.state.pop(tensor, None)
            if self.per_layer:
                for tensor in added.values():
                    self._step_in_backward(group, tensor)
            added = {}

    def _moving(self) -> Iterator[tuple[dict[str, Any], SiteBlock]]:
        """Every block that has a gradient, with its group."""
        for group in self.param_groups:
            for site, block in _blocks_of(group).items():
                trained = {role: tensor for role, tensor in block.items() if tensor.grad is not None}
                if trained:
                    yield group, self._known(site, trained, group)

    def _known(self, site: str, tensors: dict[str, Tensor], group: Mapping[str, Any]) -> SiteBlock:
        known = self._facts.get(site, SiteBlock())
        rates = (float(group["lr"]), float(group.get("initial_lr", self.defaults["lr"])))
        return SiteBlock(tensors, site=site, scale=known.scale, shape=known.shape, rates=rates)

    def _clipped(self) -> dict[str, Mapping[str, Tensor]]:
        """The gradients of every site behind the preconditioners and what looks at all of them together."""
        gradients: dict[str, Mapping[str, Tensor]] = {}
        parameters: dict[str, Mapping[str, Tensor]] = {}
        states: dict[str, State] = {}
        for _, block in self._moving():
            state = self._state_of(block)
            ahead = [step for step in self._chain_parts(block) if step.stage == GRADIENT]
            gradients[block.site] = chain(*ahead).update(_gradients(block), state, block) if ahead else _gradients(block)
            parameters[block.site], states[block.site] = block, state
        for step in self._steps:
            if step.across is None:
                continue
            parts = {site: part_of(state, f"{step.name}.") for site, state in states.items()}
            gradients = dict(step.across(gradients, parameters, parts))
            for site, part in parts.items():
                put_back(states[site], part, f"{step.name}.")
        return gradients

    def _chain_parts(self, block: SiteBlock) -> list[Step]:
        """A frozen role leaves out the steps that need it, not the whole block."""
        return for_roles(self._steps, frozenset() if block.site in self._plain else frozenset(block))

    def _chain_for(self, block: SiteBlock) -> tuple[Step, Step]:
        """The whole chain for a block, and what is left of it behind the clipping."""
        key = (frozenset(block), block.site in self._plain)
        if key not in self._chains:
            parts = self._chain_parts(block)
            rest = chain(*(part for part in parts if part.stage not in (GRADIENT, CLIPPING)))
            self._chains[key] = (chain(*parts), rest)
        return self._chains[key]

    def _state_of(self, parameters: SiteBlock) -> State:
        """The block's state, begun where there is none yet, also where freezing a role has led to another chain."""
        step, _ = self._chain_for(parameters)
        key = (parameters.site, frozenset(parameters))
        started = step.init(parameters) if key not in self._names else None
        if started is not None:
            self._names[key] = {role: frozenset(names) for role, names in started.items()}
        for role, tensor in parameters.items():
            state: dict[str, Tensor] = self.state[tensor]
            if self._names[key][role] <= state.keys():
                continue
            started = started or step.init(parameters)
            own = {name.partition(".")[0] for name in started[role]}
            kept = {name: value for name, value in state.items() if name.partition(".")[0] in own}
            self.state[tensor] = {**started[role], **kept}
        return {role: self.state[tensor] for role, tensor in parameters.items()}

    def _step_block(self, parameters: SiteBlock, lr: float, clipped: Mapping[str, Tensor] | None = None) -> None:
        state = self._state_of(parameters)
        step, rest = self._chain_for(parameters)
        gradients = _gradients(parameters) if clipped is None else clipped
        update = step.update if clipped is None else rest.update
        turns: list[tuple[str, ...]] = [(role,) for role in step.order if role in parameters]
        turns.append(tuple(role for role in parameters if role not in step.order))
        for turn in turns:
            directions = update({role: gradients[role] for role in turn}, state, parameters)
            for role in turn:
                parameters[role].add_(directions[role].to(parameters[role].dtype), alpha=-lr)
        if step.after is not None and step.rescaled is not None:
            for role, factor in step.after(state, parameters).items():
                parameters[role].mul_(factor)
                step.rescaled(state[role], factor)

    def _step_in_backward(self, group: dict[str, Any], tensor: Tensor) -> None:
        """Moves a tensor's block inside backward, once every tensor of the block has its gradient; frees these."""

        def arrived(_: Tensor) -> None:
            site = next(
                name for name, kept in zip(group["param_names"], group["params"], strict=True) if kept is tensor
            ).rpartition(".")[0]
            block = {role: kept for role, kept in _blocks_of(group)[site].items() if kept.requires_grad}
            if any(kept.grad is None for kept in block.values()):
                return
            self.move_now(site, block, group)

        tensor.register_post_accumulate_grad_hook(arrived)

    @torch.no_grad()
    def move_now(self, site: str, block: dict[str, Tensor], group: Mapping[str, Any]) -> None:
        """Moves one block by its gradients and frees them.

        Raises:
            TrainingError: a gradient is not finite.
        """
        for role, tensor in block.items():
            if tensor.grad is not None and not torch.isfinite(tensor.grad).all():
                raise TrainingError(
                    f"the gradient of {site}.{role} holds NaN or infinity. With per_layer=True, layers behind it in the model "
                    "have moved already; go back to the last checkpoint and lower the learning rate"
                )
        self._step_block(self._known(site, block, group), float(group["lr"]))
        for tensor in block.values():
            tensor.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, copied and to the bit: torch would cast state to the dtype of its tensor.

        Counters (0-d tensors) stay where they are; the rest goes to the device of the tensor that it belongs to. Tensors that
        were frozen when this optimizer was made, and that it lacks, are passed over.
        """
        state_dict = self._without_frozen(state_dict)
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

    def _without_frozen(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The stored groups without the tensors that are not here and had no state."""
        groups = []
        for stored, here in zip(state_dict["param_groups"], self.param_groups, strict=False):
            names = set(here["param_names"])
            pairs = [
                (name, index)
                for name, index in zip(stored.get("param_names", ()), stored["params"], strict=False)
                if name in names or state_dict["state"].get(index)
            ]
            left = len(stored["params"]) > len(pairs) == len(names)
            kept = {"param_names": [name for name, _ in pairs], "params": [index for _, index in pairs]} if left else {}
            groups.append({**stored, **kept})
        return {**state_dict, "param_groups": groups + state_dict["param_groups"][len(groups) :]}


def _gradients(block: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {role: tensor.grad for role, tensor in block.items() if tensor.grad is not None}


def _blocks_of(group: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in zip(group["param_names"], group["params"], strict=True):
        site, role = name.rsplit(".", 1)
        blocks.setdefault(site, {})[role] = tensor
    return blocks
