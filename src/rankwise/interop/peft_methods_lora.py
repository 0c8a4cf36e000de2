"""LORA (with its scales and DoRA) and ADALORA as entries of the table of peft_types."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch

from rankwise import catalog
from rankwise.core import decisions
from rankwise.core.errors import CheckpointError
from rankwise.core.operators import LowRank
from rankwise.core.parameterization import Parameterization
from rankwise.core.queries import svd
from rankwise.core.recipe import Recipe
from rankwise.interop.peft_method import LOW_RANK_TROUBLES, Fields, Filling, Form, PeftMethod, PeftSite, named
from rankwise.parameterizations.scaling import scale_of

KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")  # values of init_lora_weights that leave W alone
REFUSED = {
    "lora_bias": "a trained bias beside B",
    "layer_replication": "layers repeated in the model",
    "trainable_token_indices": "replaced rows of the embedding",
    "target_parameters": "parameters adapted without their layer (fused experts)",
    "use_qalora": "pooled inputs",
    "velora_config": "compressed activations",
    "alora_invocation_tokens": "an update that acts only after certain tokens",
    "monteclora_config": "a sampled update",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "routing between adapters",
    "kasa_config": "a changed base and a diagonal between the factors",
    "megatron_config": "layers split over devices",
    "ensure_weight_tying": "factors shared between tied layers",
}
UNDERSTOOD = frozenset(
    {
        *("rank_pattern", "alpha_pattern", "init_lora_weights", "megatron_core", "qalora_group_size", "runtime_config"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    }
)


def _start(fields: Fields) -> Iterable[tuple[str, str]]:
    start = fields.values.get("init_lora_weights", True)
    if start not in KEEPS_BASE:
        yield (
            "init_lora_weights",
            f"init_lora_weights={start!r} (the adapter belongs to a base that this start has changed; save it with "
            "path_initial_model_for_weight_conversion, which writes it for the untouched base)",
        )


def _forms(fields: Fields) -> list[Form]:
    pair = {"A": "r n*", "B": "m r*"}
    return [{**pair, "magnitude": "=m"} if fields.at("use_dora") else pair]


def _read(site: PeftSite) -> Filling:
    B, A = site.parts["B"], site.parts["A"]
    pair = narrowed(LowRank(B.reshape(B.shape[0], -1), A.reshape(A.shape[0], -1)), min(site.target.m, site.target.n))
    policy = "rslora" if site.at("use_rslora") else "lora"
    stated = scale_of(policy, float(site.at("lora_alpha")), site.letters["r"])
    # A pattern of alphas goes into B, which leaves the update as it is.
    ratio = stated / scale_of(policy, float(site.fields.at("lora_alpha")), pair.rank)
    B = pair.B if ratio == 1.0 else (pair.B.to(torch.promote_types(pair.B.dtype, torch.float32)) * ratio)
    tensors = {"B": B, "A": pair.A}
    if site.at("use_dora"):
        tensors["magnitude"] = site.parts["magnitude"].reshape(-1)
    return Filling({"rank": pair.rank}, tensors)


def narrowed(pair: LowRank, most: int) -> LowRank:
    """The same product with at most `most` inner directions: padding with zeros goes first, then an exact SVD."""
    if pair.rank <= most:
        return pair
    used = (pair.B != 0).any(0) & (pair.A != 0).any(1)  # (r,)
    if 0 < int(used.sum()) <= most:
        return LowRank(pair.B[:, used], pair.A[used])
    U, S, Vh = svd(LowRank(pair.B.double(), pair.A.double())).truncated(most)
    return LowRank((U * S).to(pair.B.dtype), Vh.to(pair.A.dtype))


def _recipe(fields: Fields, **arguments: Any) -> Recipe:
    alpha, dropout = float(fields.at("lora_alpha")), float(fields.at("lora_dropout"))
    root = bool(fields.at("use_rslora"))
    if fields.at("use_dora"):
        return catalog.dora(alpha=alpha, dropout=dropout, scale="rslora" if root else "lora", **arguments)
    return (catalog.rslora if root else catalog.lora)(alpha=alpha, dropout=dropout, **arguments)


LORA = PeftMethod(
    parts={
        "lora_A.weight": "A",
        "lora_B.weight": "B",
        "lora_embedding_A": "A",
        "lora_embedding_B": "B",
        "lora_magnitude_vector": "magnitude",
    },
    forms=_forms,
    defaults={"r": 8, "lora_alpha": 8.0, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False},
    understood=UNDERSTOOD,
    stated={"r": "r"},
    refused=REFUSED,
    read=_read,
    recipe=_recipe,
    problems=_start,
    layouts=frozenset({"linear", "conv", "embedding"}),
    convolutions=LOW_RANK_TROUBLES,
)


# -- AdaLoRA: PEFT stores the directions that are left, and divides alpha by the rank that training began with -----------------


def _read_adalora(site: PeftSite) -> Filling:
    started, pattern = int(site.at("init_r")), site.fields.values.get("rank_pattern") or {}
    found, kept = site.letters["r"], pattern.get(f"{site.name}.lora_E")
    if kept is not None and not (isinstance(kept, list) and len(kept) == started):
        raise CheckpointError(
            f"{site.folder}: rank_pattern at {site.name} holds {kept!r}; it has one true or false for each of init_r = "
            f"{started} directions"
        )
    stated = started if kept is None else sum(map(bool, kept))
    if found != stated:
        raise site.contradiction("rank", found, stated)
    tensors = {"A": site.parts["lora_A"], "B": site.parts["lora_B"], "gate": site.parts["lora_E"].reshape(-1)}
    return Filling({"rank": started}, tensors, functools.partial(_cut, kept=found) if found < started else None)


def _cut(entry: Parameterization, *, kept: int) -> None:
    decisions.resize(entry, torch.arange(entry.rank) < kept, None)


def _adalora(fields: Fields, **arguments: Any) -> Recipe:
    alpha = float(fields.at("lora_alpha"))
    alpha = alpha if alpha > 0 else float(fields.at("init_r"))  # as PEFT has it
    return catalog.gated_lora(alpha=alpha, dropout=float(fields.at("lora_dropout")), **arguments)


ADALORA = PeftMethod(
    parts=named("lora_A", "lora_B", "lora_E"),
    forms=lambda fields: [{"lora_A": "r n", "lora_B": "m r", "lora_E": "r 1"}],
    defaults={"init_r": 12, "lora_alpha": 8.0, "lora_dropout": 0.0},
    understood=frozenset(
        {
            *UNDERSTOOD,
            *("r", "use_rslora", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
        }
    ),
    refused={**REFUSED, "use_dora": "trained lengths of the rows"},
    read=_read_adalora,
    recipe=_adalora,
    problems=_start,
    layouts=frozenset({"linear", "conv"}),
    convolutions=frozenset({"groups", "padding mode"}),
)
