"""LoRA-GGPO: noise of the right size, the same in backward and in recomputation, none of it kept, none in eval."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError, TrainingError
from rankwise.perturbations.ggpo import (
    GradientGuidedNoise,
    gradient_row_squares,
    product_row_squares,
    row_variances,
)
from tests.contract.subjects import LAYERS, LayerKind, inputs_of, model_of
from tests.core.training import Regression, assert_same_bits, numbers, open_gates

LORA, NOISY = "lora(rank=2)", "lora(rank=2) + lora_ggpo(sigma=0.3, beta=0.5)"


def adapted(kind: LayerKind, text: str = NOISY, **options: object) -> rankwise.Handle:
    handle = rankwise.adapt_(model_of(kind), rankwise.compose(text), where=["layer"], **options)
    open_gates(handle)
    return handle


def noise_of(handle: rankwise.Handle) -> Tensor:
    """E (m, n) of this step, read off the operator."""
    adapters, layer = handle.adapters("layer"), handle.model.get_submodule("layer")
    handle.model.train()
    operator = adapters.operator(layer)
    return (operator.dense() - operator.inner.dense()).detach()


def step(problem: Regression, handle: rankwise.Handle, optimizer: torch.optim.Optimizer, count: int = 1) -> None:
    for _ in range(count):
        handle.backward(lambda: problem.loss(problem.batches[handle.step_count % 3]))
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()


def test_row_norms_from_grams_are_those_of_the_products() -> None:
    generator = torch.Generator().manual_seed(0)
    B, A, g_B, g_A = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((7, 3), (3, 9), (7, 3), (3, 9)))
    torch.testing.assert_close(product_row_squares(B, A), (B @ A).square().sum(1), rtol=1e-12, atol=1e-12)
    expected = (B @ g_A + g_B @ A).square().sum(1)
    torch.testing.assert_close(gradient_row_squares(B, A, g_B, g_A), expected, rtol=1e-12, atol=1e-12)
    assert not gradient_row_squares(B, A, torch.zeros_like(B), torch.zeros_like(A)).any()
    assert product_row_squares(B.bfloat16(), A.bfloat16()).dtype is torch.float32


@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("binding", ["path", "weight"])
def test_every_layer_adds_one_matrix_in_training_and_none_in_eval(kind: LayerKind, binding: str) -> None:
    handle, plain = adapted(kind, binding=binding), adapted(kind, LORA)
    x = inputs_of(kind)
    if x.is_floating_point():
        x.requires_grad_()
    y, base = handle.model(x), plain.model(x)
    assert torch.equal(handle.model(x), y), "the same noise for the whole step"
    layout, E = handle.targets["layer"].layout, noise_of(adapted(kind))
    expected = base + layout.matrix(x, E)
    if kind.kind == "embedding":
        expected = base + torch.nn.functional.embedding(x, E.mT)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert E.abs().max() > 0.01
    if x.is_floating_point():
        G = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        (found,), (wanted,) = torch.autograd.grad(y, x, G), torch.autograd.grad(expected, x, G)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(handle.model.eval()(x), plain.model.eval()(x), rtol=1e-12, atol=1e-12)


def test_second_derivatives_go_through_the_noise() -> None:
    for kind in (LAYERS[0], LAYERS[4]):
        handle = adapted(kind)
        x = inputs_of(kind)[:1].requires_grad_()
        assert torch.autograd.gradgradcheck(lambda x, handle=handle: handle.model(x).sin(), (x,))


def test_variances_are_the_formula_and_the_noise_has_them() -> None:
    problem = Regression()
    handle = problem.adapt("lora(rank=2, alpha=6) + lora_ggpo(sigma=0.2, beta=3.0) + sgd")
    open_gates(handle)
    optimizer = handle.optimizer(lr=0.02)
    noise = handle.perturbation
    with pytest.raises(TrainingError, match="run a forward in training mode first"):
        noise.variances("0")
    G = torch.zeros(8, dtype=torch.float64)
    for _ in range(3):
        block = handle.blocks()["0"]
        B, A = block["B"].detach().clone(), block["A"].detach().clone()
        W = handle.adapters("0").untouched(handle.targets["0"].module).dense()
        loss = problem.loss(problem.batches[0])
        used = noise.variances("0")
        expected = row_variances(W.square().sum(1), (3 * B @ A).square().sum(1), G, 6, 0.2, 3.0)
        torch.testing.assert_close(used, expected, rtol=1e-12, atol=1e-12)
        loss.backward()
        G = (3 * (B @ block["A"].grad + block["B"].grad @ A)).square().sum(1)
        handle.after_backward()
        assert torch.equal(noise.variances("0"), used), "those of this step until it is over"
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
        block = handle.blocks()["0"]
        BA = (3 * block["B"] @ block["A"]).detach().square().sum(1)
        fresh = row_variances(W.square().sum(1), BA, G, 6, 0.2, 3.0)
        torch.testing.assert_close(noise.variances("0"), fresh, rtol=1e-12, atol=1e-12)
    with pytest.raises(ArgumentError, match="no site '7'"):
        noise.variances("7")


def test_noise_has_its_variance_row_by_row_and_changes_with_step_site_and_seed() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(300, 4), nn.Linear(4, 300), nn.Linear(300, 4)).double()
    handle = rankwise.adapt_(model, rankwise.compose("lora(rank=2) + lora_ggpo(sigma=0.1)"), ["0", "2"])
    state, seen, squares = torch.random.get_rng_state(), [], []
    for _ in range(200):
        layer = model[0]
        operator = handle.adapters("0").operator(layer)
        squares.append((operator.dense() - operator.inner.dense()).detach().square().sum(1))
        seen.append(operator.noise(torch.float64)[0, :3])
        handle.perturbation.advance()
    assert torch.equal(state, torch.random.get_rng_state())
    expected = 300 * handle.perturbation.variances("0")
    torch.testing.assert_close(torch.stack(squares).mean(0), expected, rtol=0.05, atol=0.0)
    assert len({tuple(row.tolist()) for row in seen}) == 200
    keys = [GradientGuidedNoise(seed=seed).around(site).key for seed in (0, 1) for site in ("0", "2")]
    assert len(set(keys)) == 4


def test_kohya_takes_a_mean_norm_the_square_of_the_gradient_and_the_outputs() -> None:
    problem = Regression()
    handle = problem.adapt("lora(rank=2) + lora_ggpo(sigma=0.2, beta=0.7, variant='kohya') + sgd")
    open_gates(handle)
    optimizer = handle.optimizer(lr=0.02)
    step(problem, handle, optimizer)
    G = handle.perturbation.sites["0"].gradient
    B, A = (handle.blocks()["0"][role].detach() for role in "BA")
    W = handle.adapters("0").untouched(handle.targets["0"].module).dense()
    std = (0.2 * (W.norm(dim=1).mean() ** 2 + (B @ A).square().sum(1)).sqrt() + 0.7 * G) / 8**0.5
    torch.testing.assert_close(handle.perturbation.variances("0"), std.square(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "text", ["gated_lora(rank=2)", "nested_nora(rank=2, outer_rank=4)", "gralora(rank=4, blocks=2, hybrid_rank=2)"]
)
def test_of_other_updates_the_guide_is_their_change_along_the_gradients(text: str) -> None:
    problem = Regression()
    handle = problem.adapt(f"{text} + lora_ggpo(beta=1.0) + sgd")
    open_gates(handle)
    handle.optimizer(lr=0.02)
    problem.loss(problem.batches[0]).backward()
    handle.after_backward()
    block, t = handle.blocks()["0"], 1e-6
    ends = []
    with torch.no_grad():
        for sign in (1, -2):
            for tensor in block.values():
                tensor.add_(tensor.grad, alpha=sign * t)
            ends.append(handle.parameterization("0").update().dense())
    expected = ((ends[0] - ends[1]) / (2 * t)).square().sum(1)
    torch.testing.assert_close(handle.perturbation.sites["0"].gradient, expected, rtol=1e-5, atol=1e-8)


def test_without_sigma_it_is_lora_to_the_bit() -> None:
    results = []
    for text in (LORA, f"{LORA} + lora_ggpo(sigma=0.0)", f"{LORA} + lora_ggpo"):
        problem = Regression()
        handle = problem.adapt(text)
        step(problem, handle, handle.optimizer(lr=0.02), 5)
        results.append(numbers(handle))
    assert_same_bits(results[0], results[1])
    assert not torch.equal(results[0]["0.B"], results[2]["0.B"])


class Checkpointed(nn.Module):
    """Two blocks that may be run again in backward."""

    def __init__(self, how: bool | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.conv, self.how = nn.Conv1d(2, 2, 3, padding=1), how

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, self.conv):
            x = block(x) if self.how is None else checkpoint(block, x, use_reentrant=self.how)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_runs_with_the_same_noise(reentrant: bool) -> None:
    results = []
    for how in (None, reentrant):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, x = Checkpointed(how).double(), torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
        handle = rankwise.adapt_(model, rankwise.compose(NOISY), where=["blocks.0.0", "blocks.1.0", "conv"])
        open_gates(handle)
        optimizer = handle.optimizer(lr=0.1)
        for _ in range(3):
            handle.backward(lambda model=model, x=x: model(x).square().sum() / 50)
            optimizer.step()
            handle.after_step()
            optimizer.zero_grad()
        results.append(numbers(handle) | {"x": x.grad})
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_nothing_of_the_weights_size_is_kept_for_backward(dropout: float) -> None:
    kept: dict[str, list[tuple[int, ...]]] = {}
    for text in ("", " + lora_ggpo"):
        model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Conv1d(3, 5, 3), nn.Linear(28, 20))
        handle = rankwise.adapt_(model, rankwise.compose(f"lora(rank=2, dropout={dropout}){text}"), where=["0", "3"])
        open_gates(handle)
        shapes: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=shapes: (s.append(tuple(t.shape)), t)[1], lambda t: t):
            model(torch.randn(7, 3, 40, generator=torch.Generator().manual_seed(0)))
        kept[text] = sorted(shapes)
    assert kept[""] == kept[" + lora_ggpo"]


def test_one_pass_and_its_extra_products() -> None:
    """Forward of x Eᵀ and backward of Eᵀ dy: one forward and one input gradient of the frozen layers, and r x r Grams."""
    flops, passes = {}, []
    for text in ("", " + lora_ggpo"):
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        x = torch.randn(256, 64, requires_grad=True)
        model.register_full_backward_hook(lambda module, inputs, outputs: passes.append("backward"))
        handle = rankwise.adapt_(model, rankwise.compose(f"lora(rank=2){text}"))
        handle.optimizer(lr=0.1)
        model.register_forward_hook(lambda module, inputs, y: passes.append("forward"))
        passes.clear()
        with FlopCounterMode(display=False) as counter:
            handle.backward(lambda model=model, x=x: model(x).square().mean())
        flops[text] = counter.get_total_flops()
        assert passes == ["forward", "backward"]
    noise = 2 * 256 * 64 * 64 * 4  # two layers, forward and backward
    frozen = flops[""] / (1 + 2 * 2 * (64 + 64) * 1.5 / (2 * 64 * 64))  # forward and input gradients without the factors
    assert noise == pytest.approx(frozen, rel=0.1)
    assert noise <= flops[" + lora_ggpo"] - flops[""] <= 1.02 * noise


def test_it_resumes_to_the_bit() -> None:
    straight, first, second = Regression(), Regression(), Regression()
    whole = straight.adapt(NOISY)
    step(straight, whole, whole.optimizer(lr=0.02), 7)
    handle = first.adapt(NOISY)
    optimizer = handle.optimizer(lr=0.02)
    step(first, handle, optimizer, 3)
    again = second.adapt(NOISY)
    second.model.load_state_dict(first.model.state_dict())
    again.load_state_dict(copy.deepcopy(handle.state_dict()))
    moments = copy.deepcopy(optimizer.state_dict())
    optimizer = again.optimizer(lr=0.02)
    optimizer.load_state_dict(moments)
    step(second, again, optimizer, 4)
    assert_same_bits(numbers(whole), numbers(again))


def test_models_can_be_copied_and_pickled_in_training() -> None:
    problem = Regression()
    handle = problem.adapt(NOISY)
    step(problem, handle, handle.optimizer(lr=0.02))
    x = problem.batches[0][0]
    expected = problem.model(x)
    assert torch.equal(copy.deepcopy(problem.model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(problem.model))(x), expected)


def test_what_came_along_with_a_start_counts_as_part_of_the_weight() -> None:
    problem = Regression()
    handle = problem.adapt("lora(rank=2) + pissa(rank=2) + lora_ggpo(sigma=1.0)")
    problem.model(problem.batches[0][0])
    W = handle.adapters("0").untouched(handle.targets["0"].module).dense()
    torch.testing.assert_close(handle.perturbation.variances("0"), W.square().sum(1) / 6, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("text", ["dora(rank=2)", "vera(rank=2)", "full"])
def test_it_needs_a_pair_of_factors_that_is_added(text: str) -> None:
    with pytest.raises(RecipeError, match="GradientGuidedNoise"):
        Regression().adapt(f"{text} + lora_ggpo")


def test_half_precision_and_gradients_that_overflow() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).to(torch.bfloat16)
    handle = rankwise.adapt_(model, rankwise.compose("lora(rank=2) + lora_ggpo"))
    x = torch.randn(5, 16, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    assert model(x).dtype is torch.bfloat16 and handle.perturbation.variances("0").dtype is torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        handle.optimizer(lr=0.1)
        handle.backward(lambda: model(x).float().square().mean())
    block = handle.blocks()["1"]
    block["B"].grad.fill_(1e30)
    handle.perturbation.move(handle.blocks(), learning_rate=0.1)
    assert not handle.perturbation.sites["1"].gradient.any()


@pytest.mark.parametrize("arguments", [{"sigma": -1.0}, {"beta": float("nan")}, {"variant": "v2"}])
def test_arguments_out_of_range_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        GradientGuidedNoise(**arguments)  # type: ignore[arg-type]
