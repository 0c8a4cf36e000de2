"""transformers' Trainer with the callback: trains, accumulates, resumes to the bit, repeats steps exactly, stops at NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.core.errors import CheckpointError, TrainingError
from tests.interop.models import TOKENS, llama, stir

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and accelerate warn about themselves

Rows = list[dict[str, Tensor]]


def rows(count: int = 16, length: int = 8, seed: int = 4) -> Rows:
    """Sentences that count upwards from a random token: easy to learn."""
    starts = torch.randint(0, TOKENS, (count, 1), generator=torch.Generator().manual_seed(seed))
    ids = (starts + torch.arange(length)) % TOKENS
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(
    handle: rw.Handle,
    folder: Path,
    *,
    data: Rows | None = None,
    lr: float = 2e-2,
    callback: Any = None,
    kind: Any = None,
    **settings: Any,
) -> Any:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
        "lr_scheduler_type": "constant",
    }
    return (kind or transformers.Trainer)(
        handle.model,
        transformers.TrainingArguments(**{**arguments, **settings}),
        train_dataset=rows() if data is None else data,
        optimizers=(handle.optimizer(lr=lr), None),
        callbacks=[callback or rw.interop.TrainerCallback(handle)],
    )


def weights(handle: rw.Handle) -> dict[str, Tensor]:
    return {
        f"{site}.{role}": tensor.detach().clone() for site, block in handle.blocks().items() for role, tensor in block.items()
    }


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert not different


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_falls(accumulation: int, tmp_path: Path) -> None:
    handle = rw.adapt_(llama(), rw.catalog.lora(rank=4))
    run = trainer(handle, tmp_path, max_steps=30, gradient_accumulation_steps=accumulation)
    run.train()
    assert handle.step_count == 30
    assert sum(losses(run)[-5:]) < 0.8 * sum(losses(run)[:5])


def test_accumulation_and_clipping_equal_a_loop_by_hand(tmp_path: Path) -> None:
    handle = rw.adapt_(llama(), rw.catalog.lora(rank=4))
    data = rows()
    trainer(
        handle,
        tmp_path,
        data=data,
        max_steps=3,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    ).train()
    other = rw.adapt_(llama(), rw.catalog.lora(rank=4))
    optimizer = other.optimizer(lr=2e-2)
    other.model.train()
    for step in range(3):
        ids = torch.stack([row["input_ids"] for row in data[4 * step : 4 * step + 4]])
        other.model(input_ids=ids, labels=ids).loss.backward()
        other.after_backward()
        optimizer.step()
        other.after_step()
        optimizer.zero_grad()
    for key, value in weights(other).items():
        torch.testing.assert_close(weights(handle)[key], value, rtol=1e-4, atol=1e-5)


RESUMED = [
    "lora(rank=4, dropout=0.3)",
    "lora(rank=4, dropout=0.3) + lora_plus(ratio=4)",
    "dora(rank=3)",
    "vera(rank=6)",
    "lora + pissa(rank=2)",
]
RESUMED += ["lora(rank=4, dropout=0.3) + sam(rho=0.1)", "lora(rank=4) + bar", "lora(rank=4) + relora(interval=2)"]
RESUMED += ["roselora(rank=4, keep=0.5, begin=1, end=5)", "sltrain(rank=4, density=0.1)"]


@pytest.mark.parametrize("recipe", RESUMED)
def test_resumed_training_gives_the_same_weights_to_the_bit(recipe: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "gradient_accumulation_steps": 2}
    model = {"attention_dropout": 0.2}

    def fresh() -> rw.Handle:
        return rw.adapt_(llama(**model), rw.compose(recipe), seed=7)

    whole = fresh()
    trainer(whole, tmp_path, **settings).train()
    again = fresh()
    stir(again.model)  # what is loaded must not depend on what was there
    trainer(again, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.step_count == whole.step_count == 6
    assert_same(weights(whole), weights(again))
    saved = rw.load_(llama(**model), tmp_path / "checkpoint-6" / "rankwise")
    assert_same(weights(whole), weights(saved))


def test_what_was_frozen_before_the_checkpoint_is_frozen_on_resuming_and_counts_in_no_norm(tmp_path: Path) -> None:
    recipe = rw.compose("aflora(rank=4, total_steps=12, epochs=12, final_epochs=1, interval=1)")
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5, "max_steps": 9, "max_grad_norm": 0.01}
    whole, again = (rw.adapt_(llama(), recipe, seed=7) for _ in range(2))
    trainer(whole, tmp_path, **settings).train()
    trainer(again, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    frozen = again.schedule.frozen  # type: ignore[union-attr]
    assert min(frozen.values()) < 5 < max(frozen.values()) and again.trained_numbers == whole.trained_numbers
    assert_same(weights(whole), weights(again))
    for site in whole.targets:
        assert torch.equal(whole.update_of(site).dense(), again.update_of(site).dense())


def test_ranks_cut_before_the_checkpoint_are_cut_on_resuming(tmp_path: Path) -> None:
    from rankwise.core import decisions

    class Cut(transformers.TrainerCallback):
        def __init__(self, handle: rw.Handle) -> None:
            self.handle = handle

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                for site in self.handle.targets:
                    keep = torch.tensor([True, False, True, True])
                    decisions.resize(self.handle.parameterization(site), keep, self.handle._optimizer)

    def run(handle: rw.Handle, resume: Any) -> None:
        loop = trainer(handle, tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
        if not resume:
            loop.add_callback(Cut(handle))
        loop.train(resume_from_checkpoint=resume)

    whole, again = (rw.adapt_(llama(), rw.catalog.lora(rank=4)) for _ in range(2))
    run(whole, None)
    run(again, str(tmp_path / "checkpoint-2"))
    assert all(entry.shape[0] == 3 for key, entry in weights(again).items() if key.endswith(".A"))
    assert_same(weights(whole), weights(again))


def test_a_checkpoint_elsewhere_or_of_another_run_is_refused(tmp_path: Path) -> None:
    handle = rw.adapt_(llama(), rw.catalog.lora(rank=2))
    trainer(handle, tmp_path / "a", save_strategy="steps", save_steps=2, max_steps=2).train()
    folder = tmp_path / "a" / "checkpoint-2"
    other = rw.adapt_(llama(), rw.catalog.lora(rank=2))
    with pytest.raises(CheckpointError, match="holds no training state of rankwise"):
        trainer(other, tmp_path / "b", max_steps=4).train(resume_from_checkpoint=str(folder))
    other = rw.adapt_(llama(), rw.catalog.lora(rank=2))
    trainer(other, tmp_path / "b", max_steps=2, save_strategy="steps", save_steps=2, lr=1e-3).train()
    other = rw.adapt_(llama(), rw.catalog.lora(rank=2))
    with pytest.raises(CheckpointError, match=r"28 of 28 tensors of the adapter are not those of"):
        trainer(other, tmp_path / "b", max_steps=4).train(resume_from_checkpoint=str(folder))
    other = rw.adapt_(llama(), rw.catalog.lora(rank=2))
    trainer(other, tmp_path / "c", max_steps=3, callback=rw.interop.TrainerCallback(other, resume_from=folder)).train(
        resume_from_checkpoint=str(folder)
    )
    assert other.step_count == 3


def test_a_nan_stops_training_and_keeps_the_last_good_adapter(tmp_path: Path) -> None:
    class Poison(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                with torch.no_grad():
                    kwargs["model"].model.norm.weight[0] = float("nan")

    handle = rw.adapt_(llama(), rw.catalog.lora(rank=2))
    good: dict[str, Tensor] = {}

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            good.update(weights(handle))

    run = trainer(handle, tmp_path)
    run.add_callback(Poison())
    run.add_callback(Watch())
    with pytest.raises(TrainingError, match=r"step 2: .* NaN or infinity.*last_good"):
        run.train()
    assert_same(good, weights(handle))
    assert_same(good, weights(rw.load_(llama(), tmp_path / "last_good")))


def test_another_optimizer_or_model_is_refused(tmp_path: Path) -> None:
    handle = rw.adapt_(llama(), rw.catalog.lora(rank=2))
    run = trainer(handle, tmp_path)
    run.optimizer = torch.optim.AdamW([p for p in handle.model.parameters() if p.requires_grad])
    with pytest.raises(TrainingError, match="runs AdamW, not the optimizer of the recipe 'lora'"):
        run.train()
    other = rw.adapt_(llama(), rw.catalog.lora(rank=2))
    with pytest.raises(TrainingError, match="is not on"):
        trainer(handle, tmp_path, callback=rw.interop.TrainerCallback(other)).train()


# -- a second pass ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accumulation", "clip"), [(1, 0.0), (2, 0.0), (2, 0.5)])
def test_sam_under_the_trainer_equals_sam_by_hand(accumulation: int, clip: float, tmp_path: Path) -> None:
    recipe = rw.compose("lora(rank=4) + sam(rho=0.1)")
    data = rows()
    handle = rw.adapt_(llama(), recipe)
    trainer(
        handle,
        tmp_path,
        data=data,
        max_steps=3,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=clip,
        train_sampling_strategy="sequential",
    ).train()
    other = rw.adapt_(llama(), recipe)
    optimizer, width = other.optimizer(lr=2e-2), 2 * accumulation
    trained = [tensor for block in other.blocks().values() for tensor in block.values()]
    other.model.train()
    for step in range(3):
        ids = torch.stack([row["input_ids"] for row in data[width * step : width * (step + 1)]])

        def backward(ids: Tensor = ids) -> None:
            other.model(input_ids=ids, labels=ids).loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(trained, clip)

        backward()
        other.after_backward(backward)
        optimizer.step()
        other.after_step()
        optimizer.zero_grad()
    for key, value in weights(other).items():
        torch.testing.assert_close(weights(handle)[key], value, rtol=1e-3, atol=2e-5)


def test_sam_repeats_the_dropout_of_base_and_adapter(tmp_path: Path) -> None:
    handle = rw.adapt_(llama(attention_dropout=0.3), rw.compose("lora(rank=4, dropout=0.4) + sam(rho=1e-12)"))
    trainer(handle, tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.0).train()
    plain = rw.adapt_(llama(attention_dropout=0.3), rw.compose("lora(rank=4, dropout=0.4)"))
    trainer(plain, tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.0).train()
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(handle)[key], value, rtol=1e-3, atol=1e-4)


class Outside(transformers.Trainer):
    """A loss that the model does not return."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        return model(input_ids=inputs["input_ids"]).logits.square().mean()


