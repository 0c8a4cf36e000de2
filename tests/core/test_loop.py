"""What stands around one optimizer step: `handle.backward`, per-layer steps, clipping across blocks, gains, renewals."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import RecipeError, TrainingError
from rankwise.core.gain import Gain, with_gain
from rankwise.core.operators import Dense, LowRank, Operator
from rankwise.core.parameterization import Facts, Parameterization, Site
from rankwise.core.piece import piece, register
from rankwise.core.protocols import Decision, Freeze, Perturbation, Procedure, Renew
from rankwise.core.recipe import Recipe
from rankwise.core.step import CLIPPING, Block, State, Step
from rankwise.steps.moments import adamw, sgd


def model_and_batch() -> tuple[nn.Module, Callable[[], Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        x, y = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    return model, lambda: (model(x) - y).square().mean()


def train(recipe: Recipe, steps: int = 4, lr: float = 0.05, **options: object) -> dict[str, Tensor]:
    model, loss = model_and_batch()
    handle = rankwise.adapt_(model, recipe)
    optimizer = handle.optimizer(lr=lr, **options)
    for _ in range(steps):
        handle.backward(loss)
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    return {f"{site}.{role}": t.detach() for site, block in handle.blocks().items() for role, t in block.items()}


@pytest.mark.parametrize("recipe", ["lora(rank=2) + sam", "lora(rank=2, dropout=0.3) + sam", "dora(rank=2) + bar"])
def test_backward_is_the_loop_written_by_hand(recipe: str) -> None:
    model, loss = model_and_batch()
    handle = rankwise.adapt_(model, rankwise.compose(recipe))
    optimizer = handle.optimizer(lr=0.05)
    for _ in range(4):
        loss().backward()
        handle.after_backward(lambda: loss().backward())
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    by_hand = {f"{site}.{role}": t for site, block in handle.blocks().items() for role, t in block.items()}
    for name, tensor in train(rankwise.compose(recipe)).items():
        assert torch.equal(tensor, by_hand[name]), name


@pytest.mark.parametrize("recipe", ["lora(rank=2)", "full + galore(rank=2, refresh=2)", "lora(rank=2) + scaled_gd"])
def test_per_layer_steps_are_the_same_steps(recipe: str) -> None:
    together, apart = train(rankwise.compose(recipe)), train(rankwise.compose(recipe), per_layer=True)
    for name, tensor in together.items():
        assert torch.equal(tensor, apart[name]), name


def test_per_layer_frees_each_gradient() -> None:
    model, loss = model_and_batch()
    handle = rankwise.adapt_(model, rankwise.compose("full + sgd"))
    handle.optimizer(lr=0.1, per_layer=True)
    loss().backward()
    assert all(tensor.grad is None for block in handle.blocks().values() for tensor in block.values())


@pytest.mark.parametrize("recipe", ["lora(rank=2) + bar", "lora(rank=2) + sam", "relora(rank=2, interval=2)"])
def test_per_layer_is_refused_where_something_works_in_between(recipe: str) -> None:
    model, _ = model_and_batch()
    handle = rankwise.adapt_(model, rankwise.compose(recipe))
    with pytest.raises(TrainingError, match="between backward and step"):
        handle.optimizer(lr=0.1, per_layer=True)


def test_per_layer_names_a_gradient_that_is_not_finite() -> None:
    model, loss = model_and_batch()
    handle = rankwise.adapt_(model, rankwise.compose("full + sgd"))
    handle.optimizer(lr=0.1, per_layer=True)
    with pytest.raises(TrainingError, match=r"the gradient of 2\.weight holds NaN"):
        (loss() * float("nan")).backward()


@register("step")
def halve_together() -> Step:
    """All gradients by one factor that depends on every block and on a counter."""

    def init(block: Block) -> State:
        return {role: {"step": torch.zeros(())} for role in block}

    def across(gradients, parameters, states):  # type: ignore[no-untyped-def]
        norm = torch.stack([g.square().sum() for block in gradients.values() for g in block.values()]).sum().sqrt()
        for state in states.values():
            for kept in state.values():
                kept["step"] += 1
        return {site: {role: g / norm for role, g in block.items()} for site, block in gradients.items()}

    return Step(init, lambda gradients, state, parameters: gradients, "halve_together", CLIPPING, across=across)


def test_a_clipping_step_sees_all_blocks_behind_the_preconditioners() -> None:
    model, loss = model_and_batch()
    base = rankwise.compose("lora(rank=2) + scaled_gd")
    recipe = Recipe(**{**base.__dict__, "step": (piece(sgd), piece(halve_together), base.step[0])})
    handle = rankwise.adapt_(model, recipe)
    blocks = handle.blocks()
    with torch.no_grad():
        for block in blocks.values():
            block["B"].normal_(generator=torch.Generator().manual_seed(1))
    before = {(site, role): t.detach().clone() for site, block in blocks.items() for role, t in block.items()}
    optimizer = handle.optimizer(lr=1.0)
    handle.backward(loss)
    optimizer.step()
    moved = torch.cat([(before[site, role] - t).detach().flatten() for site, b in blocks.items() for role, t in b.items()])
    assert moved.norm() == pytest.approx(1.0, rel=1e-12)
    counters = [value for state in optimizer.state.values() for name, value in state.items() if "halve" in name]
    assert len(counters) == 4 and all(float(value) == 1.0 for value in counters)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_gain_scales_the_tensors_gradients_and_nothing_else(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    B, A, x, G, c = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in [(5, 2), (2, 6), (7, 6), (7, 5), (5,)]
    )
    B.requires_grad_()
    A.requires_grad_()
    x.requires_grad_()
    operator = with_gain(LowRank(B, A, scale), Gain(lambda update: c))
    y = x @ operator.dense().mT
    torch.testing.assert_close(y, scale * x @ A.mT @ B.mT, rtol=1e-13, atol=1e-13)
    y.backward(G)
    W_gradient = G.mT @ x.detach()
    torch.testing.assert_close(B.grad, scale * c[:, None] * W_gradient @ A.detach().mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(A.grad, scale * B.detach().mT @ (c[:, None] * W_gradient), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, scale * G @ B.detach() @ A.detach(), rtol=1e-12, atol=1e-12)


@register("parameterization")
class Growing(Parameterization):
    """W' = W_1 + … + W_k, with one more tensor at every renewal."""

    facts = Facts(additive=False, exact_lora_export=False)

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.part_1 = nn.Parameter(site.cast(site.weight()))

    @classmethod
    def roles_of(cls, **arguments: object) -> frozenset[str]:
        return frozenset({"part_1"})

    @classmethod
    def renewals(cls) -> frozenset[str]:
        return frozenset({"grow"})

    def forward(self, base: Operator) -> Operator:
        return Dense(sum(self.roles().values()))  # type: ignore[arg-type]

    def renew(self, what: str, generator: torch.Generator, **arguments: object) -> Mapping[str, None]:
        self.register_parameter(f"part_{len(self.roles()) + 1}", nn.Parameter(torch.zeros_like(self.part_1)))
        return {"part_1": None}

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        while f"part_{len(self.roles()) + 1}" in shapes:
            self.renew("grow", torch.Generator())


