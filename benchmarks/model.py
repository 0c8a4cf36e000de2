"""The model of the benchmark, and the adapters that are put on copies of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.recipe import Recipe

HIDDEN, LAYERS, INTERMEDIATE, HEADS, VOCABULARY, TOKENS, RANK = 512, 8, 1376, 8, 2048, 256, 16
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Llama with random frozen weights, whose first layer passes gradients on to its input like every other."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * TOKENS,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: Any = LlamaForCausalLM(config)
        model = made.to(dtype)
    model.requires_grad_(False).train()
    model.get_input_embeddings().register_forward_hook(_with_gradient)
    return model


def _with_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_(True)


def copy_of(model: nn.Module) -> nn.Module:
    """A copy with modules of its own and the same frozen tensors, so that many fit into memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


def batch_of(tokens: int = TOKENS, rows: int = 1) -> dict[str, Tensor]:
    """Random tokens, with themselves as labels."""
    ids = torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Variant:
    """One line of the table.

    Attributes:
        name: what is trained.
        library: whose adapter.
        make: gives the adapted model, its handle where it is rankwise's, from a copy of the base.
        target: the time relative to the frozen base that the design asks for.
    """

    name: str
    library: str
    make: Callable[[nn.Module], tuple[nn.Module, Any]]
    target: float | None = None


def ours(name: str, recipe: Recipe, target: float | None = None) -> Variant:
    """An adapter of rankwise."""

    def make(model: nn.Module) -> tuple[nn.Module, Any]:
        handle = rankwise.adapt_(model, recipe)
        leave_start(model)
        return model, handle

    return Variant(name, "rankwise", make, target)


def theirs(name: str, kind: str, arguments: Mapping[str, Any], **options: Any) -> Variant:
    """An adapter of PEFT, `kind` its configuration class."""

    def make(model: nn.Module) -> tuple[nn.Module, Any]:
        import peft

        config = getattr(peft, kind)(target_modules=list(LINEARS), **arguments)
        adapted = peft.get_peft_model(model, config, **options)
        adapted.train()
        leave_start(adapted)
        return adapted, None

    return Variant(name, "PEFT", make)


@torch.no_grad()
def leave_start(model: nn.Module) -> None:
    """Moves trained tensors off their start, where zeros could be cheaper."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(0.01 * noise.to(parameter.dtype))


def main_variants() -> list[Variant]:
    """The methods that both libraries have."""
    catalog = rankwise.catalog
    lora = {"r": RANK, "lora_alpha": RANK}
    return [
        ours("LoRA", catalog.lora(rank=RANK), 1.10),
        theirs("LoRA", "LoraConfig", lora),
        ours("LoRA, dropout 0.05", catalog.lora(rank=RANK, dropout=0.05), 1.15),
        theirs("LoRA, dropout 0.05", "LoraConfig", {**lora, "lora_dropout": 0.05}),
        ours("DoRA", catalog.dora(rank=RANK), 1.30),
        theirs("DoRA", "LoraConfig", {**lora, "use_dora": True}),
        ours("VeRA, rank 64", catalog.vera(rank=64)),
        theirs("VeRA, rank 64", "VeraConfig", {"r": 64}),
    ]


def theirs_in_base_dtype() -> Variant:
    """PEFT's LoRA without its float32 adapters, which make each layer keep a float32 copy of its input."""
    lora = {"r": RANK, "lora_alpha": RANK}
    return theirs("LoRA, autocast_adapter_dtype=False", "LoraConfig", lora, autocast_adapter_dtype=False)
