"""What a peft_type is to rankwise: one `PeftMethod` per type, from keys and fields to a recipe and the tensors of a layer.

The shapes of the tensors are written in letters, "m r" for (m, r): equal letters are equal numbers in all tensors of a layer,
an integer is itself, a last letter with * is the product of that and all further axes, and "=m" says that the tensor has m
numbers in whatever shape. m and n are the sizes of the layer's matrix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rankwise.core.errors import CheckpointError
from rankwise.core.layouts import ConvLayout
from rankwise.core.parameterization import Parameterization
from rankwise.core.recipe import Recipe
from rankwise.core.targets import Target

PATTERNS = {
    "r": "rank_pattern",
    "alpha": "alpha_pattern",
    "lora_alpha": "alpha_pattern",
    "n_frequency": "n_frequency_pattern",
    "block_size": "block_size_pattern",
    "delora_lambda": "lambda_pattern",
}
LOW_RANK_TROUBLES = frozenset({"groups", "dilation", "padding mode"})

Form = Mapping[str, str]  # part -> its shape in letters


@dataclass(frozen=True)
class Fields:
    """The fields of a config, with the defaults of its type where one is absent.

    Attributes:
        values: as in adapter_config.json.
        defaults: of the type.
        ignored: names that the caller takes responsibility for.
        trainable: whether the adapter is to be trained on.
    """

    values: Mapping[str, Any]
    defaults: Mapping[str, Any]
    ignored: frozenset[str] = frozenset()
    trainable: bool = True

    def at(self, name: str, site: str = "") -> Any:
        """The value, at one layer where a pattern names it."""
        value = self.values.get(name)
        stated = self.defaults.get(name) if value is None else value
        return at_pattern(self.values.get(PATTERNS[name]), site, stated) if site and name in PATTERNS else stated


@dataclass(frozen=True)
class PeftSite:
    """One layer that a file has tensors for.

    Attributes:
        name: of the layer.
        target: the layer here.
        parts: part -> tensor, as in the file.
        letters: letter -> size, as the shapes give it.
        fields: the config.
        folder: where it was read.
    """

    name: str
    target: Target
    parts: Mapping[str, Tensor]
    letters: Mapping[str, int]
    fields: Fields
    folder: Path

    def at(self, name: str) -> Any:
        """A field of the config at this layer."""
        return self.fields.at(name, self.name)

    def contradiction(self, what: str, found: object, stated: object) -> CheckpointError:
        """The two files say different things."""
        return CheckpointError(contradiction(self.folder, self.name, what, found, stated))


@dataclass(frozen=True)
class Filling:
    """What one layer becomes.

    Attributes:
        arguments: of the catalog function, as this layer has them.
        tensors: name of a role or buffer -> tensor.
        prepare: called with the parameterization before it is filled.
    """

    arguments: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    prepare: Callable[[Parameterization], None] | None = None


@dataclass(frozen=True, kw_only=True)
class PeftMethod:
    """One peft_type.

    Attributes:
        parts: end of a key -> part.
        forms: the parts that a layer can have, with their shapes, for a config.
        defaults: understood fields and their values where absent; the type of the value is checked.
        understood: further fields that are understood, or without effect on the adapted weight.
        stated: letter -> field that must agree with it (a field that is 0 leaves it open).
        refused: field -> what it does to the maths; refused unless empty.
        training: field -> what it does in training alone; refused unless empty or the adapter is not to be trained on.
        read: arguments and tensors of a layer.
        recipe: the catalog's recipe from the config and the arguments.
        problems: (field, reason) of what the config asks for and rankwise cannot reproduce.
        layouts: kinds of layers that PEFT adapts this way.
        convolutions: properties of a convolution for which PEFT's forward is not that of the changed weight.
        shared: key -> part that all layers share.
        repeated: part of a layer that is a copy of a shared part.
        bank: the shared tensors from (folder, fields, shared parts, targets).
        trained: those of them that are trained.
    """

    parts: Mapping[str, str]
    forms: Callable[[Fields], Sequence[Form]]
    defaults: Mapping[str, Any]
    understood: frozenset[str] = frozenset({"init_weights"})
    stated: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[PeftSite], Filling]
    recipe: Callable[..., Recipe]
    problems: Callable[[Fields], Iterable[tuple[str, str]]] = lambda fields: ()
    layouts: frozenset[str] = frozenset({"linear"})
    convolutions: frozenset[str] = frozenset()
    shared: Mapping[str, str] = field(default_factory=dict)
    repeated: Mapping[str, str] = field(default_factory=dict)
    bank: Callable[[Path, Fields, Mapping[str, Tensor], Mapping[str, Target]], dict[str, Tensor]] | None = None
    trained: frozenset[str] = frozenset()


def named(*endings: str) -> dict[str, str]:
    """Parts with the name of their key."""
    return {ending: ending.removesuffix(".weight") for ending in endings}


def at_pattern(patterns: Mapping[str, Any] | None, site: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of a layer's path at a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", site):
            return value
    return default


def contradiction(folder: Path, site: str, what: str, found: object, stated: object) -> str:
    """The text for a size that the tensors and the config tell differently."""
    return (
        f"{folder}: {site} has {what} {found} in adapter_model.safetensors and {what} {stated} in adapter_config.json; one of "
        "the two files belongs to another adapter"
    )


def letters_of(parts: Mapping[str, Tensor], form: Form) -> dict[str, int] | str:
    """Letter -> size, or what does not fit."""
    sizes: dict[str, int] = {}
    for part, text in form.items():
        shape, words = parts[part].shape, text.split()
        found = list(shape)
        if text.startswith("="):
            found, words = [parts[part].numel()], [text[1:]]
        elif text.endswith("*") and len(shape) >= len(words):
            found = [*shape[: len(words) - 1], math.prod(shape[len(words) - 1 :])]
            words[-1] = words[-1][:-1]
        known = {word: int(word) for word in words if word.isdigit()} | sizes
        if len(found) != len(words) or any(
            known.setdefault(word, size) != size for word, size in zip(words, found, strict=True)
        ):
            others = ", ".join(f"{other} {tuple(parts[other].shape)}" for other in form if other != part)
            return f"{part} is {tuple(shape)}, which does not fit ({text}){f' beside {others}' if others else ''}"
        sizes |= {word: size for word, size in known.items() if not word.isdigit()}
    return sizes


def convolution_trouble(layout: ConvLayout, troubles: frozenset[str] = LOW_RANK_TROUBLES) -> str | None:
    """Why PEFT's forward of a convolution is not the convolution with the changed weight, or None.

    For LoRA it runs A without the layer's dilation and padding mode, and with groups lets every group see all channels.
    """
    kernel, stride, padding = layout.kernel, layout.stride, layout.padding
    uneven = isinstance(padding, str) or max(len(set(kernel)), len(set(stride)), len(set(padding))) > 1
    found = {
        "groups": (layout.groups > 1, f"{layout.groups} groups, whose factors PEFT shapes differently"),
        "dilation": (
            any(step != 1 for step in layout.dilation),
            f"dilation {layout.dilation}, which PEFT leaves out of the update",
        ),
        "padding mode": (
            layout.padding_mode != "zeros",
            f"padding mode {layout.padding_mode!r}, which PEFT leaves out of the update",
        ),
        "uneven": (uneven, f"kernel {kernel}, stride {stride}, padding {padding}, of which PEFT reads the first number"),
        "kernel": (
            math.prod(kernel) > 1,
            f"a kernel {kernel}, whose overlapping patches PEFT rotates and adds up, but merges as one weight",
        ),
    }
    return next((text for trouble, (has, text) in found.items() if has and trouble in troubles), None)
