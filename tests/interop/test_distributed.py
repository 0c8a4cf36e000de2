"""Two processes on gloo: the same weights on both, and the same as one process gives on the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rankwise as rw
from tests.interop.distributed_worker import OWN_NOISE, RECIPES, make, tensors, train
from tests.interop.models import llama

pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> object:
    @cache
    def launch(mode: str) -> Path:
        folder = tmp_path_factory.mktemp(mode)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
        command += [sys.executable, "-m", "tests.interop.distributed_worker", mode, str(folder)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return folder

    return launch


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_give_what_one_gives(mode: str, kind: str, launched) -> None:  # type: ignore[no-untyped-def]
    folder = launched(mode)
    first, second = (load_file(folder / f"{kind}.{rank}.safetensors") for rank in (0, 1))
    handle = make(kind)
    start = tensors(handle)
    alone = train(handle, handle.model, kind, 0, 1)
    assert set(first) == set(alone)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        if kind not in OWN_NOISE:
            torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-5)
    assert max(float((alone[name] - start[name]).abs().max()) for name in alone) > 1e-2
    loaded = tensors(rw.load_(llama(), folder / kind))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("kind", RECIPES)
def test_silent_error_36_a_save_under_fsdp_holds_whole_tensors(kind: str, launched, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = launched("fsdp")
    (file,) = (folder / kind).glob("*.safetensors")
    (expected,) = make(kind).save(tmp_path).glob("*.safetensors")
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
