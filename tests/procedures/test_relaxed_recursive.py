"""Relaxed recursion on real architectures of transformers: caches, checkpointing, files, unrolling, refusals."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError, CheckpointError, TargetError
from rankwise.procedures.looped_model import RelaxedRecursive
from tests.interop.models import llama, tokens

relaxed_recursive = rankwise.catalog.relaxed_recursive


def scattered(model: nn.Module, seed: int = 4) -> nn.Module:
    """Generic values in every tensor, norms and biases included: a trained model has them too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype) * 0.2)
    return model.eval()


def bert(layers: int = 4) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=48,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=24,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return scattered(BertModel(config).double())


def gpt2(layers: int = 4) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return scattered(
            GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=layers, n_head=4, n_positions=32)).double()
        )


def decoder(layers: int = 4) -> nn.Module:
    return scattered(llama(layers).double())


def logits(model: nn.Module, batch: Tensor | None = None) -> Tensor:
    found = model(tokens() if batch is None else batch)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def moved(relaxed: RelaxedRecursive) -> RelaxedRecursive:
    """Every trained tensor somewhere else than at its start."""
    scattered(relaxed.model, seed=9)
    return relaxed


MODELS = {"llama": decoder, "bert": bert, "gpt2": gpt2}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("shared", ["average", "stepwise", "lower", "random"])
def test_full_rank_with_own_vectors_is_the_trained_model(make, shared: str) -> None:
    model = make()
    expected = logits(model)
    relaxed = relaxed_recursive(model, loops=2, rank=64, shared=shared, vectors="own")
    assert (logits(relaxed.model) - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("vectors", ["tied", "own"])
def test_unrolled_is_the_same_function_with_the_names_of_the_original(make, vectors: str) -> None:
    model = make()
    names, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    relaxed = moved(relaxed_recursive(model, loops=2, rank=3, vectors=vectors))
    expected = logits(relaxed.model).detach()
    plain = relaxed.unroll_()
    assert plain is model and list(plain.state_dict()) == names
    assert [type(module) for module in plain.modules()] == classes
    assert all("_rankwise" not in key for module in plain.modules() for key in module.__dict__)
    assert (logits(plain) - expected).norm() < 1e-12 * expected.norm()
    before = [block.get_parameter(name) for block in _stack(plain) for name, _ in block.named_parameters()]
    assert len({tensor.data_ptr() for tensor in before}) == len(before)
    with pytest.raises(ArgumentError, match="unrolled"):
        relaxed.update_of(0, "whatever")


def _stack(model: nn.Module) -> nn.ModuleList:
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


def test_tied_norms_are_the_mean_and_move_together() -> None:
    model = decoder()
    norms = [layer.input_layernorm.weight.detach().clone() for layer in model.model.layers]
    relaxed = relaxed_recursive(model, loops=2, rank=2)
    for k in range(2):
        shared = relaxed.shared_blocks[k].input_layernorm.weight
        assert torch.allclose(shared, (norms[k] + norms[k + 2]) / 2, atol=1e-15)
        assert relaxed.blocks[k + 2].input_layernorm.weight is shared


def test_every_shared_tensor_is_met_once() -> None:
    model = bert()
    relaxed = relaxed_recursive(model, loops=2, rank=2)
    named = dict(model.named_parameters())
    assert set(model.state_dict()) >= set(named) and len({id(tensor) for tensor in named.values()}) == len(named)
    assert not any(name.startswith("encoder.layer.2") and "relaxation" not in name for name in model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = relaxed.shared_blocks[0].attention.self.query.weight
    before = weight.detach().clone()
    logits(model).square().sum().backward()
    optimizer.step()
    assert torch.allclose(weight, before - 0.1 * weight.grad, atol=1e-15)
    assert relaxed.blocks[2].attention.self.query.weight is weight
    assert all(tensor.grad is not None for name, tensor in named.items() if "pooler" not in name)


@pytest.mark.parametrize("make", [decoder, gpt2], ids=["llama", "gpt2"])
def test_generation_with_the_cache_is_generation_without(make) -> None:
    model = moved(relaxed_recursive(make(), loops=2, rank=3)).model
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = tokens()
    mask = torch.ones_like(prompt)
    cached = model.generate(prompt, attention_mask=mask, use_cache=True, **settings)
    assert cached.shape == (2, 15) and torch.equal(
        cached, model.generate(prompt, attention_mask=mask, use_cache=False, **settings)
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = moved(relaxed_recursive(decoder(), loops=2, rank=2)).model.train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        logits(model).square().sum().backward()
        gradients.append({name: tensor.grad for name, tensor in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, rtol=1e-9, atol=1e-9), name


def test_copies_and_pickles_share_as_the_original_does() -> None:
    relaxed = moved(relaxed_recursive(decoder(), loops=2, rank=2))
    expected = logits(relaxed.model).detach()
    twin = copy.deepcopy(relaxed)
    again = pickle.loads(pickle.dumps(relaxed.model))
    for model in (twin.model, again):
        assert torch.equal(logits(model), expected)
        assert len(list(model.parameters())) == len(list(relaxed.model.parameters()))
        layers = model.model.layers
        assert layers[2].mlp.up_proj.weight is layers[0].mlp.up_proj.weight
        assert layers[0].mlp.up_proj.weight is not relaxed.blocks[0].mlp.up_proj.weight
    with torch.no_grad():
        twin.shared_blocks[0].mlp.up_proj.weight.zero_()
    assert torch.equal(logits(relaxed.model), expected) and not torch.equal(logits(twin.model), expected)
    twin.unroll_()
    assert torch.equal(logits(relaxed.model), expected)


def test_a_change_of_dtype_reaches_every_depth() -> None:
    relaxed = moved(relaxed_recursive(decoder(), loops=2, rank=2))
    expected = logits(relaxed.model).detach()
    relaxed.model.float()
    assert {tensor.dtype for tensor in relaxed.model.parameters()} == {torch.float32}
    assert (logits(relaxed.model) - expected).norm() < 1e-4 * expected.norm()


def test_functional_calls_replace_a_shared_tensor_at_all_its_depths() -> None:
    relaxed = moved(relaxed_recursive(decoder(), loops=2, rank=2))
    parameters = {name: tensor.detach() for name, tensor in relaxed.model.named_parameters()}
    name = "model.layers.1.mlp.down_proj.weight"
    changed = torch.func.functional_call(relaxed.model, {**parameters, name: parameters[name] * 0.5}, tokens()).logits
    with torch.no_grad():
        relaxed.shared_blocks[1].mlp.down_proj.weight.mul_(0.5)
    assert torch.allclose(changed, logits(relaxed.model), atol=1e-12)


def test_saved_and_loaded_into_a_fresh_model(tmp_path: Path) -> None:
    relaxed = moved(relaxed_recursive(decoder(), loops=2, rank=3, vectors="own"))
    expected = logits(relaxed.model).detach()
    relaxed.save(tmp_path / "looped")
    other = llama(4, seed=7).double().eval()
    loaded = RelaxedRecursive.load(other, tmp_path / "looped")
    assert torch.equal(logits(other), expected) and loaded.plan == relaxed.plan
    (file,) = (tmp_path / "looped").glob("*.safetensors")
    numbers = sum(tensor.numel() for tensor in relaxed.model.parameters())
    assert 8 * numbers <= file.stat().st_size <= 8 * numbers + 20_000  # shared tensors once
    assert (logits(loaded.unroll_()) - expected).norm() < 1e-12 * expected.norm()


def test_a_file_of_another_architecture_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    relaxed_recursive(decoder(4), loops=2, rank=3).save(tmp_path)
    for other in (decoder(6), bert(4)):
        names, expected = list(other.state_dict()), logits(other)
        with pytest.raises(CheckpointError, match="does not fit"):
            RelaxedRecursive.load(other, tmp_path)
        assert list(other.state_dict()) == names and torch.equal(logits(other), expected)
    with pytest.raises(CheckpointError, match="recipe"):
        rankwise.load_(decoder(4), tmp_path)
    model = decoder(4)
    rankwise.adapt_(model, rankwise.catalog.lora(rank=2)).save(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"rankwise\.load_"):
        RelaxedRecursive.load(decoder(4), tmp_path / "adapter")


def test_without_factors_it_is_strictly_recursive() -> None:
    model = decoder()
    relaxed = relaxed_recursive(model, loops=4, rank=0)
    assert not any("relaxation" in name for name in model.state_dict())
    assert relaxed.update_of(3, "mlp.up_proj").rank == 0 and not relaxed.update_of(3, "mlp.up_proj").dense().any()
    one = decoder(1)
    one.load_state_dict(model.state_dict())
    for _ in range(3):
        one.model.layers.append(one.model.layers[0])
    one.config.num_hidden_layers = 4
    assert torch.allclose(one(tokens(), use_cache=False).logits, logits(model), atol=1e-12)


def test_half_precision_rounds_the_mean_once_and_the_factors_make_up_for_it() -> None:
    model = decoder().bfloat16()
    weights = [layer.mlp.up_proj.weight.detach().clone() for layer in model.model.layers]
    relaxed = relaxed_recursive(model, loops=2, rank=64)
    for depth in range(4):
        shared, pair = relaxed.blocks[depth].mlp.up_proj.weight, relaxed.update_of(depth, "mlp.up_proj")
        assert shared.dtype is torch.bfloat16 and pair.A.dtype is torch.float32
        assert (shared.float() + pair.dense() - weights[depth].float()).norm() < 1e-5 * weights[depth].float().norm()
    assert logits(model).dtype is torch.bfloat16 and logits(model).isfinite().all()


def test_the_same_seed_gives_the_same_start_and_leaves_the_global_stream_alone() -> None:
    state = torch.random.get_rng_state()
    first, second, other = (relaxed_recursive(decoder(), rank=2, shared="random", seed=seed) for seed in (1, 1, 2))
    pairs = [dict(relaxed.model.named_parameters()) for relaxed in (first, second, other)]
    assert all(torch.equal(pairs[1][name], tensor) for name, tensor in pairs[0].items())
    assert any(not torch.equal(pairs[2][name], tensor) for name, tensor in pairs[0].items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_compiled_is_eager() -> None:
    from tests.oracles.test_relaxed_recursive import INPUTS, Toy

    relaxed = moved(relaxed_recursive(Toy(4), loops=2, rank=2))
    x = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    compiled = torch.compile(relaxed.model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), relaxed.model(x), atol=1e-12)


def test_layers_are_named_where_it_is_not_clear() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
            self.decoder = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    with pytest.raises(TargetError, match="encoder, decoder are equally long"):
        relaxed_recursive(Two(), rank=1)
    relaxed = relaxed_recursive(Two(), rank=1, layers="decoder")
    assert relaxed.plan.layers == "decoder" and relaxed.update_of(2, "").shape == (4, 4)
    with pytest.raises(TargetError, match="Did you mean 'decoder'"):
        relaxed_recursive(Two(), rank=1, layers="decode")
    with pytest.raises(TargetError, match="no ModuleList"):
        relaxed_recursive(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), rank=1)


def test_what_cannot_be_looped_is_refused_before_anything_changes() -> None:
    def unlike() -> nn.Module:
        model = decoder()
        model.model.layers[2].mlp.up_proj = nn.Linear(16, 20, bias=False)
        return model

    def adapted() -> nn.Module:
        model = decoder()
        rankwise.adapt_(model, rankwise.catalog.lora(rank=2))
        return model

    def looped() -> nn.Module:
        return relaxed_recursive(decoder(), rank=2).model

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.GRU(8, 8) for _ in range(2))

    cases = [
        (unlike, "not like model.layers.0"),
        (adapted, "carries an adapter"),
        (looped, "looped already"),
        (Attends, "reads this weight without calling"),
        (Recurrent, "cannot be shared"),
    ]
    for make, message in cases:
        model = make()
        names = list(model.state_dict())
        with pytest.raises(TargetError, match=message):
            relaxed_recursive(model, loops=2, rank=2)
        assert list(model.state_dict()) == names
    with pytest.raises(ArgumentError, match="it can be 2, 4"):
        relaxed_recursive(decoder(), loops=3)
    for wrong in ({"shared": "mean"}, {"start": "pissa"}, {"vectors": "some"}, {"rank": -1}):
        with pytest.raises(ArgumentError):
            relaxed_recursive(decoder(), **wrong)


def test_an_adapter_on_shared_weights_is_refused() -> None:
    relaxed = relaxed_recursive(decoder(), rank=2)
    with pytest.raises(TargetError, match="unroll_"):
        rankwise.adapt_(relaxed.model, rankwise.catalog.lora(rank=2))
    model = relaxed.unroll_()
    handle = rankwise.adapt_(model, rankwise.catalog.dora(rank=2))
    assert len(handle.targets) == 28


def test_unknown_depths_and_paths_are_named() -> None:
    relaxed = relaxed_recursive(decoder(), rank=2)
    with pytest.raises(ArgumentError, match="0 to 3"):
        relaxed.update_of(4, "mlp.up_proj")
    with pytest.raises(ArgumentError, match=r"mlp\.up_proj"):
        relaxed.update_of(0, "mlp.up_project")
