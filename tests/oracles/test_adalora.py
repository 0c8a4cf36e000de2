"""Oracles of AdaLoRA: the global budget, its scores and its masks, against loops written from the paper."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.schedules.cubic import cubic_budget
from rankwise.schedules.importance import Importance
from rankwise.schedules.orthogonality import add_orthogonality
from rankwise.schedules.sora import prune

SIZES = [(7, 5), (6, 7), (4, 6)]  # (m, n) of three layers in a row


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Linear(n, m, dtype=torch.float64) for m, n in SIZES))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, SIZES[0][1], generator=generator, dtype=torch.float64)
    return x, torch.randn(9, SIZES[-1][0], generator=generator, dtype=torch.float64)


def begin(*, optimizer: str = "sgd", lr: float = 0.1, seed: int = 0, open_gates: bool = False, **arguments):
    """A model of three layers under AdaLoRA, and its optimizer; the gates away from zero where asked for."""
    model = network()
    recipe = rw.catalog.adalora(**arguments)
    if optimizer == "sgd":
        recipe = rw.compose(recipe, rw.catalog.sgd())
    handle = rw.adapt_(model, recipe, seed=seed)
    if open_gates:
        generator = torch.Generator().manual_seed(5)
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.data.copy_(0.4 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return model, handle, handle.optimizer(lr=lr)


def gates(handle: rw.Handle) -> dict[str, Tensor]:
    return {site: block["gate"].detach().clone() for site, block in handle.blocks().items()}


def backward(model: nn.Module) -> None:
    x, y = data()
    (model(x) - y).square().mean().backward()


def triplet_scores(block, averages) -> Tensor:
    """S_i = s(e_i) + mean_j s(A_ij) + mean_k s(B_ki) with s = Ibar·Ubar."""
    s = {role: averages[role][0] * averages[role][1] for role in block}
    rank = block["gate"].numel()
    scores = [s["gate"].flatten()[i] + s["A"][i, :].mean() + s["B"][:, i].mean() for i in range(rank)]
    return torch.stack(scores)


@pytest.mark.parametrize("seed", range(5))
def test_1_the_start_is_zero_to_the_bit_and_only_the_gate_has_a_gradient(seed):
    base = network()(data()[0])
    model, handle, _ = begin(seed=seed, rank=4, target_rank=2, total_steps=10, orthogonality=0.0)
    assert torch.equal(model(data()[0]), base)
    backward(model)
    for site, block in handle.blocks().items():
        assert not handle.update_of(site).dense().any()
        assert not block["A"].grad.any()
        assert not block["B"].grad.any()
        assert block["gate"].grad.abs().min() > 0
        assert block["A"].abs().min() > 0
        assert block["B"].abs().min() > 0


def test_1_the_start_has_a_standard_deviation_of_a_fiftieth():
    model = nn.Sequential(nn.Linear(90, 80, dtype=torch.float64))
    block = rw.adapt_(model, rw.catalog.adalora(rank=40, target_rank=2, total_steps=10)).blocks()["0"]
    for role in ("A", "B"):  # 3200 numbers at least: the standard error of the estimate is 1.3 %
        assert block[role].std().item() == pytest.approx(0.02, rel=0.06)
        assert abs(block[role].mean().item()) < 0.02 * 5 / math.sqrt(3200)


def test_2_a_mask_keeps_as_many_triplets_as_the_budget_and_the_best():
    """3 layers × r = 4, and a budget of 5 after the first step: floor(3 + 9·(2/3)³)."""
    model, handle, optimizer = begin(rank=4, target_rank=1, total_steps=3, open_gates=True, orthogonality=0.1)
    backward(model)
    handle.after_backward()
    optimizer.step()
    moved = {site: {role: t.detach().clone() for role, t in block.items()} for site, block in handle.blocks().items()}
    scores = {}
    for site, block in handle.blocks().items():
        averages = {}
        for role, tensor in block.items():  # the parameter after the step times the gradient from before it
            sensitivity = (tensor * tensor.grad).detach().abs()
            smooth = 0.15 * sensitivity
            averages[role] = (smooth, 0.15 * (sensitivity - smooth).abs())
        scores[site] = triplet_scores(block, averages)
    handle.after_step()
    every = torch.cat(list(scores.values()))
    assert every.unique().numel() == 12
    threshold = every.kthvalue(12 - 5).values
    kept = 0
    for site, gate in gates(handle).items():
        expected = torch.where((scores[site] <= threshold).reshape(gate.shape), torch.zeros_like(gate), moved[site]["gate"])
        assert torch.equal(gate, expected)
        kept += int((gate != 0).sum())
        for role in ("A", "B"):  # only the gate is masked
            assert torch.equal(handle.blocks()[site][role], moved[site][role])
    assert kept == 5


def test_2_with_ties_it_still_keeps_exactly_the_budget():
    """The paper's threshold would cut every tied triplet; the docstring says that exactly the budget is kept."""
    model, handle, optimizer = begin(rank=4, target_rank=1, total_steps=3, open_gates=True, orthogonality=0.0, lr=0.0)
    backward(model)
    for block in handle.blocks().values():
        for tensor in block.values():
            tensor.grad.zero_()
    handle.after_backward()
    optimizer.step()
    handle.after_step()
    assert sum(int((gate != 0).sum()) for gate in gates(handle).values()) == 5


