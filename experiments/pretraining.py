"""A small Llama from scratch, every method on the same tokens.

    python -m experiments.pretraining --write docs/results/pretraining.md

Every linear layer but the head is adapted; embeddings, norms and head are trained whole by the recipe's step for plain tensors.
Finished rows are kept under --out, so an interrupted run goes on where it stopped; --fresh runs everything again.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rankwise
from experiments.language import Corpus, Size, batch_at, beside, corpus, llama, loss_of, validation_loss
from experiments.pretraining_page import Table
from experiments.running import Method, Row, Rows, Run, chosen, factors, model_bytes, train
from rankwise.core.checkpoint import write_atomically
from rankwise.core.errors import RankwiseError
from rankwise.core.handle import Handle
from rankwise.lab.terminal import Progress, quiet_libraries

COMMAND = "python -m experiments.pretraining"
REST = 2e-3  # highest rate of embeddings, norms and head in every row
METHODS = (
    Method(name="AdamW", recipe="full", rate=2e-3),
    Method(name="AdamW, another seed", recipe="full", rate=2e-3, seed=1),
    Method(name="GaLore", recipe="full + galore(rank={rank}, scale=0.25, refresh={interval})", rate=1e-2),
    Method(name="Fira", recipe="full + fira(rank={rank}, scale=0.25, refresh={interval})", rate=1e-2),
    Method(name="Flora", recipe="full + flora_grad(rank={rank}, interval={interval})", rate=2e-3),
    Method(name="COAP", recipe="full + coap(rank={rank}, scale=0.25, refresh=8, recompute=5)", rate=1e-2),
    Method(
        name="Online Subspace Descent",
        recipe="full + online_subspace_descent(rank={rank}, scale=0.25, interval={interval})",
        rate=1e-2,
    ),
    Method(name="APOLLO", recipe="full + apollo(rank={rank}, scale=1.0, refresh={interval})", rate=1e-2),
    Method(name="APOLLO-Mini", recipe="full + apollo_mini(scale=128.0, refresh={interval})", rate=1e-2),
    Method(name="ReLoRA", recipe="relora(rank={rank}, alpha=32.0, dropout=0.0, interval={interval})", rate=4e-3, jagged=True),
    Method(
        name="ReLoRA after a full quarter",
        recipe="relora(rank={rank}, alpha=32.0, dropout=0.0, interval={interval})",
        rate=4e-3,
        jagged=True,
        warm=0.25,
    ),
    Method(name="SLTrain", recipe="sltrain(rank={rank}, alpha=32.0, density=0.03)", rate=3e-3),
    Method(name="LTE", recipe="lte(rank={rank}, heads=8, alpha=1024.0, interval=10)", rate=2e-4),
    Method(name="SST", recipe="sst(rank={rank}, interval=20, warmup=4)", rate=2e-3),
)


def trained_row(method: Method, size: Size, text: Corpus, progress: Callable[[int, float], None]) -> Row:
    """One method's run, from the seed's weights to its validation loss."""
    model = llama(size, text.vocabulary, method.seed)

    def loss_at(step: int) -> Any:
        return loss_of(model, batch_at(text, size, step, method.seed))

    rest = method.rest or REST
    first = round(method.warm * size.steps)
    before = Run()
    if first:
        whole = adapted(model, "full", method.seed)
        shared = {"rest": rest, "factor": factors(size.steps), "on_step": progress}
        before = train(whole, loss_at, range(first), rate=METHODS[0].rate, **shared)
        absorb_(whole)
    recipe = method.text(rank=size.rank, interval=size.interval)
    handle = adapted(model, recipe, method.seed)
    factor = factors(size.steps - first, interval=size.interval if method.jagged else None)
    run = train(
        handle,
        loss_at,
        range(first, size.steps),
        rate=method.rate,
        rest=rest,
        factor=lambda step: factor(step - first),
        on_step=progress,
    )
    return joined(before, run).to_json() | {
        "recipe": recipe,
        "loss": math.inf if run.failure else validation_loss(model, text, size.rows),
        "model_bytes": model_bytes(model),
    }


def adapted(model: nn.Module, recipe: str, seed: int) -> Handle:
    """The model with an adapter on its linear layers, in training mode."""
    handle = rankwise.adapt_(model, rankwise.compose(recipe), seed=seed, train_also=beside(model))
    model.train()
    return handle


@torch.no_grad()
def absorb_(handle: Handle) -> None:
    """Writes what was trained into the weights and takes the adapter off."""
    updates = {site: handle.update_of(site).dense() for site in handle.targets}
    handle.detach_()
    for site, update in updates.items():
        handle.targets[site].parameter().add_(update)


def joined(first: Run, second: Run) -> Run:
    """Two runs as one: steps one after the other, the larger state."""
    return Run(
        first.losses + second.losses,
        first.seconds + second.seconds,
        max(first.state_bytes, second.state_bytes),
        max(first.rest_bytes, second.rest_bytes),
        second.trained,
        first.failure or second.failure,
    )


def run(
    size: Size, text: Corpus, methods: Sequence[Method], out: Path, *, fresh: bool = False, quiet: bool = False
) -> list[Row]:
    """The rows of the methods, those on disk taken from there."""
    kept, rows = Rows(out, asdict(size), fresh=fresh), []
    with Progress(len(methods) * size.steps, quiet=quiet) as progress:
        for method in methods:
            progress.phase(method.name)
            rows.append(kept.row(method, lambda method=method: trained_row(method, size, text, progress.step)))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", metavar="PAGE", type=Path, help="also write the page, and its figure beside it as .svg")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="rows of the table, by name; default: all")
    parser.add_argument("--steps", type=int, default=Size.steps, help=f"optimizer steps (default {Size.steps})")
    parser.add_argument("--data", default=Size.data, help=f"text to train on (default {Size.data})")
    parser.add_argument("--rate", type=float, help="highest rate of the adapted layers, instead of each method's own")
    parser.add_argument("--out", type=Path, default=Path("runs/pretraining"), help="folder of finished rows")
    parser.add_argument("--fresh", action="store_true", help="run again what is there already")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    quiet_libraries()
    size = Size(steps=options.steps, data=options.data)
    try:
        methods, missing = chosen(METHODS, options.methods)
        if options.rate is not None:
            methods = [replace(method, rate=options.rate) for method in methods]
        text = corpus(size)
        rows = run(size, text, methods, options.out, fresh=options.fresh)
    except RankwiseError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; finished rows are in {options.out}, the same command goes on from there", file=sys.stderr)
        return 130
    made = Table(size, text, methods, rows, missing, REST)
    print(made.results(), made.settings(), made.reading(), sep="\n\n")
    if options.write:
        picture = options.write.with_suffix(".svg")
        options.write.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(picture, made.picture())
        write_atomically(options.write, made.page(" ".join([COMMAND, *(arguments or sys.argv[1:])]), picture.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
