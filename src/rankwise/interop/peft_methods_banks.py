"""VERA, RANDLORA and VBLORA, whose layers share tensors, as entries of the table of peft_types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise import catalog
from rankwise.core.errors import CheckpointError
from rankwise.core.parameterization import Parameterization
from rankwise.core.recipe import Recipe
from rankwise.core.targets import Target
from rankwise.interop.peft_method import Fields, Filling, PeftMethod, PeftSite, named
from rankwise.parameterizations.vector_bank_compact import logits_of

Bank = dict[str, Tensor]
Targets = Mapping[str, Target]


def _missing(folder: Path, part: str, have: str, need: object) -> CheckpointError:
    return CheckpointError(f"{folder}: {part} is {have} in the file; the layers of this model need {need}")


# -- VeRA ----------------------------------------------------------------------------------------------------------------------


def _vera_bank(folder: Path, fields: Fields, shared: Mapping[str, Tensor], targets: Targets) -> Bank:
    """A and B, from the file or drawn as PEFT draws them."""
    rank = int(fields.at("r"))
    sizes = {"A": (rank, max(t.n for t in targets.values())), "B": (max(t.m for t in targets.values()), rank)}
    if not shared and not fields.at("save_projection"):
        generator = torch.Generator().manual_seed(int(fields.at("projection_prng_key")))
        bounds = {part: math.sqrt(6.0 / size[1]) for part, size in sizes.items()}
        return {
            part: torch.empty(size).uniform_(-bounds[part], bounds[part], generator=generator) for part, size in sizes.items()
        }
    for part, size in sizes.items():
        found = shared.get(part)
        if found is None or tuple(found.shape) != size:
            raise _missing(folder, f"vera_{part}", "missing" if found is None else f"{tuple(found.shape)}", size)
    return dict(shared)


VERA = PeftMethod(
    parts={"vera_lambda_b": "b", "vera_lambda_d": "d"},
    forms=lambda fields: [{"b": "m", "d": "r"}],
    defaults={"r": 256, "d_initial": 0.1, "vera_dropout": 0.0, "save_projection": True, "projection_prng_key": 0},
    stated={"r": "r"},
    read=lambda site: Filling({"rank": site.letters["r"]}, {"b": site.parts["b"], "d": site.parts["d"]}),
    recipe=lambda fields, **arguments: catalog.vera(
        d_initial=float(fields.at("d_initial")), dropout=float(fields.at("vera_dropout")), save_projections=True, **arguments
    ),
    shared={"base_model.vera_A": "A", "base_model.vera_B": "B"},
    bank=_vera_bank,
)


# -- RandLoRA: PEFT writes the bases once for the model and again for every layer ----------------------------------------------


def _randlora_bank(folder: Path, fields: Fields, shared: Mapping[str, Tensor], targets: Targets) -> Bank:
    """A (r, narrow) and B (wide, N, r), from the file or drawn as PEFT draws them."""
    rank = int(fields.at("r"))
    if not shared and not fields.at("save_projection"):
        return _drawn(fields, rank, targets)
    narrow = max(min(t.m, t.n) for t in targets.values())
    wide = max(max(t.m, t.n) for t in targets.values())
    least = {"A": (rank, 1, narrow), "B": (wide, -(-narrow // rank), rank)}
    for part, size in least.items():
        found = shared.get(part)
        if found is None:
            raise _missing(folder, f"randlora_{part}", "missing", size)
        shape, exact = tuple(found.shape), (0, 1) if part == "A" else (2,)  # PEFT may have made the other sizes larger
        fits = len(shape) == 3 and all(have >= need for have, need in zip(shape, size, strict=True))
        if not fits or any(shape[axis] != size[axis] for axis in exact):
            raise _missing(folder, f"randlora_{part}", f"{shape}", size)
    return {"A": shared["A"].squeeze(1), "B": shared["B"]}


def _drawn(fields: Fields, rank: int, targets: Targets) -> Bank:
    """The bases of the key: uniform in bfloat16, or sparse signs, over their standard deviation."""
    largest = max(t.m for t in targets.values()), max(t.n for t in targets.values())
    wide, narrow = max(largest), min(largest)
    sizes = {"A": (rank, 1, narrow), "B": (wide, -(-narrow // rank), rank)}
    generator = torch.Generator().manual_seed(int(fields.at("projection_prng_key")))
    if fields.at("sparse") or fields.at("very_sparse"):
        share = 1 / (2 * (math.sqrt(narrow) if fields.at("very_sparse") else 3.0))
        drawn = {part: torch.rand(size, generator=generator) for part, size in sizes.items()}
        drawn = {part: (values > 1 - share).float() - (values < share).float() for part, values in drawn.items()}
    else:

        def uniform(*size: int) -> Tensor:
            bound = 1 / math.sqrt(math.prod(size[1:]))
            return torch.empty(size, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)

        drawn = {"A": uniform(*sizes["A"])}
        drawn["B"] = torch.cat([uniform(wide, 1, rank) for _ in range(sizes["B"][1])], dim=1)
    even = {part: values / values.std() for part, values in drawn.items()}
    return {"A": even["A"].squeeze(1), "B": even["B"]}


def _randlora(fields: Fields, **arguments: Any) -> Recipe:
    projection = "very_sparse" if fields.at("very_sparse") else "sparse" if fields.at("sparse") else "dense"
    alpha, dropout = float(fields.at("randlora_alpha")), float(fields.at("randlora_dropout"))
    return catalog.randlora(alpha=alpha, pairing="peft", projection=projection, dropout=dropout, **arguments)


RANDLORA = PeftMethod(
    parts=named("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
    forms=lambda fields: [{"randlora_lambda": "r N", "randlora_gamma": "N k"}],
    defaults={
        "r": 32,
        "randlora_alpha": 640.0,
        "randlora_dropout": 0.0,
        "sparse": False,
        "very_sparse": False,
        "save_projection": True,
        "projection_prng_key": 0,
    },
    stated={"r": "r"},
    read=lambda site: Filling(
        {"rank": site.letters["r"]}, {"Lambda": site.parts["randlora_lambda"], "Gamma": site.parts["randlora_gamma"]}
    ),
    recipe=_randlora,
    shared={"base_model.randlora_A": "A", "base_model.randlora_B": "B"},
    repeated={"randlora_A": "A", "randlora_B": "B"},
    bank=_randlora_bank,
)


# -- VB-LoRA: whole logits, or only which vectors they choose and how much of each ---------------------------------------------


def _vblora_bank(folder: Path, fields: Fields, shared: Mapping[str, Tensor], targets: Targets) -> Bank:
    size, found = (int(fields.at("num_vectors")), int(fields.at("vector_length"))), shared.get("vectors")
    if found is None or tuple(found.shape) != size:
        raise _missing(folder, "vblora_vector_bank", "missing" if found is None else f"{tuple(found.shape)}", size)
    return dict(shared)


def _read_vblora(site: PeftSite) -> Filling:
    arguments = {"rank": site.letters["r"]}
    if "vblora_logits_A" in site.parts:
        return Filling(arguments, {f"logits_{letter}": site.parts[f"vblora_logits_{letter}"] for letter in "AB"})
    count, top, tensors = int(site.at("num_vectors")), int(site.at("topk")), {}
    for letter in "AB":
        ids, weights = (site.parts[f"vblora_logits_{letter}_topk_{part}"] for part in ("indices", "weights"))
        if weights.shape[-1] != top - 1 or not bool((ids.long() >= 0).all() and (ids.long() < count).all()):
            raise CheckpointError(
                f"{site.folder}: {site.name} chooses vectors {int(ids.min())} to {int(ids.max())} with "
                f"{weights.shape[-1]} stored weights each; the config has {count} vectors and topk {top}, so {top - 1} weights"
            )
        tensors[f"logits_{letter}"] = logits_of(ids.long(), weights.float(), count)
    return Filling(arguments, tensors, _compact)


def _compact(entry: Parameterization) -> None:
    entry.compact = True  # type: ignore[assignment]


VBLORA = PeftMethod(
    parts=named(
        "vblora_logits_A",
        "vblora_logits_B",
        *(f"vblora_logits_{letter}_topk_{part}" for letter in "AB" for part in ("indices", "weights")),
    ),
    forms=lambda fields: [
        {
            "vblora_logits_A_topk_indices": "r p t",
            "vblora_logits_A_topk_weights": "r p u",
            "vblora_logits_B_topk_indices": "q r t",
            "vblora_logits_B_topk_weights": "q r u",
        }
        if fields.at("save_only_topk_weights")
        else {"vblora_logits_A": "r p h", "vblora_logits_B": "q r h"}
    ],
    defaults={"r": 4, "num_vectors": 256, "vector_length": 256, "topk": 2, "save_only_topk_weights": False},
    understood=frozenset({"init_vector_bank_bound", "init_logits_std"}),
    stated={"r": "r", "h": "num_vectors", "t": "topk"},
    training={
        "save_only_topk_weights": "the logits that lost are not in the file",
        "vblora_dropout": "dropout of inputs, which vblora has none of here",
    },
    read=_read_vblora,
    recipe=lambda fields, **arguments: catalog.vblora(
        vectors=int(fields.at("num_vectors")),
        length=int(fields.at("vector_length")),
        top=int(fields.at("topk")),
        start="paper",
        **arguments,
    ),
    shared={"base_model.vblora_vector_bank": "vectors"},
    bank=_vblora_bank,
    trained=frozenset({"vectors"}),
)
