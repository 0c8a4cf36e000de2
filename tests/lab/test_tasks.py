"""Tasks of three kinds on tiny models: what is learned, in which order, and what the measures mean."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

from rankwise.core.errors import ArgumentError, DataError
from rankwise.lab.tasks import make_task
from tests.lab.tiny_models import jsonl, reviews, tiny_bert, tiny_llama


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return str(tiny_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("llama")))


def sums(path: Path) -> str:
    words = ["one", "two", "three", "four"]
    return str(jsonl(path, [{"question": f"the sum of {a} and {b}", "answer": f"{b} {a}"} for a in words for b in words]))


def test_batches_depend_on_the_seed_alone_and_go_through_every_row(bert: str, tmp_path: Path) -> None:
    task = make_task(bert, str(reviews(tmp_path / "a.jsonl")), device="cpu")
    first, second, other = (list(task.train_batches(4, 9, seed)) for seed in (3, 3, 4))
    assert all(torch.equal(one[key], two[key]) for one, two in zip(first, second, strict=True) for key in one)
    assert not all(torch.equal(one["labels"], two["labels"]) for one, two in zip(first, other, strict=True))
    assert sorted(islice(task.order(3), 36)) == list(range(36)) == sorted(islice(task.order(3), 36, 72))
    longer = list(task.train_batches(4, 12, 3))
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(first, longer, strict=False))
    probes = [task.probe_batches(2), task.probe_batches(2)]
    assert torch.equal(probes[0][1]["input_ids"], probes[1][1]["input_ids"])


def test_the_base_is_the_same_each_time_and_only_the_head_follows_the_seed(bert: str, tmp_path: Path) -> None:
    task = make_task(bert, str(reviews(tmp_path / "a.jsonl")), device="cpu")
    one, two, other = (dict(task.fresh_model(seed).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [name for name in one if not torch.equal(one[name], other[name])] == ["classifier.weight"]
    assert list(task.head) == ["classifier"]
    assert task.describe() == make_task(bert, str(tmp_path / "a.jsonl"), device="cpu").describe()


def test_accuracy_and_macro_f1_are_those_of_scikit_learn(bert: str, tmp_path: Path) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    task = make_task(bert, str(reviews(tmp_path / "a.jsonl", 200)), device="cpu")
    model = task.fresh_model(1)
    measured = task.evaluate(model)
    guesses, truth, losses = [], [], []
    for row in task.data.evaluation:
        batch = task.batch([row])  # type: ignore[attr-defined]
        with torch.no_grad():
            output = model(**batch)
        guesses.append(int(output.logits.argmax()))
        truth.append(int(batch["labels"]))
        losses.append(float(output.loss))
    assert measured["accuracy"] == pytest.approx(accuracy_score(truth, guesses))
    assert measured["macro_f1"] == pytest.approx(f1_score(truth, guesses, average="macro"))
    assert measured["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_drift_is_zero_for_the_base_and_what_its_formula_says_after_a_change(bert: str, tmp_path: Path) -> None:
    general = jsonl(
        tmp_path / "general.jsonl", [{"text": f"the day {word} was"} for word in ("one", "two", "three", "four") * 10]
    )
    task = make_task(bert, str(reviews(tmp_path / "a.jsonl")), retention=str(general), device="cpu")
    model = task.fresh_model(5)
    assert task.retention(model) == pytest.approx(0.0, abs=1e-12)
    before = features(task, model)
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.0.output.dense.weight").add_(0.1)
    after = features(task, model)
    expected = (after - before).square().sum(1).mean() / (before - before.mean(0)).square().sum(1).mean()
    assert task.retention(model) == pytest.approx(float(expected), rel=1e-4)
    assert make_task(bert, str(tmp_path / "a.jsonl"), retention="none", device="cpu").retention(model) is None


def features(task, model: nn.Module) -> torch.Tensor:
    rows = []
    for text in task.general:
        tokens = task.loaded.processor(text, return_tensors="pt", truncation=True, max_length=task.max_length)
        with torch.no_grad():
            rows.append(model.bert(**tokens).last_hidden_state[0].mean(0))  # type: ignore[operator]
    return torch.stack(rows)


def test_only_what_the_assistant_says_is_learned(llama: str, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "good day"}, {"role": "assistant", "content": "fine"}]
    talk += [{"role": "user", "content": "bad night"}, {"role": "assistant", "content": "the day was good"}]
    file = jsonl(tmp_path / "a.jsonl", [{"messages": talk}] * 4)
    task = make_task(llama, str(file), retention="none", device="cpu")
    batch = task.collate([0, 1])
    learned = batch["input_ids"][0][batch["labels"][0] != -100]
    assert task.loaded.processor.decode(learned) == "fine <eos> the day was good <eos>"
    said = batch["labels"] != -100
    assert torch.equal(batch["labels"][said], batch["input_ids"][said])


def test_padding_is_neither_seen_nor_learned_and_the_loss_is_per_token(llama: str, tmp_path: Path) -> None:
    rows = [{"text": "the day was good"}, {"text": "the sum of one and two is three"}] * 10
    task = make_task(llama, str(jsonl(tmp_path / "a.jsonl", rows)), max_length=11, retention="none", device="cpu")
    model = task.fresh_model(0)
    total, count = 0.0, 0
    for tokens, _ in task.held_out:  # type: ignore[attr-defined]
        ids = torch.tensor([tokens])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, :-1]
        total += float(nn.functional.cross_entropy(scores, ids[0, 1:], reduction="sum"))
        count += len(tokens) - 1
    measured = task.evaluate(model)
    assert measured["loss"] == pytest.approx(total / count, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert (task.metric_name, task.higher_is_better) == ("perplexity", False)


class Oracle(nn.Module):
    """Answers from a table, after whatever padding stands before the prompt."""

    def __init__(self, task, wrong: int) -> None:
        super().__init__()
        self.task, self.model, self.table = task, task.fresh_model(0), {}
        for index, row in enumerate(task.data.evaluation):
            answer = "bad" if index < wrong else row["answer"]
            prompt = tuple(task._prompt([{"role": "user", "content": row["question"]}]))
            self.table[prompt] = task.tokenizer(f"{answer} <eos>", add_special_tokens=False)["input_ids"]

    def forward(self, **batch):
        return self.model(**batch)

    def generate(self, *, input_ids, attention_mask, max_new_tokens, **options):
        rows = []
        for tokens, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            said = self.table[tuple(token for token, seen in zip(tokens, mask, strict=True) if seen)]
            rows.append([*tokens, *said, *[0] * (max_new_tokens - len(said))])
        return torch.tensor(rows)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_exact_match_counts_whole_answers(llama: str, tmp_path: Path, wrong: int) -> None:
    task = make_task(llama, sums(tmp_path / "a.jsonl"), retention="none", device="cpu")
    assert len(task.data.evaluation) == 2
    assert task.evaluate(Oracle(task, wrong))["exact_match"] == (2 - wrong) / 2


def test_greedy_generation_of_a_padded_batch_says_what_each_prompt_alone_gets(llama: str, tmp_path: Path) -> None:
    task = make_task(llama, sums(tmp_path / "a.jsonl"), retention="none", device="cpu")
    model = task.fresh_model(0)
    prompts = [task._prompt([{"role": "user", "content": text}]) for text in ("one", "the sum of one and two is", "good day")]  # type: ignore[attr-defined]
    together = task._said(model, prompts, 6)  # type: ignore[attr-defined]
    assert together == [task._said(model, [prompt], 6)[0] for prompt in prompts]  # type: ignore[attr-defined]


def test_without_a_template_chat_rows_are_refused_and_answers_follow_a_line(tmp_path: Path) -> None:
    plain = str(tiny_llama(tmp_path / "plain", template=False))
    talk = [{"role": "user", "content": "good day"}, {"role": "assistant", "content": "fine"}]
    with pytest.raises(DataError, match="has no chat template"):
        make_task(plain, str(jsonl(tmp_path / "a.jsonl", [{"messages": talk}] * 4)), retention="none")
    task = make_task(plain, sums(tmp_path / "b.jsonl"), retention="none", device="cpu")
    batch = task.collate([0])
    assert task.loaded.processor.decode(batch["labels"][batch["labels"] != -100]).endswith("<eos>")


def test_rows_too_long_to_hold_an_answer_are_told(llama: str, tmp_path: Path) -> None:
    row = {"question": "good " * 30, "answer": "fine"}
    with pytest.raises(DataError, match="no row has anything to learn within max_length=16"):
        make_task(llama, str(jsonl(tmp_path / "a.jsonl", [row] * 4)), max_length=16, retention="none", device="cpu").collate(
            [0]
        )
    with pytest.raises(ArgumentError, match="max_length is a number of tokens"):
        make_task(llama, str(tmp_path / "a.jsonl"), max_length=3)


def test_retention_of_a_language_model_is_its_loss_on_text_it_does_not_train_on(llama: str, tmp_path: Path) -> None:
    general = str(jsonl(tmp_path / "g.jsonl", [{"text": "the day was good and the night was bad"}] * 30))
    task = make_task(llama, sums(tmp_path / "a.jsonl"), retention=general, device="cpu")
    value = task.retention(task.fresh_model(0))
    assert value is not None
    assert value == pytest.approx(math.log(22), rel=0.2)  # an untrained model knows nothing of the 22 words
    with pytest.raises(DataError, match="it trains on"):
        make_task(llama, general, retention=general, device="cpu")