def test_3_the_budget():
    arguments = {"start": 36, "target": 13, "total_steps": 120, "warmup_steps": 20, "final_steps": 40}
    budget = [cubic_budget(step, **arguments) for step in range(141)]
    assert budget[20] == 36
    assert budget[80] == 13
    assert budget[50] == math.floor(13 + (36 - 13) / 8)
    assert all(later <= sooner for sooner, later in itertools.pairwise(budget))
    for step, value in enumerate(budget):
        if step <= 20:
            expected = 36
        elif step <= 80:
            expected = math.floor(13 + 23 * (1 - (step - 20) / 60) ** 3)
        else:
            expected = 13
        assert value == expected


def test_4_the_importance_average_by_hand():
    importance = Importance(beta1=0.5, beta2=0.5)
    one = torch.ones(1, dtype=torch.float64)
    for sensitivity, smooth, uncertain in ((1.0, 0.5, 0.25), (3.0, 1.75, 0.75)):
        importance.observe("w", -sensitivity * one, one)
        found = importance.averages("w")
        assert found[0].item() == pytest.approx(smooth, abs=1e-7)
        assert found[1].item() == pytest.approx(uncertain, abs=1e-7)
        assert importance.score("w").item() == pytest.approx(smooth * uncertain, abs=1e-7)


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_5_export_equals_the_layer_and_cuts_to_the_open_gates(alpha):
    x = data()[0]
    model, handle, _ = begin(rank=4, target_rank=2, total_steps=10, alpha=alpha, open_gates=True)
    closed = {"0": [1, 2], "1": [0, 1, 2, 3], "2": []}
    for site, zeros in closed.items():
        handle.blocks()[site]["gate"].data.view(-1)[zeros] = 0.0
    before = model(x)
    updates = {}
    for site, block in handle.blocks().items():
        s = (4.0 if alpha is None else alpha) / (4 + 1e-5)  # the divisor is the starting rank, whatever is left
        keep = block["gate"].flatten() != 0
        B, A = block["B"][:, keep], s * torch.diag(block["gate"].flatten()[keep]) @ block["A"][keep]
        updates[site] = (B @ A).detach()
        assert (handle.update_of(site).dense() - updates[site]).abs().max() < 1e-10
        factors = handle.low_rank_of(site)
        assert factors is not None
        assert (factors.B @ factors.A - updates[site]).abs().max() < 1e-10
    exported = network()
    for site, update in updates.items():
        exported.get_submodule(site).weight.data += update
    assert (exported(x) - before).abs().max() < 1e-6
    assert prune(handle) == {"0": 2, "1": 0, "2": 4}
    assert (model(x) - before).abs().max() < 1e-6
    for site, update in updates.items():
        assert handle.blocks()[site]["A"].shape[0] == 4 - len(closed[site])
        assert (handle.update_of(site).dense() - update).abs().max() < 1e-10


