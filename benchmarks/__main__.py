"""`python -m benchmarks [--write PAGE] [--rounds N]`: counts, times, prints, and stores benchmarks/results.json."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import adapters, model, page, peers, training


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--write", metavar="PAGE", help="also write the tables as Markdown, such as docs/results/benchmarks.md")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of the timed comparison (default 12)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    started = time.monotonic()
    both = model.main_variants()
    main_rows = training.rows(both, rounds=options.rounds)
    catalog_rows = training.rows(peers.catalog_variants(), rounds=max(2, options.rounds // 3))
    half = [both[0], both[1], model.theirs_in_base_dtype(), *both[2:]]
    half_rows = training.half_precision(half)
    times, mixed = adapters.measured()
    command = "python -m benchmarks" + (f" --write {options.write}" if options.write else "")
    text = page.page(main_rows, catalog_rows, half_rows, times, mixed, command)
    results = {
        "training": [asdict(row) for row in main_rows],
        "catalog": [asdict(row) for row in catalog_rows],
        "bfloat16": [asdict(row) for row in half_rows],
        "adapters_ms": times,
        "mixed_batch": {name: asdict(ratio) for name, ratio in mixed.items()},
    }
    (Path(__file__).parent / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    if options.write:
        target = Path(options.write)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    print(text)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
