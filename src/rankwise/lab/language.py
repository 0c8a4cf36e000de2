"""Rows of text for a causal language model: chats, questions with answers, plain text; loss and exact match."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.errors import DataError

Row = Mapping[str, Any]
_IGNORED = -100  # labels that do not count in transformers' loss


class Language:
    """Turns rows into batches, and measures a model on them.

    Only what the model is to say counts in the loss: the answers, or the assistant's turns; all of it for plain text.

    Args:
        tokenizer: of the model.
        length: most tokens of a row; longer rows are cut.
        new_tokens: most tokens of a generated answer.
        score: (answer, row) -> 0..1; None compares texts.
    """

    def __init__(self, tokenizer: Any, length: int, new_tokens: int, score: Callable[[str, Row], float] | None = None) -> None:
        self.tokenizer, self.length, self.new_tokens, self.score = tokenizer, length, new_tokens, score

    def batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Padded token numbers, mask and labels."""
        encoded = [self._encode(row) for row in rows]
        width = max(len(tokens) for tokens, _ in encoded)
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([tokens + [pad] * (width - len(tokens)) for tokens, _ in encoded]),
            "attention_mask": torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens, _ in encoded]),
            "labels": torch.tensor([labels + [_IGNORED] * (width - len(labels)) for _, labels in encoded]),
        }

    def _encode(self, row: Row) -> tuple[list[int], list[int]]:
        """Token numbers and labels of one row."""
        if "messages" in row:
            tokens, labels = self._chat(row["messages"])
        elif "prompt" in row:
            asked = self.prompt_tokens(str(row["prompt"]))
            said = self._plain(f"{row['answer']}{self.tokenizer.eos_token}")
            tokens, labels = asked + said, [_IGNORED] * len(asked) + said
        else:
            tokens = self._plain(f"{row['text']}{self.tokenizer.eos_token}")
            labels = list(tokens)
        tokens, labels = tokens[: self.length], labels[: self.length]
        if all(label == _IGNORED for label in labels):
            raise DataError(
                f"a row has nothing to learn from within {self.length} tokens; raise length=. It begins: {row!s:.80}"
            )
        return tokens, labels

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt_tokens(self, prompt: str) -> list[int]:
        """A question as the model expects it: through its chat template where it has one."""
        if self.tokenizer.chat_template is None:
            return self._plain(f"{prompt}\n")
        return self._plain(self._render([{"role": "user", "content": prompt}], opening=True))

    def _chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[int]]:
        """A chat; the assistant's turns count. Turn by turn, so that no template needs to mark them."""
        if self.tokenizer.chat_template is None:
            raise DataError(
                "the data holds chats (messages), but this model's tokenizer has no chat template; use prompt and answer"
            )
        tokens: list[int] = []
        labels: list[int] = []
        written = ""
        for count, message in enumerate(messages, start=1):
            said = message["role"] == "assistant"
            if said:  # what opens the assistant's turn is given to it
                opened = self._render(messages[: count - 1], opening=True)
                opening = self._plain(opened[len(written) :])
                tokens, labels, written = tokens + opening, labels + [_IGNORED] * len(opening), opened
            closed = self._render(messages[:count], opening=False)
            turn = self._plain(closed[len(written) :])
            tokens, labels, written = tokens + turn, labels + (turn if said else [_IGNORED] * len(turn)), closed
        return tokens, labels

    def _render(self, messages: Sequence[Mapping[str, str]], *, opening: bool) -> str:
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opening)

    def loss(self, model: nn.Module, rows: Sequence[Row]) -> float:
        """Mean loss per counted token."""
        total, count = 0.0, 0
        with torch.no_grad():
            for start in range(0, len(rows), 16):
                batch = self.batch(rows[start : start + 16])
                tokens = int((batch["labels"][:, 1:] != _IGNORED).sum())
                total += float(model(**batch).loss) * tokens
                count += tokens
        return total / count

    def exact_match(self, model: Any, rows: Sequence[Row]) -> float:
        """Share of questions whose greedily generated answer is right."""
        right = 0.0
        for start in range(0, len(rows), 32):
            part = rows[start : start + 32]
            asked = [self.prompt_tokens(str(row["prompt"])) for row in part]
            width = max(map(len, asked))
            pad = self.tokenizer.pad_token_id
            batch = torch.tensor([[pad] * (width - len(tokens)) + tokens for tokens in asked])  # padded on the left
            mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in asked])
            with torch.no_grad():
                told = model.generate(
                    input_ids=batch, attention_mask=mask, max_new_tokens=self.new_tokens, do_sample=False, pad_token_id=pad
                )
            for row, tokens in zip(part, told[:, width:], strict=True):
                answer = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
                right += self.score(answer, row) if self.score is not None else float(answer == str(row["answer"]).strip())
        return right / len(rows)
