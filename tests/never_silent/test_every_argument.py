"""Number 5 of the list: no option is stored and never used. Every argument of every recipe changes what training gives, or is
refused. Generated from the signatures of the catalog: an argument without a case here fails."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError, StatisticsError
from rankwise.core.handle import trained_tensors
from rankwise.core.piece import SHELVES
from rankwise.core.recipe import Recipe
from rankwise.core.statistics import Statistic

# argument -> (what else is needed for it to matter, another value), for one method or for all that have it
ANYWHERE: dict[str, tuple[dict[str, Any], Any]] = {
    "rank": ({}, 5),
    "alpha": ({}, 7.0),
    "dropout": ({}, 0.4),
    "scale": ({}, "rslora"),
    "input_start": ({}, "orthonormal"),
    "iterations": ({}, 1),
    "total_steps": ({}, 6),
    "warmup_steps": ({}, 3),
    "final_steps": ({}, 4),
    "interval": ({}, 3),
    "weight_decay": ({}, 0.3),
    "learning_rate": ({}, 0.1),
    "compat": ({}, "released"),
    "eps": ({}, 1e-2),
}
CASES: dict[tuple[str, str], tuple[dict[str, Any], Any]] = {
    ("lora_fa", "input_start"): ({}, "kaiming"),
    ("lora_fa", "train"): ({}, "A"),
    ("dora", "detach_norm"): ({}, False),
    ("dora", "inner"): ({"rank": None}, "vera"),
    ("dora", "direction"): ({"rank": None}, False),
    ("vera", "d_initial"): ({}, 0.5),
    ("vera", "train"): ({}, "b"),
    ("vera", "share"): ({}, False),
    ("vera", "save_projections"): ({}, True),
    ("lora_xs", "core_std"): ({}, 0.1),
    ("lora_xs", "frames"): ({}, "kaiming"),
    ("lora_xs", "singular_values"): ({}, "both"),
    ("flora_core", "scale"): ({}, 2.0),
    ("flora_core", "kernel_rank"): ({}, 1),
    ("bone", "mode"): ({"rank": 4}, "bat"),
    ("bone", "axis"): ({"mode": "bat", "rank": 4}, "col"),
    ("bone", "width"): ({"mode": "mini", "rank": 4, "width": 4}, 2),
    ("gated_lora", "form"): ({}, "sora"),
    ("loldu", "start"): ({}, "constant"),
    ("pmss", "select"): ({}, "deim"),
    ("pmss", "rescale"): ({}, True),
    ("pmss", "scale"): ({}, 2.0),
    ("nested_nora", "rank"): ({}, 3),
    ("nested_nora", "outer_rank"): ({}, 5),
    ("nested_nora", "split"): ({}, "input"),
    ("nested_nora", "outer"): ({}, "awsvd"),
    ("nested_nora", "compensate"): ({}, True),
    ("bora", "detach_norm"): ({}, False),
    ("bora", "order"): ({}, "column"),
    ("edora", "core_std"): ({}, 0.1),
    ("edora", "detach_norm"): ({}, False),
    ("soda", "factors"): ({}, (1, 2, -1)),
    ("soda", "decomposition"): ({}, "lq"),
    ("soda", "rectify"): ({"start_delta": -0.5}, False),
    ("soda", "start_delta"): ({}, 0.1),
    ("pissa", "mode"): ({}, "absorb"),
    ("pissa", "iterations"): ({"rank": 1}, 1),  # small matrices are decomposed exactly, whatever is asked for
    ("lora_one", "gamma"): ({}, 4.0),
    ("lora_one", "normalize_by_sigma1"): ({}, False),
    ("nystrom_nora", "sigma"): ({}, 1.0),
    ("eva", "whiten"): ({}, True),
    ("eva", "center"): ({}, False),
    ("adamw", "betas"): ({}, (0.5, 0.9)),
    ("sgd", "momentum"): ({}, 0.5),
    ("lora_plus", "ratio"): ({}, 2.0),
    ("scaled_gd", "damping"): ({}, 1.0),
    ("scaled_gd", "normalized"): ({}, True),
    ("scaled_gd", "sequential"): ({}, True),
    ("reflora", "warmup"): ({}, 4),
    ("reflora", "variant"): ({}, "scalar"),
    ("galore", "scale"): ({}, 1.0),
    ("galore", "refresh"): ({}, 2),
    ("galore", "side"): ({}, "reverse_std"),
    ("galore", "inner"): ({}, "sgd"),
    ("stiefel_adam", "betas"): ({}, (0.5, 0.9)),
    ("stiefel_adam", "epsilon"): ({}, 0.1),
    ("stiefel_adam", "retraction"): ({}, "cayley"),
    ("sam", "rho"): ({}, 0.5),
    ("sam", "adaptive"): ({}, True),
    ("bar", "kind"): ({"beside": "pissa"}, "obar"),
    ("bar", "strength"): ({}, 5.0),
    ("bar", "decay_steps"): ({}, 3),
    ("bar", "decay"): ({"decay_steps": 5}, "cosine"),
    ("adalora", "target_rank"): ({}, 2),
    ("adalora", "orthogonality"): ({}, 5.0),
    ("adalora", "beta1"): ({"rank": 4, "target_rank": 1}, 0.0),
    ("adalora", "beta2"): ({"rank": 4, "target_rank": 1}, 0.0),
    ("sora", "threshold"): ({}, 0.1),
    ("sora", "mode"): ({}, "learning_rate"),
    ("sora", "l1"): ({}, 1.0),
    ("sora", "rung_steps"): ({"threshold": (0.01, 0.05), "rung_steps": 4}, 2),
    ("sora", "compat"): ({"threshold": 0.2}, "released"),
    ("relora", "moments"): ({}, 0.5),
    ("loha", "tucker"): ({}, True),
    ("loha", "start"): ({}, "lycoris"),
    ("lokr", "factor"): ({}, 4),
    ("lokr", "decompose_both"): ({"rank": 1, "factor": 4}, True),
    ("lokr", "full_scale"): ({"rank": 100, "alpha": 7.0}, "one"),
    ("lokr", "tucker"): ({"rank": 1}, True),
    ("lokr", "zero"): ({}, "D"),
    ("gralora", "rank"): ({}, 8),
    ("gralora", "blocks"): ({}, 4),
    ("gralora", "hybrid_rank"): ({}, 2),
    ("fourierft", "frequencies"): ({}, 5),
    ("fourierft", "scale"): ({}, 30.0),
    ("fourierft", "location_seed"): ({}, 1),
    ("c3a", "block"): ({}, 2),
    ("shira", "rank"): ({}, 1),
    ("shira", "mask"): ({}, "magnitude"),
    ("lora_dropout", "kind"): ({"probability": 0.4}, "rank"),
    ("lora_dropout", "probability"): ({}, 0.4),
    ("lora_dropout", "rescale"): ({"probability": 0.4}, False),
    ("lora_dropout", "granularity"): ({"probability": 0.4, "kind": "rank"}, "sample"),
    ("dota", "row_factors"): ({}, ((2, 2, 2), (3, 4, 2), (4, 4, 1))),
    ("dota", "column_factors"): ({}, ((6, 3, 2), (8, 2, 2), (6, 2, 2))),
    ("dota", "balanced"): ({}, True),
    ("lowrank_tales", "factors"): ({}, 3),
}
CASES |= {  # parameterizations that multiply the weight
    ("oft", "block"): ({}, 2),
    ("oft", "cayley"): ({}, "neumann"),
    ("oft", "terms"): ({"cayley": "neumann"}, 3),
    ("oft", "share_blocks"): ({}, True),
    ("oft", "side"): ({}, "output"),
    ("oft", "constrain"): ({}, 0.01),
    ("boft", "block"): ({"factors": 1}, 4),
    ("boft", "factors"): ({}, 1),
    ("hra", "rank"): ({}, 6),
    ("hra", "gram_schmidt"): ({"start": "random"}, True),
    ("hra", "start"): ({}, "random"),
    ("ia3", "side"): ({}, "input"),
    ("ia3", "input_layers"): ({}, ("3",)),
    ("road", "variant"): ({}, 2),
    ("road", "group"): ({}, 4),
    ("delora", "strength"): ({}, 3.0),
    ("delora", "weight_norms"): ({}, False),
    ("delora", "start"): ({}, "zero"),
    ("batched_flora", "mode"): ({}, "residual"),
    ("batched_flora", "alpha"): ({"mode": "residual"}, 7.0),
    ("capaboost", "branches"): ({}, 3),
    ("capaboost", "density"): ({}, 0.8),
    ("capaboost", "masks"): ({"rank": 4}, "nm"),
}
CASES |= {  # starts and procedures
    ("olora", "mode"): ({}, "absorb"),
    ("milora", "select"): ({}, "middle"),
    ("milora", "mode"): ({}, "absorb"),
    ("orthogonal_start", "std"): ({}, 0.3),
    ("lora_ga", "rank"): ({}, 3),
    ("lora_ga", "gamma"): ({}, 4.0),
    ("lora_ga", "directions"): ({}, "ArBr"),
    ("lora_ga", "scaling"): ({}, "unit"),
    ("lora_ga", "mode"): ({}, "absorb"),
    ("corda", "select"): ({}, "smallest"),
    ("corda", "damping"): ({}, 1.0),
    ("corda", "mode"): ({}, "absorb"),
    ("cora", "sources"): ({}, ("SOURCES", "OTHERS")),
    ("cora", "rank"): ({"sources": ("SOURCES", "OTHERS")}, 1),
    ("cora", "gain"): ({}, 2.0),
    ("cora", "freeze"): ({}, False),
    ("cora", "source"): ({}, "weight"),
    ("cora", "share"): ({}, "per_kind"),
    ("loftq", "bits"): ({}, 3),
    ("loftq", "block"): ({}, 8),
    ("loftq", "quantizer"): ({}, "uniform"),
    ("loftq", "mode"): ({}, "quantized"),  # refused on layers of ordinary numbers
    ("rac_lora", "side"): ({}, "A"),
    ("rac_lora", "draw"): ({}, "orthonormal"),
    ("rac_lora", "moments"): ({}, 0.5),
}
REFUSED = {("loftq", "mode")}
RECIPES = [slug for shelf in SHELVES for slug in rankwise.catalog.names(shelf)]
ARGUMENTS = [(slug, name) for slug in RECIPES for name in inspect.signature(rankwise.catalog.entry(slug).make).parameters]


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(4, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 16)]
        return nn.Sequential(*layers).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 4, 4, 4, generator=generator, dtype=torch.float64) + 0.5
    return x, torch.randint(16, (9,), generator=generator)


_collected: dict[bool, Any] = {}


def where_of(recipe: Recipe) -> list[str]:
    """The convolution too where the method works on it, since its kernel has arguments of its own."""
    whole = "conv" in recipe.parameterization.factory.facts.layouts
    return ["0", "3", "5"] if whole else ["3", "5"]


def observed(recipe: Recipe) -> dict[str, Tensor]:
    """Everything a user can see after training a little: trained tensors, the weights, the outputs in both modes."""
    net, (x, y) = network(), data()
    if not _collected:
        needs = {Statistic.GRADIENT, Statistic.INPUT_GRAM}
        _collected[True] = rankwise.collect(net, [(x, y)], needs, where=["0", "3", "5"])
    handle = rankwise.adapt_(net, recipe, where=where_of(recipe), statistics=_collected[True])
    optimizer = handle.optimizer(lr=3e-2)

    def loss() -> None:
        nn.functional.cross_entropy(net(x), y).backward()

    for _ in range(8):
        loss()
        handle.after_backward(loss)
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    found = {f"file/{key}": tensor.detach().clone() for key, tensor in trained_tensors(handle).items()}
    found |= {f"weight/{site}": net.get_submodule(site).weight.detach().clone() for site in handle.targets}
    found |= {"train": net(x).detach(), "eval": net.eval()(x).detach()}
    return found


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    if {key: tensor.shape for key, tensor in one.items()} != {key: tensor.shape for key, tensor in other.items()}:
        return True
    return any(float((one[key].double() - other[key].double()).abs().max()) > 1e-9 for key in one if one[key].numel())


@functools.cache
def earlier(seed: int) -> str:
    """A folder with an earlier adapter of the network, and of another layer that is alike."""
    net = network()
    net.add_module("more", nn.ModuleDict({"3": nn.Linear(6, 24)}).double())
    handle = rankwise.adapt_(net, rankwise.catalog.lora(rank=2), where=["0", "3", "5"])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return str(handle.save(Path(mkdtemp(prefix="rankwise-earlier-"))))


def built(slug: str, arguments: dict[str, Any]) -> Recipe:
    """The recipe, a perturbation, schedule or step on what it needs."""
    made = {key: rankwise.catalog.entry(value).make() if key == "inner" else value for key, value in arguments.items()}
    for key, value in made.items():
        if isinstance(value, tuple) and "SOURCES" in value:
            made[key] = tuple(earlier(seed) for seed, _ in enumerate(value))
    beside = made.pop("beside", None)  # a method to compose it with, since the argument matters only then
    recipe = rankwise.catalog.entry(slug).make(**made)
    return recipe if beside is None else rankwise.compose(recipe, beside)


@pytest.mark.parametrize(("slug", "name"), ARGUMENTS)
def test_05_every_argument_has_an_effect(slug: str, name: str) -> None:
    kept = rankwise.catalog.entry(slug)
    assert (slug, name) in CASES or name in ANYWHERE, f"add a case for {slug}({name}=…)"
    context, value = CASES.get((slug, name)) or ANYWHERE[name]
    arguments = {**kept.tiny, **context}
    assert arguments.get(name, object()) != value
    before = observed(built(slug, arguments))
    assert not differ(before, observed(built(slug, arguments))), "the same recipe twice gives the same"
    other = built(slug, {**arguments, name: value})
    if (slug, name) in REFUSED:
        with pytest.raises(StatisticsError):
            observed(other)
        return
    assert differ(before, observed(other)), f"{slug}({name}={value!r}) changes nothing"


WITHOUT_EFFECT = [
    "vera(rank=4, train='d', d_initial=0.5)",
    "lora_xs(rank=2, frames='kaiming', singular_values='both')",
    "lora_xs(rank=2, frames='kaiming', iterations=2)",
    "bar(decay='cosine')",
    "bone(rank=4, mode='miss', axis='col')",
    "bone(rank=4, mode='miss', width=4)",
    "bone(rank=4, mode='bat', dropout=0.5)",
    "dora(direction=False, rank=4)",
    "dora(inner=vera(rank=4), alpha=4)",
    "dora(inner=vera(rank=4), scale='rslora')",
    "dora(direction=False, scale='rslora')",
    "lora_fa(rank=2, train='A', input_start='kaiming')",
    "sora(rung_steps=3)",
    "galore(rank=2, inner=adamw(weight_decay=0.1))",
    "oft(block=4, terms=3)",
    "ia3(side='input', input_layers=('3',))",
    "batched_flora(rank=2, alpha=4)",
    "capaboost(rank=4, masks='nm', density=0.3)",
    "lora_dropout(rank=2, kind='input', granularity='sample')",
    "lora_dropout(rank=2, kind='output', granularity='token')",
]


@pytest.mark.parametrize("text", WITHOUT_EFFECT)
def test_05_an_argument_that_could_have_no_effect_is_refused(text: str) -> None:
    with pytest.raises((ArgumentError, RecipeError)):
        observed(rankwise.compose(text))
