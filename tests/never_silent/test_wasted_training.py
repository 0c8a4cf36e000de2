"""Part C of the list of silent errors: wrong or wasted training. Tests are named by their number in the list."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.approximations.budget import redistribute
from rankwise.core.statistics import Statistic
from tests.never_silent.models import adapted, inputs, mlp

ADALORA = "adalora(rank=3, target_rank=1, total_steps=8, warmup_steps=1, final_steps=2)"


@pytest.mark.parametrize(
    ("recipe", "said"), [(ADALORA, "no rank was pruned"), ("sora(threshold=1e-9)", "no gate reached zero")]
)
def test_43_a_schedule_that_did_nothing_says_so(recipe: str, said: str) -> None:
    handle = rankwise.adapt_(mlp(), rankwise.compose(recipe))
    assert said in (handle.unfinished() or "") and said in handle.coverage()


def test_43_a_schedule_that_is_through_says_nothing() -> None:
    net = mlp()
    handle = rankwise.adapt_(net, rankwise.compose(ADALORA))
    optimizer = handle.optimizer(lr=1e-2)
    for _ in range(8):
        net(inputs()).square().sum().backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    assert handle.unfinished() is None and "unfinished" not in handle.coverage()
    assert sum(int((handle.parameterization(s).roles()["gate"] != 0).sum()) for s in handle.targets) == 2


class Model(nn.Module):
    """Takes what a transformers model takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(12, 8), nn.Linear(8, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.body(self.embedding(input_ids))


def test_45_padding_does_not_count_whatever_the_batch_size() -> None:
    torch.manual_seed(0)
    model = Model().double()
    with torch.no_grad():
        model.embedding.weight[0] = -1e6  # what padding holds must not matter
    rows = [[3, 4, 5], [6, 7], [8, 9, 10, 11, 2], [1]]
    ids = torch.zeros(4, 5, dtype=torch.long)
    mask = torch.zeros(4, 5, dtype=torch.long)
    for position, row in enumerate(rows):
        ids[position, : len(row)], mask[position, : len(row)] = torch.tensor(row), 1
    needs = {Statistic.INPUT_GRAM, Statistic.OUTPUT_GRAM}

    def gathered(batches: list[dict[str, Any]]) -> Any:
        return rankwise.collect(model, batches, needs, where=["body"])["body"]

    together = gathered([{"input_ids": ids, "attention_mask": mask}])
    alone = gathered(
        [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)} for row in rows]
    )
    for one, other in ((together.inputs, alone.inputs), (together.outputs, alone.outputs)):
        assert one.count == other.count == 11
        torch.testing.assert_close(one.gram, other.gram)
        torch.testing.assert_close(one.total, other.total)
    assert together.inputs.covariance().trace() < 1e3


@pytest.mark.parametrize("arguments", ["", ", save_projections=True", ", share=False"])
def test_48_a_shared_pair_is_stored_once_or_as_its_seed(arguments: str, tmp_path: Path) -> None:
    layers, rank = 6, 64
    handle = adapted(mlp(layers), f"vera(rank={rank}{arguments})")
    size = next(handle.save(tmp_path).glob("*.safetensors")).stat().st_size
    pair = 0 if not arguments else 2 * 8 * rank * 8  # B and A, float64
    copies = layers if "share" in arguments else 1
    header = 200 * 4 * layers
    assert handle.trained_numbers * 8 <= size <= handle.trained_numbers * 8 + copies * pair + header


BARE = """
import importlib.abc, sys

THERE = {*sys.stdlib_module_names, "rankwise", "torch", "torchgen", "functorch", "numpy", "safetensors", "typing_extensions"}
OF_TORCH = {"sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec", "packaging", "triton", "opt_einsum"}

class Only(importlib.abc.MetaPathFinder):
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        bare = top in THERE or top in OF_TORCH or top.startswith("_sysconfigdata")
        return self.finder.find_spec(name, path, target) if bare else None

sys.meta_path[:] = [Only(finder) for finder in sys.meta_path]
import torch
import rankwise
from rankwise.core.piece import SHELVES
blocked = [name for name in ("transformers", "peft", "optuna", "datasets", "pyarrow") if name in sys.modules]
assert not blocked, blocked
from pathlib import Path
from tempfile import mkdtemp
x, y = torch.randn(6, 8), torch.arange(6)
done = 0

def earlier(net):
    handle = rankwise.adapt_(net, rankwise.catalog.lora(rank=2))
    with torch.no_grad():
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.add_(torch.randn(tensor.shape))
    folder = handle.save(Path(mkdtemp()))
    handle.detach_()
    return str(folder)

for shelf in SHELVES:
    for slug in rankwise.catalog.names(shelf):
        kept = rankwise.catalog.entry(slug)
        net = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Linear(12, 8))
        filled = {key: (earlier(net),) if value == ("SOURCES",) else value for key, value in kept.tiny.items()}
        recipe = kept.make(**filled)
        statistics = rankwise.collect(net, [(x, y)], recipe.needs) if recipe.needs else None
        handle = rankwise.adapt_(net, recipe, statistics=statistics)
        optimizer = handle.optimizer(lr=1e-3)
        own = getattr(handle.procedure, "loss", None)  # a procedure that makes the loss itself, from inputs in [0, 1]
        loss = lambda: torch.nn.functional.cross_entropy(net(x), y) if own is None else own(net, x.sigmoid(), y)
        handle.backward(loss)
        optimizer.step()
        handle.after_step()
        done += 1
for slug in rankwise.catalog.names():
    assert callable(rankwise.catalog.entry(slug).make)
print("trained", done)
"""


