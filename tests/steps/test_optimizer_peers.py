"""The same trajectory as torch's and PEFT's optimizers, on a small LoRA with the same settings, the same start and data.

Differences by design, with their number:
- LoRA+: PEFT multiplies the rate of B, here the direction is multiplied; with decay that decays B `ratio` times as fast in
  both. PEFT leaves vectors undecayed only for biases; here for every vector.
- Riemannian: PEFT damps with reg = 1e-2 and here with 1e-6. With the same damping both agree to rounding.
- LoRA-FA: PEFT adds ε to √v before its bias correction, so that ε acts as ε/√(1 - β₂ᵗ): up to 32 ε. With its ε = 1e-6 the
  trajectories are 6e-4 apart; with one that is nothing they agree.
- Adafactor: torch bounds the rate by 1/√t and always takes steps relative to the weight's size; in this range of steps the
  bound does not act. torch keeps squares above eps² where the release adds 1e-30.
"""

import warnings

import pytest
import torch
from torch import nn

import rankwise
from rankwise.core.optimizer import BlockOptimizer
from rankwise.steps.flora_grad import flora_grad
from rankwise.steps.moments import adamw

STEPS, RANK, ALPHA = 20, 3, 6.0


def network():
    generator = torch.Generator().manual_seed(0)
    made = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return made


def loss(model, step):
    generator = torch.Generator().manual_seed(100 + step)
    x, y = (torch.randn(6, size, generator=generator, dtype=torch.float64) for size in (7, 5))
    return (model(x) - y).square().mean()


def factors():
    generator = torch.Generator().manual_seed(1)
    shapes = {"0": {"A": (RANK, 7), "B": (9, RANK)}, "2": {"A": (RANK, 9), "B": (5, RANK)}}
    return {
        site: {role: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3 for role, shape in roles.items()}
        for site, roles in shapes.items()
    }


def trained(model, blocks, optimizer):
    """Site -> role -> tensor after training from `factors`."""
    with torch.no_grad():
        for site, block in factors().items():
            for role, tensor in block.items():
                blocks[site][role].copy_(tensor)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    return {site: {role: tensor.detach().clone() for role, tensor in block.items()} for site, block in blocks.items()}


def ours(text, lr):
    model = network()
    handle = rankwise.adapt_(model, rankwise.compose(f"lora(rank={RANK}, alpha={ALPHA}) + {text}"))
    return trained(model, handle.blocks(), handle.optimizer(lr=lr))


def theirs(make, lr):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0", "2"], lora_dropout=0.0)
        wrapped = peft.get_peft_model(network(), config, autocast_adapter_dtype=False)
        for parameter in wrapped.parameters():
            parameter.data = parameter.data.double()
        layers = wrapped.base_model.model
        blocks = {s: {r: getattr(layers[int(s)], f"lora_{r}")["default"].weight for r in ("A", "B")} for s in ("0", "2")}
        return trained(wrapped, blocks, make(wrapped, lr))


def distance(one, two):
    """Largest difference of any tensor, relative to its size."""
    return max(float((one[site][role] - two[site][role]).norm() / two[site][role].norm()) for site in one for role in one[site])


def moved(found):
    return distance(found, factors())


def plain(cls, **settings):
    return lambda model, lr: cls([p for p in model.parameters() if p.requires_grad], lr=lr, **settings)


@pytest.mark.parametrize(
    ("text", "make", "lr"),
    [
        ("sgd", plain(torch.optim.SGD), 0.2),
        ("sgd(momentum=0.9, weight_decay=0.1)", plain(torch.optim.SGD, momentum=0.9, weight_decay=0.1), 0.1),
        ("adamw", plain(torch.optim.AdamW, weight_decay=0.0), 0.02),
        ("adamw(weight_decay=0.3)", plain(torch.optim.AdamW, weight_decay=0.3), 0.02),
        ("adamw(betas=(0.7, 0.9), eps=1e-3)", plain(torch.optim.AdamW, weight_decay=0.0, betas=(0.7, 0.9), eps=1e-3), 0.02),
    ],
)
def test_torch_on_a_small_lora(text, make, lr):
    found, expected = ours(text, lr), theirs(make, lr)
    assert distance(found, expected) < 1e-12
    assert moved(found) > 0.05


@pytest.mark.parametrize(("ratio", "decay"), [(16.0, 0.0), (4.0, 0.2)])
def test_lora_plus_is_pefts(ratio, decay):
    optimizers = pytest.importorskip("peft.optimizers")

    def make(model, lr):
        settings = {"lr": lr, "loraplus_lr_ratio": ratio, "loraplus_weight_decay": decay}
        return optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, **settings)

    found = ours(f"adamw(weight_decay={decay}) + lora_plus(ratio={ratio})", 5e-3)
    assert distance(found, theirs(make, 5e-3)) < 1e-12
    assert distance(found, ours(f"adamw(weight_decay={decay})", 5e-3)) > 0.05


