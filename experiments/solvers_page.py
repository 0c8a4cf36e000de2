"""The page and the figure of `experiments.solvers`."""

from __future__ import annotations

import html
import math
import platform
from importlib.metadata import version

from experiments.solvers import (
    CONDITIONS,
    DRAWN,
    EVERY,
    GOAL,
    LIMIT,
    PLAIN_LIMIT,
    RATES,
    SIZES,
    WIDER,
    Draws,
    Run,
    Runs,
    Solver,
    solvers,
)
from rankwise.lab.plots import FONT, GRID, INK, SOFT, Palette

PANEL, TALL, GAP, LEFT, TOP, LINE = 270, 190, 26, 62, 40, 20
DASHES = ("", "7 4", "2 4")  # where the colors come again
LOWEST = -9  # power of ten at the bottom of a panel


def _cell(solver: Solver, run: Run) -> str:
    if run.iterations is not None:
        return f"{run.iterations:,}"
    return "diverges" if run.trace is None else f"> {solver.limit:,} ({run.error:.0e})"


def _table(found: Runs, kind: str, chosen: list[Solver], widths: list[int]) -> str:
    head = ["step", "preconditions"]
    head += [f"κ = {condition:g}, r = {'' if wider == 1 else f'{wider} '}r*" for wider in widths for condition in CONDITIONS]
    rows = [head]
    for solver in chosen:
        runs = [found[kind, wider, condition, solver.name] for wider in widths for condition in CONDITIONS]
        rows.append([f"`{solver.name}`", "yes" if solver.preconditions else "", *(_cell(solver, run) for run in runs)])
    return _aligned(rows)


def _drawn(draws: Draws) -> str:
    head = [
        "step",
        *(f"κ = {condition:g}, r = {'' if wider == 1 else f'{wider} '}r*" for wider in WIDER for condition in CONDITIONS),
    ]
    names = list(dict.fromkeys(name for name, _, _ in draws))
    cells = [[f"`{name}`", *(str(draws[name, wider, c]) for wider in WIDER for c in CONDITIONS)] for name in names]
    return _aligned([head, *cells])


def _aligned(rows: list[list[str]]) -> str:
    sizes = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (size + 2) for size in sizes) + "|", *lines[1:]])


def page(found: Runs, draws: Draws, command: str, seconds: float) -> str:
    """The whole page."""
    first = [solver for solver in solvers() if not solver.further]
    others = [solver for solver in solvers() if solver.further]
    tables = []
    for kind, sizes in SIZES.items():
        said = ", ".join(f"{name} = {value}" for name, value in sizes.items())
        tables.append(f"### {kind.capitalize()}\n\n{said}.\n\n{_table(found, kind, first, list(WIDER))}\n")
    rates = ", ".join(f"{rate:g}" for rate in sorted(RATES))
    machine = f"{platform.machine()}; Python {platform.python_version()}, torch {version('torch')}"
    return f"""# Factor steps as solvers

Made by `{command}` in {seconds:.0f} s of one core, on {machine}.

Every step of the catalog that moves B and A, as a solver of problems whose answer M* is known: a matrix seen whole, through
Gaussian measurements, and in some of its entries. M* has rank r* and singular values from 1 down to 1/κ. The factors have
rank r* or, as if it were not known, 2 r*; they begin as LoRA does, A Gaussian and B zero. Each number is the iterations until
‖BA − M*‖ / ‖M*‖ is {GOAL:g}, looked at every {EVERY}, at the best of the constant rates {rates};
"> n (error)" is the error after n iterations. Steps come on plain SGD, so that what is seen is the step and not Adam.

![Error against iterations](solvers.svg)

*How to read it.* Where M* is seen whole or through enough Gaussian measurements, a preconditioner that undoes the factorization
is flat in κ: the same number in the three columns, whatever the rank. Gradient descent is not: its iterations grow with κ,
since the smallest direction of M* is learned at a rate proportional to its size. RefLoRA preconditions too, but only balances
B against A, so what it descends on is still the square of the factors. Compressed gradients (ConEF) follow their SGD with a
delay; weight decay moves the answer itself. Completion from half of the entries is another matter: a preconditioner that is
hardly damped (1e-6) moves as fast along what the seen entries hardly determine, and at κ = 100, or with more rank than M* has,
it ends elsewhere. Damping by the smallest singular value mends the first and not the second; there gradient descent, slow as
it is, gets further.

{chr(10).join(tables)}
How many of {DRAWN} such completion problems are solved to {GOAL:g} within {LIMIT} iterations, at the best of three rates:

{_drawn(draws)}

## Other forms, on factorization at the true rank

Variants, and the steps on AdamW as their recipes have them. A step of Adam has the size of the rate, whatever the gradient, so
at a constant rate it comes no nearer than that; here the rate is halved every 20 or 60 iterations, and where the error ends is
what the rate's whole way allowed. These numbers say that it gets there, not how fast it could.

{_table(found, "factorization", others, [1])}
"""