class Beside(transformers.Trainer):
    """A loss that the model returns in part."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        return outputs.loss + outputs.logits.square().mean()


@pytest.mark.parametrize(
    ("kind", "message"), [(Outside, "computes its loss outside of the model"), (Beside, "would not be exact")]
)
def test_a_second_pass_that_cannot_be_exact_is_refused(kind: Any, message: str, tmp_path: Path) -> None:
    handle = rw.adapt_(llama(), rw.compose("lora(rank=2) + sam"))
    with pytest.raises(TrainingError, match=message):
        trainer(handle, tmp_path, kind=kind).train()


# -- with torch's and transformers' switches --------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recipe", ["lora(rank=4, dropout=0.3)", "dora(rank=4, dropout=0.3)"])
def test_checkpointing_gives_the_same_weights(reentrant: bool, recipe: str, tmp_path: Path) -> None:
    plain, saving = (rw.adapt_(llama(), rw.compose(recipe), seed=7) for _ in range(2))
    trainer(plain, tmp_path).train()
    trainer(saving, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}).train()
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(saving)[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["lora(rank=4)", "dora(rank=4)"])
def test_compiled_training_gives_the_same_weights(recipe: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    plain, compiled = (rw.adapt_(llama(), rw.compose(recipe), seed=7) for _ in range(2))
    trainer(plain, tmp_path, lr=1e-3).train()
    trainer(compiled, tmp_path, lr=1e-3, torch_compile=True, torch_compile_backend="aot_eager").train()
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(compiled)[key], value, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_bf16_trains_with_float32_masters(base: torch.dtype, tmp_path: Path) -> None:
    handle = rw.adapt_(llama().to(base), rw.catalog.lora(rank=4))
    run = trainer(handle, tmp_path, bf16=True, max_steps=30)
    run.train()
    assert {tensor.dtype for tensor in weights(handle).values()} == {torch.float32}
    assert sum(losses(run)[-5:]) < 0.85 * sum(losses(run)[:5])


class ByHand(nn.Module):
    """LoRA on a frozen bfloat16 layer as one would write it for the least memory: factors cast to the base's dtype."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.A = nn.Parameter(torch.randn(rank, layer.in_features) * 0.1)
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + (x @ self.A.t().to(x.dtype)) @ self.B.t().to(x.dtype)


