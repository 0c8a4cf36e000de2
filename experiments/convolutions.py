"""A small convolutional network from scratch, of low rank from the start or on the way: accuracy against what is shipped.

    python -m experiments.convolutions --write docs/results/convolutions.md

Two convolutions and the hidden layer are adapted; the first convolution, batch norms and head are trained whole. After training
the layers that the method ships take the places of the adapted ones; accuracy and numbers are those of that network.
Finished runs are kept under --out, so an interrupted table goes on where it stopped; --fresh runs everything again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from torch import Tensor, nn
from torch.nn import functional

import rankwise
from benchmarks.markdown import machine, table
from experiments import command
from experiments.chart import Series, chart
from experiments.images import ADAPTED, Images, Size, accuracy, batch_at, images, network
from experiments.running import Method, Row, Rows, absorb_, factors, train
from rankwise import compression
from rankwise.core.handle import Handle
from rankwise.lab.intervals import mean_interval
from rankwise.lab.terminal import Progress, count_text, interval_text

REST = 2e-3  # highest rate of what is trained whole, under AdamW
SEEDS = 3
METHODS = (
    Method(name="whole, AdamW", recipe="full", rate=2e-3),
    Method(name="whole, SGD", recipe="full + sgd(momentum=0.9)", rate=5e-2, rest=5e-2),
    Method(name="whole, half as wide", recipe="full", rate=2e-3, width=0.5),
    Method(name="whole, a quarter as wide", recipe="full", rate=2e-3, width=0.25),
    Method(name="whole, an eighth as wide", recipe="full", rate=2e-3, width=0.125),
    Method(name="TRP", recipe="trp(interval={interval}, matricization='channel', energy=0.9)", rate=2e-3),
    Method(name="TRP, finer", recipe="trp(interval={interval}, matricization='channel', energy=0.95)", rate=2e-3),
    Method(name="TRP, spatial", recipe="trp(interval={interval}, matricization='spatial', energy=0.95)", rate=2e-3),
    Method(name="DLRT", recipe="dlrt(rank={rank}, tolerance=0.2)", rate=1e-1, rest=1e-1),
    Method(name="CondLR", recipe="condlr(compression=0.8, tau=1.0, momentum=0.3)", rate=1e-1, rest=5e-2),
    Method(name="Tucker-DLRT", recipe="tucker_dlrt(tolerance=0.2)", rate=2e-1, rest=5e-2),
    Method(name="Maestro", recipe="maestro(penalty=1e-2, threshold=1e-1, interval={interval})", rate=2e-3),
    Method(name="Cuttlefish", recipe="cuttlefish(interval={half}, window=5, threshold=0.5)", rate=2e-3),
    Method(
        name="Cuttlefish, plain ranks", recipe="cuttlefish(interval={half}, window=5, threshold=1.0, rule='plain')", rate=2e-3
    ),
)


def trained_row(method: Method, size: Size, data: Images, progress: Callable[[int, float], None]) -> Row:
    """One run of one method, from the seed's weights to the accuracy of what it ships."""
    model = network(size, data, width=method.width, seed=method.seed)
    recipe = method.text(rank=size.rank, interval=size.interval, half=max(1, size.interval // 2))
    beside = [name for name, _ in model.named_children() if name not in ADAPTED]
    handle = rankwise.adapt_(model, rankwise.compose(recipe), where=ADAPTED, seed=method.seed, train_also=beside)
    model.train()

    def loss_at(step: int) -> Tensor:
        x, y = batch_at(data, size, step, method.seed)
        return functional.cross_entropy(model(x), y)

    run = train(
        handle,
        loss_at,
        range(size.steps),
        rate=method.rate,
        rest=method.rest or REST,
        factor=factors(size.steps),
        on_step=progress,
    )
    row = run.to_json() | {"recipe": recipe, "rate": method.rate}
    if run.failure:
        return row
    adapted = accuracy(model, data)
    deploy_(handle)
    return row | {"adapted": adapted, "accuracy": accuracy(model, data), "numbers": numbers(model)}


def deploy_(handle: Handle) -> None:
    """Puts the layers that the method ships in the places of the adapted ones."""
    if handle.procedure is None and handle.recipe.roles == {"weight"}:
        absorb_(handle)
    else:
        compression.deploy_(handle)


def numbers(model: nn.Module) -> int:
    """Numbers that a network is shipped with, what batch norm counts left out."""
    return sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in model.parameters()}.values())


