"""`rankwise compare` as a command: options, presets, and errors without a traceback for what a user can mend.

rankwise compare --model packaged:minilm --data packaged:tweets --recipes lora dora "lora + bar" --steps 200 --out runs/a
rankwise compare --preset demo
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.core.errors import ArgumentError, RankwiseError, did_you_mean
from rankwise.lab.result import ComparisonResult

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # under five minutes on two idle cores: an encoder of 22.7 M numbers on real tweets, one composition of four papers
    "demo": {
        "model": "packaged:minilm",
        "data": "packaged:tweets",
        "recipes": ("lora", "dora", "lora_one", "dora + reflora(warmup=8) + bar"),
        "steps": 36,
        "batch_size": 16,
        "seeds": 3,
        "rates": 3,
        "probes": 8,
        "max_length": 40,
        "eval_limit": 400,
        "out": "runs/demo",
    },
}
DEFAULTS: Mapping[str, Any] = {"seeds": 3, "lrs": ("auto",), "rates": 5, "batch_size": 16, "probes": 8, "retention": "auto"}
EXAMPLE = """example:
  rankwise compare --model packaged:minilm --data packaged:tweets --recipes lora "dora + bar" --steps 60 --out runs/a"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to a parser. None means "as the preset says, or the default"."""
    add = parser.add_argument
    parser.epilog, parser.formatter_class = EXAMPLE, argparse.RawDescriptionHelpFormatter
    add("--preset", help=f"settings by name: {', '.join(PRESETS)}; other options win over them")
    add("--model", help="a folder, a hub name, a .gguf file, or packaged:NAME")
    add("--data", help="JSONL, CSV or Parquet file, a datasets folder, or packaged:NAME")
    add("--task", help="causal-lm, text-classification or image-classification; default: told by the data's columns")
    add("--recipes", nargs="+", metavar="RECIPE", help='methods or compositions, such as lora "dora(rank=4) + bar"')
    add("--steps", type=int, help="training steps of each final run")
    add("--batch-size", type=int, help="rows per step (16)")
    add("--seeds", type=int, help="how many seeds (3)")
    add("--lrs", nargs="+", metavar="RATE", help="auto, or the learning rates to try (auto)")
    add("--rates", type=int, help="rates that auto starts with, half a decade apart (5)")
    add("--probes", type=int, help="batches for starts that read statistics (8)")
    add("--max-length", type=int, help="tokens per row")
    add("--train-limit", type=int, help="rows to train on")
    add("--eval-limit", type=int, help="rows to evaluate on")
    add("--retention", help="data with general text, none, or auto")
    add("--device", help="cpu or cuda; default: cuda where there is one")
    add("--threads", type=int, help="threads of torch; default: torch decides")
    add("--out", help="folder for results, adapters and report; the same folder continues a comparison")


def settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options as given, over the preset's, over the defaults.

    Raises:
        ArgumentError: an unknown preset, or something that is needed is missing.
    """
    preset = given.get("preset")
    if preset is not None and preset not in PRESETS:
        raise ArgumentError(f"no preset {preset!r}. {did_you_mean(preset, PRESETS)}")
    chosen = {**DEFAULTS, **PRESETS.get(preset or "", {}), **{key: value for key, value in given.items() if value is not None}}
    missing = [f"--{key}" for key in ("model", "data", "recipes", "steps", "out") if chosen.get(key) is None]
    if missing:
        raise ArgumentError(f"compare needs {', '.join(missing)}; see rankwise compare --help, or use --preset demo")
    return chosen


def run(given: Mapping[str, Any], command: str = "") -> ComparisonResult:
    """Runs the comparison that the options describe.

    Args:
        given: options by name, as `add_options` names them; None where not given.
        command: as typed, for the report.
    """
    chosen = settings(given)
    if chosen.get("threads"):
        import torch

        torch.set_num_threads(int(chosen["threads"]))
    from rankwise.lab.compare import run_compare
    from rankwise.lab.tasks import make_task

    names = ("task", "max_length", "train_limit", "eval_limit", "retention", "device")
    task = make_task(chosen["model"], chosen["data"], **{name: chosen[name] for name in names if chosen.get(name) is not None})
    return run_compare(
        task,
        chosen["recipes"],
        steps=chosen["steps"],
        batch_size=chosen["batch_size"],
        seeds=chosen["seeds"],
        learning_rates=_rates(chosen["lrs"]),
        rates=chosen["rates"],
        probes=chosen["probes"],
        out=Path(chosen["out"]),
        command=command,
    )


def _rates(texts: Sequence[str]) -> str | list[float]:
    if list(texts) == ["auto"]:
        return "auto"
    try:
        return [float(text) for text in texts]
    except ValueError as error:
        raise ArgumentError(f"--lrs is auto or numbers such as 1e-4 3e-4, not {' '.join(texts)}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 1 for an error a user can mend, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="rankwise compare", description="Which low-rank method is best here?")
    add_options(parser)
    typed = list(sys.argv[1:] if arguments is None else arguments)
    given = vars(parser.parse_args(typed))
    command = shlex.join(["rankwise", "compare", *typed])
    try:
        run(given, command)
    except RankwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; nothing that was finished is lost. To go on: {command}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