def figure(found: Runs) -> str:
    """Small multiples: a row per problem and rank, a column per condition number."""
    first = [solver for solver in solvers() if not solver.further]
    palette = Palette([solver.name for solver in first])
    places = [(kind, wider) for kind in SIZES for wider in WIDER]
    legend = 3
    rows = math.ceil(len(first) / legend)
    width = LEFT + len(CONDITIONS) * (PANEL + GAP)
    height = TOP + len(places) * (TALL + GAP + 24) + rows * LINE + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-size="12" '
        f"font-family='{FONT}'><title>Relative error against iterations</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for row, (kind, wider) in enumerate(places):
        for column, condition in enumerate(CONDITIONS):
            x, y = LEFT + column * (PANEL + GAP), TOP + row * (TALL + GAP + 24)
            parts += _panel(found, first, palette, kind, wider, condition, x, y)
    bottom = TOP + len(places) * (TALL + GAP + 24)
    for index, solver in enumerate(first):
        x, y = LEFT + index % legend * (width - LEFT) / legend, bottom + index // legend * LINE
        parts.append(_line([(x, y), (x + 24, y)], palette.color(solver.name), _dash(index)))
        parts.append(_text(x + 30, y + 4, solver.name, INK))
    return "\n".join([*parts, "</svg>", ""])


def _panel(
    found: Runs, chosen: list[Solver], palette: Palette, kind: str, wider: int, condition: float, x: float, y: float
) -> list[str]:
    parts = [_text(x, y - 8, f"{kind}, κ = {condition:g}, r = {'' if wider == 1 else f'{wider} '}r*", INK)]
    for power in range(LOWEST, 1, 3):
        at = y + TALL * power / LOWEST
        parts.append(f'<line x1="{x}" x2="{x + PANEL}" y1="{at:.1f}" y2="{at:.1f}" stroke="{GRID}"/>')
        if x == LEFT:
            parts.append(_text(x - 8, at + 4, "1" if power == 0 else f"1e{power}", SOFT, "end"))
    span = math.log10(PLAIN_LIMIT)
    for power in range(math.floor(span) + 1):
        parts.append(_text(x + PANEL * power / span, y + TALL + 16, f"{10**power:,}", SOFT, "middle"))
    for index, solver in enumerate(chosen):
        trace = found[kind, wider, condition, solver.name].trace
        if trace is None:
            continue
        points = []
        for iteration, error in zip(trace.iteration[1:], trace.error[1:], strict=True):
            height = min(max(math.log10(max(float(error), 1e-30)), LOWEST), 0.0)
            points.append((x + PANEL * math.log10(float(iteration)) / span, y + TALL * height / LOWEST))
        parts.append(_line(points, palette.color(solver.name), _dash(index)))
    return parts


def _dash(index: int) -> str:
    return DASHES[index // 8 % len(DASHES)]


def _line(points: list[tuple[float, float]], color: str, dash: str) -> str:
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    style = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{drawn}" fill="none" stroke="{color}" stroke-width="1.8"{style}/>'


def _text(x: float, y: float, words: str, color: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}">{html.escape(words)}</text>'
