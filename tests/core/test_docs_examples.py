"""The Python blocks of the docs run as they stand, and README's loop with a model and data under its names."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S)


PAGES = [(page, index) for page in ("docs/index.md", "docs/add-a-method.md") for index in range(len(blocks(page)))]


@pytest.mark.parametrize(("page", "index"), PAGES)
def test_blocks_of_the_docs_run(page: str, index: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks(page)[index], f"{page}, block {index}", "exec"), {"__name__": "docs"})
    assert capsys.readouterr().out.strip()


class Model(nn.Module):
    """A model in the manner of transformers: keyword arguments in, an output with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=nn.functional.cross_entropy(self.layer(inputs), labels))


def test_the_loop_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"inputs": torch.randn(4, 16, generator=generator), "labels": torch.randint(0, 8, (4,), generator=generator)}
        for _ in range(3)
    ]
    names = {"model": Model(), "probe_batches": batches[:1], "batches": batches, "__name__": "readme"}
    exec(compile(blocks("README.md")[0], "README.md", "exec"), names)
    assert (tmp_path / "runs" / "a" / "adapter.json").is_file()
    assert names["handle"].merged
