"""The command line: rankwise compare | train | inspect | merge | export | methods."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

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
        list[str] | None,
        typer.Option("--recipes", "-r", help="Such as: --recipes lora 'dora(rank=4)' 'lora + bar'. See `rankwise methods`."),
    ] = None,
    out: Out = Path("runs/compare"),
    steps: Annotated[int, typer.Option(help="Optimizer steps of each final run.")] = 100,
    seeds: Annotated[int, typer.Option(help="Final runs per recipe; the intervals are over them.")] = 3,
    lrs: Annotated[str, typer.Option(help="'auto', or rates to try: 1e-4,3e-4,1e-3.")] = "auto",
    rates: Annotated[int, typer.Option(help="How many rates 'auto' begins with, half a decade apart.")] = 5,
    batch_size: BatchSize = 16,
    evaluation: Evaluation = None,
    task: Task = None,
    column: Columns = None,
    train_limit: TrainLimit = None,
    eval_limit: EvalLimit = None,
    max_length: MaxLength = None,
    image_size: ImageSize = None,
    preset: Annotated[str | None, typer.Option(help=f"Settings by name: {', '.join(PRESETS)}.")] = None,
) -> None:
    """Which method, at which learning rate, is best for your model and data, by how much, and is it more than noise?

    Every recipe looks for its learning rate in short runs, then all seeds run at the best one, on the same batches. Ends in a
    table, sentences that say what is *not* resolved, and `report.html`, which opens offline.

        rankwise compare -m packaged:minilm -d packaged:tweets --recipes lora dora "lora + bar" --steps 60 --out runs/tweets
    """
    settings: dict[str, Any] = {"model": model, "data": data, "recipes": recipes or None, "steps": steps, "seeds": seeds}
    settings |= {"lrs": lrs, "rates": rates, "batch_size": batch_size, "max_length": max_length}
    settings |= {"train_limit": train_limit, "eval_limit": eval_limit, "evaluation": evaluation, "task": task}
    settings |= {"columns": column, "image_size": image_size}
    commands.compare(settings, preset, out, command=_command())


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
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints to resume from.")] = 50,
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
        {"evaluation": evaluation, "task": task, "columns": column, "train_limit": train_limit, "eval_limit": eval_limit}
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


def _command() -> str:
    return shlex.join(["rankwise", *sys.argv[1:]])


def _spread(arguments: list[str]) -> list[str]:
    """`--recipes a b c` as `--recipes a --recipes b --recipes c`, which typer reads."""
    spread: list[str] = []
    option: str | None = None
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument == "--recipes" else None
        elif option is not None and spread[-1] != option:
            spread.append(option)
        spread.append(argument)
    return spread


def main() -> None:
    """Runs the command line: errors a user can mend come without a traceback, Ctrl-C says how to go on."""
    try:
        app(_spread(sys.argv[1:]))
    except RankwiseError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.secho(
            "stopped. What was finished is kept; the same command goes on from there.", fg=typer.colors.YELLOW, err=True
        )
        sys.exit(130)


if __name__ == "__main__":
    main()
