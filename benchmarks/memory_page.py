"""`python -m benchmarks.memory_page [--write PAGE] [--rounds N]`: optimizer memory, peaks and times of full-rank training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import rankwise
from benchmarks.markdown import machine, table
from benchmarks.memory import TOKENS, Row, rows

LLAMA_1B = {"layers": 24, "hidden": 2048, "intermediate": 5461, "vocabulary": 32_000, "rank": 512}  # GaLore's, at its rank
# slug -> what its paper says of optimizer memory against AdamW, in 32 bits and in 8
PUBLISHED = {"galore": ("up to −65.5 %", ""), "fira": ("−61.1 % (1B)", ""), "coap": ("−61 % (1B)", "−81 % (1B)")}


def page(found: Sequence[Row], command: str) -> str:
    """The page."""
    base = found[0]
    return f"""# Memory and time of full-rank training

Made by `{command}`. {machine("torch", "transformers")}

SmolLM2-135M, every weight trained, one sequence of {TOKENS} tokens, float32. Linear layers are projected at a quarter of the
width; the embedding (a fifth of all numbers) and norms get what the recipe has for plain tensors, AdamW as a rule. Every method
of the catalog whose recipe trains whole weights.

Optimizer state in MiB, counted, and what it saves against AdamW: on the linear layers, on all of the model, and there with
moments of 8 bits. *1B* is what the catalog's formula saves on all of a LLaMA of 1B at rank 512, the setting of the published
figures.

{table(*state_table(found))}

Peak in MiB of live tensors over a whole step, weights, gradients and activations included, counted exactly (scratch memory
inside an operation is not seen). The frozen weights stay underneath the trained ones, {base.frozen / 2**20:,.0f} MiB in every
row. *per layer* moves each layer inside backward and frees its gradient; *8 bits* does so with moments of 8 bits.

Times are CPU time relative to AdamW, the two taking turns: *step* is the median ratio of ordinary steps; *refresh* is what a
step with a new basis takes longer, in seconds, and how many steps lie between two of them; *all in all* spreads that over the
steps. AdamW's step takes {base.seconds:.2f} s.

{table(*step_table(found))}
"""


def state_table(found: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines: optimizer state."""
    base = found[0]

    def saved(part: int, whole: int) -> str:
        return _percent(1 - part / whole)

    lines = []
    for row in found:
        published = PUBLISHED.get(row.slug, ("", ""))
        lines.append(
            [
                row.name,
                f"{row.state[1] / 2**20:,.0f}",
                saved(row.state[0], base.state[0]),
                saved(row.state[1], base.state[1]),
                "" if row.state_8bit is None else saved(row.state_8bit[1], base.state[1]),
                _percent(on_llama(row.slug)),
                *published,
            ]
        )
    return ["", "state", "linear", "all", "all, 8 bits", "1B", "published", "published, 8 bits"], lines


def step_table(found: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines: peaks and times."""
    base = found[0]

    def peak(count: int | None) -> list[str]:
        return ["", ""] if count is None else [f"{count / 2**20:,.0f}", f"{count / base.peak:.2f}"]

    lines = []
    for row in found:
        lines.append(
            [
                row.name,
                *peak(row.peak),
                *peak(row.peak_per_layer),
                *peak(row.peak_8bit),
                f"{row.step:.2f}",
                ", ".join(f"{extra:.2f} / {period:g}" for extra, period in row.refresh),
                f"{row.amortized:.2f}",
            ]
        )
    ratio = "÷ AdamW"
    return ["", "peak", ratio, "per layer", ratio, "8 bits", ratio, "step", "refresh", "all in all"], lines


def on_llama(slug: str) -> float:
    """The share of AdamW's state that the catalog's formula saves on a LLaMA of 1B, all tensors counted."""
    if not slug:
        return 0.0
    hidden, wide, layers = LLAMA_1B["hidden"], LLAMA_1B["intermediate"], LLAMA_1B["layers"]
    shapes = [(hidden, hidden)] * 4 + [(wide, hidden)] * 2 + [(hidden, wide)]
    rest = 2 * LLAMA_1B["vocabulary"] * hidden + (2 * layers + 1) * hidden
    formula, kept = rankwise.catalog.entry(slug).state, 0.0
    for m, n in shapes:
        known = {"m": m, "n": n, "r": LLAMA_1B["rank"], "numbers": m * n}
        kept += eval(formula, {"__builtins__": {}, "min": min, "max": max}, known)  # a formula of our own catalog
    whole = layers * sum(m * n for m, n in shapes) + rest
    return 1 - (layers * kept + 2 * rest) / (2 * whole)


def _percent(share: float) -> str:
    return f"−{100 * share:.1f} %" if share > 0 else f"+{-100 * share:.1f} %" if share < 0 else "0"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_page", description=__doc__)
    parser.add_argument("--write", metavar="PAGE", type=Path, help="also write the page as Markdown")
    parser.add_argument("--rounds", type=int, default=4, help="timed steps of each method (default 4)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = "python -m benchmarks.memory_page" + (f" --write {options.write}" if options.write else "")
    text = page(rows(rounds=options.rounds), command)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
