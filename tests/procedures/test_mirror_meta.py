"""Meta mirror descent: the map, the inner loop, meta-gradients, and few-shot tasks on adapters of real models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError, DataError, ModelError, TrainingError
from rankwise.procedures.meta_adapter import MetaAdapter
from rankwise.procedures.mirror_meta import MirrorMap, adapt_task, meta_train
from tests.core.training import Regression

SHAPES = [(3, 4), (3,), (2, 3, 3, 2), (), (5, 2), (4,), (6, 2, 1)]


def stirred(shapes=SHAPES, seed: int = 0, size: float = 0.3, **options: int) -> tuple[MirrorMap, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    mirror = MirrorMap(shapes, generator=generator, **options).double()
    with torch.no_grad():
        for tensor in mirror.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * size)
    return mirror, [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_it_starts_as_the_identity_and_can_learn_every_matrix() -> None:
    shapes = [(32, 16), (64,), (16, 8, 3, 3), (24, 16), (40,)]  # small ones come down to a number or two, and ReLU to 0
    mirror, z = MirrorMap(shapes, block=2).double(), stirred(shapes)[1]
    assert all(torch.equal(one, other) for one, other in zip(mirror(z), z, strict=True))
    last = [layer for pair in mirror.outputs for layer in pair]
    sum(((phi - 1) ** 2).sum() for phi in mirror(z)).backward()
    assert all(layer.matrices[-1].grad.any() for layer in last), "with all matrices at zero none would get a gradient"


@pytest.mark.parametrize("block", [1, 2, 4])
def test_the_jacobian_is_block_lower_triangular_with_a_positive_diagonal(block: int) -> None:
    shapes = [(16, 8), (16,), (8, 16)]
    mirror, z = stirred(shapes, block=block)
    sizes, flat = [128, 16, 128], torch.cat([one.flatten() for one in z])

    def h(vector: Tensor) -> Tensor:
        parts = [part.reshape(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]
        return torch.cat([phi.flatten() for phi in mirror(parts)])

    jacobian = torch.autograd.functional.jacobian(h, flat)
    starts = [0, 128, 144, 272]
    for index in range(3):
        first = starts[(index // block) * block]
        own = slice(starts[index], starts[index + 1])
        assert not jacobian[own, starts[index + 1] :].any()
        inside = jacobian[own, first : starts[index + 1]].clone()
        inside[:, starts[index] - first :] -= torch.diag(jacobian[own, own].diagonal())
        assert not inside.any(), "within its block the map is diagonal"
    assert bool((jacobian.diagonal() > 0).all())
    logarithm = sum(scale.sum() for scale in mirror.log_scales(z))
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, logarithm, rtol=1e-10, atol=1e-10)
    assert block == 4 or jacobian[144:, :144].any(), "a later block depends on earlier ones"


@pytest.mark.parametrize("size", [0.3, 2.0])
def test_the_inverse_recovers_the_dual_variables(size: float) -> None:
    for block in (1, 3, 4):
        mirror, z = stirred(size=size, block=block)
        for one, back in zip(z, mirror.inverse(mirror(z)), strict=True):
            torch.testing.assert_close(back, one, rtol=1e-7, atol=1e-7)


def test_h_the_identity_is_gradient_descent_and_a_diagonal_h_is_meta_sgd() -> None:
    H = torch.tensor([2.0, 5.0, 0.5], dtype=torch.float64)
    z0, D = [torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)], torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64)

    def loss(phi: list[Tensor]) -> Tensor:
        return 0.5 * (H * phi[0] ** 2).sum()

    mirror = MirrorMap([(3,)]).double()
    plain, diagonal = z0[0], z0[0] * D
    for _ in range(5):
        plain, diagonal = plain - 0.1 * H * plain, diagonal - 0.1 * D * H * diagonal
    torch.testing.assert_close(adapt_task(mirror, z0, loss, rate=0.1)[0], plain, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        mirror.log_weight[0].copy_(D.log())
    torch.testing.assert_close(adapt_task(mirror, z0, loss, rate=0.1)[0], diagonal, rtol=1e-12, atol=1e-14)
    (optimum,) = adapt_task(lambda z: [z[0] / H], z0, loss, steps=1, rate=1.0)
    assert float(optimum.abs().max()) < 1e-14


def test_softmax_is_exponentiated_gradient() -> None:
    generator = torch.Generator().manual_seed(2)
    costs, z0 = (
        torch.rand(6, generator=generator, dtype=torch.float64),
        [torch.randn(6, generator=generator, dtype=torch.float64)],
    )
    p = z0[0].softmax(0)
    for _ in range(7):
        p = p * torch.exp(-0.3 * (costs + 2 * p))
        p = p / p.sum()
    with torch.no_grad():  # it makes the gradients that it needs by itself
        found = adapt_task(lambda z: [z[0].softmax(0)], z0, lambda phi: (costs * phi[0] + phi[0] ** 2).sum(), steps=7, rate=0.3)
    torch.testing.assert_close(found[0].detach(), p, rtol=1e-10, atol=1e-12)
    assert not z0[0].requires_grad


def test_meta_gradients_are_those_of_finite_differences_and_first_order_ones_are_not() -> None:
    mirror, z = stirred([(2,), (2, 2)], block=1)
    z0 = [nn.Parameter(tensor * 0.5) for tensor in z]

    def support(phi: list[Tensor]) -> Tensor:
        return (phi[0] ** 4).sum() + (phi[1] @ phi[0]).sin().sum() + phi[1].square().sum()

    def query(phi: list[Tensor]) -> Tensor:
        return (phi[0] * phi[1].sum(0)).cos().sum()

    def outer(*, second_order: bool = True) -> Tensor:
        return query(adapt_task(mirror, z0, support, steps=3, rate=0.1, second_order=second_order))

    learned = [*z0, *mirror.parameters()]
    exact = torch.autograd.grad(outer(), learned, allow_unused=True)
    short = torch.autograd.grad(outer(second_order=False), learned, allow_unused=True)
    far = 0.0
    for tensor, gradient, cheap in zip(learned, exact, short, strict=True):
        for place in range(tensor.numel()):
            with torch.no_grad():
                flat, numbers = tensor.view(-1), []
                kept = float(flat[place])
                for shift in (1e-6, -1e-6):
                    flat[place] = kept + shift
                    numbers.append(float(outer().detach()))
                flat[place] = kept
            expected = (numbers[0] - numbers[1]) / 2e-6
            assert abs(float(gradient.reshape(-1)[place]) - expected) < 1e-6 * max(1.0, abs(expected))
            far = max(far, abs(float(cheap.reshape(-1)[place]) - expected))
    assert far > 1e-2


def test_meta_training_by_the_paper_s_outer_optimizer() -> None:
    """Quadratic tasks of one ill-conditioned shape: what is learned adapts better in two steps than the plain start."""
    H = torch.logspace(-2, 1, 6, dtype=torch.float64)

    def task(seed: int):
        center = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1.0

        def loss(phi: list[Tensor]) -> Tensor:
            return (H * (phi[0] - center) ** 2).sum()

        return loss, loss

    mirror, z0 = MirrorMap([(6,)]).double(), [nn.Parameter(torch.zeros(6, dtype=torch.float64))]
    fresh = [float(task(1000 + k)[1](adapt_task(mirror, z0, task(1000 + k)[0], steps=2, rate=0.05))) for k in range(20)]
    seen: list[int] = []
    losses = meta_train(
        mirror,
        z0,
        lambda iteration: [task(4 * iteration + k) for k in range(4)],
        iterations=300,
        steps=2,
        rate=0.05,
        meta_rate=0.02,
        fall_every=200,
        report=lambda iteration, loss: seen.append(iteration),
    )
    assert seen == list(range(300))
    assert len(losses) == 300
    after = [float(task(1000 + k)[1](adapt_task(mirror, z0, task(1000 + k)[0], steps=2, rate=0.05))) for k in range(20)]
    print(f"query loss after two steps: {sum(fresh) / 20:.3f} before, {sum(after) / 20:.3f} after meta-training")
    assert sum(after) < 0.5 * sum(fresh)


def test_second_derivatives_pass_through_the_adapter_s_own_kernels() -> None:
    """The factors of LoRA through the fused node: the meta-gradient of z₀ against finite differences."""
    problem = Regression()
    handle = problem.adapt("lora(rank=2)")
    meta = MetaAdapter(handle, block=2)
    with torch.no_grad():
        for tensor in meta.z0:
            tensor.normal_(generator=torch.Generator().manual_seed(3)).mul_(0.5)
    (x, y), (far, there) = problem.batches[:2]

    def outer() -> Tensor:
        phi = adapt_task(meta.mirror, meta.z0, lambda phi: F.mse_loss(meta.run_with(phi)(x), y), steps=2, rate=0.3)
        return F.mse_loss(meta.run_with(phi)(far), there)

    gradients = torch.autograd.grad(outer(), meta.z0)
    for tensor, gradient in zip(meta.z0, gradients, strict=True):
        direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        with torch.no_grad():
            values = []
            for shift in (1e-5, -2e-5):
                tensor.add_(direction, alpha=shift)
                values.append(float(outer().detach()))
            tensor.add_(direction, alpha=1e-5)
        assert abs((values[0] - values[1]) / 2e-5 - float((gradient * direction).sum())) < 1e-8
    before = {name: tensor.detach().clone() for name, tensor in meta.tensors.items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in meta.tensors.items())
    meta.adapt_(lambda run: F.mse_loss(run(x), y), steps=3, rate=0.3)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in meta.tensors.items())
    expected = adapt_task(meta.mirror, meta.z0, lambda phi: F.mse_loss(meta.run_with(phi)(x), y), steps=3, rate=0.3)
    for tensor, value in zip(meta.tensors.values(), expected, strict=True):
        torch.testing.assert_close(tensor, value, rtol=1e-12, atol=1e-14)
    handle.merge_()


def test_refusals() -> None:
    mirror, z = stirred()
    with pytest.raises(ArgumentError, match="in this order, not"):
        mirror(z[::-1])
    with pytest.raises(ArgumentError, match="block >= 1"):
        MirrorMap(SHAPES, block=0)
    with pytest.raises(TrainingError, match=r"does not depend on tensors \[1\] of 2"):
        adapt_task(lambda z: [2 * one for one in z], z[:2], lambda phi: phi[0].sum())
    z0 = [nn.Parameter(one) for one in z]
    tasks = [(lambda phi: phi[0].sum() * 0 + sum(one.sum() for one in phi), lambda phi: phi[0].sum() * float("nan"))]
    with pytest.raises(TrainingError, match="iteration 0: the query loss is nan"):
        meta_train(mirror, z0, lambda iteration: tasks, iterations=1)
    with pytest.raises(ArgumentError, match="belong to the optimizer made here"):
        meta_train(mirror, z0, lambda iteration: tasks, meta_rate=0.1, optimizer=torch.optim.Adam(z0))
    problem = Regression()
    frozen = problem.adapt("lora(rank=2)")
    for block in frozen.blocks().values():
        for tensor in block.values():
            tensor.requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing to adapt"):
        rankwise.catalog.mirror_meta(frozen, lambda iteration: [], iterations=1)


def fashion() -> tuple[Tensor, Tensor]:
    from rankwise.lab.packaged_data import FASHION_LABELS, packaged_rows

    try:
        rows = packaged_rows("packaged:fashion-mnist").evaluation[:3000]
    except DataError as error:
        pytest.skip(str(error))
    import numpy as np

    images = torch.stack([torch.from_numpy(np.array(row["image"], dtype=np.float32)) for row in rows])[:, None] / 255
    return F.avg_pool2d(images, 2), torch.tensor([FASHION_LABELS.index(row["label"]) for row in rows])  # (N, 1, 14, 14)


@pytest.mark.slow
def test_few_shot_tasks_on_packaged_images() -> None:
    """Three-way five-shot on classes that meta-training has not seen, through LoRA factors and a head of a small net."""
    images, labels = fashion()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)
        )
    handle = rankwise.adapt_(net, rankwise.catalog.lora(rank=4), where=["0", "2"], train_also=["5"])

    def task(seed: int, classes: list[int]):
        draw = torch.Generator().manual_seed(seed)
        chosen = [classes[k] for k in torch.randperm(len(classes), generator=draw)[:3]]
        rows = [torch.nonzero(labels == name).flatten() for name in chosen]
        picked = [one[torch.randperm(len(one), generator=draw)[:20]] for one in rows]
        sets = []
        for part, shots in ((slice(0, 5), 5), (slice(5, 20), 15)):
            x, y = torch.cat([images[one[part]] for one in picked]), torch.arange(3).repeat_interleave(shots)
            sets.append((x, y))
        return sets

    def losses(sets):
        return tuple(lambda run, x=x, y=y: F.cross_entropy(run(x), y) for x, y in sets)

    def accuracy(meta: MetaAdapter) -> float:
        right = 0.0
        for seed in range(5000, 5030):
            (x, y), (held, answers) = task(seed, [0, 5, 7, 8, 9])
            phi = meta.adapted(lambda run, x=x, y=y: F.cross_entropy(run(x), y), rate=0.2)
            with torch.no_grad():
                right += float((meta.run_with(phi)(held).argmax(1) == answers).double().mean()) / 30
        return right

    plain = accuracy(MetaAdapter(handle))
    meta = rankwise.catalog.mirror_meta(
        handle,
        lambda iteration: [losses(task(2 * iteration + k, [1, 2, 3, 4, 6])) for k in range(2)],
        iterations=100,
        rate=0.2,
        meta_rate=0.01,
    )
    learned = accuracy(meta)
    print(f"unseen classes: {plain:.3f} from the plain start, {learned:.3f} meta-learned")
    print(f"query loss {meta.losses[0]:.3f} -> {meta.losses[-1]:.3f}")
    assert learned > plain + 0.02


@pytest.mark.slow
def test_second_order_through_the_packaged_text_encoder() -> None:
    """A few outer steps on tweets through LoRA factors of its last block, whose attention has no fused second derivative."""
    from rankwise.lab.tasks import make_task

    try:
        made = make_task("packaged:minilm", "packaged:tweets", train_limit=64, eval_limit=8, retention="none")
    except (DataError, ModelError) as error:
        pytest.skip(str(error))
    model = made.fresh_model(0).eval()
    where = [
        f"{name}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layer.5.attention.self" in name
    ]
    handle = rankwise.adapt_(model, rankwise.catalog.lora(rank=2), where=where, train_also=["classifier"])
    batches = [
        {key: value[:, :16] if value.dim() == 2 else value for key, value in batch.items()}
        for batch in made.train_batches(8, 4, 0)
    ]

    def loss(batch):
        rest = {key: value for key, value in batch.items() if key != "labels"}
        return lambda run: F.cross_entropy(run(**rest).logits, batch["labels"])

    tasks = [(loss(batches[0]), loss(batches[1])), (loss(batches[2]), loss(batches[3]))]
    meta = rankwise.catalog.mirror_meta(handle, lambda iteration: tasks, iterations=6, steps=2, rate=0.05, meta_rate=0.02)
    assert meta.losses[-1] < meta.losses[0]
    assert all(tensor.grad is None for tensor in meta.tensors.values())
