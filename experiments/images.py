"""A small convolutional network to be trained from scratch, and packaged images as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rankwise.core.errors import DataError
from rankwise.core.randomness import generator_for
from rankwise.lab.data import load_data
from rankwise.lab.models import IMAGE

ADAPTED = ("second", "third", "hidden")  # first layer and head stay whole, as in the papers


@dataclass(frozen=True, kw_only=True)
class Size:
    """Network and batches.

    Attributes:
        data: as `rankwise compare --data` takes it.
        channels: of the first layer; the second has twice, the third four times as many.
        rows: images of a batch.
        images, held: most images to train and to test on.
        steps: optimizer steps.
    """

    data: str = "packaged:fashion-mnist"
    channels: int = 24
    rows: int = 64
    images: int = 12_000
    held: int = 2_000
    steps: int = 240

    @property
    def rank(self) -> int:
        """Two thirds of the channels: a sixth of the width of the last convolution."""
        return max(2, 2 * self.channels // 3)

    @property
    def interval(self) -> int:
        """A twentieth of the run."""
        return max(1, self.steps // 20)


@dataclass(frozen=True)
class Images:
    """Images (N, 1, H, W) with numbers of their classes (N,)."""

    train: Tensor
    train_labels: Tensor
    held: Tensor
    held_labels: Tensor
    classes: int


def images(size: Size) -> Images:
    """Reads the images, a fixed choice of them, with mean 0 and deviation 1.

    Raises:
        DataError: there are fewer images than a batch has.
    """
    data = load_data(size.data, task=IMAGE, train_limit=size.images, eval_limit=size.held)
    column, label = data.columns["image"], data.columns["label"]
    number = {name: index for index, name in enumerate(data.labels)}
    parts = []
    for rows in (data.train, data.evaluation):
        pixels = np.stack([np.asarray(row[column], dtype=np.float32) for row in rows])
        parts += [torch.from_numpy(pixels)[:, None], torch.tensor([number[str(row[label])] for row in rows])]
    if len(parts[1]) < size.rows:
        raise DataError(f"{size.data} has {len(parts[1])} images to train on; a batch has {size.rows}")
    mean, deviation = parts[0].mean(), parts[0].std()
    return Images((parts[0] - mean) / deviation, parts[1], (parts[2] - mean) / deviation, parts[3], len(number))


class Network(nn.Module):
    """Three convolutions with batch norm and pooling, a hidden layer and a head."""

    def __init__(self, channels: int, pixels: int, classes: int) -> None:
        super().__init__()
        inner = 4 * channels
        self.first = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)
        self.third = nn.Conv2d(2 * channels, inner, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for width in (channels, 2 * channels, inner)])
        self.hidden = nn.Linear(inner * (pixels // 8) ** 2, inner)
        self.head = nn.Linear(inner, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, H, W) to scores (N, classes)."""
        for layer, norm in zip((self.first, self.second, self.third), self.norms, strict=True):
            x = functional.max_pool2d(norm(layer(x)).relu(), 2)
        return self.head(self.hidden(x.flatten(1)).relu())


def network(size: Size, data: Images, *, width: float, seed: int) -> Network:
    """A network with the weights that the seed draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(max(2, round(width * size.channels)), data.train.shape[-1], data.classes)


def batch_at(data: Images, size: Size, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """The images and labels of a step: the same for every method of a seed, each image once an epoch."""
    count = len(data.train) // size.rows
    epoch, place = divmod(step, count)
    order = torch.randperm(len(data.train), generator=generator_for(seed, "epoch", epoch))
    rows = order[place * size.rows : (place + 1) * size.rows]
    return data.train[rows], data.train_labels[rows]


@torch.no_grad()
def accuracy(model: nn.Module, data: Images, rows: int = 500) -> float:
    """Share of the test images whose class is right."""
    model.eval()
    right = 0
    for x, y in zip(data.held.split(rows), data.held_labels.split(rows), strict=True):
        right += int((model(x).argmax(1) == y).sum())
    model.train()
    return right / len(data.held)
