"""Folders of tiny transformers models and data files, as a user would have them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

WORDS = ["good", "bad", "fine", "day", "night", "the", "a", "is", "was", "sum", "of", "one", "two", "three", "four", "and"]


def tiny_bert(folder: Path) -> Path:
    """A BERT of two layers with a tokenizer of its own."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=5 + len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        BertModel(config).save_pretrained(folder)
    return folder


def tiny_llama(folder: Path, *, template: bool = True) -> Path:
    """A Llama of two layers with a word tokenizer and, if asked for, a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    known = ["<pad>", "<eos>", "<unk>", "user", "assistant", ":", *WORDS]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    if template:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }} : {{ m.content }} <eos> {% endfor %}"
            "{% if add_generation_prompt %}assistant : {% endif %}"
        )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(known), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def jsonl(path: Path, rows: list[dict]) -> Path:
    """Rows as a file."""
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def reviews(path: Path, count: int = 40) -> Path:
    """Texts whose label is told by one word."""
    rows = [
        {"text": f"the {WORDS[3 + index % 2]} was {WORDS[index % 2]}", "label": ["plus", "minus"][index % 2]}
        for index in range(count)
    ]
    return jsonl(path, [{**row, "text": row["text"] + " and" * (index % 5)} for index, row in enumerate(rows)])


def needs(package: str, install: str) -> None:
    """Skips a test whose package is not there. It is not imported: packages of weights may need more than they say."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: {install}")
