"""The types with an update or factor of high rank (LOHA to MISS) as entries of the table of peft_types."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankwise import catalog
from rankwise.core.errors import CheckpointError, FingerprintError
from rankwise.core.recipe import Recipe
from rankwise.interop.peft_method import Fields, Filling, PeftMethod, PeftSite, named
from rankwise.parameterizations.fourierft import positions_of

DROPS = {"rank_dropout": "rows of the update are dropped", "module_dropout": "the whole update is dropped"}


def _scaled(site: PeftSite) -> dict[str, Any]:
    return {"rank": int(site.at("r")), "alpha": float(site.at("alpha"))}


# -- LoHa and LoKr: in a convolution, with or without Tucker factors; those of a Conv1d end with an axis of one ----------------


def _read_loha(site: PeftSite) -> Filling:
    tucker = "hada_t1" in site.parts
    roles = {"hada_w{}_a": "P", "hada_w{}_b": "Q", "hada_t{}": "T"} if tucker else {"hada_w{}_a": "B", "hada_w{}_b": "A"}
    tensors = {f"{role}{c}": site.parts[part.format(c)] for part, role in roles.items() for c in (1, 2)}
    return Filling(_scaled(site), _of_kernel(site, tensors, "T"))


def _of_kernel(site: PeftSite, tensors: dict[str, Tensor], letter: str) -> dict[str, Tensor]:
    """The same with cores of the layer's kernel, where the file has one axis more."""
    kernel = site.target.mode_shape()[2:]
    return {
        role: core.reshape(*core.shape[:2], *kernel)
        if role.startswith(letter) and core.dim() == 4 and tuple(core.shape[2:]) == (*kernel, 1)
        else core
        for role, core in tensors.items()
    }


LOHA = PeftMethod(
    parts=named(*(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))),
    forms=lambda fields: [
        {"hada_w1_a": "m r", "hada_w1_b": "r n", "hada_w2_a": "m r", "hada_w2_b": "r n"},
        {
            "hada_w1_a": "r m",
            "hada_w1_b": "r c",
            "hada_t1": "r r k*",
            "hada_w2_a": "r m",
            "hada_w2_b": "r c",
            "hada_t2": "r r k*",
        },
    ],
    defaults={"r": 8, "alpha": 8.0, "use_effective_conv2d": False},
    understood=frozenset({"rank_pattern", "alpha_pattern", "init_weights"}),
    stated={"r": "r"},
    training=DROPS,
    read=_read_loha,
    recipe=lambda fields, **arguments: catalog.loha(tucker=bool(fields.at("use_effective_conv2d")), **arguments),
    layouts=frozenset({"linear", "conv"}),
    convolutions=frozenset({"padding mode"}),
)


LOKR_ROLES = {
    "lokr_w1": "C",
    "lokr_w1_a": "C_B",
    "lokr_w1_b": "C_A",
    "lokr_w2": "D",
    "lokr_w2_a": "D_B",
    "lokr_w2_b": "D_A",
    "lokr_t2": "T",
}


def _lokr_forms(fields: Fields) -> list[dict[str, str]]:
    left = ({"lokr_w1": "a c"}, {"lokr_w1_a": "a r", "lokr_w1_b": "r c"})
    right = (
        {"lokr_w2": "b d*"},
        {"lokr_w2_a": "b r", "lokr_w2_b": "r d"},
        {"lokr_w2_a": "r b", "lokr_w2_b": "r d", "lokr_t2": "r r k*"},
    )
    return [{**one, **other} for one in left for other in right]


def _read_lokr(site: PeftSite) -> Filling:
    tensors = {LOKR_ROLES[part]: tensor for part, tensor in site.parts.items() if part in LOKR_ROLES}
    if "T" in tensors:
        tensors |= {"P": tensors.pop("D_B"), "Q": tensors.pop("D_A")}
    return Filling(_scaled(site), _of_kernel(site, tensors, "T"))


