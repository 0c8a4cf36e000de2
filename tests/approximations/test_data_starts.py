"""LoRA-GA, CorDA and CoRA: exactness, options and refusals that their oracles do not cover."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.never_silent.models import inputs, mlp
from torch import Tensor, nn

import rankwise
from rankwise.approximations.cora import CoRA, common_subspace
from rankwise.approximations.corda import CorDA
from rankwise.approximations.lora_ga import DIRECTIONS, SCALINGS, LoRAGA
from rankwise.approximations.milora import MiLoRA
from rankwise.approximations.pissa import PiSSA
from rankwise.core.errors import ArgumentError, CheckpointError, FingerprintError, StatisticsError
from rankwise.core.operators import Dense, LowRank
from rankwise.core.statistics import LayerStatistics, MomentCollector, Statistic

M, N = 10, 12


def matrix(m: int = M, n: int = N, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def known(rows: Tensor | None = None, W: Tensor | None = None) -> LayerStatistics:
    moments = MomentCollector(N)
    moments.add(matrix(60, N, seed=5) * torch.linspace(3, 0.2, N).double() if rows is None else rows)
    return LayerStatistics("layer", matrix() if W is None else W, gradient=matrix(seed=1), inputs=moments)


def run(start: Any, statistics: LayerStatistics, rank: int, scale: float = 1.0) -> LowRank:
    return start(statistics, rank, generator=torch.Generator().manual_seed(0), scale=scale)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_lora_ga_has_the_best_first_step_whatever_the_split(directions: str, scaling: str) -> None:
    statistics, rank, scale = known(), 3, 0.5
    G, S = statistics.require_gradient(), torch.linalg.svdvals(statistics.weight)
    pair = run(LoRAGA(directions=directions, scaling=scaling, gamma=9.0), statistics, rank, scale)
    size = {"stable": M**0.25 / 3, "unit": 1.0, "gd": 2.0, "weightS": (S[:rank] / scale).sqrt().mean().item()}[scaling]
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(pair.A @ pair.A.t(), size**2 * eye)
    torch.testing.assert_close(pair.B.t() @ pair.B, size**2 * eye)
    U, values, Vh = torch.linalg.svd(G, full_matrices=False)
    best = U[:, : 2 * rank] * values[: 2 * rank] @ Vh[: 2 * rank]
    step = G @ pair.A.t() @ pair.A + pair.B @ pair.B.t() @ G
    torch.testing.assert_close(step, size**2 * best)


@pytest.mark.parametrize("mode", ["offset", "absorb"])
def test_lora_ga_moves_the_model_by_that_step(mode: str) -> None:
    net, x = mlp(layers=1), inputs(40)
    pairs, eta = [(x, torch.arange(40) % 8)], 1e-4
    recipe = rankwise.catalog.lora_ga(rank=2, mode=mode)
    statistics = rankwise.collect(net, pairs, recipe.needs)
    handle = rankwise.adapt_(net, recipe, statistics=statistics)
    entry = handle.parameterization("0")
    nn.functional.cross_entropy(net(x), pairs[0][1]).backward()
    with torch.no_grad():
        entry.A -= eta * entry.A.grad
        entry.B -= eta * entry.B.grad
    U, S, Vh = torch.linalg.svd(statistics["0"].require_gradient(), full_matrices=False)
    expected = -eta * (16 / 2**0.5) ** 2 * (8**0.5 / 16) * (U[:, :4] * S[:4] @ Vh[:4])  # −η s² c² [G]_{2r}
    torch.testing.assert_close(handle.update_of("0").dense(), expected, rtol=0, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("select", ["largest", "smallest"])
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_corda_is_the_released_formula_without_its_inverse(select: str, damping: float) -> None:
    statistics, rank, scale = known(), 3, 2.0
    W, moments = statistics.weight, statistics.require_inputs()
    C = moments.gram / moments.count
    C = C + damping * C.diagonal().mean() * torch.eye(N, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    right = torch.linalg.solve(C.t(), Vh.t()).t()  # Vᵀ C⁻¹
    index = slice(0, rank) if select == "largest" else slice(M - rank, M)
    pair = run(CorDA(select=select, damping=damping), statistics, rank, scale)
    torch.testing.assert_close(scale * pair.dense(), U[:, index] * S[index] @ right[index])
    torch.testing.assert_close(pair.B.t() @ pair.B, torch.diag(S[index] / scale))
    torch.testing.assert_close(pair.A.norm(dim=1), (right[index] * (S[index] / scale).sqrt()[:, None]).norm(dim=1))


def test_corda_on_white_inputs_is_pissa_or_milora() -> None:
    white = known(rows=torch.eye(N, dtype=torch.float64))
    for mine, other in ((CorDA(), PiSSA()), (CorDA(select="smallest"), MiLoRA())):
        torch.testing.assert_close(run(mine, white, 3).dense(), run(other, white, 3).dense())


def test_corda_takes_few_tokens_and_no_silence() -> None:
    few = known(rows=matrix(4, N, seed=3))
    assert run(CorDA(damping=0.0), few, 4).dense().norm() > 1
    with pytest.raises(StatisticsError, match="layer: 1 of the 5 singular values"):
        run(CorDA(damping=0.0), few, 5)
    with pytest.raises(StatisticsError, match="layer: the inputs collected are all zero"):
        run(CorDA(), known(rows=torch.zeros(4, N, dtype=torch.float64)), 2)
    with pytest.raises(ArgumentError, match="damping is 0 or more, not -1"):
        CorDA(damping=-1)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_thin_route_and_the_dense_one_find_the_same_subspace(count: int) -> None:
    pairs = [LowRank(matrix(16, 2, seed=k), matrix(2, N, seed=20 + k), 1.0 + k) for k in range(count)]
    U, S = common_subspace(pairs)
    dense_U, dense_S = common_subspace([Dense(pair.dense()) for pair in pairs])
    rank = min(2 * count, 5)
    torch.testing.assert_close(S[:rank], dense_S[:rank])
    torch.testing.assert_close(U[:, :rank] @ U[:, :rank].t(), dense_U[:, :rank] @ dense_U[:, :rank].t())
    whole = torch.linalg.svdvals(torch.cat([pair.dense() for pair in pairs], dim=1))
    torch.testing.assert_close(S[:rank], whole[:rank])


def earlier(folder: Path, text: str = "lora(rank=2, alpha=6)", seed: int = 0, net: nn.Module | None = None) -> str:
    net = mlp() if net is None else net
    handle = rankwise.adapt_(net, rankwise.compose(text), where=lambda _, module: isinstance(module, nn.Linear))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    torch.save({site: handle.update_of(site).dense() for site in handle.targets}, folder.with_suffix(".pt"))
    return str(handle.save(folder))


def updates(folder: str) -> dict[str, Tensor]:
    return torch.load(Path(folder).with_suffix(".pt"), weights_only=True)


TEXTS = ["lora(rank=2, alpha=6)", "dora(rank=2)", "lora_xs(rank=2)", "pissa(rank=2)", "bone(rank=2)", "loftq(rank=2, bits=2)"]
BANKS = [
    "vera(rank=2)",
    "tied_lora(rank=2)",
    "tied_lora(rank=2, train='uv')",
    "lotr(rank=2)",
    "vblora(rank=2, vectors=5, length=4)",
]
BANKS += ["randlora(rank=3)", "nola(rank=2, bases_A=5, bases_B=7)", "nola(rank=2, bases_A=5, bases_B=7, share_bases=True)"]
BANKS += ["intrinsic_dimension(dimension=9)", "intrinsic_dimension(dimension=9, scope='tensor', gains=True)"]


@pytest.mark.parametrize("text", [*TEXTS, *BANKS, "pissa(rank=2, mode='absorb')", "gated_lora(rank=2)", "mica(rank=2)"])
def test_sources_of_any_method_are_read_without_their_model(text: str, tmp_path: Path) -> None:
    folder = earlier(tmp_path / "a", text)
    statistics = LayerStatistics("0", mlp()[0].weight.detach())
    (update,) = CoRA(sources=[folder]).updates(statistics)
    torch.testing.assert_close(update.dense(), updates(folder)["0"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("freeze", [True, False])
def test_the_common_subspace_becomes_the_output_factor(freeze: bool, tmp_path: Path) -> None:
    folders = [earlier(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    net, x = mlp(), inputs()
    expected = net(x)
    recipe = rankwise.catalog.cora(sources=folders, rank=3, gain=2.0, freeze=freeze)
    handle = rankwise.adapt_(net, recipe)
    assert torch.equal(net(x), expected)
    assert set(handle.blocks()["1"]) == ({"A"} if freeze else {"A", "B"})
    stacked = torch.cat([updates(folder)["1"] for folder in folders], dim=1)
    U, S, _ = torch.linalg.svd(stacked, full_matrices=False)
    B = handle.parameterization("1").B
    torch.testing.assert_close(B @ B.t(), 4 * U[:, :3] @ U[:, :3].t())
    start, statistics = recipe.start.build(), LayerStatistics("1", net[1].weight.detach())
    assert start.captured(statistics, 3) == pytest.approx((S[:3].square().sum() / S.square().sum()).item())
    assert start.captured(statistics, 4) == pytest.approx(1.0)
    handle.save(tmp_path / "new")  # and a file of it needs the sources no more
    for folder in folders:
        for file in Path(folder).iterdir():
            file.unlink()
    fresh = mlp()
    rankwise.load_(fresh, tmp_path / "new")
    assert torch.equal(fresh(x), net(x))


def test_one_source_is_given_back_by_its_subspace(tmp_path: Path) -> None:
    folder = earlier(tmp_path / "a")
    net = mlp()
    handle = rankwise.adapt_(net, rankwise.catalog.cora(sources=(folder,), rank=2, gain=0.5))
    for site in handle.targets:
        entry, change = handle.parameterization(site), updates(folder)[site]
        with torch.no_grad():
            entry.A.copy_(entry.B.t() @ change / (entry.scale * 0.25))
        torch.testing.assert_close(handle.update_of(site).dense(), change)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.ModuleDict({"q": nn.Linear(8, 6), "v": nn.Linear(5, 6), "o": nn.Linear(6, 8)})
        self.two = nn.ModuleDict({"q": nn.Linear(7, 6), "v": nn.Linear(8, 6), "o": nn.Linear(6, 8)})


@pytest.mark.parametrize(
    ("share", "joined"),
    [("per_site", ["one.q"]), ("per_kind", ["one.q", "two.q"]), ("global", ["one.q", "one.v", "two.q", "two.v"])],
)
def test_layers_of_equal_outputs_can_share_one_subspace(share: str, joined: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Blocks().double()
    W = net.one["q"].weight.detach().clone()
    folder = earlier(tmp_path / "a", "lora(rank=1)", net=net)
    pair = run(CoRA(sources=[folder], share=share), LayerStatistics("one.q", W), 1)
    stacked = torch.cat([updates(folder)[site] for site in joined], dim=1)
    U = torch.linalg.svd(stacked, full_matrices=False)[0]
    torch.testing.assert_close(pair.B @ pair.B.t(), U[:, :1] @ U[:, :1].t())


def test_whole_weights_are_stacked_on_request(tmp_path: Path) -> None:
    folder = earlier(tmp_path / "a")
    W = mlp()[0].weight.detach()
    pair = run(CoRA(sources=[folder], source="weight"), LayerStatistics("0", W), 3)
    U = torch.linalg.svd(W + updates(folder)["0"])[0]
    torch.testing.assert_close(pair.B @ pair.B.t(), U[:, :3] @ U[:, :3].t())


def test_sources_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = earlier(tmp_path / "a")
    with pytest.raises(
        StatisticsError, match="0: the 1 sources together change 2 directions of this layer, fewer than the rank 3"
    ):
        rankwise.adapt_(mlp(), rankwise.catalog.cora(sources=[folder], rank=3))
    with pytest.raises(FingerprintError, match="trained on another base: the weight of 0 differs"):
        rankwise.adapt_(mlp(seed=1), rankwise.catalog.cora(sources=[folder], rank=2))
    with pytest.raises(CheckpointError, match="does not adapt '2'"):
        rankwise.adapt_(mlp(layers=3), rankwise.catalog.cora(sources=[folder], rank=2))
    with pytest.raises(FingerprintError, match="1 is 8×8 there and 5×6 here"):
        rankwise.adapt_(
            nn.ModuleList([mlp()[0], nn.Linear(6, 5)]).double(), rankwise.catalog.cora(sources=[folder], rank=2), where=["1"]
        )
    with pytest.raises(CheckpointError, match=r"holds no adapter\.json"):
        rankwise.adapt_(mlp(), rankwise.catalog.cora(sources=[str(tmp_path / "none")], rank=2))
    with pytest.raises(ArgumentError, match="sources is a list of folders"):
        rankwise.adapt_(mlp(), rankwise.compose("cora(rank=2, sources=())"))
    with pytest.raises(ArgumentError, match="it goes with source='delta'"):
        rankwise.adapt_(mlp(), rankwise.catalog.cora(sources=[folder], rank=2, source="weight", share="global"))


def test_a_source_of_a_convolution_and_of_an_embedding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"conv": nn.Conv2d(3, 6, 3), "table": nn.Embedding(9, 6)}).double()
    handle = rankwise.adapt_(net, rankwise.catalog.lora(rank=2), where=["conv", "table"])
    with torch.no_grad():
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.add_(torch.randn(tensor.shape, dtype=torch.float64))
    changes = {site: handle.update_of(site).dense() for site in handle.targets}
    folder = str(handle.save(tmp_path))
    handle.detach_()
    new = rankwise.adapt_(net, rankwise.catalog.cora(sources=[folder], rank=2), where=["conv", "table"])
    for site, change in changes.items():
        B = new.parameterization(site).B
        torch.testing.assert_close(B @ B.t() @ change, change)


def test_needs_are_collected() -> None:
    assert rankwise.catalog.lora_ga(rank=2).needs == {Statistic.GRADIENT}
    assert rankwise.catalog.corda(rank=2).needs == {Statistic.INPUT_GRAM}
    with pytest.raises(rankwise.RankwiseError, match="were not collected"):
        rankwise.adapt_(mlp(), rankwise.catalog.lora_ga(rank=2))