def activation_bytes(model: nn.Module) -> int:
    """What autograd keeps for backward per row of the batch: copies of parameters, the same for any batch, do not count."""
    return (saved_bytes(model, 6) - saved_bytes(model, 2)) // 4


def saved_bytes(model: nn.Module, rows: int) -> int:
    """Bytes that autograd keeps for backward, each storage once, parameters not counted."""
    held: dict[int, int] = {}
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    ids = torch.arange(rows * 16).reshape(rows, 16) % TOKENS

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(input_ids=ids, labels=ids).loss.backward()
    return sum(held.values())


def test_silent_error_47_a_bf16_base_keeps_no_more_than_lora_by_hand() -> None:
    names = [name for name, module in llama().named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    hand = llama().to(torch.bfloat16).requires_grad_(False)
    for name in names:
        owner, _, last = name.rpartition(".")
        setattr(hand.get_submodule(owner), last, ByHand(hand.get_submodule(name), 4))
    model = llama().to(torch.bfloat16)
    rw.adapt_(model, rw.catalog.lora(rank=4))
    frozen = llama().to(torch.bfloat16).requires_grad_(False)
    frozen.model.embed_tokens.weight.requires_grad_(True)
    assert 0 < activation_bytes(frozen) < activation_bytes(model) <= activation_bytes(hand)
