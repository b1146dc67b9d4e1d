"""The plots of scaling.html, in the look of a run's report (cmpt/monitor/plots.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from cmpt.monitor.plots import COLOURS, GRID, INK, MUTED, as_svg, bare, legend_above, short
from step_model import TERMS

# One colour for each term, wherever it is drawn; readable on light and on dark.
TERM_COLOURS = dict(
    zip(
        TERMS,
        ("#5b8def", "#8fb3ff", "#7a8290", "#e07b39", "#d64f6a", "#b565d8", "#c9a227", "#2fa58a", "#6fbf4b"),
        strict=True,
    )
)
TERM_LABELS = {"features": "features (loss gather)", "data": "data wait"}
_BAR_INCHES = 0.24


@dataclass(frozen=True)
class Line:
    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    """With `high`: the range of each point."""
    high: Sequence[float] | None = None
    dots: bool = True
    dashed: bool = False
    colour: int = 0


def lines(
    name: str, drawn: Sequence[Line], percent: bool = False, log_y: bool = False, top: float | None = None,
    wide: bool = False,
) -> str:  # fmt: skip
    """Values over numbers of processes or nodes, doubled from tick to tick."""

    def paint(axes: Axes) -> None:
        for line in drawn:
            colour = MUTED if line.colour < 0 else COLOURS[line.colour % len(COLOURS)]
            style = (0, (4, 3)) if line.dashed else "-"
            marker = "o" if line.dots else ""
            axes.plot(line.x, line.y, color=colour, linewidth=1.5, linestyle=style, marker=marker, markersize=4,
                      label=line.label)  # fmt: skip
            if line.low is not None and line.high is not None:
                axes.vlines(line.x, line.low, line.high, color=colour, linewidth=1)
        ticks = sorted({x for line in drawn for x in line.x})
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if log_y:
            axes.set_yscale("log", base=2)
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(bottom=0, top=top)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f} %" if percent else short(v)))
        bare(axes)
        legend_above(axes, 3 if wide else 2)

    return as_svg(name, (9.6, 3.2) if wide else (4.7, 3.0), paint)


def bars(name: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Stacked horizontal bars: shares of the step by term, a bar for every row."""

    def paint(axes: Axes) -> None:
        labels = list(rows)
        left = [0.0] * len(labels)
        for term, colour in TERM_COLOURS.items():
            values = [rows[label].get(term, 0.0) for label in labels]
            if not any(values):
                continue
            axes.barh(labels, values, left=left, color=colour, height=0.68, label=TERM_LABELS.get(term, term))
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        bare(axes)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.tick_params(axis="y", labelsize=8)
        legend_above(axes, 5)

    return as_svg(name, (9.6, 0.9 + _BAR_INCHES * len(rows)), paint)


def values(name: str, rows: Mapping[str, float], text: Mapping[str, str], one: float | None = None) -> str:
    """Horizontal bars with their values at the end; `one`: a dashed line at this value."""

    def paint(axes: Axes) -> None:
        labels = list(rows)
        axes.barh(labels, list(rows.values()), color=COLOURS[0], height=0.6)
        for place, label in enumerate(labels):
            axes.annotate(text[label], (rows[label], place), (4, 0), textcoords="offset points", va="center",
                          color=INK, fontsize=8)  # fmt: skip
        if one is not None:
            axes.axvline(one, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15 * max([*rows.values(), one or 0.0]))
        bare(axes)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)

    return as_svg(name, (9.6, 0.4 + _BAR_INCHES * len(rows)), paint)


def against(name: str, measured: Sequence[float], predicted: Sequence[float], band: float) -> str:
    """Predicted over measured seconds, with the diagonal and a band of so much around it."""

    def paint(axes: Axes) -> None:
        most = 1.1 * max(*measured, *predicted)
        axes.fill_between([0, most], [0, most * (1 - band)], [0, most * (1 + band)], color=GRID, linewidth=0,
                          label=f"within {100 * band:.0f} %")  # fmt: skip
        axes.plot([0, most], [0, most], color=MUTED, linewidth=1)
        axes.plot(measured, predicted, "o", color=COLOURS[0], markersize=4, label="a point")
        axes.set_xlim(0, most)
        axes.set_ylim(0, most)
        axes.set_xlabel("measured, s", color=INK)
        axes.set_ylabel("predicted, s", color=INK)
        bare(axes)
        legend_above(axes, 2)

    return as_svg(name, (4.7, 3.4), paint)
