"""The command line: rankwise compare | train | inspect | merge | export | methods."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import click
import typer

from rankwise.core.errors import RankwiseError
from rankwise.lab import commands
from rankwise.lab.presets import PRESETS

app = typer.Typer(
    help="Low-rank adaptation of models: compare methods on your model and data, train, look inside, merge and ship.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="A transformers folder, a hub name, a .gguf file, or packaged:minilm|smollm2|dinov2-small."
    ),
]
DataName = Annotated[
    str | None,
    typer.Option(
        "--data",
        "-d",
        help="A .jsonl, .csv or .parquet file, a datasets folder, or packaged:tweets|fashion-mnist|kjv|reasoning-gym/TASK.",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write to. The same command goes on where it stopped.")]
Evaluation = Annotated[str | None, typer.Option(help="A second file with the rows to evaluate on.")]
Task = Annotated[
    str | None, typer.Option(help="causal-lm, text-classification or image-classification. Default: told by the columns.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="Where columns have other names: --column text=review --column label=stars."),
]
TrainLimit = Annotated[int | None, typer.Option(help="Train on a seeded choice of so many rows.")]
EvalLimit = Annotated[int | None, typer.Option(help="Evaluate on a seeded choice of so many rows.")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens per row.")]
ImageSize = Annotated[int | None, typer.Option(help="Side of an image in pixels.")]
BatchSize = Annotated[int, typer.Option(help="Rows per step.")]


@app.command()
def compare(
    model: Model = None,
    data: DataName = None,
    recipes: Annotated[
        list[str] | None, typer.Option(help="Such as: --recipes lora 'dora(rank=4)' 'lora + bar'. See `rankwise methods`.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write to. The same command goes on there.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each final run.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Final runs per recipe; the intervals are over them (3).")] = None,
    lrs: Annotated[list[str] | None, typer.Option(help="auto, or the rates to try: --lrs 1e-4 3e-4 1e-3 (auto).")] = None,
    rates: Annotated[int | None, typer.Option(help="How many rates auto begins with, half a decade apart (5).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step (16).")] = None,
    probes: Annotated[int | None, typer.Option(help="Batches for starts that read statistics (8).")] = None,
    evaluation: Evaluation = None,
    task: Task = None,
    column: Columns = None,
    train_limit: TrainLimit = None,
    eval_limit: EvalLimit = None,
    max_length: MaxLength = None,
    image_size: ImageSize = None,
    retention: Annotated[str | None, typer.Option(help="Data with general text, none, or auto (auto).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.")] = None,
    preset: Annotated[str | None, typer.Option(help=f"Settings by name, other options win: {', '.join(PRESETS)}.")] = None,
) -> None:
    """Which method, at which learning rate, is best for your model and data, by how much, and is it more than noise?

    Every recipe looks for its learning rate in short runs, then all seeds run at the best one, on the same batches. Ends in a
    table, sentences that say what is *not* resolved, and `report.html`, which opens offline.

        rankwise compare -m packaged:minilm -d packaged:tweets --recipes lora dora "lora + bar" --steps 60 --out runs/tweets
    """
    from rankwise.lab import compare_command

    given = {key: value for key, value in locals().items() if key not in ("column", "compare_command")}
    compare_command.run({**given, "columns": commands.columns_of(column)}, _command())


@app.command()
def train(
    model: Model = None,
    data: DataName = None,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Such as 'lora(rank=8)' or 'dora + pissa'.")] = "lora(rank=8)",
    out: Out = Path("runs/train"),
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate. Default: the recipe's usual one; `compare` finds yours.")
    ] = None,
    batch_size: BatchSize = 16,
    seed: Annotated[int, typer.Option(help="Of adapter, head and batches.")] = 0,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints (a tenth of all steps).")] = None,
    evaluation: Evaluation = None,
    task: Task = None,
    column: Columns = None,
    train_limit: TrainLimit = None,
    eval_limit: EvalLimit = None,
    max_length: MaxLength = None,
    image_size: ImageSize = None,
) -> None:
    """Trains one recipe and saves the adapter. After Ctrl-C or a crash the same command goes on.

    rankwise train -m packaged:minilm -d packaged:tweets -r "lora(rank=8)" --steps 100 --out runs/tweets-lora
    """
    made = commands.task_of(
        model,
        data,
        {
            "evaluation": evaluation,
            "task": task,
            "columns": commands.columns_of(column),
            "train_limit": train_limit,
            "eval_limit": eval_limit,
        }
        | {"max_length": max_length, "image_size": image_size, "seed": seed},
    )
    commands.train(
        made,
        recipe,
        out,
        steps=steps,
        batch_size=batch_size,
        learning_rate=lr,
        seed=seed,
        save_every=save_every,
        command=_command(),
    )


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="A rankwise or PEFT adapter folder.")],
    base: Annotated[
        str | None, typer.Option(help="The model it was trained on: adds intruder dimensions, and reads DoRA and the like.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Where to write the heat map. Default: inspect.html in the adapter's folder.")
    ] = None,
) -> None:
    """Looks inside an adapter: norms, ranks in use, balance, what a smaller rank would lose, layer by layer.

    rankwise inspect runs/tweets-lora/adapter --base packaged:minilm
    """
    commands.inspect(adapter, base, html)


@app.command()
def merge(
    adapters: Annotated[list[Path], typer.Argument(help="Two or more adapter folders (rankwise or PEFT).")],
    model: Model = None,
    out: Out = Path("runs/merged"),
    method: Annotated[
        str, typer.Option(help="svd, cat, linear, task_arithmetic, or iteris (which needs --data per adapter).")
    ] = "svd",
    weights: Annotated[str | None, typer.Option(help="One number per adapter: 0.5,0.5. Default: 1 for each.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the result; without it nothing is lost.")] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", "-d", help="For iteris: the data of each adapter, in order.")
    ] = None,
    samples: Annotated[int, typer.Option(help="For iteris: rows read per adapter.")] = 48,
) -> None:
    """Merges adapters of one base into one, in the space of their updates, and says how far it is from the exact sum.

    rankwise merge runs/a/adapter runs/b/adapter -m packaged:minilm --method svd --rank 8 --out runs/ab
    """
    commands.merge(adapters, model, out, method=method, weights=weights, rank=rank, data=data or [], samples=samples)


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="A rankwise adapter folder.")],
    model: Model = None,
    to: Annotated[str, typer.Option(help="peft: read by peft, and through its format by vLLM and llama.cpp.")] = "peft",
    out: Out = Path("runs/export"),
    tolerance: Annotated[
        float | None, typer.Option(help="Relative error a layer may lose where its update is not of low rank.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="The common rank to write. Default: the smallest that fits.")] = None,
    native: Annotated[bool, typer.Option("--native", help="Write DoRA, VeRA and rsLoRA in PEFT's own form.")] = False,
) -> None:
    """Writes an adapter for other tools, verified against the original before anything is written.

    rankwise export runs/tweets-lora/adapter -m packaged:minilm --to peft --out runs/tweets-peft
    """
    commands.export(adapter, model, to, out, tolerance=tolerance, rank=rank, native=native)


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="One method; without it, all of them.")] = None) -> None:
    """The catalog: formula, trained numbers, cost, merge and export, reference.

    rankwise methods dora
    """
    commands.methods(name)


_STOPPED = 130
_typed: list[str] = []


def _command() -> str:
    return shlex.join(["rankwise", *_typed])


def _spread(arguments: Sequence[str]) -> list[str]:
    """`--recipes a b c` as `--recipes a --recipes b --recipes c`, which typer reads; --lrs and --data too."""
    spread: list[str] = []
    option: str | None = None
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in ("--recipes", "--lrs", "--data") else None
        elif option is not None and spread[-1] != option:
            spread.append(option)
        spread.append(argument)
    return spread


def run(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit status: 0, 1 for an error a user can mend, 2 for a wrong call, 130 after Ctrl-C."""
    global _typed
    _typed = list(arguments)
    try:
        if app(_spread(arguments), standalone_mode=False) == _STOPPED:  # typer turns Ctrl-C into this status
            raise KeyboardInterrupt
    except RankwiseError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        return 1
    except click.exceptions.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.exceptions.Abort):
        typer.secho(f"stopped. What was finished is kept. To go on: {_command()}", fg=typer.colors.YELLOW, err=True)
        return _STOPPED
    return 0


def main() -> None:
    """Entry point of the program."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
