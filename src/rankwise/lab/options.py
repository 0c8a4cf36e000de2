"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

MODEL_HELP = "A transformers folder, a hub name, a .gguf file, or packaged:minilm, packaged:smollm2, packaged:dinov2-small."
Model = Annotated[str | None, typer.Option("--model", "-m", help=MODEL_HELP)]
DataName = Annotated[
    str | None,
    typer.Option(
        "--data",
        "-d",
        help="A .jsonl, .csv or .parquet file, a datasets folder, or packaged:tweets, fashion-mnist, kjv, reasoning-gym/TASK.",
    ),
]
Base = Annotated[
    str | None, typer.Option("--base", "--model", "-m", help="The model it was trained on. Default: what its run recorded.")
]
Kind = Annotated[str | None, typer.Option("--task", help="causal-lm, text-classification or image-classification.")]
Evaluation = Annotated[str | None, typer.Option(help="A second file with the rows to evaluate on.")]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="Where columns have other names: --column text=review --column label=stars."),
]
TrainLimit = Annotated[int | None, typer.Option(help="Train on a seeded choice of so many rows.")]
EvalLimit = Annotated[int | None, typer.Option(help="Evaluate on a seeded choice of so many rows.")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens per row.")]
ImageSize = Annotated[int | None, typer.Option(help="Side of an image in pixels.")]
Retention = Annotated[str | None, typer.Option(help="Data with general text to measure forgetting on, none, or auto.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")]
Threads = Annotated[int | None, typer.Option(help="Threads of torch. Default: torch decides.")]
BatchSize = Annotated[int | None, typer.Option(help="Rows per step. Default: 16.")]