@pytest.mark.parametrize(("base", "cls", "lr"), [("adamw", torch.optim.AdamW, 0.02), ("sgd", torch.optim.SGD, 0.02)])
@pytest.mark.parametrize("damping", [1e-2, 1e-6])
def test_scaled_gd_is_pefts_riemannian(base, cls, lr, damping):
    optimizers = pytest.importorskip("peft.optimizers")
    if not hasattr(optimizers, "create_riemannian_optimizer"):
        pytest.skip("this PEFT has no Riemannian optimizer")

    def make(model, rate):
        return optimizers.create_riemannian_optimizer(model, cls, lr=rate, reg=damping, weight_decay=0.0)

    found = ours(f"{base} + scaled_gd(damping={damping})", lr)
    assert distance(found, theirs(make, lr)) < 1e-9
    assert distance(found, ours(f"{base} + scaled_gd(damping=1.0)", lr)) > 1e-2  # the damping is not without effect


@pytest.mark.parametrize(("eps", "least", "most"), [(1e-6, 1e-5, 1e-2), (1e-15, 0.0, 1e-7)])
def test_lora_fa_is_pefts_but_for_epsilon(eps, least, most):
    optimizers = pytest.importorskip("peft.optimizers")

    def make(model, rate):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = optimizers.create_lorafa_optimizer(model, r=RANK, lora_alpha=int(ALPHA), lr=rate)
        optimizer.param_groups[0]["eps"] = eps
        return optimizer

    model = network()
    text = f"lora_fa(rank={RANK}, alpha={ALPHA}, correct=True, damping=1e-8) + adamw(eps={eps})"
    handle = rankwise.adapt_(model, rankwise.compose(text))
    layers = {site: handle.parameterization(site) for site in handle.targets}
    blocks = {site: {"A": layer.A, "B": layer.B} for site, layer in layers.items()}
    found = trained(model, blocks, handle.optimizer(lr=0.02))
    assert least <= distance(found, theirs(make, 0.02)) < most


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": nn.Parameter(torch.randn(6, 9, generator=generator, dtype=torch.float64)),
        "bias": nn.Parameter(torch.randn(6, generator=generator, dtype=torch.float64)),
    }


def descend(tensors, optimizer):
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for tensor in tensors.values():
            tensor.grad = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) + tensor.detach()
        optimizer.step()
    return tensors


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("decay_rate", [-0.8, -0.5])
def test_floras_base_is_torchs_adafactor(weight_decay, decay_rate):
    step = flora_grad(rank=2, momentum=0.0, scale_parameter=True, weight_decay=weight_decay, decay_rate=decay_rate)
    mine, other = weights(), weights()
    descend(mine, BlockOptimizer({"site": mine}, [step], 0.05))
    settings = {"lr": 0.05, "weight_decay": weight_decay, "beta2_decay": decay_rate, "eps": (1e-15, 1e-3)}
    descend(other, torch.optim.Adafactor([other["weight"]], **settings))
    torch.testing.assert_close(mine["weight"], other["weight"], rtol=1e-12, atol=1e-12)
    assert float((mine["weight"].detach() - weights()["weight"].detach()).norm()) > 0.1
    undecayed = weights()  # vectors are not decayed here
    descend(undecayed, torch.optim.Adafactor([undecayed["bias"]], **{**settings, "weight_decay": 0.0}))
    torch.testing.assert_close(mine["bias"], undecayed["bias"], rtol=1e-12, atol=1e-12)


def test_torch_bounds_the_rate_of_adafactor():
    """The difference that is left: torch takes min(lr, 1/√t), which acts from t = 1/lr² on."""
    mine, other = weights(), weights()
    descend(mine, BlockOptimizer({"site": mine}, [flora_grad(rank=2, momentum=0.0, scale_parameter=True)], 0.5))
    descend(other, torch.optim.Adafactor([other["weight"]], lr=0.5, eps=(1e-15, 1e-3)))
    apart = (mine["weight"] - other["weight"]).detach().norm() / other["weight"].detach().norm()
    assert 0.01 < float(apart) < 2.0


def test_adamw_on_its_own_is_torchs_to_rounding():
    mine, other = weights(), weights()
    descend(mine, BlockOptimizer({"site": mine}, [adamw()], 0.05))
    descend(other, torch.optim.AdamW(other.values(), lr=0.05, weight_decay=0.0))
    for role, tensor in mine.items():
        torch.testing.assert_close(tensor, other[role], rtol=1e-13, atol=1e-13)
