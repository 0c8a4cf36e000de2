"""ALLoRA, LoRA-Pro, clipping and decay by role: options, refusals and numerics that their oracles leave open."""

import copy
import pickle

import pytest
import torch
from torch import nn

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError
from rankwise.steps.clipping import clip, effective_norm
from rankwise.steps.lora_pro import directions, equivalent_gradient, sylvester


def problem(recipe, *, where="all-linear", lr=0.05, stir=0.0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()
        x, y = torch.randn(20, 8, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    handle = rankwise.adapt_(model, rankwise.compose(recipe), where)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64), alpha=stir)
    return model, handle, handle.optimizer(lr=lr, **options), lambda: (model(x) - y).square().mean()


def factors(seed, m=9, n=7, r=3):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(m, r), (r, n), (m, n)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_lora_pro_survives_half_precision_factors_and_singular_ones():
    B, A, G = factors(0)
    B[:, 1] = B[:, 0]  # the Gram of B is singular
    d_B, d_A = directions(B, A, G @ A.mT, B.mT @ G, 1.0)
    assert torch.isfinite(d_B).all() and torch.isfinite(d_A).all()
    expected = G - (torch.eye(9, dtype=G.dtype) - B @ torch.linalg.pinv(B)) @ G @ (
        torch.eye(7, dtype=G.dtype) - torch.linalg.pinv(A) @ A
    )
    torch.testing.assert_close(B @ d_A + d_B @ A, expected, rtol=1e-9, atol=1e-9)
    half = equivalent_gradient(B.bfloat16(), A.bfloat16(), (G @ A.mT).bfloat16(), (B.mT @ G).bfloat16(), 1.0, 1e-8)
    assert half.dtype is torch.float32


