"""LTE on two processes without a wrapper: the same as all heads in one process, what is averaged, and what files hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rankwise as rw
from rankwise.core.errors import TrainingError
from tests.interop.heads_worker import RATE, STEPS, batch, make, model, run, state
from tests.interop.launching import on_two_processes

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("heads")
    on_two_processes("tests.interop.heads_worker", str(made))
    return made


def both(folder: Path, name: str) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"{name}.{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize("reset", [False, True])
def test_one_head_per_process_is_two_heads_in_one(reset: bool, folder: Path) -> None:
    """Five steps, so that the last one comes after a merge: the heads differ, the main weight does not."""
    handle = make(2, reset)
    run(handle, handle.optimizer(lr=RATE), range(STEPS))
    alone = state(handle)
    first, second = both(folder, f"trained-{reset}")
    for site in ("0", "3"):
        assert float(alone[f"update.{site}"].abs().max()) > 1e-3
        for key in (f"update.{site}", f"{site}.merged_A", f"{site}.merged_B"):
            assert torch.equal(first[key], second[key])
            torch.testing.assert_close(first[key], alone[key], rtol=1e-6, atol=1e-9)
        for role in ("A_heads", "B_heads"):
            heads = torch.cat([first[f"{site}.{role}"], second[f"{site}.{role}"]])
            torch.testing.assert_close(heads, alone[f"{site}.{role}"], rtol=1e-6, atol=1e-9)
            assert not torch.equal(first[f"{site}.{role}"], second[f"{site}.{role}"])


def test_what_is_trained_beside_is_averaged_at_a_merge(folder: Path) -> None:
    replicas, after = both(folder, "replicas"), both(folder, "beside")
    assert len(replicas[0]) == 2
    for name, one in replicas[0].items():
        other = replicas[1][name]
        assert not torch.equal(one, other)
        for kept in after:
            torch.testing.assert_close(kept[f"beside.{name}"], (one + other) / 2, rtol=1e-14, atol=1e-15)
        assert torch.equal(after[0][f"beside.{name}"], after[1][f"beside.{name}"])


def test_files(folder: Path) -> None:
    for rank in (0, 1):
        said = json.loads((folder / f"said.{rank}.json").read_text())
        assert all(said["same"].values()), said["same"]
        assert said["early"].startswith("CheckpointError") and "save after a merge" in said["early"]


@pytest.mark.parametrize("kind", ["per_layer", "per_layer_plain"])
def test_moving_layers_inside_backward_is_refused_on_several_processes(kind: str, folder: Path) -> None:
    """Their gradients are not averaged yet."""
    for rank in (0, 1):
        said = json.loads((folder / f"said.{rank}.json").read_text())[kind]
        assert said.startswith("TrainingError") and "averaging of gradients over processes" in said


def test_on_another_number_of_processes_a_file_is_used_but_not_trained(folder: Path) -> None:
    handle = rw.load_(model(), folder / "merged-0")
    x, _ = batch(9)
    torch.testing.assert_close(handle.update_of("0").dense(), rw.load_(model(), folder / "merged-1").update_of("0").dense())
    assert float(handle.update_of("0").dense().abs().max()) > 1e-3
    handle.model.eval()
    expected = handle.model(x)
    handle.model.train()
    with pytest.raises(TrainingError, match="by 2 processes with 1 heads each, and here are 1; go on with as many"):
        handle.model(x)
    handle.merge_()
    handle.model.eval()
    torch.testing.assert_close(handle.model(x), expected)