@dataclass(frozen=True)
class Table:
    """All runs: a list of rows, one per seed, for each method."""

    size: Size
    methods: Sequence[Method]
    rows: Sequence[Sequence[Row]]
    missing: Sequence[str]

    def page(self, command: str, picture: str) -> str:
        """The page as Markdown."""
        size = self.size
        missing = f"\nNot in this version's catalog: {', '.join(self.missing)}.\n" if self.missing else ""
        return f"""# Training small convolutional networks at low rank

```
{command}
```

Three convolutions of 3 × 3 with batch norm ({size.channels}, {2 * size.channels} and {4 * size.channels} channels), a hidden
layer and a head on `{size.data}`, {size.images:,} images to train on and {size.held:,} to test on, from random weights:
{size.steps} steps of {size.rows} images. The second and third convolution and the hidden layer are adapted, the rest is trained
whole. {machine("torch")}

*accuracy* is that of the network as it is shipped, with the small layers that the method ends with in place of the adapted
ones; *before* is the accuracy of the adapted network just before. Means over {len(self.rows[0])} seeds with 95 %
intervals. The narrower networks without any method are the ones to beat: a method is worth its trouble above the line through
them. Rates rise over a tenth of the steps and fall as a cosine to a tenth. Rates and thresholds of the methods are the best of
one to three settings tried by hand on the test images of seed 0, which favors them; the whole networks had one try.
{missing}
{self.text()}

![accuracy against numbers]({picture})
"""

    def text(self) -> str:
        """Measured columns and settings."""
        whole = self.rows[0]
        head = ["", "accuracy", "before", "numbers", "÷ whole", "s/step", "recipe", "highest rate", ""]
        lines = []
        for method, rows in zip(self.methods, self.rows, strict=True):
            failed = [row["failure"] for row in rows if row["failure"]]
            done = [row for row in rows if not row["failure"]]
            size = _mean(done, "numbers")
            lines.append(
                [
                    method.name,
                    interval_text(mean_interval([row["accuracy"] for row in done])) if done else "diverged",
                    f"{_mean(done, 'adapted'):.3f}" if done else "",
                    count_text(size) if done else "",
                    f"{size / _mean(whole, 'numbers'):.3f}" if done else "",
                    f"{_mean(done, 'seconds_per_step'):.3f}" if done else "",
                    f"`{rows[0]['recipe']}`",
                    f"{method.rate:g}",
                    f"{len(failed)} of {len(rows)}: {failed[0]}" if failed else _note(method, size, _mean(whole, "numbers")),
                ]
            )
        return table(head, lines)

    def picture(self) -> str:
        """Accuracy against numbers: the narrower networks as a line, each method as a point."""
        points = [
            (method, _mean(done, "numbers"), _mean(done, "accuracy"))
            for method, rows in zip(self.methods, self.rows, strict=True)
            if (done := [row for row in rows if not row["failure"]])
        ]
        plain = sorted((size, height) for method, size, height in points if method.recipe == "full")
        lines = [Series("narrower networks", *zip(*plain, strict=True))] if plain else []
        dots = [Series(method.name, [size], [height]) for method, size, height in points if method.recipe != "full"]
        return chart([*lines, *dots], x="numbers shipped", y="accuracy", log_x=True, title="accuracy against numbers")


def _note(method: Method, size: float, whole: float) -> str:
    return "ships no smaller layer" if size >= whole and not method.recipe.startswith("full") else ""


def _mean(rows: Sequence[Row], key: str) -> float:
    return sum(row[key] for row in rows) / max(1, len(rows))


def make(options: argparse.Namespace, methods: list[Method], missing: list[str]) -> Table:
    """The table of the methods, runs on disk taken from there."""
    size = Size(steps=options.steps, data=options.data)
    data = images(size)
    kept = Rows(options.out, asdict(size), fresh=options.fresh)
    seeds = [replace(method, seed=seed) for method in methods for seed in range(options.seeds)]
    found: dict[str, list[Row]] = {}
    with Progress(len(seeds) * size.steps, quiet=False) as progress:
        for method in seeds:
            progress.phase(f"{method.name}, seed {method.seed}")
            row = kept.row(method, lambda method=method: trained_row(method, size, data, progress.step))
            found.setdefault(method.name, []).append(row)
    return Table(size, methods, list(found.values()), missing)


def main(arguments: Sequence[str] | None = None) -> int:
    return command.run("experiments.convolutions", __doc__, METHODS, Size, make, arguments, seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
