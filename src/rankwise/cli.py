"""The command line: rankwise compare | intrinsic-dimension | train | inspect | merge | export | methods."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from rankwise.core.errors import ArgumentError, RankwiseError
from rankwise.lab import commands, compare_command, intrinsic_dimension
from rankwise.lab.options import (
    Base,
    BatchSize,
    Columns,
    DataName,
    Device,
    EvalLimit,
    Evaluation,
    ImageSize,
    Kind,
    MaxLength,
    Model,
    Retention,
    Threads,
    TrainLimit,
)
from rankwise.lab.presets import PRESETS
from rankwise.lab.terminal import quiet_libraries

MENDABLE, STOPPED = 2, 130  # exit codes: an error that the user can mend, and Ctrl-C
SPREAD = ("--recipes", "--lrs", "--dimensions")  # options that take several values at once

app = typer.Typer(
    help="Low-rank adaptation of models: compare methods on your model and data, train, look inside, merge and ship.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def compare(
    context: typer.Context,
    model: Model = None,
    data: DataName = None,
    recipes: Annotated[
        list[str] | None,
        typer.Option("--recipes", "-r", help="Such as: --recipes lora 'dora(rank=4)' 'lora + bar'. See rankwise methods."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder to write to, or to go on in.")] = None,
    preset: Annotated[str | None, typer.Option(help=f"{', '.join(PRESETS)}. Other options win over it.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each final run.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Final runs per recipe; intervals are over them. Default: 3.")] = None,
    lrs: Annotated[list[str] | None, typer.Option("--lrs", help="auto, or rates to try: --lrs 1e-4 3e-4 1e-3.")] = None,
    rates: Annotated[int | None, typer.Option(help="Rates that auto begins with, half a decade apart. Default: 5.")] = None,
    probes: Annotated[int | None, typer.Option(help="Batches for starts that read statistics. Default: 8.")] = None,
    batch_size: BatchSize = None,
    task: Kind = None,
    evaluation: Evaluation = None,
    column: Columns = None,
    train_limit: TrainLimit = None,
    eval_limit: EvalLimit = None,
    max_length: MaxLength = None,
    image_size: ImageSize = None,
    retention: Retention = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Which method, at which learning rate, is best for your model and data, by how much, and is it more than noise?

    Every recipe looks for its learning rate in short runs, then all seeds run at the best one, on the same batches. Ends in a
    table, in sentences that say what is *not* resolved, and in report.html, which opens offline.

    An example:

    `rankwise compare -m packaged:minilm -d packaged:tweets --recipes lora "dora + bar" --steps 60 --out runs/tweets`
    """
    given = {name: value for name, value in context.params.items() if value not in (None, [], ())}
    given["columns"] = commands.columns_of(column)
    with stoppable(context):
        compare_command.run(given, shlex.join(["rankwise", *context.obj]))


