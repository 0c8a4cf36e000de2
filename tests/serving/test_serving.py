"""The adapter bank: three backends against merged weights row by row, plan invariances, slots, gradients, folders."""

import itertools

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.core.errors import ActivationError, ArgumentError, CheckpointError, FingerprintError
from rankwise.core.layouts import LinearLayout
from rankwise.core.operators import Dense, LowRank
from rankwise.serving import AdapterBank, BatchPlan
from rankwise.serving.backends import RUN, pick

D = torch.float64
BACKENDS = ("loop", "gathered", "segmented", "auto")


def gen(seed):
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 8).double(), nn.Linear(8, 5).double()
        for i, p in enumerate(self.parameters()):
            p.data = torch.randn(p.shape, generator=gen(100 + i), dtype=D) * 0.5

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def adapter(seed, r=2, scale=1.0, sites=("up", "down")):
    shapes = {"up": (8, 5), "down": (5, 8)}
    return {
        site: LowRank(
            torch.randn(shapes[site][0], r, generator=gen(seed), dtype=D),
            torch.randn(r, shapes[site][1], generator=gen(seed + 1), dtype=D),
            scale,
        )
        for site in sites
    }


ADAPTERS = {"a": adapter(0, 1, 0.5), "b": adapter(10, 3, 2.0), "c": adapter(20, 2), "d": adapter(30, 3, sites=("down",))}


def bank_of(backend="auto", slots=4, max_rank=3):
    bank = AdapterBank(slots=slots, max_rank=max_rank, backend=backend)
    for name, updates in ADAPTERS.items():
        bank.register(name, updates)
    return bank


def alone(x, name):
    net = Net()
    for site, update in ADAPTERS.get(name, {}).items():
        net.get_submodule(site).weight.data += update.dense()
    with torch.no_grad():
        return net(x)


ROWS = [
    ["a", None, "b", "a", "c", "d"],
    ["a", "a", "b", "b", "b", None],
    ["a", "b", "c", "d", None, None],
    ["d", "d", "d", "d", "d", "d"],
    [None, None, None, None, None, "c"],
]