def test_6_a_closed_gate_comes_back_until_the_next_mask():
    """Masks at steps 2 and 4; at step 3 the gates that step 2 closed have moved again."""
    arguments = {"rank": 4, "target_rank": 1, "total_steps": 9, "interval": 2, "orthogonality": 0.0}
    model, handle, optimizer = begin(open_gates=True, **arguments)
    zeros = []
    for step in range(1, 5):
        backward(model)
        if step == 3:  # gradient of a closed gate: s B_iᵀ G A_iᵀ, from G of an unmasked layer
            site, gate = next((s, g) for s, g in gates(handle).items() if (g == 0).any())
            i = int((gate.flatten() == 0).nonzero()[0])
            block = handle.blocks()[site]
            x, y = data()
            W = network().get_submodule(site).weight.detach() + handle.update_of(site).dense().detach()
            W.requires_grad_(True)
            h = x
            for name in "012":
                layer = network().get_submodule(name)
                matrix = W if name == site else layer.weight + handle.update_of(name).dense()
                h = h @ matrix.T + layer.bias
            (G,) = torch.autograd.grad((h - y).square().mean(), W)
            expected = 4 / (4 + 1e-5) * block["B"][:, i] @ G @ block["A"][i]
            assert block["gate"].grad.flatten()[i].item() == pytest.approx(expected.item(), rel=1e-9)
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
        zeros.append(sum(int((gate == 0).sum()) for gate in gates(handle).values()))
    budgets = [math.floor(3 + 9 * (1 - t / 9) ** 3) for t in (2, 4)]
    assert zeros == [0, 12 - budgets[0], 0, 12 - budgets[1]]


def regularizer(blocks, strength: float) -> Tensor:
    total = 0.0
    for block in blocks:
        A, B = block["A"], block["B"]
        rank = A.shape[0]
        identity = torch.eye(rank, dtype=A.dtype)
        total = total + torch.linalg.norm(A @ A.T - identity) + torch.linalg.norm(B.T @ B - identity)
    return strength * total / (2 * len(blocks))


def random_blocks(seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "A": torch.randn(3, n, generator=generator, dtype=torch.float64).requires_grad_(True),
            "B": torch.randn(m, 3, generator=generator, dtype=torch.float64).requires_grad_(True),
        }
        for m, n in SIZES
    ]


def added_gradients(blocks, strength: float) -> list[Tensor]:
    for block in blocks:
        for tensor in block.values():
            tensor.grad = torch.zeros_like(tensor)
    add_orthogonality(blocks, strength)
    return [tensor.grad for block in blocks for tensor in block.values()]


def test_7_the_regularizer_is_the_mean_of_norms_that_are_not_squared():
    blocks = random_blocks(0)
    tensors = [tensor for block in blocks for tensor in block.values()]
    expected = torch.autograd.grad(regularizer(blocks, 0.3), tensors)
    for found, reference in zip(added_gradients(blocks, 0.3), expected, strict=True):
        assert (found - reference).abs().max() < 1e-12