def test_sylvester_leaves_directions_alone_that_both_sides_lack():
    P, Q = torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64)), torch.diag(torch.tensor([3.0, 0.0], dtype=torch.float64))
    X = sylvester(P, Q, torch.ones(2, 2, dtype=torch.float64))
    torch.testing.assert_close(X, torch.tensor([[0.2, 0.5], [1 / 3, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("recipe", ["dora(rank=2) + lora_pro", "gated_lora(rank=2) + lora_pro"])
def test_lora_pro_trains_what_stands_beside_the_factors(recipe):
    _, handle, optimizer, loss = problem(recipe, stir=0.1)
    before = {role: tensor.detach().clone() for role, tensor in handle.blocks()["0"].items()}
    handle.backward(loss)
    optimizer.step()
    assert all(not torch.equal(tensor, before[role]) for role, tensor in handle.blocks()["0"].items())


def test_lora_pro_with_full_rank_follows_full_gradient_descent():
    """With r = min(m, n) the step in W is the gradient itself, whatever the factors and their scale."""
    _, handle, optimizer, loss = problem("lora(rank=4, alpha=12) + lora_pro(variant='sgd', damping=0.0)", stir=1.0, lr=1e-6)
    before = {site: handle.update_of(site).dense().detach() for site in handle.targets}
    handle.backward(loss)
    optimizer.step()
    moved = handle.update_of("2").dense().detach() - before["2"]
    _, other, second, again = problem("full + sgd", lr=1e-6)
    with torch.no_grad():
        for site in handle.targets:
            other.blocks()[site]["weight"].add_(before[site])
    start = other.blocks()["2"]["weight"].detach().clone()
    other.backward(again)
    second.step()
    torch.testing.assert_close(moved, other.blocks()["2"]["weight"].detach() - start, rtol=1e-4, atol=1e-15)


@pytest.mark.parametrize("other", ["scaled_gd", "reflora", "lora_pro(variant='sgd')"])
def test_lora_pro_is_not_stacked_on_another_preconditioner(other):
    with pytest.raises(RecipeError, match="at most one preconditioner"):
        rankwise.adapt_(nn.Sequential(nn.Linear(8, 8)), rankwise.compose(f"lora(rank=2) + lora_pro + {other}"))


def test_two_clippings_and_a_clipping_beside_sequential_steps_are_refused():
    clips = "theory_gradient_clipping + theory_gradient_clipping(mode='per_role')"
    for recipe in (f"lora(rank=2) + {clips}", "lora(rank=2) + theory_gradient_clipping + scaled_gd(sequential=True)"):
        with pytest.raises(RecipeError, match="at most one step that clips"):
            rankwise.adapt_(nn.Sequential(nn.Linear(8, 8)), rankwise.compose(recipe))


def test_allora_refuses_what_has_no_factors_to_rescale():
    for host in ("dora(rank=2)", "sltrain(rank=2, density=0.25, keep_base=True)"):
        with pytest.raises(RecipeError, match="an additive parameterization with exact factors"):
            rankwise.adapt_(nn.Sequential(nn.Linear(8, 8)), rankwise.compose(f"{host} + allora"))
    with pytest.raises(ArgumentError, match="eta_squared"):
        rankwise.compose("lora + allora(eta_squared=0)").steps()


def test_allora_rescales_under_dropout_too():
    """At B = 0 every row has c = η, so B's gradient is η times LoRA's with the same masks."""
    gradients = []
    for recipe in ("lora(rank=2, dropout=0.5)", "lora(rank=2, dropout=0.5) + allora(eta_squared=9.0)"):
        _, handle, _, loss = problem(recipe)
        handle.backward(loss)
        gradients.append(handle.blocks()["0"]["B"].grad)
    torch.testing.assert_close(gradients[1], 3.0 * gradients[0])


def test_a_model_under_allora_can_be_copied_and_pickled_and_its_evaluation_is_lora():
    model, _, _, loss = problem("lora(rank=2) + allora", stir=0.3)
    expected = loss()
    assert torch.equal(pickle.loads(pickle.dumps(model))(torch.ones(1, 8).double()), model(torch.ones(1, 8).double()))
    copy.deepcopy(model)
    model.eval()
    torch.testing.assert_close(loss(), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("binding", ["path", "weight"])
def test_allora_has_the_same_gradients_in_both_bindings(binding):
    gradients = []
    for chosen in ("path", binding):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3)).double()
            x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
        handle = rankwise.adapt_(model, rankwise.compose("lora(rank=2) + allora"), "all-layers", binding=chosen)
        with torch.no_grad():
            for block in handle.blocks().values():
                block["B"].add_(0.3)
        handle.optimizer(lr=0.1)
        model(x).square().sum().backward()
        gradients.append([tensor.grad for block in handle.blocks().values() for tensor in block.values()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_a_new_optimizer_without_allora_takes_the_rescaling_off():
    _, handle, _, _ = problem("lora(rank=2) + allora")
    assert handle.parameterization("0").gradient_gain is not None
    handle.recipe = rankwise.compose("lora(rank=2)")
    handle.optimizer(lr=0.1)
    assert handle.parameterization("0").gradient_gain is None


def test_clipping_reports_and_leaves_small_gradients_to_the_bit():
    _, handle, optimizer, loss = problem("lora(rank=2) + sgd + theory_gradient_clipping(max_norm=1e9)")
    _, plain, other, again = problem("lora(rank=2) + sgd")
    for one, two, fn in ((handle, optimizer, loss), (plain, other, again)):
        one.backward(fn)
        two.step()
    for site, block in handle.blocks().items():
        for role, tensor in block.items():
            assert torch.equal(tensor, plain.blocks()[site][role])
            assert float(optimizer.state[tensor]["clip.clipped"]) == 0.0
            assert float(optimizer.state[tensor]["clip.norm"]) > 0.0


def test_the_quantile_limit_follows_the_norms():
    step = clip(quantile=0.9)
    generator = torch.Generator().manual_seed(0)
    block = {"A": torch.zeros(1, dtype=torch.float64)}
    state = step.init(block)
    clipped = 0
    for count in range(4000):
        gradient = torch.randn(1, generator=generator, dtype=torch.float64).exp()
        assert step.across is not None
        step.across({"s": {"A": gradient}}, {"s": block}, {"s": state})
        if count == 1999:
            clipped = float(state["A"]["clipped"])
    share = (float(state["A"]["clipped"]) - clipped) / 2000
    assert 0.08 < share < 0.12
    assert 2.0 < float(state["A"]["limit"]) < 6.5  # the 0.9-quantile of |log-normal| is 3.6


def test_a_norm_that_is_not_finite_leaves_the_gradients_to_be_seen():
    step = clip(max_norm=1.0)
    block = {"A": torch.zeros(2)}
    gradient = torch.tensor([float("inf"), 1.0])
    assert step.across is not None
    out = step.across({"s": {"A": gradient}}, {"s": block}, {"s": step.init(block)})
    assert torch.equal(out["s"]["A"], gradient)


def test_the_effective_norm_does_not_depend_on_the_factorization():
    B, A, G = factors(1)
    T = torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    d_B, d_A = directions(B, A, G @ A.mT, B.mT @ G, 1.0)
    other_B, other_A = B @ torch.linalg.inv(T), T @ A
    e_B, e_A = directions(other_B, other_A, G @ other_A.mT, other_B.mT @ G, 1.0)
    one, two = effective_norm(B, A, d_B, d_A, 1.0), effective_norm(other_B, other_A, e_B, e_A, 1.0)
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_decay_acts_on_the_chosen_roles_only():
    sizes = {}
    for roles in (None, ("B",)):
        _, handle, optimizer, _ = problem("lora(rank=2) + sgd", stir=1.0, lr=0.0)
        recipe = rankwise.compose("lora(rank=2)", f"sgd + decoupled_weight_decay(weight_decay=0.5, roles={roles!r})")
        handle.recipe = recipe
        optimizer = handle.optimizer(lr=0.1)
        before = {role: tensor.detach().clone() for role, tensor in handle.blocks()["0"].items()}
        for tensor in handle.blocks()["0"].values():
            tensor.grad = torch.zeros_like(tensor)
        optimizer.step()
        sizes[roles] = {role: float((t / before[role]).mean()) for role, t in handle.blocks()["0"].items()}
    assert sizes[None] == pytest.approx({"A": 0.95, "B": 0.95})
    assert sizes[("B",)] == pytest.approx({"A": 1.0, "B": 0.95})


def test_vectors_decay_only_if_asked_for():
    for vectors, expected in ((False, 1.0), (True, 0.99)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 6)).double()
        recipe = f"vera(rank=4) + sgd + decoupled_weight_decay(weight_decay=0.1, vectors={vectors})"
        handle = rankwise.adapt_(model, rankwise.compose(recipe))
        optimizer = handle.optimizer(lr=0.1)
        d = handle.blocks()["0"]["d"]
        before = d.detach().clone()
        d.grad = torch.zeros_like(d)
        optimizer.step()
        torch.testing.assert_close(d.detach(), before * expected)
    with pytest.raises(ArgumentError, match="roles is a list"):
        rankwise.compose("lora + decoupled_weight_decay(roles='B')").steps()
