"""The contract of a parameterization: one function per promise. Each is shown to bite in test_contract_bites.py.

Every function takes a subject and a kind of layer and fails with an AssertionError that names the promise.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy
import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.bindings import adapted_layers
from rankwise.core.checkpoint import trained_tensors
from rankwise.core.errors import MergeError
from rankwise.core.queries import as_low_rank, column_norms, frobenius, rank_bound, row_norms, svd
from tests.contract.subjects import LayerKind, Subject, inputs_of, model_of, scatter, statistics_of

TOLERANCE = 1e-10  # float64, sums of at most a few hundred products of size one
Check = Callable[[Subject, LayerKind], None]


def close(actual: Tensor, expected: Tensor, promise: str, tolerance: float = TOLERANCE) -> None:
    scale = max(1.0, float(expected.detach().abs().max()) if expected.numel() else 1.0)
    assert actual.shape == expected.shape, f"{promise}: shape {tuple(actual.shape)} against {tuple(expected.shape)}"
    error = float((actual - expected).detach().abs().max()) if expected.numel() else 0.0
    assert error <= tolerance * scale, f"{promise}: off by {error:.3e}"


def adapted(subject: Subject, kind: LayerKind, *, generic: bool = True, **options) -> tuple[nn.Module, rankwise.Handle]:
    model = model_of(kind)
    known = statistics_of(model, subject, inputs_of(kind, 7))
    handle = rankwise.adapt_(model, subject.recipe, where=["layer"], statistics=known, **options)
    if generic:
        scatter(handle)
    return model, handle


def gradients(model: nn.Module, handle: rankwise.Handle, x: Tensor, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Gradients of a generic scalar of the output, for every trained tensor and the input."""
    x = x.clone().requires_grad_(x.is_floating_point())
    y = run(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)
    model.zero_grad()
    (y * weights).sum().backward()
    found = {f"{site}.{role}": p.grad for site, block in handle.blocks().items() for role, p in block.items()}
    if x.is_floating_point():
        found["x"] = x.grad
    return {key: torch.zeros(()) if value is None else value.clone() for key, value in found.items()}


def check_starts_at_base(subject: Subject, kind: LayerKind) -> None:
    x = inputs_of(kind)
    expected = model_of(kind)(x)
    model, _ = adapted(subject, kind, generic=False)
    # A start as small as LoRA-XS's core is allowed; everything else is the base to rounding.
    allowed = 1e-12 if subject.facts.starts_at_base else 1e-3
    close(model(x), expected, "the first forward equals the base", allowed)


def check_path_equals_weight(subject: Subject, kind: LayerKind) -> None:
    x = inputs_of(kind)
    model, handle = adapted(subject, kind)
    other, other_handle = adapted(subject, kind, binding="weight")
    close(model(x), other(x), "path equals weight in value")
    mine = gradients(model, handle, x, model)
    theirs = gradients(other, other_handle, x, other)
    assert set(mine) == set(theirs)
    for key, value in mine.items():
        close(value, theirs[key], f"path equals weight in the gradient of {key}", 1e-9)


def check_path_equals_functional(subject: Subject, kind: LayerKind) -> None:
    x = inputs_of(kind)
    model, handle = adapted(subject, kind)

    def run(value: Tensor) -> Tensor:
        return rankwise.functional_call(model, rankwise.effective_weights(model), value)

    close(run(x), model(x), "functional equals path in value")
    mine, theirs = gradients(model, handle, x, model), gradients(model, handle, x, run)
    for key, value in mine.items():
        close(theirs[key], value, f"functional equals path in the gradient of {key}", 1e-9)


def check_training_mode_equals_eval(subject: Subject, kind: LayerKind) -> None:
    """Without dropout, and again after the tensors have moved: a plan kept for eval must not go stale."""
    x = inputs_of(kind)
    model, handle = adapted(subject, kind)
    for seed in (11, 12):
        model.train()
        expected = model(x)
        model.eval()
        with torch.no_grad():
            close(model(x), expected, "eval equals train")
            scatter(handle, seed)
            moved = model(x)
        model.train()
        close(moved, model(x), "eval follows a change of the trained tensors (no stale plan)")


def check_base_untouched(subject: Subject, kind: LayerKind) -> None:
    x = inputs_of(kind)
    original = model_of(kind)
    model, handle = adapted(subject, kind)
    optimizer = handle.optimizer(lr=0.1)
    for _ in range(2):
        handle.backward(lambda: model(x).square().sum())
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    for name, parameter in original.named_parameters():
        mine = dict(model.named_parameters())[name]
        assert not mine.requires_grad, f"the base is frozen: {name}"
        assert mine.grad is None, f"the base gets no gradient: {name}"
        assert torch.equal(mine, parameter), f"the base is untouched: {name}"


