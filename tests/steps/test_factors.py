"""LoRA+, ScaledGD and RefLoRA on a pair of factors."""

import pytest
import torch

from rankwise.core.errors import ArgumentError
from rankwise.core.optimizer import BlockOptimizer
from rankwise.steps.grams import damped_inverse, geometric_mean
from rankwise.steps.moments import adamw, sgd
from rankwise.steps.ratio import lora_plus
from rankwise.steps.reflora import reflora
from rankwise.steps.scaled_gd import scaled_gd
from tests.steps.blocks import pair, product, step, train


def other_factorization(B, A, seed=9):
    generator = torch.Generator().manual_seed(seed)
    T = torch.randn(A.shape[0], A.shape[0], generator=generator, dtype=A.dtype) + 2 * torch.eye(A.shape[0], dtype=A.dtype)
    return B @ torch.linalg.inv(T), T @ A


def test_ratio_one_is_the_plain_step_to_the_bit():
    B, A, M = pair()
    plain, _ = train([adamw()], B, A, M, count=5)
    same, _ = train([adamw(), lora_plus(ratio=1.0)], B, A, M, count=5)
    assert torch.equal(plain["A"], same["A"]) and torch.equal(plain["B"], same["B"])


def test_ratio_moves_b_and_vectors_only_and_decay_with_them():
    B, A, M = pair()
    plain, _ = train([adamw(weight_decay=0.1)], B, A, M)
    fast, _ = train([adamw(weight_decay=0.1), lora_plus(ratio=8.0)], B, A, M)
    torch.testing.assert_close(fast["B"] - B, 8.0 * (plain["B"] - B), rtol=1e-12, atol=1e-15)
    assert torch.equal(fast["A"], plain["A"])
    head = {"weight": torch.nn.Parameter(torch.ones(2, 3)), "bias": torch.nn.Parameter(torch.ones(2))}
    for tensor in head.values():
        tensor.grad = torch.ones_like(tensor)
    BlockOptimizer({"head": head}, [sgd(), lora_plus(ratio=8.0)], 0.01, plain=["head"]).step()
    torch.testing.assert_close(head["weight"].detach(), torch.full((2, 3), 0.99))
    torch.testing.assert_close(head["bias"].detach(), torch.full((2,), 0.92))


def test_scaled_gd_formula_uses_the_other_factor_at_the_same_point():
    B, A, M = pair()
    moved, _ = train([scaled_gd(damping=0.3), sgd()], B, A, M, lr=0.1)
    G, eye = B @ A - M, torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(moved["A"], A - 0.1 * torch.linalg.inv(B.mT @ B + 0.3 * eye) @ B.mT @ G)
    torch.testing.assert_close(moved["B"], B - 0.1 * G @ A.mT @ torch.linalg.inv(A @ A.mT + 0.3 * eye))


def test_sequential_preconditions_b_with_the_moved_a():
    B, A, M = pair()
    both, _ = train([scaled_gd(damping=0.1), sgd()], B, A, M, lr=0.1)
    moved, _ = train([scaled_gd(damping=0.1, sequential=True), sgd()], B, A, M, lr=0.1)
    G, eye = B @ A - M, torch.eye(3, dtype=torch.float64)
    new_A = both["A"].detach()
    assert torch.equal(moved["A"], both["A"])
    torch.testing.assert_close(moved["B"].detach(), B - 0.1 * G @ A.mT @ torch.linalg.inv(new_A @ new_A.mT + 0.1 * eye))
    assert not torch.allclose(moved["B"], both["B"])


@pytest.mark.parametrize("preconditioner", [scaled_gd(damping=0.0), reflora(warmup=0)])
def test_the_step_does_not_depend_on_the_factorization(preconditioner):
    B, A, M = pair()
    one, _ = train([preconditioner, sgd()], B, A, M, lr=0.05)
    two, _ = train([preconditioner, sgd()], *other_factorization(B, A), M, lr=0.05)
    plain_one, _ = train([sgd()], B, A, M, lr=0.05)
    plain_two, _ = train([sgd()], *other_factorization(B, A), M, lr=0.05)
    assert torch.linalg.matrix_norm(product(one) - product(two)) < 1e-11
    assert torch.linalg.matrix_norm(product(plain_one) - product(plain_two)) > 1e-2  # the test can fail


