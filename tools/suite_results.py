"""Results of a suite as a table and as a picture, beside the published figures that the suite file knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cmpt.monitor.tasks import MEASURES
from cmpt.recipe.suite import Suite

Results = Mapping[str, Mapping[str, float]]
_OURS, _THEIRS = "#2f6fde", ("#8a8f98", "#d9730d", "#12946a", "#8a4fd0", "#c2410c", "#0e7490", "#a16207")
_NARROWEST_TABLE = 160  # columns, where there is no terminal


class Line(NamedTuple):
    """One result that stands in the table, in per cent."""

    task: str
    measure: str
    ours: float
    published: dict[str, float | None]


def lines_of(suite: Suite, results: Results) -> list[Line]:
    """The suite's order; last the mean over the zero-shot tasks, where there are several."""
    rows = suite.rows.values if suite.rows else {}
    lines, zero_shot = [], []
    for task in suite.tasks:
        for metric in task.metrics if task.name in results else ():
            published = {
                model: figures.get(f"{task.name}/{metric}", figures.get(task.name) if len(task.metrics) == 1 else None)
                for model, figures in rows.items()
            }
            label = MEASURES.get(metric, metric.replace("_", " "))
            lines.append(Line(task.name, label, 100 * results[task.name][metric], published))
            if task.kind == "zero_shot":
                zero_shot.append(lines[-1])
    if len(zero_shot) > 1:
        every = {model: [line.published[model] for line in zero_shot] for model in rows}
        means = {model: _mean(values) for model, values in every.items()}
        ours = sum(line.ours for line in zero_shot) / len(zero_shot)
        lines.append(Line(f"mean of {len(zero_shot)} zero-shot tasks", "", ours, means))
    return lines


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def print_results(model: str, suite: Suite, results: Results, left_out: Mapping[str, str]) -> None:
    """The table, in per cent, and the tasks that were left out."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_NARROWEST_TABLE)
    table = Table(title=Text(model), box=box.SIMPLE, title_justify="left")
    table.add_column("task", no_wrap=True)
    table.add_column("measure")
    table.add_column("this model", justify="right", style="bold")
    for name in suite.rows.values if suite.rows else ():
        table.add_column(Text(name), justify="right")
    for line in lines_of(suite, results):
        published = ["" if value is None else f"{value:.1f}" for value in line.published.values()]
        table.add_row(line.task, Text(line.measure), f"{line.ours:.2f}", *published)
    console.print(table)
    if suite.rows:
        console.print(f"Per cent; the other columns: {suite.rows.source}", highlight=False, markup=False)
    for name, why in left_out.items():
        console.print(f"left out: {name}: {why}", highlight=False, markup=False)


def draw_results(path: Path, model: str, suite: Suite, results: Results) -> None:
    """A PNG: a row for each result, a dot for this model and one for each published figure."""
    lines = lines_of(suite, results)
    rows = list(suite.rows.values) if suite.rows else []
    figure = Figure(figsize=(9.0, 1.3 + (0.5 if rows else 0.34) * len(lines)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(lines))
    for number, name in enumerate(rows):
        aside = 0.7 * ((number + 0.5) / len(rows) - 0.5)  # each model on a level of its own, so that none hides another
        known = [(value, at + aside) for at, line in enumerate(lines) if (value := line.published[name]) is not None]
        if known:
            colour = _THEIRS[number % len(_THEIRS)]
            values, at = zip(*known, strict=True)
            axes.scatter(values, at, s=26, label=name, color=colour, alpha=0.8, linewidths=0)
    axes.scatter([line.ours for line in lines], places, s=64, marker="D", label="this model", color=_OURS, zorder=3)
    axes.set_yticks(places, [f"{line.task}  {line.measure}".strip() for line in lines])
    axes.set_xlim(0, 100)
    source = f"per cent; others: {suite.rows.source}" if suite.rows else "per cent"
    axes.set_xlabel("\n".join(wrap(source, 90)), fontsize=8)
    axes.grid(axis="x", color="#e4e7ec")
    for place in places[::2]:
        axes.axhspan(place - 0.5, place + 0.5, color="#f5f6f8", zorder=0)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(model if len(model) <= 70 else f"…{model[-69:]}", loc="left", fontsize=10)
    figure.legend(loc="outside upper right", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
