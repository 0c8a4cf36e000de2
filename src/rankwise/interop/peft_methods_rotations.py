"""OFT, BOFT, HRA, IA3 and ROAD, which multiply the weight, as entries of the table of peft_types."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from typing import Any

from rankwise import catalog
from rankwise.core.errors import CheckpointError
from rankwise.core.layouts import ConvLayout
from rankwise.core.recipe import Recipe
from rankwise.interop.peft_method import Fields, Filling, PeftMethod, PeftSite, named

# -- OFT -----------------------------------------------------------------------------------------------------------------------


def _oft_gate(fields: Fields) -> Iterable[tuple[str, str]]:
    if "oft_block_size" not in fields.values:
        yield (
            "oft_block_size",
            "no oft_block_size (OFT of peft before 0.14, whose tensors mean another rotation; train it again)",
        )


def _read_oft(site: PeftSite) -> Filling:
    embedding = site.target.layout.kind == "embedding"
    part = "oft_embedding_R" if "oft_embedding_R" in site.parts else "oft_R"
    if (part == "oft_embedding_R") != embedding:
        raise CheckpointError(f"{site.folder}: {site.name} has {part} and is of kind {site.target.layout.kind} here")
    skew, size = site.parts[part], site.target.m if embedding else site.target.n
    rows, entries = skew.shape
    block = (1 + math.isqrt(1 + 8 * entries)) // 2
    shared = bool(site.at("block_share"))
    if block * (block - 1) // 2 != entries or (rows != 1 if shared else rows * block != size) or size % block:
        raise CheckpointError(
            f"{site.folder}: {site.name} rotates {size} numbers here, and {part} is {tuple(skew.shape)}: "
            f"{rows} block{'s' if rows != 1 else ''} of {block}{', shared' if shared else ''}; another base?"
        )
    asked = {"oft_block_size": block, "r": size // block}
    for name, found in asked.items():
        stated = int(site.fields.at(name))
        if stated and size % stated == 0 and found != stated:  # PEFT replaces a size that does not divide
            raise site.contradiction(name, found, stated)
    return Filling({"block": block}, {"skew": skew})


def _oft(fields: Fields, **arguments: Any) -> Recipe:
    series = (
        {"cayley": "neumann", "terms": int(fields.at("num_cayley_neumann_terms"))} if fields.at("use_cayley_neumann") else {}
    )
    version = re.match(r"(\d+)\.(\d+)", str(fields.values.get("peft_version") or ""))
    if series and (version is None or (int(version[1]), int(version[2])) < (0, 18)):
        said = f"peft {version[0]}" if version else "a peft that did not note its version (before 0.18)"
        warnings.warn(
            f"this OFT adapter was trained by {said} with the truncated series, which 0.18 changed; it is read as the "
            "series of 0.18 and later, as peft itself does, so that its rotations are a little other than in training",
            stacklevel=2,
        )
    constrain = float(fields.at("eps")) if fields.at("coft") else None
    return catalog.oft(share_blocks=bool(fields.at("block_share")), constrain=constrain, **series, **arguments)


OFT = PeftMethod(
    parts=named("oft_R.weight", "oft_embedding_R.weight"),
    forms=lambda fields: [{"oft_R": "k e"}, {"oft_embedding_R": "k e"}],
    defaults={
        "r": 0,
        "oft_block_size": 32,
        "block_share": False,
        "coft": False,
        "eps": 6e-5,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
    },
    understood=frozenset({"init_weights", "module_dropout"}),  # that dropout has no effect in PEFT
    read=_read_oft,
    recipe=_oft,
    problems=_oft_gate,
    layouts=frozenset({"linear", "conv", "embedding"}),
    convolutions=frozenset({"groups", "kernel"}),
)


# -- BOFT ----------------------------------------------------------------------------------------------------------------------


def _read_boft(site: PeftSite) -> Filling:
    arguments = {"block": site.letters["b"], "factors": site.letters["N"]}  # PEFT cuts N to 1 without its extension
    return Filling(arguments, {"blocks": site.parts["boft_R"], "gain": site.parts["boft_s"].reshape(-1)})


BOFT = PeftMethod(
    parts=named("boft_R", "boft_s"),
    forms=lambda fields: [{"boft_R": "N D b b", "boft_s": "=m"}],
    defaults={"boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1, "boft_dropout": 0.0},
    stated={"b": "boft_block_size", "D": "boft_block_num"},
    read=_read_boft,
    recipe=lambda fields, **arguments: catalog.boft(dropout=float(fields.at("boft_dropout")), **arguments),
    layouts=frozenset({"linear", "conv"}),
    convolutions=frozenset({"groups", "dilation", "padding mode", "uneven"}),
)


# -- HRA -----------------------------------------------------------------------------------------------------------------------


def _hra(fields: Fields, **arguments: Any) -> Recipe:
    apart = bool(fields.at("apply_GS")) or arguments["rank"] % 2 == 1  # those have no start at the base
    start = "random" if apart else "paired"
    return catalog.hra(gram_schmidt=bool(fields.at("apply_GS")), start=start, **arguments)


HRA = PeftMethod(
    parts=named("hra_u"),
    forms=lambda fields: [{"hra_u": "n r"}],
    defaults={"r": 8, "apply_GS": False},
    stated={"r": "r"},
    read=lambda site: Filling({"rank": site.letters["r"]}, {"U": site.parts["hra_u"]}),
    recipe=_hra,
    layouts=frozenset({"linear", "conv"}),
    convolutions=frozenset({"groups", "dilation", "padding mode", "uneven"}),
)


# -- IA3: the shape says which side is scaled, and feedforward_modules says it too ---------------------------------------------


def _read_ia3(site: PeftSite) -> Filling:
    gain, layout = site.parts["ia3_l"], site.target.layout
    inputs = layout.groups * layout.channels if isinstance(layout, ConvLayout) else site.target.n
    sizes = {"output": site.target.m, "input": inputs}
    shapes = {side: (size, 1) if side == "output" else (1, size) for side, size in sizes.items()}
    if isinstance(layout, ConvLayout):
        shapes = {side: (1, size, *(1 for _ in layout.kernel)) for side, size in sizes.items()}
    fits = [side for side, shape in shapes.items() if shape == tuple(gain.shape)]
    names = site.fields.values.get("feedforward_modules")
    stated = None if names is None else "input" if _feeds_forward(names, site.name) else "output"
    if not fits:
        raise CheckpointError(
            f"{site.folder}: {site.name} has ia3_l {tuple(gain.shape)}; for this layer it is {shapes['output']}, or "
            f"{shapes['input']} in feedforward_modules; another base?"
        )
    if len(fits) > 1 and stated is None:
        raise CheckpointError(
            f"{site.folder}: ia3_l {tuple(gain.shape)} of {site.name} may scale its inputs or its outputs, and the config "
            "has no feedforward_modules to tell; add that list of the layers with scaled inputs"
        )
    if stated is not None and stated not in fits:
        raise CheckpointError(
            f"{site.folder}: ia3_l {tuple(gain.shape)} of {site.name} scales its {fits[0]}s, and by feedforward_modules "
            f"({names!r}) it would be its {stated}s; one of the two files belongs to another adapter"
        )
    return Filling({"side": fits[0] if stated is None else stated}, {"gain": gain.reshape(-1)})


def _feeds_forward(names: str | list[str], site: str) -> bool:
    """As PEFT tells it: by the end of the name, at a dot or not."""
    return re.fullmatch(names, site) is not None if isinstance(names, str) else any(site.endswith(name) for name in names)


IA3 = PeftMethod(
    parts=named("ia3_l"),
    forms=lambda fields: [{"ia3_l": "=l"}],
    defaults={},
    understood=frozenset({"feedforward_modules", "init_ia3_weights"}),
    read=_read_ia3,
    recipe=lambda fields, **arguments: catalog.ia3(**arguments),
    layouts=frozenset({"linear", "conv"}),
)


# -- RoAd: the size of a group cannot be told from the tensors -----------------------------------------------------------------


def _variant(fields: Fields) -> Iterable[tuple[str, str]]:
    if fields.at("variant") not in ("road_1", "road_2", "road_4"):
        yield "variant", f"variant={fields.at('variant')!r} (rankwise knows road_1, road_2 and road_4)"


ROAD = PeftMethod(
    parts=named("road_theta", "road_alpha"),
    forms=lambda fields: [{"road_theta": "t", "road_alpha": "t"}],
    defaults={"variant": "road_1", "group_size": 64},
    read=lambda site: Filling({}, {"angle": site.parts["road_theta"], "gain": site.parts["road_alpha"]}),
    recipe=lambda fields, **arguments: catalog.road(
        variant=int(fields.at("variant").removeprefix("road_")), group=int(fields.at("group_size")), **arguments
    ),
    problems=_variant,
)