@pytest.mark.parametrize(("backend", "rows", "tokens"), list(itertools.product(BACKENDS, ROWS, (None, 3))))
@pytest.mark.parametrize("grad", [False, True])
def test_every_row_is_as_if_alone_with_its_adapter_merged(backend, rows, tokens, grad):
    shape = (6, 5) if tokens is None else (6, tokens, 5)
    x, net, bank = torch.randn(shape, generator=gen(1), dtype=D), Net(), bank_of(backend)
    with bank.serve(net), bank.rows(rows), torch.set_grad_enabled(grad):
        y = net(x)
    for i, name in enumerate(rows):
        torch.testing.assert_close(y[i : i + 1].detach(), alone(x[i : i + 1], name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_none_is_the_base_to_the_bit_and_permuting_rows_permutes_outputs(backend):
    net, bank, x = Net(), bank_of(backend), torch.randn(6, 4, 5, generator=gen(2), dtype=D)
    base = net(x)
    with bank.serve(net):
        for rows in (None, [None] * 6):
            with bank.rows(rows):
                assert torch.equal(net(x), base)
        with bank.rows([]):
            assert net(x[:0]).shape == (0, 4, 5)
        order = torch.randperm(6, generator=gen(3))
        with bank.rows(ROWS[0]):
            straight = net(x)
        with bank.rows([ROWS[0][i] for i in order]):
            torch.testing.assert_close(net(x[order]), straight[order], rtol=0, atol=1e-13)
        with bank.rows("b"):  # one name: all rows, any batch size
            torch.testing.assert_close(net(x), alone(x, "b"), rtol=0, atol=1e-12)
            torch.testing.assert_close(net(x[:2]), alone(x[:2], "b"), rtol=0, atol=1e-12)
        with bank.rows(["a", "b"]), pytest.raises(ActivationError, match="6 rows, but 2"):
            net(x)
    assert torch.equal(net(x), base) and not net.up._forward_hooks


def test_rows_nest_and_come_back_after_an_error():
    bank = bank_of()
    with bank.rows("a"):
        with bank.rows(["b", None]):
            assert bank.plan(2).distinct == (1,)
        assert bank.plan(3).slots == (0, 0, 0)
        with pytest.raises(ZeroDivisionError), bank.rows("b"):
            raise ZeroDivisionError
        assert bank.plan(3).slots == (0, 0, 0)
    assert bank.plan(3) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_to_the_largest_rank_changes_nothing(backend):
    net, x = Net(), torch.randn(3, 5, generator=gen(4), dtype=D)
    outputs = []
    for max_rank in (3, 7):
        bank = bank_of(backend, max_rank=max_rank)
        with bank.serve(net), bank.rows(["a", "b", "c"]), torch.no_grad():
            outputs.append(net(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_training_each_adapter_alone_on_its_rows(backend):
    net, x = Net(), torch.randn(6, 2, 5, generator=gen(5), dtype=D)
    rows, bank = ["a", "c", "a", None, "c", "b"], bank_of(backend)
    for p in net.parameters():
        p.requires_grad_(False)
    bank.requires_grad_(True)
    inputs = x.clone().requires_grad_(True)
    with bank.serve(net), bank.rows(rows):
        net(inputs).square().sum().backward()
    input_gradient = torch.zeros_like(x)
    for name in ("a", "b", "c", None):
        mine = [i for i, other in enumerate(rows) if other == name]
        factors = {
            site: (u.folded().B.clone().requires_grad_(True), u.A.clone().requires_grad_(True))
            for site, u in ADAPTERS.get(name, {}).items()
        }
        weights = {f"{site}.weight": net.get_submodule(site).weight + B @ A for site, (B, A) in factors.items()}
        part = x[mine].clone().requires_grad_(True)
        torch.func.functional_call(net, weights, (part,)).square().sum().backward()
        input_gradient[mine] = part.grad
        for site, (B, A) in factors.items():
            place, slot, r = bank.sites[site], bank.names[name], A.shape[0]
            torch.testing.assert_close(bank.A[place].grad[slot, :r], A.grad, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(bank.B[place].grad[slot, :, :r], B.grad, rtol=1e-10, atol=1e-12)
            assert not bank.A[place].grad[slot, r:].any() and not bank.B[place].grad[slot, :, r:].any()
    assert not bank.A[bank.sites["down"]].grad[bank.names["d"]].any()  # not in the batch: exactly zero
    torch.testing.assert_close(inputs.grad, input_gradient, rtol=1e-10, atol=1e-12)


def test_several_adapters_train_in_one_pass_and_the_padding_stays_zero():
    net, x = Net(), torch.randn(8, 5, generator=gen(6), dtype=D)
    for p in net.parameters():
        p.requires_grad_(False)
    bank = AdapterBank(slots=3, max_rank=3)
    for i in range(2):
        start = {site: LowRank(torch.zeros_like(u.B), u.A) for site, u in adapter(40 + i, 2).items()}
        bank.register(f"job{i}", start)
    bank.requires_grad_(True)
    optimizer = torch.optim.Adam(bank.parameters(), lr=0.02)
    goals = torch.cat([torch.zeros(4, 5, dtype=D), torch.ones(4, 5, dtype=D)])
    losses = []
    with bank.serve(net), bank.rows(["job0"] * 4 + ["job1"] * 4):
        for _ in range(60):
            optimizer.zero_grad()
            rows = (net(x) - goals).square().mean(1)
            rows.sum().backward()
            optimizer.step()
            losses.append((rows[:4].sum().item(), rows[4:].sum().item()))
    assert losses[-1][0] < 0.3 * losses[0][0] and losses[-1][1] < 0.3 * losses[0][1]
    assert all(not A[:, 2:].any() and not A[2].any() for A in bank.A)


def test_eviction_takes_the_least_recently_used_and_a_new_slot_gives_the_same_result():
    net, x, bank = Net(), torch.randn(2, 5, generator=gen(7), dtype=D), bank_of()
    bank.use("a")
    bank.use(None)
    bank.pin("b")
    slot = bank.names["c"]
    assert bank.register("e", adapter(50, 1)) == slot  # a was used last, b is pinned, so c goes
    with pytest.raises(ActivationError, match="'c' was evicted"):
        bank.use("c")
    bank.evict("d")
    bank.register("c", ADAPTERS["c"])
    assert bank.names["c"] != slot
    with bank.serve(net), bank.rows("c"), torch.no_grad():
        torch.testing.assert_close(net(x), alone(x, "c"), rtol=0, atol=1e-12)
    with bank.serve(net), bank.rows("e"), torch.no_grad():  # nothing of the slot's former owner is left
        net(x)
        place, r = bank.sites["down"], 1
        assert not bank.A[place][slot, r:].any() and not bank.B[place][slot, :, r:].any()


def test_a_reused_slot_forgets_sites_that_the_new_adapter_lacks():
    net, x, bank = Net(), torch.randn(2, 5, generator=gen(8), dtype=D), AdapterBank(slots=1, max_rank=3)
    bank.register("b", ADAPTERS["b"])
    bank.register("d", ADAPTERS["d"])
    with bank.serve(net), bank.rows("d"), torch.no_grad():
        torch.testing.assert_close(net(x), alone(x, "d"), rtol=0, atol=1e-12)


def test_full_banks_name_what_holds_them():
    bank = AdapterBank(slots=2, max_rank=3)
    bank.register("a", ADAPTERS["a"], pinned=True)
    bank.register("b", ADAPTERS["b"])
    with bank.rows("b"):
        with pytest.raises(ActivationError, match="more slots"):
            bank.register("c", ADAPTERS["c"])
        with pytest.raises(ActivationError, match="in use"):
            bank.evict("b")
    bank.register("c", ADAPTERS["c"])
    assert set(bank.names) == {"a", "c"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.register("a", ADAPTERS["a"]), "slot 0"),
        (lambda b: b.register("x", adapter(0, 4)), "rank 4 at up"),
        (lambda b: b.register("x", {"up": Dense(torch.eye(8, 5))}), "no exact low-rank"),
        (lambda b: b.register("x", {"up": LowRank(torch.ones(4, 1), torch.ones(1, 5))}), "another base"),
        (lambda b: b.use(["aa"]), "'aa'"),
        (lambda b: b.serve(nn.Linear(5, 8)), "not in this model"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_bank_stays_as_it_was(call, message):
    bank = bank_of(slots=6)
    before, stacks = dict(bank.names), [p.clone() for p in bank.parameters()]
    with pytest.raises(ActivationError, match=message):
        call(bank)
    assert dict(bank.names) == before and all(torch.equal(p, q) for p, q in zip(bank.parameters(), stacks, strict=True))


def test_another_acting_adapter_is_refused():
    net = Net()
    rw.adapt_(net, rw.catalog.lora(rank=2))
    with pytest.raises(ActivationError, match=r"activate_\(model, None\)"):
        bank_of().serve(net)
    rw.activate_(net, None)
    with bank_of().serve(net), torch.no_grad():
        pass


def test_convolutions_are_served_by_segments():
    conv = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).double()
    updates = {
        name: {"0": LowRank(torch.randn(4, 2, generator=gen(s), dtype=D), torch.randn(2, 27, generator=gen(s + 1), dtype=D))}
        for name, s in (("a", 1), ("b", 5))
    }
    bank, x = AdapterBank(slots=2, max_rank=2), torch.randn(3, 3, 5, 5, generator=gen(9), dtype=D)
    for name, update in updates.items():
        bank.register(name, update)
    with bank.serve(conv), bank.rows(["b", None, "a"]), torch.no_grad():
        y = conv(x)
    for i, name in enumerate(["b", None, "a"]):
        weight = conv[0].weight + (0 if name is None else updates[name]["0"].dense().reshape(4, 3, 3, 3))
        torch.testing.assert_close(y[i], nn.functional.conv2d(x[i], weight, conv[0].bias, padding=1), rtol=0, atol=1e-12)
    bank.backend = "gathered"
    with pytest.raises(ArgumentError, match="conv layer"):
        bank.serve(conv)


def test_the_plan_and_the_rule():
    plan = BatchPlan([2, -1, 0, 2])
    assert [(s.slot, s.rows.tolist(), s.first) for s in plan.segments] == [(0, [2], 2), (2, [0, 3], None)]
    assert plan.order[plan.inverse].tolist() == [0, 1, 2, 3] and plan.distinct == (0, 2) and plan.scattered == 2
    A, B = torch.zeros(32, 64, 2048), torch.zeros(32, 2048, 64)
    few = torch.zeros(32, 1, 2048)
    assert pick(BatchPlan([i % 2 for i in range(32)]), few, A, B, LinearLayout()) == "segmented"
    assert pick(BatchPlan(list(range(8))), few[:8], A, B, LinearLayout()) == "gathered"  # views: nothing is copied
    assert (
        pick(BatchPlan([5, 3, 1, 7, 0, 2, 6, 4]), few[:8, :, :512], A[:, :8, :512], B[:, :512, :8], LinearLayout())
        == "gathered"
    )
    assert set(RUN) == {"loop", "gathered", "segmented"}


@pytest.fixture
def folders(tmp_path):
    paths = {}
    for i, recipe in enumerate((rw.catalog.lora(rank=2, alpha=6), rw.catalog.rslora(rank=3, alpha=4), rw.catalog.lora(rank=3))):
        net = Net()
        handle = rw.adapt_(net, recipe, seed=i)
        with torch.no_grad():
            for j, block in enumerate(handle.blocks().values()):
                block["B"].copy_(torch.randn(block["B"].shape, generator=gen(10 * i + j), dtype=D))
        paths[f"user{i}"] = (handle.save(tmp_path / f"user{i}"), handle)
    return paths


def test_folders_load_as_their_handles_act(folders):
    bank, net, x = AdapterBank(slots=3, max_rank=3), Net(), torch.randn(3, 5, generator=gen(1), dtype=D)
    assert bank.load_many(path for path, _ in folders.values()) == {"user0": 0, "user1": 1, "user2": 2}
    with bank.serve(net), bank.rows(list(folders)), torch.no_grad():
        y = net(x)
        for i, (_, handle) in enumerate(folders.values()):
            torch.testing.assert_close(y[i], handle.model(x[i]), rtol=0, atol=1e-12)
    for name, (_, handle) in folders.items():
        for site, update in bank.updates(name).items():
            torch.testing.assert_close(update.dense(), handle.update_of(site).dense(), rtol=0, atol=1e-12)


def test_another_base_and_damaged_or_foreign_folders_are_refused(folders, tmp_path):
    bank = AdapterBank(slots=3, max_rank=3)
    path, _ = folders["user0"]
    bank.load(path, "mine")
    other = Net()
    other.up.weight.data += 1
    with pytest.raises(FingerprintError, match="another base"):
        bank.serve(other)
    bank.serve(other, any_base=True).detach()
    file = next(path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        bank.load(path, "again")
    full = rw.adapt_(Net(), rw.catalog.full())
    with pytest.raises(CheckpointError, match=r"register\(name, handle.updates"):
        bank.load(full.save(tmp_path / "full"))


@pytest.mark.slow
def test_a_real_language_model_with_an_adapter_per_row():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50
    )
    model = transformers.LlamaForCausalLM(config).eval()
    sites = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    updates = [
        {
            s: LowRank(
                torch.randn(m.out_features, 3, generator=gen(i)), torch.randn(3, m.in_features, generator=gen(i + 9)) * 0.1
            )
            for s, m in sites.items()
        }
        for i in range(3)
    ]
    ids = torch.randint(0, 50, (4, 6), generator=gen(3))
    bank = AdapterBank(slots=3, max_rank=4)
    for i, update in enumerate(updates):
        bank.register(f"u{i}", update)
    with torch.no_grad():
        base = model(ids).logits
        with bank.serve(model), bank.rows(["u2", None, "u0", "u1"]):
            y = model(ids).logits
        assert not torch.allclose(y[0], base[0], atol=0.05)
        for i, which in enumerate((2, None, 0, 1)):
            for site, module in sites.items():
                if which is not None:
                    module.weight += updates[which][site].dense()
            torch.testing.assert_close(y[i], model(ids[i : i + 1]).logits[0], rtol=1e-4, atol=1e-4)
            for site, module in sites.items():
                if which is not None:
                    module.weight -= updates[which][site].dense()
