"""A small Llama to be trained from scratch, and text as tokens of a byte-level vocabulary made from the training part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.errors import DataError
from rankwise.core.randomness import generator_for
from rankwise.lab.data import load_data
from rankwise.lab.models import CAUSAL


@dataclass(frozen=True, kw_only=True)
class Size:
    """Model and batches.

    Attributes:
        data: as `rankwise compare --data` takes it.
        hidden, layers, intermediate, heads: of the Llama.
        vocabulary: most tokens.
        rows, tokens: of a batch.
        held: rows of the validation text.
        steps: optimizer steps.
    """

    data: str = "packaged:kjv"
    hidden: int = 320
    layers: int = 7
    intermediate: int = 864
    heads: int = 5
    vocabulary: int = 2048
    rows: int = 8
    tokens: int = 64
    held: int = 128
    steps: int = 200

    @property
    def rank(self) -> int:
        """A quarter of the width."""
        return max(1, self.hidden // 4)

    @property
    def interval(self) -> int:
        """A fifth of the run: between refreshes or restarts."""
        return max(1, self.steps // 5)


@dataclass(frozen=True)
class Corpus:
    """Text as tokens.

    Attributes:
        vocabulary: how many tokens there are.
        train: tokens to train on (N,).
        held: rows to validate on (rows, tokens).
        letters: bytes of text per token of the training part.
    """

    vocabulary: int
    train: Tensor
    held: Tensor
    letters: float


def corpus(size: Size) -> Corpus:
    """Reads the text, makes the vocabulary from its training part and encodes both parts.

    Raises:
        DataError: there is too little text.
    """
    from tokenizers import ByteLevelBPETokenizer

    data = load_data(size.data, task=CAUSAL)
    column = data.columns["text"]
    texts, others = ([str(row[column]) for row in rows] for rows in (data.train, data.evaluation))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=size.vocabulary, show_progress=False)

    def encoded(parts: Sequence[str]) -> Tensor:
        return torch.tensor([token for part in parts for token in tokenizer.encode(part).ids], dtype=torch.long)

    train, held = encoded(texts), encoded(others)
    rows = min(size.held, len(held) // size.tokens)
    if len(train) <= size.tokens or rows < 1:
        raise DataError(
            f"{size.data} has {len(train)} tokens to train on and {len(held)} to validate on; rows of {size.tokens} need more"
        )
    letters = sum(len(text.encode()) for text in texts) / len(train)
    return Corpus(tokenizer.get_vocab_size(), train, held[: rows * size.tokens].view(rows, size.tokens), letters)


def batch_at(text: Corpus, size: Size, step: int, seed: int) -> Tensor:
    """The rows (rows, tokens) of a step: the same for every method of a seed."""
    chance = generator_for(seed, "batch", step)
    starts = torch.randint(len(text.train) - size.tokens, (size.rows,), generator=chance)
    return torch.stack([text.train[start : start + size.tokens] for start in starts.tolist()])


def llama(size: Size, vocabulary: int, seed: int) -> nn.Module:
    """A Llama with the weights that the seed draws: transformers', but for embeddings at N(0, 1).

    At transformers' 0.02 what the first layers add drowns the embeddings, and half of a short run goes by before a method that
    starts from such layers learns more than how frequent tokens are.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        intermediate_size=size.intermediate,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=vocabulary,
        max_position_embeddings=size.tokens,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        nn.init.normal_(model.model.embed_tokens.weight)
    return model


def beside(model: nn.Module) -> list[str]:
    """Modules trained whole beside the adapted linear layers: embeddings, norms and head."""
    head: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    return [
        name
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False)) and (module is head or not isinstance(module, nn.Linear))
    ]


def loss_of(model: Any, rows: Tensor) -> Tensor:
    """Mean loss of the next token."""
    return model(input_ids=rows, labels=rows).loss


@torch.no_grad()
def validation_loss(model: nn.Module, text: Corpus, rows: int) -> float:
    """Mean loss over the validation text, `rows` at a time."""
    model.eval()
    parts = text.held.split(rows)
    total = sum(float(loss_of(model, part)) * len(part) for part in parts)
    model.train()
    return total / len(text.held)