def check_every_tensor_trains(subject: Subject, kind: LayerKind) -> None:
    model, handle = adapted(subject, kind)
    found = gradients(model, handle, inputs_of(kind), model)
    for key, value in found.items():
        assert value.dim() > 0 or key == "x" or value != 0, f"every trained tensor gets a gradient: {key}"
        assert torch.any(value != 0), f"every trained tensor gets a gradient: {key}"


def check_low_rank_reproduces_dense(subject: Subject, kind: LayerKind) -> None:
    _, handle = adapted(subject, kind)
    update = handle.update_of("layer")
    dense = update.dense()
    factors = as_low_rank(update)
    if subject.facts.exact_lora_export:
        assert factors is not None, "the update has exact factors"
        close(factors.dense(), dense, "as_low_rank reproduces dense")
    rank = int(torch.linalg.matrix_rank(dense, rtol=1e-9))
    assert rank <= rank_bound(update), f"rank {rank} is within the bound {rank_bound(update)}"


def check_queries_agree_with_dense(subject: Subject, kind: LayerKind) -> None:
    model, handle = adapted(subject, kind)
    for operator in (handle.update_of("layer"), handle.adapters("layer").operator(model.layer)):
        dense = operator.dense()
        close(row_norms(operator), dense.norm(dim=1), "row_norms")
        close(column_norms(operator), dense.norm(dim=0), "column_norms")
        close(frobenius(operator), dense.norm(), "frobenius")
        U, S, Vh = svd(operator)
        close((U * S) @ Vh, dense, "svd")
        close(S, torch.linalg.svdvals(dense)[: len(S)], "singular values")


def check_merge_equals_forward(subject: Subject, kind: LayerKind) -> None:
    x = inputs_of(kind)
    model, handle = adapted(subject, kind)
    before = model.layer.weight.detach().clone()
    expected = model(x)
    bias = getattr(model.layer, "bias", None)
    bias = None if bias is None else bias.detach().clone()
    handle.merge_()
    close(model(x), expected, "merged equals adapted")
    with pytest.raises(MergeError, match="merged already"):
        handle.merge_()
    handle.unmerge_()
    assert torch.equal(model.layer.weight, before), "unmerge restores the base to the bit"
    assert bias is None or torch.equal(model.layer.bias, bias), "unmerge restores the bias to the bit"
    close(model(x), expected, "unmerged equals adapted")
    handle.merge_()
    handle.detach_()
    assert torch.equal(model.layer.weight, before), "detach restores the base to the bit"
    assert bias is None or torch.equal(model.layer.bias, bias), "detach restores the bias to the bit"
    close(model(x), model_of(kind)(x), "detached equals the base")


def check_save_load(subject: Subject, kind: LayerKind) -> None:
    x = inputs_of(kind)
    model, handle = adapted(subject, kind)
    with TemporaryDirectory() as folder:
        handle.save(Path(folder))
        fresh = model_of(kind)
        loaded = rankwise.load_(fresh, folder)
    close(fresh(x), model(x), "loaded equals saved", 0.0)
    assert loaded.trained_numbers == handle.trained_numbers > 0, "a loaded adapter goes on training"
    assert loaded.recipe == handle.recipe, "the recipe survives"


def check_copies(subject: Subject, kind: LayerKind) -> None:
    x = inputs_of(kind)
    model, handle = adapted(subject, kind)
    expected = model(x)
    copied = copy.deepcopy(model)
    close(copied(x), expected, "deepcopy", 0.0)
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    close(pickle.loads(buffer.getvalue())(x), expected, "pickle", 0.0)
    scatter(handle, 9)
    close(copied(x), expected, "a copy does not follow the original", 0.0)
    ours, theirs = dict(model.named_parameters()), dict(copied.named_parameters())
    assert set(ours) == set(theirs), "a copy has the same keys"
    assert not any(ours[key] is theirs[key] for key in ours), "a copy shares no parameter"


def check_dtype_moves(subject: Subject, kind: LayerKind) -> None:
    x = inputs_of(kind)
    model, _ = adapted(subject, kind)
    expected = model(x)
    model.float()
    small = x.float() if x.is_floating_point() else x
    assert model(small).dtype is torch.float32, "float() moves the adapter along"
    close(model(small).double(), expected, "float32 follows float64", 1e-4)