def test_49_every_method_runs_with_torch_numpy_and_safetensors_alone() -> None:
    ran = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    recipes = sum(len(rankwise.catalog.names(shelf)) for shelf in rankwise.core.recipe.SHELVES)
    assert ran.stdout.split() == ["trained", str(recipes)]


def test_50_switching_compiled_adapters_gives_eager_numbers_and_few_recompilations() -> None:
    torch.compiler.reset()
    net = mlp(dtype=torch.float32)
    names = [f"adapter_{position}" for position in range(4)]
    for position, name in enumerate(names):
        adapted(net, f"lora(rank={2 + position % 2})", seed=position, name=name)
    graphs: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled, x = torch.compile(net, backend=count), inputs(dtype=torch.float32)
    with torch.no_grad():
        for turn in range(3):
            for name in names:
                rankwise.activate_(net, name)
                torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-5)
            if turn == 0:
                first = len(graphs)
    assert first <= len(names), "at most one graph for each adapter"
    assert len(graphs) == first, "switching back to a known adapter compiles nothing"
    torch.compiler.reset()


@pytest.mark.parametrize("policy", ["lora", "rslora"])
def test_52_redistributed_ranks_keep_one_scale(policy: str) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"narrow": nn.Linear(8, 8), "broad": nn.Linear(8, 8)}).double()
    x = {"narrow": inputs(40) * torch.tensor([10.0, *[0.01] * 7], dtype=torch.float64), "broad": inputs(40)}
    statistics = {}
    for site, rows in x.items():
        one = nn.Sequential(net[site])
        statistics[site] = rankwise.collect(one, [(rows, torch.zeros(40, dtype=torch.long))], {Statistic.INPUT_GRAM})["0"]
    recipe = redistribute(rankwise.compose(f"eva(rank=4) + lora(rank=4, alpha=6, scale='{policy}')"), statistics, minimum=1)
    handle = rankwise.adapt_(net, recipe, where=["narrow", "broad"], statistics=statistics)
    ranks = {site: handle.parameterization(site).rank for site in x}
    assert ranks == {"narrow": 1, "broad": 7}
    expected = 6 / (4 if policy == "lora" else 2)
    assert {handle.parameterization(site).scale for site in x} == {expected}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_53_a_start_beside_a_weight_of_half_precision_leaves_the_base_exact(dtype: torch.dtype) -> None:
    net = mlp(dtype=dtype)
    before, x = [layer.weight.clone() for layer in net], inputs(dtype=dtype)
    expected = net(x)
    handle = rankwise.adapt_(net, rankwise.compose("pissa(rank=2)"))
    assert all(torch.equal(layer.weight, kept) for layer, kept in zip(net, before, strict=True))
    for site in handle.targets:  # the start and what is subtracted for it cancel in the factors' own precision
        assert handle.update_of(site).dense().abs().max() < 1e-6
    # The output is rounded to half precision once more, after the branch was added: one unit in the last place.
    assert (net(x) - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_53_a_start_absorbed_into_half_precision_reports_its_rounding(dtype: torch.dtype) -> None:
    net = mlp(dtype=dtype)
    with pytest.warns(UserWarning, match=r"rounds to (bfloat16|float16).*0\.\d+ %.*mode='offset'"):
        handle = rankwise.adapt_(net, rankwise.compose("pissa(rank=2, mode='absorb')"))
    handle.detach_()
    assert torch.equal(net[0].weight, mlp(dtype=dtype)[0].weight)


def test_53_an_absorbed_start_in_full_precision_has_nothing_to_report() -> None:
    rankwise.adapt_(mlp(dtype=torch.float32), rankwise.compose("pissa(rank=2, mode='absorb')"))
