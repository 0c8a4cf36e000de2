"""Many adapters: save, load a hundred, switch between them, and eight in one batch; PEFT on a subset, its times grow."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import rankwise
from benchmarks.clock import Ratio, cpu_milliseconds, interleaved
from benchmarks.model import RANK, batch_of, copy_of, llama, main_variants
from rankwise.serving import AdapterBank

ADAPTERS, SUBSET, ROWS = 100, 10, 8


def measured() -> tuple[dict[str, float], dict[str, Ratio]]:
    """CPU milliseconds by name of the operation, and times of a batch with eight adapters relative to the frozen base."""
    base = llama()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        times, served = _ours(base, root)
        theirs, mixed = _theirs(base, root)
    batch = batch_of(32, ROWS)
    del batch["labels"]
    plain = copy_of(base).eval()
    work: dict[str, Callable[[], Any]] = {
        "base": lambda: plain(**batch),
        "rankwise, 8 adapters": lambda: served(**batch),
        "PEFT, 8 adapters": lambda: mixed(**batch, adapter_names=[f"a{index}" for index in range(ROWS)]),
    }
    with torch.no_grad():
        return times | theirs, interleaved(work, "base", rounds=15)


def _ours(base: Any, root: Path) -> tuple[dict[str, float], Any]:
    model = copy_of(base)
    times: dict[str, float] = {}
    handles: list[Any] = []
    times["rankwise: adapt 56 layers"] = cpu_milliseconds(
        lambda: handles.append(rankwise.adapt_(model, rankwise.catalog.lora(rank=RANK)))
    )
    handle, generator = handles[0], torch.Generator().manual_seed(0)
    folders = [root / f"a{index}" for index in range(ADAPTERS)]
    for index, place in enumerate(folders):
        if index < SUBSET or index == ADAPTERS - 1:
            print(f"  saving adapter {index}", file=sys.stderr, flush=True)
        with torch.no_grad():
            for block in handle.blocks().values():
                for tensor in block.values():
                    tensor.normal_(std=0.02, generator=generator)
        saving = cpu_milliseconds(lambda place=place: handle.save(place))
        times["rankwise: save one"] = min(saving, times.get("rankwise: save one", saving))
    handle.detach_()
    times["rankwise: load one into the model"] = cpu_milliseconds(lambda: rankwise.load_(copy_of(base), folders[0]), repeats=3)
    bank = AdapterBank(slots=ADAPTERS, max_rank=RANK)
    times[f"rankwise: load {ADAPTERS}"] = cpu_milliseconds(lambda: bank.load_many(folders))
    bank.serve(model.eval())

    def switch() -> None:
        for index in range(ADAPTERS):
            bank.use(f"a{index}")

    times[f"rankwise: switch, {ADAPTERS} loaded"] = cpu_milliseconds(switch, repeats=5) / ADAPTERS
    bank.use([f"a{7 * index}" for index in range(ROWS)])
    return times, model


def _theirs(base: Any, root: Path) -> tuple[dict[str, float], Any]:
    import peft

    times: dict[str, float] = {}
    variant = next(one for one in main_variants() if one.library == "PEFT")
    made: list[Any] = []
    times["PEFT: adapt 56 layers"] = cpu_milliseconds(lambda: made.append(variant.make(copy_of(base))[0]))
    with _quiet():
        times["PEFT: save one"] = cpu_milliseconds(lambda: made[0].save_pretrained(root / "peft"), repeats=3)
        loaded: list[Any] = []
        times["PEFT: load one into the model"] = cpu_milliseconds(
            lambda: loaded.append(peft.PeftModel.from_pretrained(copy_of(base), root / "peft", adapter_name="a0"))
        )
        model, total = loaded[0], times["PEFT: load one into the model"]
        for index in range(1, SUBSET):
            took = cpu_milliseconds(lambda index=index: model.load_adapter(root / "peft", f"a{index}"))
            total += took
        times[f"PEFT: load {SUBSET} (of {ADAPTERS}; each takes longer than the last)"] = total
        times[f"PEFT: load the {SUBSET}th alone"] = took
        names = [f"a{index}" for index in range(SUBSET)]
        times[f"PEFT: switch, {SUBSET} loaded"] = cpu_milliseconds(lambda: [model.set_adapter(name) for name in names]) / SUBSET
    return times, model.eval()


@contextmanager
def _quiet() -> Any:
    """PEFT warns that the base has no name to save; nothing here depends on it."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
