"""Causal language models: chat messages, prompt and answer with exact match by generation, or plain text with perplexity.

Only what the model is to say is learned: the labels of prompts, of other speakers and of padding are -100.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from rankwise.core.errors import DataError
from rankwise.lab.data import Data, Row
from rankwise.lab.general import general_text
from rankwise.lab.models import LoadedModel
from rankwise.lab.tasks import Batch, Task

IGNORED = -100  # transformers' label of a token that does not count
GENERAL_BLOCKS, GENERAL_LENGTH = 16, 128
Example = tuple[list[int], list[int]]  # tokens, labels


class CausalTask(Task):
    """A causal language model and rows of text."""

    def __init__(
        self, loaded: LoadedModel, data: Data, *, seed: int, device: str, max_length: int, retention: str = "auto"
    ) -> None:
        super().__init__(loaded, data, seed=seed, device=device)
        self.max_length, self.tokenizer = max_length, loaded.processor
        self.answers = "answer" in data.columns
        self.metric_name = "exact_match" if self.answers else "perplexity"
        self.higher_is_better = self.answers
        self.general, name = general_text(retention, data.name)
        self.retention_note = f"loss per token on {name}" if self.general else name
        if "messages" in data.columns and not self.tokenizer.chat_template:
            raise DataError(
                f"{data.name} holds chat messages, but the tokenizer of {loaded.name} has no chat template; use texts"
            )

    # -- examples ------------------------------------------------------------------------------------------------------

    @cached_property
    def examples(self) -> list[Example]:
        """Training examples."""
        return self._encoded(self.data.train)

    @cached_property
    def held_out(self) -> list[Example]:
        """Examples to evaluate the loss on."""
        return self._encoded(self.data.evaluation)

    @property
    def train_size(self) -> int:
        """How many examples there are; plain text is cut into blocks first."""
        return len(self.examples)

    def collate(self, indices: Sequence[int]) -> Batch:
        """Training examples as one batch on the CPU."""
        return self._padded([self.examples[index] for index in indices])

    def _encoded(self, rows: Sequence[Row]) -> list[Example]:
        if "text" in self.data.columns:
            blocks = self._blocks([row[self.data.columns["text"]] for row in rows], self.max_length)
            return [(block, block) for block in blocks]
        found = [self._dialogue(self._messages(row)) for row in rows]
        kept = [example for example in found if any(label != IGNORED for label in example[1][1:])]
        if not kept:
            raise DataError(
                f"{self.data.name}: no row has anything to learn within max_length={self.max_length} tokens; raise max_length"
            )
        return kept

    def _blocks(self, texts: Sequence[str], length: int, most: int | None = None) -> list[list[int]]:
        """Texts joined by the end token and cut into blocks; the last, shorter one is kept if it has two tokens."""
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        stream: list[int] = []
        for text in texts:
            stream += [*self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *end]
            if most is not None and len(stream) >= most * length:
                break
        blocks = [stream[begin : begin + length] for begin in range(0, len(stream), length)]
        return [block for block in blocks if len(block) > 1][:most]

    def _messages(self, row: Row) -> list[dict[str, str]]:
        if "messages" in self.data.columns:
            return [dict(message) for message in row[self.data.columns["messages"]]]
        prompt, answer = str(row[self.data.columns["prompt"]]), str(row[self.data.columns["answer"]])
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    def _dialogue(self, messages: Sequence[dict[str, str]]) -> Example:
        tokens: list[int] = []
        labels: list[int] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self._prompt(messages[:index]), self._spoken(messages[: index + 1])
            if before[: len(tokens)] != tokens or after[: len(before)] != before:
                raise DataError(
                    f"{self.data.name}: the chat template of {self.loaded.name} rewrites earlier turns, so what the assistant "
                    "says cannot be told from the rest; give one answer per row"
                )
            labels += [IGNORED] * (len(before) - len(tokens)) + after[len(before) :]
            tokens = after
        return tokens[: self.max_length], labels[: self.max_length]

    def _prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.tokenizer(messages[-1]["content"] + "\n")["input_ids"]

    def _spoken(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = self.tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
        return [*self._prompt(messages[:-1]), *answer, self.tokenizer.eos_token_id]

    def _padded(self, examples: Sequence[Example]) -> Batch:
        longest = max(len(tokens) for tokens, _ in examples)
        pad = self.tokenizer.pad_token_id
        rows = [
            (tokens + [pad] * (longest - len(tokens)), [1] * len(tokens) + [0] * (longest - len(tokens)))
            for tokens, _ in examples
        ]
        labels = [wanted + [IGNORED] * (longest - len(wanted)) for _, wanted in examples]
        return {
            "input_ids": torch.tensor([tokens for tokens, _ in rows]),  # (rows, longest)
            "attention_mask": torch.tensor([mask for _, mask in rows]),
            "labels": torch.tensor(labels),
        }

    # -- measures ------------------------------------------------------------------------------------------------------

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss per token and perplexity on the held-out rows; where rows have answers, exact match by greedy generation."""
        loss = self._loss(model, self.held_out)
        measures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        return measures | ({"exact_match": self._exact_match(model)} if self.answers else {})

    def retention(self, model: nn.Module) -> float | None:
        """Loss per token on held-back general text."""
        if not self.general:
            return None
        blocks = self._blocks(self.general, GENERAL_LENGTH, GENERAL_BLOCKS)
        return self._loss(model, [(block, block) for block in blocks])

    @torch.no_grad()
    def _loss(self, model: nn.Module, examples: Sequence[Example], batch_size: int = 8) -> float:
        training, total, count = model.training, 0.0, 0
        model.eval()
        ordered = sorted(examples, key=lambda example: len(example[0]))
        for begin in range(0, len(ordered), batch_size):
            batch = self.to_device(self._padded(ordered[begin : begin + batch_size]))
            tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(model(**batch).loss) * tokens
            count += tokens
        model.train(training)
        return total / count

    @torch.no_grad()
    def _exact_match(self, model: nn.Module, batch_size: int = 16) -> float:
        training, right = model.training, 0
        model.eval()
        column = self.data.columns["answer"]
        longest = max(
            len(self.tokenizer(str(row[column]), add_special_tokens=False)["input_ids"]) for row in self.data.evaluation
        )
        prompts = [(self._prompt(self._messages(row)[:-1]), row) for row in self.data.evaluation]
        prompts.sort(key=lambda pair: len(pair[0]))
        for begin in range(0, len(prompts), batch_size):
            part = prompts[begin : begin + batch_size]
            for said, (_, row) in zip(self._said(model, [tokens for tokens, _ in part], longest + 4), part, strict=True):
                right += self._score(said, row) >= 1.0
        model.train(training)
        return right / len(prompts)

    def _said(self, model: nn.Module, prompts: Sequence[list[int]], most: int) -> list[str]:
        """Greedy continuations; prompts are padded on the left, so that all end at the same place."""
        longest, pad = max(map(len, prompts)), self.tokenizer.pad_token_id
        tokens = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        found = cast(Any, model).generate(
            input_ids=tokens.to(self.device), attention_mask=mask.to(self.device), max_new_tokens=most, do_sample=False,
            pad_token_id=pad, eos_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        return [text.strip() for text in self.tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)]

    def _score(self, said: str, row: Row) -> float:
        if self.data.score is not None:
            return self.data.score(said, row)
        return float(said == str(row[self.data.columns["answer"]]).strip())

    def describe(self) -> dict[str, Any]:
        """As for every task, and the length of a row."""
        return {**super().describe(), "max_length": self.max_length}
