"""Gradient transformations on blocks, and chains of them; `optimizer.BlockOptimizer` runs them.

A block is the tensors of one site by role, {"A": (r, n), "B": (m, r)} or {"weight": (m, n)}. A `Step` turns gradients into
directions; the shell takes p <- p - lr · direction. State lives per tensor, {role: {name: Tensor}}, so that schedulers,
`state_dict`, sharding and resuming work as for any torch optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from rankwise.core.errors import Problem
from rankwise.core.gain import Gain
from rankwise.core.sharding import is_sharded, sharded_like, spread_like, whole

Block = Mapping[str, Tensor]
State = dict[str, dict[str, Tensor]]  # role -> name -> tensor
Sites = Mapping[str, Block]
Across = Callable[[Sites, Sites, Mapping[str, State]], Sites]  # (gradients, parameters, states) -> gradients

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
        across: of a step of stage "clipping": (gradients, parameters, states), each by site, of all blocks together ->
            gradients. Called once per step, after the preconditioners; `update` is not called then.
        exact: whether it reads the full gradient off those of the factors at their own values (g_A = s Bᵀ G), which gradients
            taken elsewhere (SAM) or estimated (zeroth order) do not allow.
        layers: names of layers (the last part, or the whole) that it treats in a way of their own; they must exist.
        problem_at: (site, m, n) -> why it cannot run on the weight of that layer, or None.
        gain: by what the gradient that reaches the tensors of an additive update is multiplied during backward, row by row.
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
    across: Across | None = None
    exact: bool = False
    layers: tuple[str, ...] = ()
    problem_at: Callable[[str, int, int], Problem | None] | None = None
    gain: Gain | None = None


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


def on_whole(step: Step) -> Step:
    """The same step for tensors that are sharded too: those of its roles are gathered, and what comes out is sharded again.

    Its state is that of whole tensors, the same on every device. For steps that decompose matrices or take their products.
    """

    def gathered(block: Block) -> Block:
        if not any(is_sharded(tensor) for tensor in block.values()):
            return block
        tensors = {role: whole(tensor) if role in step.roles else tensor for role, tensor in block.items()}
        shape, scale, rates = shape_of(block), scale_of(block), rates_of(block)
        return SiteBlock(tensors, site=site_name_of(block), scale=scale, shape=shape, rates=rates)

    def update(gradients: Block, state: State, parameters: Block) -> Block:
        directions = step.update(gathered(gradients), state, gathered(parameters))
        return {role: spread_like(direction, gradients[role]) for role, direction in directions.items()}

    def after(state: State, parameters: Block) -> dict[str, Tensor]:
        present = gathered(parameters)
        factors = step.after(state, present) if step.after is not None else {}
        for role, tensor in present.items():
            if tensor is not parameters[role]:  # it may have been moved in place
                parameters[role].copy_(sharded_like(tensor, parameters[role]))
        return factors

    def init(block: Block) -> State:
        return step.init(gathered(block))

    return step._replace(init=init, update=update, after=None if step.after is None else after)


def chain(*steps: Step) -> Step:
    """Runs steps one after the other, in the order of their stages. State is kept under "<step's name>.<name>"."""
    order = (GRADIENT, CLIPPING, MOMENTS, DIRECTION)
    ordered = sorted(steps, key=lambda step: order.index(step.stage))
    named: list[tuple[str, Step]] = []  # prefix of the state's names, step
    for step in ordered:
        repeated = sum(step.name == other.name for _, other in named)
        named.append((f"{step.name}{repeated + 1 if repeated else ''}.", step))

    def init(block: Block) -> State:
        state: State = {role: {} for role in block}
        for prefix, step in named:
            put_back(state, step.init(block), prefix)
        return state

    def update(gradients: Block, state: State, parameters: Block) -> Block:
        for prefix, step in named:
            part = part_of(state, prefix)
            gradients = step.update(gradients, part, parameters)
            put_back(state, part, prefix)
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


def part_of(state: State, prefix: str) -> State:
    """What one step of a chain keeps."""
    return {role: _with_prefix(tensors, prefix) for role, tensors in state.items()}


def put_back(state: State, part: State, prefix: str) -> None:
    """Undoes `part_of`."""
    for role, tensors in part.items():
        for name, tensor in tensors.items():
            state[role][prefix + name] = tensor


def for_roles(steps: Iterable[Step], roles: Iterable[str]) -> list[Step]:
    """The chain for a block that trains only these roles: steps that need others give way to what they name as `plain`."""
    present = frozenset(roles)
    kept = [step if step.roles <= present else step.plain for step in steps]
    return [step for step in kept if step is not None]
