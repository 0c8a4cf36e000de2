"""Layers of low rank on two processes: the same ranks and tensors on both, and what one process gives on the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.procedures.low_rank_worker import RECIPES, SHARDED, make, train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> object:
    @cache
    def launch(mode: str) -> Path:
        folder = tmp_path_factory.mktemp(mode)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
        command += [sys.executable, "-m", "tests.procedures.low_rank_worker", mode, str(folder)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return folder

    return launch


@pytest.mark.parametrize(("mode", "kind"), [*(("ddp", kind) for kind in RECIPES), *(("fsdp", kind) for kind in SHARDED)])
def test_two_processes_give_what_one_gives(mode: str, kind: str, launched) -> None:  # type: ignore[no-untyped-def]
    first, second = (load_file(launched(mode) / f"{kind}.{rank}.safetensors") for rank in (0, 1))
    handle = make(kind)
    alone = train(handle, handle.model, kind, 0, 1)
    assert set(first) == set(second) == set(alone)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert tensor.shape == alone[name].shape, name  # ranks are shapes
    for name in first:  # signs of singular vectors may differ where sums were taken in another order
        if name.endswith((".update", "weight", "bias")) or kind == "condlr":
            torch.testing.assert_close(first[name], alone[name], rtol=1e-5, atol=1e-6)
