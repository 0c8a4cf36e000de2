"""`RelaxedRecursive`: a model whose stack of layers is looped, its low-rank factors per depth, its file, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from rankwise.core import checkpoint
from rankwise.core.errors import ArgumentError, CheckpointError, RankwiseError, did_you_mean, shorten
from rankwise.core.operators import LowRank
from rankwise.procedures.layer_tying import (
    CHILD,
    Relaxation,
    check_loops,
    find_stack,
    linear_maps,
    loop_,
    shared_names,
    unloop_,
    wide,
)

KIND = "relaxed_recursive"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What defines the looped form of a model beside its tensors.

    Attributes:
        layers: dotted name of the stack.
        loops: B, how often the shared layers run.
        rank: r of the factors, clipped to min(m, n) map by map.
        vectors: "tied" or "own" norms and biases.
    """

    layers: str
    loops: int
    rank: int
    vectors: str = "tied"


class RelaxedRecursive:
    """A model with looped layers; made by `relaxed_recursive` or `RelaxedRecursive.load`.

    Attributes:
        model: the model, changed in place.
        plan: its `Plan`.
        blocks: the layers of all depths.
        shared_blocks: the K layers that own the shared tensors; they are also those of the first K depths.
        maps: the linear maps within a layer by path.
        without_factors: parameters of two dimensions and more that are shared, but lie in no layer that could have factors
            (embeddings, fused experts): what sharing loses there, no rank wins back.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, blocks: Sequence[nn.Module], factors: Mapping[tuple[int, str], LowRank]
    ) -> None:
        self.model, self.plan, self.blocks = model, plan, tuple(blocks)
        self.shared_blocks = self.blocks[: len(blocks) // plan.loops]
        self.maps = linear_maps(blocks[0], plan.layers)
        relaxed = {f"{path}.weight".lstrip(".") for path in self.maps if plan.rank}
        shared = [name for name, tensor in blocks[0].named_parameters() if tensor.dim() > 1]
        self.without_factors = tuple(name for name in shared if name not in relaxed)
        for depth, block in enumerate(self.blocks):
            owners = dict(self.shared_blocks[depth % len(self.shared_blocks)].named_modules())
            for path, module in list(block.named_modules()):
                pair = factors.get((depth, path))
                relaxation = None if pair is None else Relaxation(pair.B, pair.A, self.maps[path].layout)
                owner = None if depth < len(self.shared_blocks) else owners[path]
                loop_(module, owner, shared_names(module, plan.vectors), relaxation)

    def __repr__(self) -> str:
        said = f"{self.plan.layers}: {len(self.shared_blocks)} layers × {self.plan.loops} loops, rank {self.plan.rank}"
        alone = shorten(self.without_factors)
        return f"RelaxedRecursive({said}" + (f"; shared without factors: {alone})" if alone else ")")

    def update_of(self, depth: int, path: str) -> LowRank:
        """B_l A_l at a depth, counted from 0, of the map at `path` within a layer; its factors are the trained tensors.

        Raises:
            ArgumentError: no such depth or map, or the model is unrolled.
        """
        self._check_looped()
        if not 0 <= depth < len(self.blocks):
            raise ArgumentError(f"depth {depth} is not one of 0 to {len(self.blocks) - 1}")
        if path not in self.maps:
            raise ArgumentError(f"{path!r} is no linear map of a layer. {did_you_mean(path, self.maps)}")
        module = self.blocks[depth].get_submodule(path)
        relaxation = module._modules.get(CHILD)
        if isinstance(relaxation, Relaxation):
            return relaxation.operator()
        weight, target = wide(cast(Tensor, module.weight)), self.maps[path]
        return LowRank(weight.new_zeros(target.m, 0), weight.new_zeros(0, target.n))

    @torch.no_grad()
    def unroll_(self) -> nn.Module:
        """The ordinary model with all its layers, W_l = W' + B_l A_l, in place; this object is used up then.

        Raises:
            ArgumentError: it is unrolled already.
        """
        self._check_looped()
        made = [
            (module, self._own(depth, path))
            for depth, block in enumerate(self.blocks)
            for path, module in block.named_modules()
            if path.rpartition(".")[2] != CHILD
        ]
        for module, parameters in made:
            unloop_(module, parameters)
        self.blocks = self.shared_blocks = ()
        return self.model

    def _own(self, depth: int, path: str) -> dict[str, nn.Parameter]:
        """The parameters that the module at this depth and path has when it stands alone."""
        owner, own = self.shared_blocks[depth % len(self.shared_blocks)].get_submodule(path), {}
        for name in shared_names(owner, self.plan.vectors):
            shared = cast(nn.Parameter, owner._parameters[name])
            value = shared.detach().clone()
            if path in self.maps and name == "weight":
                layout = self.maps[path].layout
                matrix = wide(layout.to_matrix(value)) + self.update_of(depth, path).dense()  # (m, n)
                value = layout.from_matrix(matrix.to(value.dtype), value).contiguous()
            own[name] = nn.Parameter(value, requires_grad=shared.requires_grad)
        return own

    def _check_looped(self) -> None:
        if not self.blocks:
            raise ArgumentError("this model was unrolled (unroll_); it is an ordinary one now, without factors of its own")

    def save(self, directory: str | Path) -> Path:
        """Writes the whole model into a folder, every shared tensor once; see `load`.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        self._check_looped()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(self.model).items()}
        return checkpoint.write(Path(directory), {"format": checkpoint.FORMAT, "kind": KIND, KIND: asdict(self.plan)}, tensors)

    @staticmethod
    def load(model: nn.Module, directory: str | Path) -> RelaxedRecursive:
        """Gives an ordinary model of the same architecture the looped form and the tensors of a saved one, in place.

        Args:
            model: with any weights; all of them come from the file.
            directory: what `save` wrote.

        Raises:
            CheckpointError: damaged files, or another architecture; the model stays as it was then.
        """
        folder = Path(directory)
        description, tensors = checkpoint.read(folder)
        if description.get("kind") != KIND:
            raise CheckpointError(f"{folder} holds an adapter and no relaxed recursive model; use rankwise.load_")
        try:
            plan = Plan(**description[KIND])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / checkpoint.JSON_NAME} is damaged: {error}") from error
        try:
            layers, blocks = find_stack(model, plan.layers)
            check_loops(len(blocks), plan.loops)
            factors = {
                (depth, path): _blank(target.parameter(), min(plan.rank, target.m, target.n), target.m, target.n)
                for path, target in linear_maps(blocks[0], layers).items()
                for depth in range(len(blocks))
                if plan.rank
            }
        except RankwiseError as error:
            raise CheckpointError(f"{folder} does not fit this model: {error}") from error
        plain = [(module, dict(module._parameters)) for block in blocks for module in block.modules()]
        looped = RelaxedRecursive(model, plan, blocks, factors)
        try:
            _fill(_tensors(model), tensors, folder)
        except CheckpointError:
            for module, parameters in plain:
                unloop_(module, cast(dict[str, nn.Parameter], parameters))
            raise
        return looped


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter once, and the buffers that a state dict has."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


def _blank(weight: Tensor, rank: int, m: int, n: int) -> LowRank:
    like = wide(weight)
    return LowRank(like.new_zeros(m, rank), like.new_zeros(rank, n))


@torch.no_grad()
def _fill(places: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path) -> None:
    unused, unfilled = sorted(set(tensors) - set(places)), sorted(set(places) - set(tensors))
    if unused or unfilled:
        raise CheckpointError(
            f"{folder} does not fit: {len(unused)} tensors of the file have no place here ({shorten(unused) or 'none'}), "
            f"{len(unfilled)} places got no tensor ({shorten(unfilled) or 'none'})"
        )
    for name, place in places.items():
        if place.shape != tensors[name].shape:
            raise CheckpointError(f"{folder}: {name} is {tuple(tensors[name].shape)} in the file, {tuple(place.shape)} here")
    for name, place in places.items():
        place.copy_(tensors[name])