@register("procedure")
class Grow(Procedure):
    """Grows after every second step; takes every gradient twice."""

    renews: ClassVar[frozenset[str]] = frozenset({"grow"})
    second_pass = True

    def __init__(self) -> None:
        self.between_calls = 0
        self.shapes: Mapping[str, tuple[int, ...]] = {}

    def begin(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def between(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        self.between_calls += 1
        assert all(tensor.grad is not None for block in blocks.values() for tensor in block.values())
        return {}

    def decide(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        return dict.fromkeys(blocks, Renew("grow")) if step % 2 else {}


def growing() -> Recipe:
    own = frozenset({"parameterization", "procedure"})
    return Recipe(name="grow", parameterization=piece(Growing), step=(piece(adamw),), procedure=piece(Grow), own=own)


def test_a_renewal_may_add_tensors_and_the_optimizer_follows() -> None:
    model, loss = model_and_batch()
    handle = rankwise.adapt_(model, growing())
    assert handle.procedure.shapes == {"0": (5, 6), "2": (4, 5)}  # type: ignore[union-attr]
    optimizer = handle.optimizer(lr=0.01)
    for count in range(5):
        handle.backward(loss)
        optimizer.step()
        handle.after_step()
        state = optimizer.state.get(handle.parameterization("0").part_1, {})
        assert bool(state) == (count % 2 == 0)  # forgotten at every renewal
        optimizer.zero_grad()
    assert handle.procedure.between_calls == 5  # type: ignore[union-attr]
    assert sorted(handle.blocks()["0"]) == ["part_1", "part_2", "part_3"]
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len(group["param_names"]) == 6
    assert all(tensor.abs().sum() > 0 for tensor in handle.blocks()["2"].values())


def test_what_a_renewal_added_is_stored_and_loaded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, loss = model_and_batch()
    handle = rankwise.adapt_(model, growing())
    optimizer = handle.optimizer(lr=0.01)
    for _ in range(4):
        handle.backward(loss)
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    expected = handle.update_of("0").dense()
    handle.save(tmp_path / "a")
    again, _ = model_and_batch()
    loaded = rankwise.load_(again, tmp_path / "a")
    torch.testing.assert_close(loaded.update_of("0").dense(), expected, rtol=0, atol=0)


def test_a_procedure_whose_renewals_the_parameterization_lacks_is_refused() -> None:
    model, _ = model_and_batch()
    base = rankwise.compose("lora(rank=2)")
    with pytest.raises(RecipeError, match="a parameterization that can grow"):
        rankwise.adapt_(model, Recipe(**{**base.__dict__, "procedure": piece(Grow)}))


def test_two_methods_that_take_gradients_their_own_way_are_refused() -> None:
    model, _ = model_and_batch()
    sam = rankwise.compose("sam")
    with pytest.raises(RecipeError, match="gradients that are taken in one way"):
        rankwise.adapt_(model, Recipe(**{**growing().__dict__, "perturbation": sam.perturbation}))


@register("perturbation")
class Guess(Perturbation):
    """Puts ones into the gradients, without backward."""

    forward_only = True

    def estimate(self, blocks: Mapping[str, Block], evaluate: Callable[[], Tensor], *, learning_rate: float) -> Tensor:
        loss = evaluate()
        assert not loss.requires_grad
        for block in blocks.values():
            for tensor in block.values():
                tensor.grad = torch.ones_like(tensor)
        return loss


def test_forward_only_methods_run_without_backward_and_without_dropout() -> None:
    model, loss = model_and_batch()
    model.insert(1, nn.Dropout(0.9))  # type: ignore[operator]
    base = rankwise.compose("lora(rank=2, dropout=0.5) + sgd")
    handle = rankwise.adapt_(model, Recipe(**{**base.__dict__, "perturbation": piece(Guess)}))
    optimizer = handle.optimizer(lr=0.1)
    with torch.no_grad():
        expected = model.eval() and loss()
    model.train()
    model[1].eval()
    before = handle.blocks()["0"]["A"].detach().clone()
    assert torch.equal(handle.backward(loss), expected)
    assert model.training and not model[1].training
    optimizer.step()
    handle.after_step()
    torch.testing.assert_close(handle.blocks()["0"]["A"], before - 0.1)
    with pytest.raises(TrainingError, match=r"loss = handle\.backward"):
        handle.after_backward()


@pytest.mark.parametrize("where", [["0", "2"], ["2", "0"]])
def test_sites_come_in_the_order_of_the_model(where: list[str]) -> None:
    """Else an optimizer's state would come back at other tensors after `load_`, which knows the model's order only."""
    model, _ = model_and_batch()
    handle = rankwise.adapt_(model, rankwise.compose("lora(rank=2)"), where)
    assert list(handle.targets) == ["0", "2"]


@register("parameterization")
class Turning(Growing):
    """Growing, which can also turn its part by a matrix."""

    @classmethod
    def renewals(cls) -> frozenset[str]:
        return frozenset({"grow", "turn"})

    def renew(self, what: str, generator: torch.Generator, **arguments: object) -> Mapping[str, Callable[[Tensor], Tensor]]:
        by = arguments["by"]
        self.part_1.copy_(by @ self.part_1)  # type: ignore[operator]
        return {"part_1": lambda moment: by @ moment}  # type: ignore[operator]


@pytest.mark.parametrize("bits", [32, 8])
def test_moments_follow_a_renewal_as_gradients_do_and_squares_through_their_roots(bits: int) -> None:
    if bits == 8:
        pytest.importorskip("torchao")
    model = nn.Sequential(nn.Linear(80, 64)).double()
    recipe = Recipe(name="turn", parameterization=piece(Turning), step=(piece(adamw, bits=bits),))
    handle = rankwise.adapt_(model, recipe)
    optimizer = handle.optimizer(lr=0.01)
    handle.backward(lambda: model(torch.ones(1, 80, dtype=torch.float64)).square().sum())
    optimizer.step()
    part = handle.blocks()["0"]["part_1"]
    before = dict(optimizer.state[part])
    by = torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    handle.apply_({"0": Renew("turn", {"by": by})})
    after = optimizer.state.get(part, {})
    if bits == 8:  # codes cannot be turned: the state begins again
        assert any("codes" in name for name in before) and not after
        return
    torch.testing.assert_close(after["adamw.exp_avg"], by @ before["adamw.exp_avg"])
    torch.testing.assert_close(after["adamw.exp_avg_sq"], (by @ before["adamw.exp_avg_sq"].sqrt()).square())
    assert torch.equal(after["adamw.step"], before["adamw.step"])


def test_an_optimizer_made_after_freezing_takes_the_state_of_one_made_before() -> None:
    first, loss = model_and_batch()
    handle = rankwise.adapt_(first, rankwise.compose("lora(rank=2)"))
    optimizer = handle.optimizer(lr=0.05)

    def step(handle: rankwise.Handle, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
        handle.backward(loss)
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()

    step(handle, optimizer, loss)
    handle.apply_({"0": Freeze(frozenset({"A"}))})
    second, other_loss = model_and_batch()
    other = rankwise.adapt_(second, rankwise.compose("lora(rank=2)"))
    with torch.no_grad():
        for site, block in handle.blocks().items():
            for role, tensor in block.items():
                other.parameterization(site).roles()[role].copy_(tensor)
        other.parameterization("0").roles()["A"].copy_(handle.parameterization("0").roles()["A"])
    other.load_state_dict(handle.state_dict())
    again = other.optimizer(lr=0.05)
    again.load_state_dict(optimizer.state_dict())
    step(handle, optimizer, loss)
    step(other, again, other_loss)
    for site, block in handle.blocks().items():
        for role, tensor in block.items():
            assert torch.equal(tensor, other.blocks()[site][role]), f"{site}.{role}"


@pytest.mark.filterwarnings("ignore")  # Dynamo tells where masks break the graph
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_compiled_model_meets_the_same_masks_in_both_passes(dropout: float) -> None:
    """Without masks its forwards are one graph each and not counted; with them, the first mask of all counts too."""
    found = []
    for compiled in (False, True):
        model, _ = model_and_batch()
        handle = rankwise.adapt_(model, rankwise.compose(f"lora(rank=2, dropout={dropout}) + sam(rho=0.1)"))
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=not dropout, backend="aot_eager") if compiled else model
        x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        optimizer = handle.optimizer(lr=0.05)
        model.eval()
        model(x)  # an eager one is counted, without masks
        model.train()
        for _ in range(3):
            handle.backward(lambda: run(x).square().mean())  # noqa: B023
            optimizer.step()
            handle.after_step()
            optimizer.zero_grad()
        found.append({f"{site}.{role}": t.detach() for site, block in handle.blocks().items() for role, t in block.items()})
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-9, atol=1e-12)