def check_half_precision_base(subject: Subject, kind: LayerKind) -> None:
    """A bfloat16 base keeps float32 masters and computes in bfloat16."""
    x = inputs_of(kind)
    exact, _ = adapted(subject, kind)
    expected = exact(x)
    model = model_of(kind).to(torch.bfloat16)
    known = statistics_of(model_of(kind), subject, x)
    handle = rankwise.adapt_(model, subject.recipe, where=["layer"], statistics=known)
    scatter(handle)
    for block in handle.blocks().values():
        for role, tensor in block.items():
            assert tensor.dtype is torch.float32, f"a half-precision base gets float32 masters: {role}"
    y = model(x.bfloat16() if x.is_floating_point() else x)
    assert y.dtype is torch.bfloat16, "compute stays in the base's dtype"
    if subject.facts.expected_failures.get("half_precision_value") is None:
        close(y.double(), expected, "bfloat16 follows float64", 0.1)


def check_compiles(subject: Subject, kind: LayerKind) -> None:
    x = inputs_of(kind)
    model, handle = adapted(subject, kind)
    expected = gradients(model, handle, x, model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(x), model(x), "compiled equals eager")
    for key, value in gradients(model, handle, x, compiled).items():
        close(value, expected[key], f"compiled equals eager in the gradient of {key}", 1e-9)


def check_same_seed_same_result(subject: Subject, kind: LayerKind) -> None:
    states = []
    for seed in (3, 3, 4):
        _, handle = adapted(subject, kind, generic=False, seed=seed)
        states.append({key: value.clone() for key, value in trained_tensors(handle).items()})
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), f"the same seed gives the same numbers: {key}"


def check_global_generators_untouched(subject: Subject, kind: LayerKind) -> None:
    x = inputs_of(kind)
    before = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist())
    model, handle = adapted(subject, kind)
    optimizer = handle.optimizer(lr=0.1)
    handle.backward(lambda: model(x).square().sum())
    optimizer.step()
    handle.after_step()
    after = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist())
    assert torch.equal(before[0], after[0]), "torch's global generator is untouched"
    assert before[1:] == after[1:], "Python's and numpy's global generators are untouched"


def check_shared_tensors_once(subject: Subject, kind: LayerKind) -> None:
    """On a model of two layers, whatever the method shares is one tensor, met once by parameters and state dict."""
    model = nn.Sequential(model_of(kind), model_of(kind))
    if subject.recipe.needs:  # methods that read data share nothing
        return
    handle = rankwise.adapt_(model, subject.recipe, where=["layer"])
    if handle.bank is None:
        return
    held = [buffer for _, buffer in model.named_buffers()] + list(model.parameters())
    for name, tensor in [*handle.bank.named_buffers(), *handle.bank.named_parameters()]:
        same = [other for other in held if other.data_ptr() == tensor.data_ptr() or other.shape == tensor.shape]
        assert sum(other is tensor for other in same) == 1, f"a shared tensor is registered once: {name}"
    for _, _, adapters in adapted_layers(model):
        for entry in adapters.values():
            for name, own in entry.named_buffers():
                copies = [other for _, other in handle.bank.named_buffers() if other.shape == own.shape and other.equal(own)]
                assert not copies, f"a shared tensor is copied per layer: {name}"


def check_scale_is_applied(subject: Subject, kind: LayerKind) -> None:
    """The update that acts is the one that is reported: y(x) - base(x) = (update)(x)."""
    x = inputs_of(kind)
    model, handle = adapted(subject, kind)
    layout = handle.targets["layer"].layout
    expected = layout.matrix(x, handle.update_of("layer").dense())
    bias = getattr(model.layer, "bias", None)
    if bias is not None:
        expected = layout.add_bias(expected, handle.parameterization("layer").adapted_bias(bias) - bias)
    close(model(x) - model_of(kind)(x), expected, "the update that acts is the one reported")


ON_EVERY_LAYER: tuple[Check, ...] = (
    check_starts_at_base,
    check_path_equals_weight,
    check_path_equals_functional,
    check_training_mode_equals_eval,
    check_base_untouched,
    check_every_tensor_trains,
    check_low_rank_reproduces_dense,
    check_queries_agree_with_dense,
    check_merge_equals_forward,
    check_save_load,
    check_copies,
    check_dtype_moves,
    check_half_precision_base,
    check_scale_is_applied,
    check_shared_tensors_once,
)
ON_ONE_LAYER: tuple[Check, ...] = (
    check_compiles,
    check_same_seed_same_result,
    check_global_generators_untouched,
)


def name_of(check: Check) -> str:
    return check.__name__.removeprefix("check_")
