"""Two processes on gloo: the same weights on both, and the same as one process gives on the whole batch."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rankwise as rw
from tests.interop.distributed_recipes import KINDS, ONLY_BETWEEN_PROCESSES, PARAMETERIZATIONS, expected_refusal
from tests.interop.distributed_worker import base_of, make, tensors, train, unwrapped
from tests.interop.launching import on_two_processes

pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> object:
    @cache
    def launch(mode: str) -> Path:
        folder = tmp_path_factory.mktemp(mode)
        on_two_processes("tests.interop.distributed_worker", mode, str(folder))
        return folder

    return launch


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_give_what_one_gives_or_refuse(mode: str, name: str, launched) -> None:  # type: ignore[no-untyped-def]
    """Equal weights on both, to the bit, and those of one process with the whole batch; or an error that tells the way out."""
    kind, folder = KINDS[name], launched(mode)
    refusals = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{name}.[01].json"))]
    expected = expected_refusal(mode, kind)
    if expected is not None:
        assert len(refusals) == 2, f"{name} is to be refused under {mode}: {expected[1]}"
        for refusal in refusals:
            assert refusal["ours"], refusal["trace"]
            assert expected[0] in refusal["message"]
        return
    assert not refusals, refusals[0]["trace"]
    first, second = (load_file(folder / f"{name}.{rank}.safetensors") for rank in (0, 1))
    assert set(first) == set(second)
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    handle = make(kind)
    start = tensors(handle)
    alone = train(handle, unwrapped, kind, 0, 1)
    same = {key: key in start and start[key].shape == tensor.shape for key, tensor in alone.items()}
    moved = max(float((tensor - start[key] if same[key] else tensor).abs().max()) for key, tensor in alone.items())
    assert moved > 1e-4
    if kind.slug not in ONLY_BETWEEN_PROCESSES:
        assert set(first) == set(alone)
        close = {"rtol": 1e-8, "atol": 1e-6 * moved} if kind.generated else {"rtol": 1e-4, "atol": 1e-5}
        for key, tensor in first.items():
            torch.testing.assert_close(tensor, alone[key], **close)
    loaded = tensors(rw.load_(base_of(kind), folder / name))
    assert set(loaded) == set(first)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in first.items())


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_silent_error_36_a_save_under_fsdp_holds_whole_tensors(name: str, launched, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = launched("fsdp")
    (file,) = (folder / name).glob("*.safetensors")
    (expected,) = make(KINDS[name]).save(tmp_path).glob("*.safetensors")
    assert file.stat().st_size == expected.stat().st_size
    stored, whole = load_file(file), load_file(expected)
    assert {name: tensor.shape for name, tensor in stored.items()} == {name: tensor.shape for name, tensor in whole.items()}


@pytest.mark.parametrize("mode", ["trainer_ddp", "trainer_fsdp"])
def test_the_trainer_resumes_to_the_bit_with_two_processes(mode: str, launched) -> None:  # type: ignore[no-untyped-def]
    first, second = (load_file(launched(mode) / f"trainer.{rank}.safetensors") for rank in (0, 1))
    names = [name.removeprefix("first.") for name in first if name.startswith("first.")]
    assert len(names) == 28
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[f"first.{name}"], first[f"again.{name}"]) for name in names)
    other = load_file(launched("trainer_ddp") / "trainer.0.safetensors")
    for name in names:
        torch.testing.assert_close(first[f"plain.{name}"], other[f"plain.{name}"], rtol=1e-4, atol=1e-5)
