"""Adapter banks against their spec (arXiv:2312.05677, arXiv:2310.18547): every row run alone, its adapter merged by hand.

Oracle 2 is about the multiplicative form, which the bank does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.operators import LowRank
from rankwise.serving import AdapterBank

BACKENDS = ["loop", "gathered", "segmented", "auto"]
N, HIDDEN, M = 6, 9, 5
SHAPES = {"0": (HIDDEN, N), "2": (M, HIDDEN)}
Adapter = dict[str, LowRank]
ROWS = ["b", None, "c", "a", "b", "b", None, "d", "a"]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(model: nn.Module, site: str) -> nn.Linear:
    layer = model.get_submodule(site)
    assert isinstance(layer, nn.Linear)
    return layer


def gradient_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def stack_gradient(bank: AdapterBank, role: str, site: str) -> Tensor:
    """Gradient of the stack A (G, R, n) or B (G, m, R) of a site, found by its sizes, which differ between sites."""
    m, n = SHAPES[site]
    (found,) = [
        gradient_of(stack)
        for name, stack in bank.named_parameters()
        if name.startswith(role) and (stack.shape[2] == n if role == "A" else stack.shape[1] == m)
    ]
    return found


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(N, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, M))
    for i, parameter in enumerate(model.parameters()):
        parameter.data = 0.5 * normal(100 + i, *parameter.shape).to(dtype)
    return model


def adapter(seed: int, rank: int, scale: float, dtype: torch.dtype = torch.float64) -> Adapter:
    return {
        site: LowRank(normal(seed + i, m, rank).to(dtype), normal(seed + 50 + i, rank, n).to(dtype), scale)
        for i, (site, (m, n)) in enumerate(SHAPES.items())
    }


def four(dtype: torch.dtype = torch.float64) -> dict[str, Adapter]:
    """Ranks and scales all different; "d" lacks the second site."""
    found = {
        "a": adapter(1000, 1, 2.0, dtype),
        "b": adapter(2000, 3, 0.5, dtype),
        "c": adapter(3000, 4, -1.5, dtype),
        "d": adapter(4000, 2, 1.0, dtype),
    }
    del found["d"]["2"]
    return found


def bank_of(adapters: dict[str, Adapter], backend: str = "auto", slots: int = 5, max_rank: int = 4) -> AdapterBank:
    bank = AdapterBank(slots=slots, max_rank=max_rank, backend=backend)
    for name, updates in adapters.items():
        bank.register(name, updates)
    return bank


def merged(adapters: dict[str, Adapter], name: str | None, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    model = network(dtype)
    for site, update in (adapters[name] if name is not None else {}).items():
        layer = linear(model, site)
        layer.weight.data += update.scale * update.B @ update.A
    return model


def served(bank: AdapterBank, model: nn.Module, x: Tensor, rows: Sequence[str | None]) -> Tensor:
    with bank.serve(model), bank.rows(list(rows)), torch.no_grad():
        return model(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [None, 1, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_1_each_row_gets_its_own_merged_weight(backend: str, tokens: int | None, dtype: torch.dtype, tolerance: float) -> None:
    adapters = four(dtype)
    bank, model = bank_of(adapters, backend), network(dtype)
    models = {name: merged(adapters, name, dtype) for name in (None, *adapters)}
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        rows = [(None, *adapters)[int(i)] for i in torch.randint(0, 5, (9,), generator=generator)]
        x = normal(seed, 9, *(() if tokens is None else (tokens,)), N).to(dtype)
        found = served(bank, model, x, rows)
        for i, name in enumerate(rows):
            expected = models[name](x[i : i + 1]).detach()[0]
            assert float((found[i] - expected).abs().max() / expected.abs().max()) <= tolerance


def test_1_all_backends_are_the_per_row_sum() -> None:
    adapters, x = four(), normal(7, 9, 3, N)
    model = network()
    expected = []
    for row, name in zip(x, ROWS, strict=True):
        chosen = {} if name is None else adapters[name]
        for site in ("0", "2"):
            layer = linear(model, site)
            y = row @ layer.weight.T + layer.bias
            if site in chosen:
                y = y + chosen[site].scale * (row @ chosen[site].A.T) @ chosen[site].B.T
            row = torch.tanh(y) if site == "0" else y
        expected.append(row.detach())
    for backend in BACKENDS:
        found = served(bank_of(adapters, backend), network(), x, ROWS)
        assert float((found - torch.stack(expected)).abs().max()) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_3_permuting_rows_permutes_outputs(backend: str) -> None:
    bank, model, x = bank_of(four(), backend), network(), normal(9, 9, 2, N)
    reference = served(bank, model, x, ROWS)
    for seed in range(5):
        order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
        found = served(bank, model, x[order], [ROWS[int(i)] for i in order])
        assert float((found - reference[order]).abs().max()) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_3_one_adapter_for_all_rows_is_plain_lora(backend: str) -> None:
    model, x = network(), normal(10, 7, N)
    handle = rankwise.adapt_(model, rankwise.compose("lora(rank=3, alpha=6)"), seed=0)
    for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data = normal(400 + i, *parameter.shape)
    plain = model(x).detach()
    bank = AdapterBank(slots=2, max_rank=3, backend=backend)
    bank.register("only", handle.updates())
    assert float((plain - network()(x).detach()).abs().max()) > 0.1
    for rows in (["only"] * 7, "only"):
        base = network()
        with bank.serve(base), bank.rows(rows), torch.no_grad():
            assert float((base(x) - plain).abs().max()) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_3_no_rows_and_rows_without_adapter_are_the_base_to_the_bit(backend: str, dtype: torch.dtype) -> None:
    bank, model, x = bank_of(four(dtype), backend), network(dtype), normal(11, 6, 2, N).to(dtype)
    expected = network(dtype)(x).detach()
    assert torch.equal(served(bank, model, x, [None] * 6), expected)
    with bank.serve(model):
        bank.use(None)
        assert torch.equal(model(x), expected)
    assert served(bank, model, x[:0], []).shape == (0, 2, M)
    assert torch.equal(model(x), expected)  # and nothing is left on the model
    mixed = served(bank, model, x, [None, "a", None, "b", None, None])
    assert torch.equal(mixed[[0, 2, 4, 5]], expected[[0, 2, 4, 5]])
    assert all(float((mixed[i] - expected[i]).abs().max()) > 0.01 for i in (1, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_4_zero_padding_changes_nothing(backend: str) -> None:
    """Factors, weights and inputs are small integers, so that every order of summation gives the same bits."""
    layer = nn.Linear(N, M).double()
    layer.weight.data, layer.bias.data = (3 * normal(12, M, N)).round(), (3 * normal(13, M)).round()
    model = nn.Sequential(layer)
    updates = {
        str(r): {"0": LowRank((2 * normal(20 + r, M, r)).round(), (2 * normal(30 + r, r, N)).round(), 2.0)} for r in (1, 2, 4)
    }
    x, rows = (4 * normal(14, 6, 3, N)).round(), ["1", "4", None, "2", "2", "1"]
    found = [served(bank_of(updates, backend, max_rank=max_rank), model, x, rows) for max_rank in (4, 5, 16)]
    expected = torch.stack(
        [
            row @ (layer.weight + (0 if name is None else updates[name]["0"].dense())).T + layer.bias
            for row, name in zip(x, rows, strict=True)
        ]
    ).detach()
    assert all(torch.equal(each, expected) for each in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_4_the_true_rank_comes_back_out(backend: str) -> None:
    adapters = four()
    bank = bank_of(adapters, backend, max_rank=16)
    for name, updates in adapters.items():
        kept = bank.updates(name)
        assert set(kept) == set(updates)
        for site, update in updates.items():
            assert kept[site].rank == update.rank
            assert float((kept[site].dense() - update.dense()).abs().max()) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_5_gradients_are_those_of_training_alone(backend: str, name: str) -> None:
    adapters, x, target = four(), normal(15, 9, 3, N), normal(16, 9, 3, M)
    bank, model = bank_of(adapters, backend, max_rank=6), network().requires_grad_(False)
    bank.requires_grad_()
    with bank.serve(model), bank.rows(ROWS):
        (model(x) - target).pow(2).sum().backward()
    slot = bank.names[name]

    mine = [i for i, row in enumerate(ROWS) if row == name]
    alone = {site: (u.B * u.scale, u.A.clone()) for site, u in adapters[name].items()}  # the scale is folded into B
    for B, A in alone.values():
        B.requires_grad_()
        A.requires_grad_()
    weights = {site: linear(model, site).weight for site in SHAPES}
    full = {site: W + alone[site][0] @ alone[site][1] if site in alone else W for site, W in weights.items()}
    hidden = torch.tanh(x[mine] @ full["0"].T + linear(model, "0").bias)
    (hidden @ full["2"].T + linear(model, "2").bias - target[mine]).pow(2).sum().backward()

    for site in SHAPES:
        found_A, found_B = stack_gradient(bank, "A", site)[slot], stack_gradient(bank, "B", site)[slot]  # (R, n), (m, R)
        rank = alone[site][1].shape[0] if site in alone else 0
        if rank:
            B, A = alone[site]
            assert float((found_A[:rank] - gradient_of(A)).norm() / gradient_of(A).norm()) < 1e-5
            assert float((found_B[:, :rank] - gradient_of(B)).norm() / gradient_of(B).norm()) < 1e-5
        assert not found_A[rank:].any() and not found_B[:, rank:].any()  # padding learns nothing


@pytest.mark.parametrize("backend", BACKENDS)
def test_5_adapters_without_rows_get_no_gradient(backend: str) -> None:
    bank, model = bank_of(four(), backend), network().requires_grad_(False)
    bank.requires_grad_()
    with bank.serve(model), bank.rows(["a", None, "c"]):
        model(normal(17, 3, N)).pow(2).sum().backward()
    used = {bank.names["a"], bank.names["c"]}
    for stack in bank.parameters():
        assert stack.grad is not None
        for slot in range(5):
            assert bool(stack.grad[slot].any()) == (slot in used)


@pytest.mark.parametrize("backend", BACKENDS)
def test_6_another_slot_gives_the_same_result(backend: str) -> None:
    adapters, model, x = four(), network(), normal(18, 9, N)
    bank = bank_of(adapters, backend, slots=4)
    reference = served(bank, model, x, ROWS)
    before = dict(bank.names)
    for name in "abcd":
        bank.evict(name)
    for name in "dcba":
        bank.register(name, adapters[name])
    assert all(bank.names[name] != before[name] for name in "abcd")
    assert torch.equal(served(bank, model, x, ROWS), reference)


def test_6_nothing_of_an_evicted_adapter_is_left() -> None:
    wide, narrow = adapter(5000, 4, 3.0), four()["d"]  # the second is narrower and has one site only
    bank = bank_of({"wide": wide}, slots=1)
    bank.evict("wide")
    bank.register("narrow", narrow)
    model, x = network(), normal(19, 4, N)
    expected = merged({"d": narrow}, "d")(x).detach()
    assert float((served(bank, model, x, ["narrow"] * 4) - expected).abs().max()) < 1e-12
