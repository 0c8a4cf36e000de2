"""Private randomness: seeded generators, and dropout masks that can be drawn again. The global generators are untouched."""

from __future__ import annotations

import functools
import math
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from rankwise.core.errors import TrainingError
from rankwise.core.transforms import transformed

_REMEMBERED = 4096  # mask calls kept for recomputation: layers × micro-batches between a forward and its backward


def generator_for(seed: int, *names: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream depends on the seed and on names (of a layer, of a purpose). CPU streams agree everywhere."""
    text = "/".join(str(name) for name in (int(seed), *names))  # a CPU generator reads 32 bits of its seed and no more
    return torch.Generator(device).manual_seed(zlib.crc32(text.encode()))


class MaskStream:
    """Dropout masks of one adapter on a model: one per input tensor and forward, and the same again under recomputation.

    Layers that read the same tensor (q, k and v; gate and up) share one x̃, so it is made and kept once. A mask depends on
    the seed, the forward it was drawn in and the layer that asked first. Gradient checkpointing runs layers again inside
    backward; the stream then finds the forward it repeats by the layer and the content of its input.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.forwards = 0
        self.counting = False  # from the first mask on; without masks a compiled forward has nothing to guard on
        self.recording = False  # whether the forwards of a step are kept for a second pass
        self.drawn = False  # whether there was any mask: a compiled forward without masks is not counted, to stay one graph
        self._uncounted = False  # whether the present forward is such a one
        self._recorded: list[int] = []
        self._pending: list[int] | None = None  # during a second pass: forwards still to be repeated
        self._shared: tuple[weakref.ref[Tensor], int, float, str, Callable[[], Tensor], Tensor, Any] | None = None
        self._calls: OrderedDict[tuple[str, float], tuple[int, str]] = OrderedDict()
        self._kept: dict[tuple[bool, bool], tuple[Hashable, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"_recorded": [], "_pending": None, "_shared": None, "_calls": OrderedDict(), "_kept": {}}
        kept = {name: getattr(self, name) for name in ("seed", "forwards", "counting", "recording", "drawn", "_uncounted")}
        return kept | fresh

    def start_forward(self, model: Any = None, *_: object) -> None:
        """Called once per forward of the model, as its forward pre-hook; one that is repeated inside backward is none."""
        if not torch.compiler.is_compiling() and self._kept:
            self._kept.clear()
        if torch.compiler.is_compiling() and self.recording and not self.drawn:
            self._uncounted = True
        elif self.counting or self.recording:
            cast(Any, _eagerly)(self._next_forward, model)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A tensor, or several, that the layers of one forward share, made by the first that asks; the next makes its own.

        `key` changes with whatever the tensor is made of. Graphs that share it may be run backward one after the other
        (checkpointed regions, two losses), so its node must save no tensors. Compiled graphs and torch.func share nothing.
        """
        if torch.compiler.is_compiling() or transformed():
            return make()
        mode = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        kept = self._kept.get(mode)
        if kept is None or kept[0] != key:
            kept = self._kept[mode] = (key, make())
        return kept[1]

    def resume(self, forwards: int) -> None:
        """Goes on after so many counted forwards."""
        self.forwards, self.counting = forwards, forwards > 0

    def _next_forward(self, model: Any) -> None:
        if inside_backward():
            return
        self._shared, self.counting, self._uncounted = None, True, False
        repeats = torch.is_grad_enabled() and (model is None or model.training)  # others may differ from pass to pass
        if self._pending is not None:
            if not repeats:
                return
            if not self._pending:
                raise TrainingError(
                    f"the replay runs more forwards than the step did ({len(self._recorded)}); it has to repeat exactly the "
                    "forwards and backwards since the last step"
                )
            self.forwards = self._pending.pop(0)
            return
        self.forwards += 1
        if self.recording and repeats:
            self._recorded.append(self.forwards)

    def forget(self) -> None:
        """A step is over: its forwards will not be repeated."""
        self._recorded.clear()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within, forwards repeat those of the step, micro-batches too, in order and with the same masks.

        Raises:
            TrainingError: they are not as many as in the step.
        """
        forwards = self.forwards
        self._pending = list(self._recorded) if self._recorded else None
        try:
            yield
            if self._pending:
                raise TrainingError(
                    f"the replay ran {len(self._recorded) - len(self._pending)} of the step's {len(self._recorded)} forwards "
                    "in training mode. It has to run every micro-batch of the step again; run others under torch.no_grad()"
                )
        finally:
            self.forwards, self._pending, self._shared = forwards, None, None

    def thin(self, x: Tensor, probability: float, site: str) -> Tensor:
        """x̃ = mask ∘ x, the mask 0 with the given probability (to 1/65536), else 1 / (1 - probability).

        Raises:
            TrainingError: a recomputation asks for a forward that is no longer remembered.
        """
        return cast(Any, _eagerly)(self._thin, x, probability, site)

    def _thin(self, x: Tensor, probability: float, site: str) -> Tensor:
        self._count()
        if self._shared is not None:
            reference, version, kept, owner, draw, thinned, keeper = self._shared
            if reference() is x and version == x._version and kept == probability:
                self._remember(x, site, owner)
                same = keeper is _keeper() and thinned.requires_grad == (x.requires_grad and torch.is_grad_enabled())
                return thinned if same else _thinned(x, draw)
        forward, owner = self._call_of(x, site)
        draw = functools.partial(_drawn, self.seed, (forward, owner), x.shape, x.dtype, x.device, probability)
        thinned = _thinned(x, draw)
        self._shared = (weakref.ref(x, self._release), x._version, probability, owner, draw, thinned, _keeper())
        return thinned

    def mask(self, x: Tensor, shape: Sequence[int], probability: float, dtype: torch.dtype, site: str) -> Tensor:
        """A mask of a layer's own, of any shape, as `thin` draws it; x, the layer's input, tells forwards apart.

        Raises:
            TrainingError: a recomputation asks for a forward that is no longer remembered.
        """
        return cast(Any, _eagerly)(self._own, x, shape, probability, dtype, site)

    def _own(self, x: Tensor, shape: Sequence[int], probability: float, dtype: torch.dtype, site: str) -> Tensor:
        self._count()
        return _drawn(self.seed, self._call_of(x, site), shape, dtype, x.device, probability)

    def _count(self) -> None:
        self.drawn = True
        if self._uncounted or not self.counting:  # the first mask of all, in a forward that was not counted
            self.forwards, self.counting = self.forwards + 1, True
            if self._uncounted and torch.is_grad_enabled():
                self._recorded.append(self.forwards)
            self._uncounted = False

    def _call_of(self, x: Tensor, site: str) -> tuple[int, str]:
        """(forward, who asked first), of this call or of the one that is repeated inside backward."""
        if not inside_backward():
            self._remember(x, site, site)
            return self.forwards, site
        found = self._calls.get((site, _probe(x)))  # a checkpointed layer runs again
        if found is None:
            raise TrainingError(
                f"gradient checkpointing runs {site} again with an input that no forward is remembered for, so its dropout "
                "mask cannot be repeated; call backward() closer to its forward, or set dropout=0"
            )
        return found

    def _release(self, reference: weakref.ref[Tensor]) -> None:
        """The input is gone, so nobody will share its x̃, which holds on to the graph."""
        if self._shared is not None and self._shared[0] is reference:
            self._shared = None

    def _remember(self, x: Tensor, site: str, owner: str) -> None:
        if not may_be_recomputed():
            return
        self._calls[site, _probe(x)] = (self.forwards, owner)
        if len(self._calls) > _REMEMBERED:
            self._calls.popitem(last=False)


@torch.compiler.disable
def _eagerly(function: Any, *arguments: object) -> Tensor:
    """Runs outside of a compiled graph: a private generator cannot be captured."""
    return function(*arguments)


def inside_backward() -> bool:
    """Whether autograd is running backward now, so that a forward is a checkpoint's recomputation."""
    return cast(Any, torch._C)._current_graph_task_id() != -1


def may_be_recomputed() -> bool:
    """Whether a checkpoint is recording: the reentrant kind switches gradients off, the other kind hooks saved tensors."""
    return not torch.is_grad_enabled() or _keeper() is not None


def _keeper() -> Any:
    """Who packs saved tensors now, such as a checkpointed region. Regions run again one by one, so they share no tensor."""
    hooks = cast(Any, torch._C)._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


def _drawn(
    seed: int, key: tuple[object, ...], shape: Sequence[int], dtype: torch.dtype, device: torch.device, probability: float
) -> Tensor:
    """A mask with mean one, all zeros at probability 1: 16 random bits decide about each entry.

    Four entries share a draw of 64 bits, which takes a sixth of the time of `bernoulli_`.
    """
    if probability >= 1:
        return torch.zeros(*shape, dtype=dtype, device=device)
    generator = generator_for(seed, "mask", *key, device=device)
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    bits = words.view(torch.int16)[:count].view(*shape)
    dropped = min(round(probability * 2**16), 2**16 - 1)  # of 65536 equally likely values
    mask = torch.empty(*shape, dtype=dtype, device=device)
    torch.ge(bits, dropped - 2**15, out=mask)
    return mask.mul_(2**16 / (2**16 - dropped))


class _Thinned(torch.autograd.Function):
    """X times a mask that is drawn again in backward, so that nothing is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        ctx.draw = draw
        return x * draw()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Thinned.apply(gradients[0], ctx.draw), None


def _thinned(x: Tensor, draw: Callable[[], Tensor]) -> Tensor:
    return x * draw() if transformed() else _Thinned.apply(x, draw)


def _probe(x: Tensor) -> float:
    """A number that tells inputs apart and is the same to the bit when a forward is repeated."""
    flat = x.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 251)].double().sum().item()