@app.command(name=intrinsic_dimension.NAME)
def measure_dimension(
    context: typer.Context,
    model: Model = None,
    data: DataName = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to, or to go on in.")] = Path("runs/dimension"),
    dimensions: Annotated[
        list[int] | None, typer.Option(help="To try: --dimensions 10 100 1000. Default: 7 from 10 to 10000, log-spaced.")
    ] = None,
    share: Annotated[float, typer.Option(help="Of full training's score, that has to be reached.")] = 0.9,
    projection: Annotated[str, typer.Option(help="fastfood, dense or sparse.")] = "fastfood",
    steps: Annotated[int, typer.Option(help="Optimizer steps of each final run.")] = 200,
    seeds: Annotated[int | None, typer.Option(help="Final runs per dimension. Default: 3.")] = None,
    lrs: Annotated[list[str] | None, typer.Option("--lrs", help="auto, or rates to try for every dimension.")] = None,
    rates: Annotated[int | None, typer.Option(help="Rates that auto begins with, half a decade apart. Default: 5.")] = None,
    batch_size: BatchSize = None,
    task: Kind = None,
    evaluation: Evaluation = None,
    column: Columns = None,
    train_limit: TrainLimit = None,
    eval_limit: EvalLimit = None,
    max_length: MaxLength = None,
    image_size: ImageSize = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """How hard is the task for this model? The fewest dimensions of a random subspace that reach 90 % of full training.

    Full training and every dimension look for their learning rate, then run on all seeds. Ends in one number and a plot.

    An example:

    `rankwise intrinsic-dimension -m packaged:minilm -d packaged:tweets --dimensions 10 100 1000 --steps 60`
    """
    given = {name: value for name, value in context.params.items() if value not in (None, [], ())}
    given["columns"] = commands.columns_of(column)
    with stoppable(context):
        typer.echo(str(intrinsic_dimension.run(given, shlex.join(["rankwise", *context.obj]))))


@app.command()
def train(
    context: typer.Context,
    model: Model = None,
    data: DataName = None,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Such as 'lora(rank=8)' or 'dora + pissa'.")] = "lora(rank=8)",
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to, or to go on in.")] = Path("runs/train"),
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate. Default: the recipe's usual one; compare finds yours.")
    ] = None,
    batch_size: BatchSize = 16,
    accumulate: Annotated[int, typer.Option(help="Parts that a step's rows are cut into, to save memory.")] = 1,
    seed: Annotated[int, typer.Option(help="Of adapter, head, batches and dropout.")] = 0,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Layers to adapt, by name: --where q_proj --where v_proj. Default: all linear ones."),
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. Default: a tenth of all.")] = None,
    task: Kind = None,
    evaluation: Evaluation = None,
    column: Columns = None,
    train_limit: TrainLimit = None,
    eval_limit: EvalLimit = None,
    max_length: MaxLength = None,
    image_size: ImageSize = None,
    retention: Retention = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Trains one recipe and saves the adapter. After Ctrl-C or a crash the same command goes on where it stopped.

    An example:

    `rankwise train -m packaged:minilm -d packaged:tweets -r "lora(rank=8)" --steps 100 --out runs/tweets-lora`
    """
    missing = [name for name, value in (("--model", model), ("--data", data)) if value is None]
    if model is None or data is None:
        raise ArgumentError(f"train needs {' and '.join(missing)}, such as --model packaged:minilm --data packaged:tweets")
    _threads(threads)
    given = {**context.params, "columns": commands.columns_of(column)}
    one = where[0] if where and len(where) == 1 else where
    with stoppable(context):
        commands.train(
            model, data, recipe, out, given, steps=steps, batch_size=batch_size or 16, accumulate=accumulate,
            learning_rate=lr, seed=seed, where=one or None, save_every=save_every,
        )  # fmt: skip


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="An adapter of rankwise or PEFT, or the folder of a run.")],
    base: Annotated[
        str | None, typer.Option("--base", "--model", "-m", help="Its model: adds intruder dimensions, and is needed for DoRA.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="The page. Default: inspect.html in the given folder.")] = None,
    task: Kind = None,
) -> None:
    """Looks inside an adapter, layer by layer: norms, ranks in use, balance, what a smaller rank would lose.

    An example:

    `rankwise inspect runs/tweets-lora --base packaged:minilm`
    """
    commands.inspect(adapter, base, html, task)


@app.command()
def merge(
    adapters: Annotated[list[Path], typer.Argument(help="Two or more adapters of one base, of rankwise or PEFT.")],
    base: Base = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.")] = Path("runs/merged"),
    method: Annotated[str, typer.Option(help="svd, cat, linear, task_arithmetic or iteris.")] = "svd",
    weights: Annotated[str | None, typer.Option(help="A number per adapter: 0.5,0.5. Default: 1 for each.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the result. Default: what the method keeps.")] = None,
    data: Annotated[list[str] | None, typer.Option("--data", "-d", help="For iteris: once per adapter, in order.")] = None,
    samples: Annotated[int, typer.Option(help="For iteris: rows read per adapter.")] = 48,
    head: Annotated[int | None, typer.Option(help="Whose classification head to keep, where they differ: 1, 2, …")] = None,
    task: Kind = None,
) -> None:
    """Merges adapters into one, in the space of their updates, and says how far it is from the exact sum.

    An example:

    `rankwise merge runs/a runs/b --method svd --rank 8 --head 1 --out runs/ab`
    """
    commands.merge(
        adapters, base, out, method=method, weights=weights, rank=rank, data=data or [], samples=samples, head=head, task=task
    )


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="An adapter, or the folder of a run.")],
    base: Base = None,
    to: Annotated[str, typer.Option(help="peft; through its format also vLLM and llama.cpp.")] = "peft",
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.")] = Path("runs/export"),
    tolerance: Annotated[float | None, typer.Option(help="Relative error a layer may lose if it is not of low rank.")] = None,
    rank: Annotated[int | None, typer.Option(help="The common rank to write. Default: the smallest that fits.")] = None,
    native: Annotated[bool, typer.Option("--native", help="Write DoRA, VeRA and rsLoRA in PEFT's own form.")] = False,
    task: Kind = None,
) -> None:
    """Writes an adapter for other tools, verified against the original before anything is written.

    An example:

    `rankwise export runs/tweets-lora --to peft --out runs/tweets-peft`
    """
    commands.export(adapter, base, to, out, task=task, tolerance=tolerance, rank=rank, native=native)


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="One method; without it, all of them.")] = None) -> None:
    """The catalog: formula, trained numbers, cost, merge and export, reference.

    An example:

    `rankwise methods dora`
    """
    commands.methods(name)


@contextmanager
def stoppable(context: typer.Context) -> Iterator[None]:
    """Turns Ctrl-C into a line that says what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        told = str(stop) or "stopped; what was finished is kept"
        typer.secho(f"\n{told}. To go on: {shlex.join(['rankwise', *context.obj])}", fg=typer.colors.YELLOW, err=True)
        raise typer.Exit(STOPPED) from stop


def _threads(count: int | None) -> None:
    if count is not None:
        import torch

        torch.set_num_threads(count)


def spread(arguments: Sequence[str]) -> list[str]:
    """`--recipes a b c` as `--recipes a --recipes b --recipes c`, which typer reads; likewise the other options of `SPREAD`."""
    found: list[str] = []
    option: str | None = None
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in SPREAD else None
        elif option is not None and found[-1] != option:
            found.append(option)
        found.append(argument)
    return found


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and gives its exit code; errors that a user can mend come without a traceback."""
    try:
        app(spread(arguments), prog_name="rankwise", obj=list(arguments))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except RankwiseError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        return MENDABLE
    return 0


def main() -> None:
    """The program."""
    quiet_libraries()
    sys.exit(run(sys.argv[1:]))
