"""The table of small convolutional networks in small: every method trains and is shipped."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import convolutions, running
from experiments.chart import Series, chart, ticks
from experiments.images import Images, Size, accuracy, batch_at, images, network
from experiments.running import Method
from rankwise.core.errors import DataError

SIZE = Size(channels=8, rows=8, steps=4)
METHODS, _ = running.chosen(convolutions.METHODS, None)


@pytest.fixture(scope="module")
def data() -> Images:
    """Two classes of images of 8 × 8: bright above, bright below."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 2
    pixels = 0.3 * torch.randn(48, 1, 8, 8, generator=generator)
    for index, label in enumerate(labels.tolist()):
        pixels[index, 0, 4 * label : 4 * label + 4] += 1
    return Images(pixels[:32], labels[:32], pixels[32:], labels[32:], 2)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_trains_and_is_shipped(method: Method, data: Images) -> None:
    row = convolutions.trained_row(method, SIZE, data, lambda step, loss: None)
    assert not row["failure"] and len(row["losses"]) == 4
    assert 0 <= row["accuracy"] <= 1
    assert row["accuracy"] == pytest.approx(row["adapted"], abs=2 / 16)  # what is shipped is what was trained
    assert row["numbers"] > 0


def test_a_whole_network_learns_and_ships_all_its_numbers(data: Images) -> None:
    row = convolutions.trained_row(METHODS[0], replace(SIZE, steps=30), data, lambda step, loss: None)
    assert row["accuracy"] == row["adapted"] == 1.0
    assert row["numbers"] == convolutions.numbers(network(SIZE, data, width=1.0, seed=0))


def test_an_epoch_holds_every_image_once(data: Images) -> None:
    rows = torch.cat([batch_at(data, SIZE, step, 0)[0] for step in range(4)])
    assert torch.equal(rows.flatten(1).sort(dim=0).values, data.train.flatten(1).sort(dim=0).values)


def test_accuracy_of_guessing_one_class(data: Images) -> None:
    model = network(SIZE, data, width=1.0, seed=0)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([1.0, 0.0]))
    assert accuracy(model, data) == 0.5
    assert model.training


def test_command_line_page_and_figure(data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 64 images: a batch of the real size
    twice = replace(data, train=data.train.repeat(2, 1, 1, 1), train_labels=data.train_labels.repeat(2))
    monkeypatch.setattr(convolutions, "images", lambda size: twice)
    page = tmp_path / "page.md"
    given = ["--methods", "whole, AdamW", "whole, half as wide", "whole, SGD", "--steps", "2", "--seeds", "2"]
    assert convolutions.main([*given, "--out", str(tmp_path / "rows"), "--write", str(page)]) == 0
    files = sorted((tmp_path / "rows").glob("*.json"))
    assert len(files) == 6 and json.loads(files[0].read_text())["settings"]["steps"] == 2
    written = page.read_text()
    assert "'whole, AdamW'" in written and "| whole, SGD" in written
    ElementTree.fromstring(page.with_suffix(".svg").read_text())


def test_packaged_images() -> None:
    try:
        found = images(Size(images=50, held=20, rows=10))
    except DataError as error:
        pytest.skip(str(error))
    assert found.train.shape == (50, 1, 28, 28) and found.held.shape == (20, 1, 28, 28)
    with pytest.raises(DataError, match="a batch has 64"):
        images(Size(images=50))
    assert found.classes == 10 and abs(float(found.train.mean())) < 1e-5


def test_a_chart_places_points_and_names() -> None:
    text = chart([Series("line", [1, 10, 100], [0.0, 1.0, 2.0]), Series("a < b", [10], [1.0])], x="x", y="y", log_x=True)
    picture: Any = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    line = next(picture.iter(f"{space}polyline")).attrib["points"].split()
    across = [float(point.split(",")[0]) for point in line]
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.2)  # logarithmic
    dot = next(picture.iter(f"{space}circle")).attrib
    assert (dot["cx"], dot["cy"]) == tuple(line[1].split(","))
    assert "a < b" in [node.text for node in picture.iter(f"{space}text")]
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def test_names_of_many_lines_stay_apart_and_inside_the_frame() -> None:
    series = [Series(f"line {k}", [1.0, 2.0], [5.0, 0.001 * k]) for k in range(14)]
    drawn = ElementTree.fromstring(chart(series, x="step", y="loss"))
    texts = [text for text in drawn.iter("{http://www.w3.org/2000/svg}text") if (text.text or "").startswith("line")]
    heights = sorted(float(text.attrib["y"]) for text in texts)
    assert len(heights) == 14 and heights[0] > 24 and heights[-1] <= 520 - 56
    assert min(after - before for before, after in itertools.pairwise(heights)) >= 16.9
