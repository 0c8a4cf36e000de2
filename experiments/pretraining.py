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
from dataclasses import asdict
from typing import Any

from torch import nn

import rankwise
from experiments import command
from experiments.language import Corpus, Size, batch_at, beside, corpus, llama, loss_of, validation_loss
from experiments.pretraining_page import Table
from experiments.running import Method, Row, Rows, Run, absorb_, factors, model_bytes, train
from rankwise.core.handle import Handle
from rankwise.lab.terminal import Progress

REST = 5e-3  # highest rate of embeddings, norms and head in every row
METHODS = (
    Method(name="AdamW", recipe="full", rate=1e-3),
    Method(name="AdamW, another seed", recipe="full", rate=1e-3, seed=1),
    Method(name="GaLore", recipe="full + galore(rank={rank}, scale=0.25, refresh={interval})", rate=1e-2),
    Method(name="Fira", recipe="full + fira(rank={rank}, scale=0.25, refresh={interval})", rate=5e-3),
    Method(name="Flora", recipe="full + flora_grad(rank={rank}, interval={interval})", rate=1e-3),
    Method(name="COAP", recipe="full + coap(rank={rank}, scale=0.25, refresh=8, recompute=5)", rate=1e-2),
    Method(
        name="Online Subspace Descent",
        recipe="full + online_subspace_descent(rank={rank}, scale=0.25, interval=200)",
        rate=1e-2,
    ),
    Method(name="APOLLO", recipe="full + apollo(rank={rank}, scale=1.0, refresh={interval})", rate=5e-3),
    Method(name="APOLLO-Mini", recipe="full + apollo_mini(scale=128.0, refresh={interval})", rate=5e-3),
    Method(name="ReLoRA", recipe="relora(rank={rank}, alpha=32.0, dropout=0.0, interval={interval})", rate=4e-3, jagged=True),
    Method(
        name="ReLoRA after a full quarter",
        recipe="relora(rank={rank}, alpha=32.0, dropout=0.0, interval={interval})",
        rate=2e-3,
        jagged=True,
        warm=0.25,
    ),
    Method(name="SLTrain", recipe="sltrain(rank={rank}, alpha=32.0, density=0.03)", rate=2e-3),
    Method(name="LTE", recipe="lte(rank={rank}, heads=8, alpha=1024.0, interval=10)", rate=2e-4),
    Method(name="SST", recipe="sst(rank={rank}, interval=20, warmup=4)", rate=1e-3),
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


def make(options: argparse.Namespace, methods: list[Method], missing: list[str]) -> Table:
    """The table of the methods, rows on disk taken from there."""
    size = Size(steps=options.steps, data=options.data)
    text = corpus(size)
    kept = Rows(options.out, asdict(size), fresh=options.fresh)
    rows = []
    with Progress(len(methods) * size.steps, quiet=False) as progress:
        for method in methods:
            progress.phase(method.name)
            rows.append(kept.row(method, lambda method=method: trained_row(method, size, text, progress.step)))
    return Table(size, text, methods, rows, missing, REST)


def main(arguments: Sequence[str] | None = None) -> int:
    return command.run("experiments.pretraining", __doc__, METHODS, Size, make, arguments)


if __name__ == "__main__":
    sys.exit(main())
