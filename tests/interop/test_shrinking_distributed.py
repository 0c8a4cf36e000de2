"""Tensors that are replaced during training, on two gloo processes: the same on both, and the same as on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.interop.shrinking_worker import RECIPES, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shrinking")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command += [sys.executable, "-m", "tests.interop.shrinking_worker", str(folder)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", RECIPES)
def test_a_model_that_is_wrapped_again_trains_as_on_one_process(kind: str, folder: Path) -> None:
    first, second = (load_file(folder / f"{kind}.{rank}.safetensors") for rank in (0, 1))
    alone, _ = train(kind, 0, 1)
    assert int(first.pop("again")) >= 1
    assert set(first) == set(alone)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        torch.testing.assert_close(tensor, alone[name], rtol=1e-10, atol=1e-12)