@pytest.mark.parametrize(("rows", "damping"), [(7, 0.5), (7, 0.0), (2, 0.5)])
def test_damped_inverse(rows, damping):
    F = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.linalg.inv(F.mT @ F + damping * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(damped_inverse(F, damping), expected)


def test_undamped_inverse_is_a_pseudo_inverse():
    B, _, _ = pair()
    deficient = torch.cat([B[:, :2], B[:, :1]], dim=1)
    torch.testing.assert_close(damped_inverse(deficient, 0.0), torch.linalg.pinv(deficient.mT @ deficient, rtol=1e-12))
    assert torch.equal(damped_inverse(torch.zeros(5, 2), 0.0), torch.zeros(2, 2))


def test_half_precision_gradients_are_preconditioned_in_single():
    B, A, M = pair(dtype=torch.bfloat16)
    block, _ = train([scaled_gd(), adamw()], B, A, M, lr=0.01, count=2)
    assert block["A"].dtype == torch.bfloat16 and torch.isfinite(block["A"]).all()


def test_normalized_drops_the_size_of_the_factors_and_leaves_a_zero_pair_alone():
    B, A, M = pair()
    G, state = {"A": M[:3], "B": M[:, :3]}, {"A": {}, "B": {}}
    update = scaled_gd(normalized=True).update
    one, scaled = update(G, state, {"A": A, "B": B}), update(G, state, {"A": A, "B": 7.0 * B})
    torch.testing.assert_close(one["A"], scaled["A"], rtol=1e-4, atol=1e-6)
    assert torch.equal(update(G, state, {"A": A, "B": torch.zeros_like(B)})["A"], G["A"])


def test_geometric_mean():
    B, A, _ = pair()
    P, Q = A @ A.mT, B.mT @ B
    S, inverse = geometric_mean(P, Q)
    torch.testing.assert_close(S @ P @ S, Q)
    torch.testing.assert_close(S @ inverse, torch.eye(3, dtype=torch.float64))
    bound = torch.trace(inverse @ Q) + torch.trace(S @ P)
    torch.testing.assert_close(bound, 2 * torch.linalg.svdvals(B @ A).sum())


def test_reflora_waits_then_acts_at_intervals():
    B, A, M = pair()
    plain, _ = train([sgd()], B, A, M, lr=0.02, count=3)
    waiting, optimizer = train([reflora(warmup=3, interval=2), sgd()], B, A, M, lr=0.02, count=3)
    assert torch.equal(plain["A"], waiting["A"])
    acted = []
    for _ in range(4):
        before = {role: tensor.detach().clone() for role, tensor in waiting.items()}
        step(optimizer, waiting, M)
        G = before["B"] @ before["A"] - M
        acted.append(not torch.allclose(waiting["A"], before["A"] - 0.02 * before["B"].mT @ G, rtol=1e-12, atol=1e-12))
    assert acted == [True, False, True, False]


def test_reflora_at_loras_start_is_plain_and_finite():
    B, A, M = pair()
    plain, _ = train([sgd()], torch.zeros_like(B), A, M)
    for variant in ("matrix", "scalar"):
        moved, _ = train([reflora(warmup=0, variant=variant), sgd()], torch.zeros_like(B), A, M)
        torch.testing.assert_close(product(moved), product(plain))


@pytest.mark.parametrize("inner", [adamw, lambda: sgd(momentum=0.9)])
def test_scalar_variant_is_invariant_to_balance_over_a_whole_run(inner):
    B, A, M = pair()
    one, _ = train([reflora(warmup=0, variant="scalar"), inner()], B, A, M, lr=0.01, count=30)
    two, _ = train([reflora(warmup=0, variant="scalar"), inner()], 5.0 * B, A / 5.0, M, lr=0.01, count=30)
    torch.testing.assert_close(product(one), product(two), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.linalg.matrix_norm(one["A"]), torch.linalg.matrix_norm(one["B"]))


def test_scalar_variant_carries_the_moments_along():
    B, A, M = pair()
    plain, before = train([adamw()], 5.0 * B, A / 5.0, M, count=2)
    moved, after = train([reflora(warmup=1, variant="scalar"), adamw()], 5.0 * B, A / 5.0, M, count=2)
    factor = (moved["A"].norm() / plain["A"].norm()).detach()
    mine, theirs = after.state[moved["A"]], before.state[plain["A"]]
    torch.testing.assert_close(mine["adamw.exp_avg"] * factor, theirs["adamw.exp_avg"])
    torch.testing.assert_close(mine["adamw.exp_avg_sq"] * factor**2, theirs["adamw.exp_avg_sq"])
    assert abs(float(factor) - 1) > 0.5


def test_bad_arguments():
    for make, text in (
        (lambda: lora_plus(ratio=0.0), "ratio is the rate"),
        (lambda: scaled_gd(damping=-1.0), "must not be negative"),
        (lambda: reflora(variant="vector"), "'matrix' or 'scalar'"),
        (lambda: reflora(interval=0), "interval >= 1"),
    ):
        with pytest.raises(ArgumentError, match=text):
            make()
