"""The page of the pretraining table: numbers, settings, figure, and sentences that follow from the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.markdown import machine, table
from experiments.chart import Series, chart
from experiments.language import Corpus, Size
from experiments.running import Method, Row
from rankwise.lab.plots import running_mean
from rankwise.lab.terminal import bytes_text, count_text

SMOOTH = 12  # steps of the running mean in the figure


@dataclass(frozen=True)
class Table:
    """All rows, and what they were made from."""

    size: Size
    corpus: Corpus
    methods: Sequence[Method]
    rows: Sequence[Row]
    missing: Sequence[str]
    rest: float

    def page(self, command: str, picture: str) -> str:
        """The page as Markdown."""
        size, reference = self.size, self.rows[0]
        linear = llama_numbers(size)
        whole = linear + 2 * self.corpus.vocabulary * size.hidden + (2 * size.layers + 1) * size.hidden
        missing = f"\nNot in this version's catalog: {', '.join(self.missing)}.\n" if self.missing else ""
        return f"""# Pretraining a small Llama

```
{command}
```

A Llama of {count_text(whole)} numbers, {count_text(linear)} of them in linear layers (hidden {size.hidden},
{size.layers} layers, intermediate {size.intermediate}, {size.heads} heads), from random weights
(embeddings at N(0, 1)), on `{size.data}`:
{size.steps} steps of {size.rows} rows of {size.tokens} tokens, {size.steps * size.rows * size.tokens:,} tokens for every row
of the table, in the same order; {self.corpus.vocabulary} byte-level tokens, {self.corpus.letters:.1f} bytes of text each.
{machine()}

Every linear layer but the head is adapted; embeddings, norms and head are trained whole, at the highest rate {self.rest:g} in
every row. Rates rise over a tenth of the steps and fall as a cosine to a tenth; ReLoRA's begins again at each restart. Rates
are the best of one to three tried by hand in runs of a third of the length; scales are the papers'. One seed each: the two
rows of AdamW show what another seed changes, and smaller differences say nothing. So short a run tells how fast a method
learns, not where it ends.

*state* is what the optimizer keeps for the linear layers, in bytes, counted, at its largest; for the rest AdamW keeps
{bytes_text(reference["rest_bytes"])} more. *model* is everything that the model holds: the frozen weights underneath stay, so
full training holds its linear layers twice. *s/step* is CPU time of one thread, the median of the steps; *time* is that of the
whole run, refreshes and restarts included.
{missing}
{self.text()}

![training loss against steps]({picture})
"""

    def text(self) -> str:
        """Tables and sentences."""
        return "\n\n".join([self.results(), self.settings(), self.reading()])

    def results(self) -> str:
        """The measured columns."""
        reference, lines = self.rows[0], []
        head = ["", "loss", "perplexity", "state", "÷ AdamW", "trained", "model", "s/step", "÷ AdamW", "time ÷ AdamW"]
        for method, row in zip(self.methods, self.rows, strict=True):
            lost = row["failure"] or not math.isfinite(row["loss"])
            lines.append(
                [
                    method.name,
                    "diverged" if lost else f"{row['loss']:.3f}",
                    "" if lost else f"{math.exp(row['loss']):.1f}",
                    bytes_text(row["state_bytes"]),
                    f"{row['state_bytes'] / reference['state_bytes']:.2f}",
                    count_text(row["trained"]),
                    bytes_text(row["model_bytes"]),
                    f"{row['seconds_per_step']:.3f}",
                    f"{row['seconds_per_step'] / reference['seconds_per_step']:.2f}",
                    "" if lost else f"{row['seconds'] / reference['seconds']:.2f}",
                ]
            )
        return table(head, lines)

    def settings(self) -> str:
        """What each row was made with."""
        lines = []
        for method, row in zip(self.methods, self.rows, strict=True):
            notes = [
                f"the first {round(method.warm * self.size.steps)} steps whole, with AdamW at {self.methods[0].rate:g}"
                if method.warm
                else "",
                row["failure"],
            ]
            lines.append([method.name, f"`{row['recipe']}`", f"{method.rate:g}", "; ".join(note for note in notes if note)])
        return table(["", "recipe", "highest rate", ""], lines)

    def reading(self) -> str:
        """What the table says, in sentences that follow from its numbers."""
        done = [(one.name, row["loss"]) for one, row in zip(self.methods, self.rows, strict=True) if not row["failure"]]
        if not done:
            return "Every run diverged."
        best = min(done, key=lambda pair: pair[1])
        sentences = [f"Least validation loss: {best[0]}, {best[1]:.3f}."]
        twins = [loss for name, loss in done if name.startswith("AdamW")]
        if len(twins) == 2:
            gap = abs(twins[0] - twins[1])
            near = [name for name, loss in done if not name.startswith("AdamW") and abs(loss - twins[0]) <= gap]
            sentences.append(f"Another seed changes AdamW's by {gap:.3f}; within that of AdamW: {', '.join(near) or 'none'}.")
            sentences.append(f"Below AdamW by more: {', '.join(n for n, loss in done if loss < twins[0] - gap) or 'none'}.")
        return " ".join(sentences)

    def picture(self) -> str:
        """Training loss against steps."""
        series = []
        for method, row in zip(self.methods, self.rows, strict=True):
            smooth = running_mean(row["losses"], min(SMOOTH, max(1, len(row["losses"]) // 4)))
            skipped = len(smooth) // 20
            if len(smooth) > 1:
                series.append(Series(method.name, list(range(skipped + 1, len(smooth) + 1)), smooth[skipped:]))
        top = max(one.y[len(one.y) // 5] for one in series)  # the first fifth is the same fall for all
        return chart(series, x="step", y=f"training loss, mean of {SMOOTH} steps", top=top, title="training loss against steps")


def llama_numbers(size: Size) -> int:
    """Numbers in the adapted layers."""
    return size.layers * (4 * size.hidden**2 + 3 * size.hidden * size.intermediate)