LOKR = PeftMethod(
    parts=named(*LOKR_ROLES),
    forms=_lokr_forms,
    defaults={"r": 8, "alpha": 8.0, "use_effective_conv2d": False, "decompose_both": False, "decompose_factor": -1},
    understood=frozenset({"rank_pattern", "alpha_pattern", "init_weights", "rank_dropout_scale"}),
    stated={"r": "r"},
    training=DROPS,
    read=_read_lokr,
    recipe=lambda fields, **arguments: catalog.lokr(
        factor=int(fields.at("decompose_factor")),
        decompose_both=bool(fields.at("decompose_both")),
        tucker=bool(fields.at("use_effective_conv2d")),
        zero="D" if fields.values.get("init_weights") == "lycoris" else "C",
        **arguments,
    ),
    layouts=frozenset({"linear", "conv"}),
    convolutions=frozenset({"padding mode"}),
)


# -- HiRA, GraLoRA, DeLoRA: factors of low rank --------------------------------------------------------------------------------


def _read_hira(site: PeftSite) -> Filling:
    rank = site.letters["r"]
    if rank not in (site.at("r"), site.fields.at("r")):  # peft 0.21 stores rank_pattern, and makes all layers of rank r
        raise site.contradiction("rank", rank, site.at("r"))
    return Filling({"rank": rank}, {"A": site.parts["hira_A"].flatten(1), "B": site.parts["hira_B"].flatten(1)})


HIRA = PeftMethod(
    parts={"hira_A": "hira_A", "hira_B": "hira_B", "hira_embedding_A": "hira_A", "hira_embedding_B": "hira_B"},
    forms=lambda fields: [{"hira_A": "r n*", "hira_B": "m r*"}],
    defaults={"r": 32},
    understood=frozenset({"rank_pattern", "init_weights"}),
    training={"hira_dropout": "dropout of inputs, which hira has none of here"},
    read=_read_hira,
    recipe=lambda fields, **arguments: catalog.hira(**arguments),
    layouts=frozenset({"linear", "conv", "embedding"}),
    convolutions=frozenset({"groups", "padding mode"}),
)


def _read_gralora(site: PeftSite) -> Filling:
    roles = {"gralora_A": "block_A", "gralora_B": "block_B", "gralora_A_general": "A", "gralora_B_general": "B"}
    tensors = {roles[part]: tensor for part, tensor in site.parts.items() if part in roles}
    return Filling({"rank": site.letters["r"]}, tensors)


GRALORA = PeftMethod(
    parts=named("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight"),
    forms=lambda fields: [
        {"gralora_A": "k p r", "gralora_B": "k r q"}
        | ({"gralora_A_general": "h n", "gralora_B_general": "m h"} if fields.at("hybrid_r") else {})
    ],
    defaults={"r": 32, "alpha": 64.0, "gralora_k": 2, "hybrid_r": 0, "gralora_dropout": 0.0},
    stated={"r": "r", "k": "gralora_k", "h": "hybrid_r"},
    read=_read_gralora,
    recipe=lambda fields, **arguments: catalog.gralora(
        alpha=float(fields.at("alpha")),
        blocks=int(fields.at("gralora_k")),
        hybrid_rank=int(fields.at("hybrid_r")),
        dropout=float(fields.at("gralora_dropout")),
        **arguments,
    ),
)


def _read_delora(site: PeftSite) -> Filling:
    norms = site.parts["delora_w_norm"]
    here = site.target.matrix().double().norm(dim=0).cpu()  # (n,)
    apart = float((norms.double() - here).norm() / here.norm().clamp_min(torch.finfo(torch.float64).tiny))
    if apart > 0.01 and "delora_w_norm" not in site.fields.ignored:
        raise FingerprintError(
            f"{site.folder}: {site.name} was trained on columns of other norms than this model's (they differ by {apart:.2g} "
            "of their size), so on another base; load that one, or pass ignore=['delora_w_norm'] to keep the file's norms here"
        )
    tensors = {"A": site.parts["delora_A"], "B": site.parts["delora_B"], "strength": site.parts["delora_lambda"]}
    return Filling({"rank": site.letters["r"]}, {**tensors, "column_norms": norms})