def test_7_no_gradient_where_the_factors_are_orthonormal_and_the_value_at_zero():
    """R = 0 at orthonormal factors, γ√r at zero ones: the library's gradient integrated along the straight way between."""
    strength, rank = 0.7, 3
    blocks = random_blocks(1)
    for block in blocks:
        block["A"].data = torch.linalg.qr(block["A"].data.T).Q.T.contiguous()
        block["B"].data = torch.linalg.qr(block["B"].data).Q
    assert regularizer(blocks, strength).item() < 1e-14
    straight = [tensor.detach().clone() for block in blocks for tensor in block.values()]
    total = 0.0
    for node, share in ((0.5 - math.sqrt(3) / 6, 0.5), (0.5 + math.sqrt(3) / 6, 0.5)):  # Gauss, exact for cubics
        for tensor, end in zip((t for block in blocks for t in block.values()), straight, strict=True):
            tensor.data = node * end
        pairs = zip(added_gradients(blocks, strength), straight, strict=True)
        total -= share * sum((gradient * end).sum().item() for gradient, end in pairs)
    assert total == pytest.approx(strength * math.sqrt(rank), rel=1e-12)
    for block in blocks:
        for tensor in block.values():
            tensor.data.zero_()
    assert regularizer(blocks, strength).item() == pytest.approx(strength * math.sqrt(rank), rel=1e-12)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in added_gradients(blocks, strength))


def test_7_exactly_orthonormal_factors_get_no_gradient_and_no_nan():
    blocks = [{"A": torch.eye(2, 5, dtype=torch.float64, requires_grad=True)}]
    blocks[0]["B"] = torch.eye(4, 2, dtype=torch.float64, requires_grad=True)
    assert all(not gradient.any() for gradient in added_gradients(blocks, 1.0))


def test_algorithm_as_a_loop():
    """The whole run by hand, with plain gradient descent: scores, budget, masks, and the frozen mask at the end."""
    total, warmup, final, interval, gamma, lr = 14, 2, 4, 2, 0.1, 0.1
    arguments = {"total_steps": total, "warmup_steps": warmup, "final_steps": final, "interval": interval}
    model, handle, optimizer = begin(rank=4, target_rank=2, orthogonality=gamma, open_gates=True, lr=lr, **arguments)
    x, y = data()
    layers = network()
    mine = {
        site: {role: tensor.detach().clone().requires_grad_(True) for role, tensor in block.items()}
        for site, block in handle.blocks().items()
    }
    averages = {
        site: {role: (torch.zeros_like(t), torch.zeros_like(t)) for role, t in block.items()} for site, block in mine.items()
    }
    start, target, s = 12, 6, 4 / (4 + 1e-5)
    for step in range(1, total + 1):
        backward(model)
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()

        h = x
        for site, block in mine.items():
            layer = layers.get_submodule(site)
            update = s * block["B"] @ torch.diag(block["gate"].flatten()) @ block["A"]
            h = h @ (layer.weight.detach() + update).T + layer.bias.detach()
        loss = (h - y).square().mean() + regularizer(list(mine.values()), gamma)
        tensors = [t for block in mine.values() for t in block.values()]
        gradients = dict(zip(map(id, tensors), torch.autograd.grad(loss, tensors), strict=True))
        scores = {}
        with torch.no_grad():
            for site, block in mine.items():
                for role, tensor in block.items():
                    gradient = gradients[id(tensor)]
                    tensor -= lr * gradient
                    if step <= total - final:
                        sensitivity = (tensor * gradient).abs()
                        smooth = 0.85 * averages[site][role][0] + 0.15 * sensitivity
                        uncertain = 0.85 * averages[site][role][1] + 0.15 * (sensitivity - smooth).abs()
                        averages[site][role] = (smooth, uncertain)
                scores[site] = triplet_scores(block, averages[site])
            if step > warmup and (step % interval == 0 or step > total - final):
                progress = (step - warmup) / (total - final - warmup)
                budget = math.floor(target + (start - target) * (1 - progress) ** 3) if step <= total - final else target
                threshold = torch.cat(list(scores.values())).kthvalue(start - budget).values
                for site, block in mine.items():
                    block["gate"].view(-1)[scores[site] <= threshold] = 0.0
        for site, block in handle.blocks().items():
            for role, tensor in block.items():
                assert (tensor - mine[site][role]).abs().max() < 1e-9, (step, site, role)
    assert sum(int((gate != 0).sum()) for gate in gates(handle).values()) == target