DELORA = PeftMethod(
    parts=named("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
    forms=lambda fields: [{"delora_A": "r n", "delora_B": "m r", "delora_lambda": "1", "delora_w_norm": "n"}],
    defaults={"r": 8, "delora_lambda": 15.0, "module_dropout": 0.0},
    understood=frozenset({"rank_pattern", "lambda_pattern", "init_weights"}),
    stated={"r": "r"},
    read=_read_delora,
    recipe=lambda fields, **arguments: catalog.delora(
        strength=float(fields.at("delora_lambda")), start="zero", dropout=float(fields.at("module_dropout")), **arguments
    ),
)


# -- FourierFT, C3A, SHiRA: an update without factors --------------------------------------------------------------------------


def _read_fourierft(site: PeftSite) -> Filling:
    count, seed = site.letters["f"], int(site.at("random_loc_seed"))  # the positions are not stored
    places = positions_of(site.target.m, site.target.n, min(count, site.target.m * site.target.n), seed)
    return Filling({"frequencies": count}, {"coefficients": site.parts["fourierft_spectrum"], "positions": places})


FOURIERFT = PeftMethod(
    parts=named("fourierft_spectrum"),
    forms=lambda fields: [{"fourierft_spectrum": "f"}],
    defaults={"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777},
    understood=frozenset({"n_frequency_pattern", "init_weights"}),
    stated={"f": "n_frequency"},
    read=_read_fourierft,
    recipe=lambda fields, **arguments: catalog.fourierft(
        scale=float(fields.at("scaling")), location_seed=int(fields.at("random_loc_seed")), **arguments
    ),
)


C3A = PeftMethod(
    parts=named("c3a_kernel"),
    forms=lambda fields: [{"c3a_kernel": "q p b"}],
    defaults={"block_size": 256},
    understood=frozenset({"block_size_pattern", "init_weights"}),
    stated={"b": "block_size"},
    read=lambda site: Filling({"block": site.letters["b"]}, {"kernel": site.parts["c3a_kernel"]}),
    recipe=lambda fields, **arguments: catalog.c3a(**arguments),
)


def _read_shira(site: PeftSite) -> Filling:
    (m, n), count = (site.target.m, site.target.n), site.letters["K"]
    rank = int(site.at("r"))
    if count != rank * (m + n):
        raise CheckpointError(
            f"{site.folder}: shira_weight of {site.name} has {count} entries, and r = {rank} of the config makes r · (m + n) = "
            f"{rank * (m + n)} on this layer, {m}×{n}; the two files belong to different adapters, or to another base"
        )
    rows, columns = site.parts["shira_indices"].long()
    flat, order = (rows * n + columns).sort()  # row by row, as ours are kept
    inside = bool(((rows >= 0) & (rows < m) & (columns >= 0) & (columns < n)).all())
    if not inside or bool((flat[1:] == flat[:-1]).any()):
        what = "the same entry twice" if inside else f"entries outside of {m}×{n}, another base?"
        raise CheckpointError(f"{site.folder}: shira_indices of {site.name} names {what}")
    return Filling(
        {"rank": rank},
        {"values": site.parts["shira_weight"][order], "indices": torch.stack([flat // n, flat % n]).to(torch.int32)},
    )


SHIRA = PeftMethod(
    parts=named("shira_weight", "shira_indices"),
    forms=lambda fields: [{"shira_weight": "K", "shira_indices": "2 K"}],
    defaults={"r": 32},
    understood=frozenset({"mask_type", "random_seed", "init_weights"}),  # the entries are in the file
    read=_read_shira,
    recipe=lambda fields, **arguments: catalog.shira(**arguments),
)


# -- MiSS: init_weights is no start, it says what the tensor means -------------------------------------------------------------


def _mode(fields: Fields) -> str:
    mode = fields.values.get("init_weights", True)
    return mode if mode in ("mini", "bat") else "miss"


def _miss(fields: Fields, **arguments: Any) -> Recipe:
    mode = _mode(fields)
    width = {"width": int(fields.at("mini_r"))} if mode == "mini" else {}
    return catalog.bone(mode=mode, dropout=0.0 if mode == "bat" else float(fields.at("miss_dropout")), **width, **arguments)


MISS = PeftMethod(
    parts=named("miss_block"),
    forms=lambda fields: [{"miss_block": {"miss": "r m", "mini": "r w", "bat": "g r r"}[_mode(fields)]}],
    defaults={"r": 64, "mini_r": 1, "miss_dropout": 0.0},
    stated={"r": "r", "w": "mini_r"},
    read=lambda site: Filling({"rank": site.letters["r"]}, {"D": site.parts["miss_block"]}),
    recipe=_miss,
    problems=lambda fields: (
        []
        if fields.values.get("init_weights", True) in (True, False, None, "mini", "bat")
        else [("init_weights", f"init_weights={fields.values['init_weights']!r} (rankwise knows true, 'mini' and 'bat')")]
    ),
)
