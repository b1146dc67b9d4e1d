"""The plots of scaling.html, in the look of a run's report (cmpt/monitor/plots.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from cmpt.monitor.plots import COLOURS, GRID, INK, MUTED, PAPER, as_svg, bare, legend_above, short
from step_model import TERMS

# One colour for each term, wherever it is drawn; readable on light and on dark. Compute is blue, communication warm.
TERM_COLOURS = dict(
    zip(
        TERMS,
        ("#3f7be8", "#8db4fa", "#848d9b", "#e8833a", "#d9486a", "#a55fd6", "#c9a227", "#1fa38a", "#7cbf3f"),
        strict=True,
    )
)
TERM_LABELS = {"features": "features (loss gather)", "data": "data wait"}
_MORE_COLOURS = (*COLOURS, "#c2417c", "#0e94ad", "#9a8420", "#6d7787")
_DASHES: tuple[tuple[float, tuple[float, ...]], ...] = ((0, ()), (0, (5, 2)), (0, (1.5, 1.5)))
_NARROW, _WIDE = 4.7, 9.6
_ROW_INCHES = 0.235
_LEAST_SHARE = 0.055
"""Of a bar or an area: the least that has room for a label."""


@dataclass(frozen=True)
class Line:
    """Measured values, a dot each."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    """With `high`: the range of each point."""
    high: Sequence[float] | None = None
    model: Sequence[float] | None = None
    """What the fitted model says at the same places."""
    colour: int = 0


@dataclass(frozen=True)
class Row:
    label: str
    parts: Mapping[str, float]
    end: str
    """Written at the bar's end."""
    mark: float | None = None
    """A line across the bar at this value."""


@dataclass(frozen=True)
class Told:
    """A foretold curve: efficiency over nodes, and what was measured of it."""

    label: str
    nodes: Sequence[int]
    efficiency: Sequence[float]
    measured: Mapping[int, float]
    colour: int
    dashed: bool


def lines(
    name: str, drawn: Sequence[Line], linear: Line | None = None, percent: bool = False, log_y: bool = False
) -> str:
    """Values over numbers of processes, doubled from tick to tick; `linear`: a dashed line to compare with."""

    def paint(axes: Axes) -> None:
        for line in drawn:
            colour, dash = _style(line.colour)
            axes.plot(line.x, line.y, color=colour, linewidth=1.5, linestyle=dash, marker="o", markersize=4,
                      label=line.label)  # fmt: skip
            if line.low is not None and line.high is not None:
                axes.vlines(line.x, line.low, line.high, color=colour, linewidth=1.2)
            if line.model is not None:
                axes.plot(line.x, line.model, color=colour, linewidth=1, linestyle=":", marker="x", markersize=5)
        if any(line.model is not None for line in drawn):
            axes.plot([], [], color=MUTED, linewidth=1, linestyle=":", marker="x", markersize=5, label="fitted model")
        if linear is not None:
            axes.plot(linear.x, linear.y, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label=linear.label)
        bare(axes)
        _doubled(axes, sorted({x for line in drawn for x in line.x}))
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(0, 1.08 * max(1.0 if percent else 0.0, axes.get_ylim()[1] / 1.05))
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(_percent if percent else short))
        legend_above(axes, columns)

    columns = 2 if max(len(line.label) for line in drawn) > 16 else 3
    entries = len(drawn) + (linear is not None) + any(line.model is not None for line in drawn)
    return as_svg(name, (_NARROW, 2.5 + 0.16 * -(-entries // columns)), paint)


def bars(name: str, groups: Mapping[str, Sequence[Row]], percent: bool, mark: str = "") -> str:
    """Stacked horizontal bars by term under the heads of their groups; `mark` says what a row's mark is."""
    places = _places({head: len(rows) for head, rows in groups.items()})
    most = max(sum(row.parts.values()) for rows in groups.values() for row in rows) or 1.0

    def paint(axes: Axes) -> None:
        rows = [row for of in groups.values() for row in of]
        heights = [place for of in places.values() for place in of]
        left = [0.0] * len(rows)
        for term, colour in TERM_COLOURS.items():
            parts = [row.parts.get(term, 0.0) for row in rows]
            if not any(parts):
                continue
            axes.barh(heights, parts, left=left, color=colour, edgecolor=PAPER, linewidth=0.5, height=0.78,
                      label=TERM_LABELS.get(term, term))  # fmt: skip
            for part, begin, height in zip(parts, left, heights, strict=True):
                if percent and part >= _LEAST_SHARE:
                    axes.text(begin + part / 2, height, f"{100 * part:.0f}", color=PAPER, fontsize=7, ha="center",
                              va="center_baseline")  # fmt: skip
            left = [a + b for a, b in zip(left, parts, strict=True)]
        marks = [(row.mark, height) for row, height in zip(rows, heights, strict=True) if row.mark is not None]
        if marks:
            low, high = [height - 0.47 for _, height in marks], [height + 0.47 for _, height in marks]
            axes.vlines([value for value, _ in marks], low, high, color=INK, linewidth=1.2, label=mark)
        for end, row, height in zip(left, rows, heights, strict=True):
            axes.annotate(row.end, (1.0 if percent else end, height), (5, 0), textcoords="offset points",
                          va="center_baseline", color=INK, fontsize=8)  # fmt: skip
        _rows(axes, places, [row.label for row in rows])
        axes.set_xlim(0, 1 if percent else most)
        axes.xaxis.set_major_formatter(FuncFormatter(_percent if percent else short))
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        legend_above(axes, 5)

    return as_svg(name, (_WIDE, 0.95 + _ROW_INCHES * sum(len(of) + 1 for of in places.values())), paint)


def values(name: str, groups: Mapping[str, Sequence[tuple[str, float, str]]]) -> str:
    """Horizontal bars of (label, value, text of the value) under the heads of their groups."""
    places = _places({head: len(rows) for head, rows in groups.items()})

    def paint(axes: Axes) -> None:
        rows = [row for of in groups.values() for row in of]
        heights = [place for of in places.values() for place in of]
        axes.barh(heights, [value for _, value, _ in rows], color=COLOURS[0], height=0.7)
        for (_, value, text), height in zip(rows, heights, strict=True):
            axes.annotate(text, (value, height), (5, 0), textcoords="offset points", va="center_baseline", color=INK,
                          fontsize=8)  # fmt: skip
        _rows(axes, places, [label for label, _, _ in rows])
        axes.set_xlim(left=0)
        axes.xaxis.set_visible(False)

    return as_svg(name, (_WIDE, 0.2 + _ROW_INCHES * sum(len(of) + 1 for of in places.values())), paint)


Pairs = Mapping[str, Sequence[tuple[float, float]]]
"""(x, y) by group."""


def against(name: str, points: Pairs, band: float) -> str:
    """Predicted over measured seconds, with the diagonal and a band of so much around it."""
    every = [value for of in points.values() for pair in of for value in pair]
    low, high = min(every) / 1.3, max(every) * 1.3
    log = high / low > 8

    def paint(axes: Axes) -> None:
        ends = [low if log else 0.0, high]
        axes.fill_between(ends, [(1 - band) * end for end in ends], [(1 + band) * end for end in ends], color=GRID,
                          linewidth=0, label=f"within {100 * band:.0f} %")  # fmt: skip
        axes.plot(ends, ends, color=MUTED, linewidth=1)
        _dots(axes, points)
        bare(axes)
        if log:
            axes.set_xscale("log")
            axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            if log:
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_minor_locator(NullLocator())
            else:
                axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
            axis.set_major_formatter(FuncFormatter(short))
        axes.set_xlim(*ends)
        axes.set_ylim(*ends)
        axes.set_xlabel("measured, seconds a step", color=INK)
        axes.set_ylabel("predicted, seconds a step", color=INK)
        legend_above(axes, 2)

    return as_svg(name, (_NARROW, 3.8), paint)


def errors(name: str, points: Pairs, band: float) -> str:
    """Errors, as shares, over numbers of processes, with a band of so much around none."""

    def paint(axes: Axes) -> None:
        bare(axes)
        _doubled(axes, sorted({x for of in points.values() for x, _ in of}))
        axes.axhspan(-band, band, color=GRID, linewidth=0, label=f"within {100 * band:.0f} %")
        axes.axhline(0, color=MUTED, linewidth=1)
        _dots(axes, points)
        most = 1.15 * max(band, *(abs(y) for of in points.values() for _, y in of))
        axes.set_ylim(-most, most)
        axes.grid(visible=False)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+.0f} %" if value else "0 %"))
        axes.set_xlabel("processes", color=INK)
        axes.set_ylabel("predicted against measured", color=INK)
        legend_above(axes, 2)

    return as_svg(name, (_NARROW, 3.8), paint)


def _dots(axes: Axes, points: Pairs) -> None:
    for number, (label, of) in enumerate(points.items()):
        axes.plot(*zip(*of, strict=True), "o", color=_style(number)[0], markersize=4.5, alpha=0.85, label=label)


def over_nodes(name: str, curves: Sequence[Told], most_measured: int) -> str:
    """Efficiency over nodes with a label at the end of every curve; what lies beyond the measured nodes is set off."""

    def paint(axes: Axes) -> None:
        bare(axes)
        _doubled(axes, sorted({n for curve in curves for n in curve.nodes}))
        for curve in curves:
            colour = _style(curve.colour)[0]
            axes.plot(curve.nodes, curve.efficiency, color=colour, linewidth=1.6,
                      linestyle=(0, (5, 2)) if curve.dashed else "-")  # fmt: skip
            if curve.measured:
                axes.plot(list(curve.measured), list(curve.measured.values()), "o", color=colour, markersize=4.5)
        top = 1.08 * max(1.0, *(value for curve in curves for value in (*curve.efficiency, *curve.measured.values())))
        axes.set_ylim(0, top)
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
        axes.axvline(most_measured, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        one = "one node was" if most_measured == 1 else f"{most_measured:,} nodes were"
        axes.annotate(
            f"{one} measured", (most_measured, 0), (4, 5), textcoords="offset points", color=MUTED, fontsize=8
        )
        for end in {curve.nodes[-1] for curve in curves}:
            of = [curve for curve in curves if curve.nodes[-1] == end]
            heights = spread([curve.efficiency[-1] for curve in of], 0.055 * top, top)
            for curve, height in zip(of, heights, strict=True):
                text = f"{curve.label}: {100 * curve.efficiency[-1]:.0f} %"
                axes.annotate(text, (end, height), (8, 0), textcoords="offset points", va="center_baseline",
                              color=_style(curve.colour)[0], fontsize=8.5)  # fmt: skip

    return as_svg(name, (_WIDE, 3.6), paint)


def areas(name: str, nodes: Sequence[int], shares: Mapping[str, Sequence[float]]) -> str:
    """Shares of the step by term over nodes, stacked; the large ones have their name at the end."""

    def paint(axes: Axes) -> None:
        axes.stackplot(nodes, list(shares.values()), colors=[TERM_COLOURS[term] for term in shares], edgecolor=PAPER,
                       linewidth=0.5)  # fmt: skip
        bare(axes)
        _doubled(axes, nodes if len(nodes) < 8 else nodes[::-2])
        axes.set_xlim(nodes[0], nodes[-1])
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
        axes.grid(visible=False)
        below, labels = 0.0, []
        for term, of in shares.items():
            if of[-1] >= _LEAST_SHARE / 2:
                labels.append((term, below + of[-1] / 2, of[-1]))
            below += of[-1]
        heights = spread([middle for _, middle, _ in labels], 0.068, 1.0)
        for (term, _, share), height in zip(labels, heights, strict=True):
            axes.annotate(f"{term} {100 * share:.0f} %", (nodes[-1], height), (5, 0), textcoords="offset points",
                          va="center_baseline", color=TERM_COLOURS[term], fontsize=8)  # fmt: skip

    return as_svg(name, (_NARROW, 2.7), paint)


def changes(name: str, factors: Mapping[str, float]) -> str:
    """By how many times something would rise, a bar for every change with its name above it; now is 1."""

    def paint(axes: Axes) -> None:
        heights = [2.0 * number for number in range(len(factors))]
        better = [factor >= 1.005 for factor in factors.values()]
        axes.barh(heights, list(factors.values()), color=[COLOURS[0] if up else MUTED for up in better], height=0.72)
        for (label, factor), height in zip(factors.items(), heights, strict=True):
            times = f"× {factor:.2f}" if factor >= 0.1 else f"× {factor:.1g}"
            for text, at, place in ((label, (0, height - 0.9), (1, 0)), (times, (factor, height), (5, 0))):
                axes.annotate(text, at, place, textcoords="offset points", va="center_baseline", color=INK, fontsize=8)
        axes.vlines(
            [1.0] * len(heights), [h - 0.4 for h in heights], [h + 0.4 for h in heights], color=INK, linewidth=1
        )
        bare(axes)
        axes.grid(visible=False)
        axes.set_ylim(heights[-1] + 0.8, -1.6)
        axes.set_xlim(0, 1.12 * max(1.0, *factors.values()))
        axes.xaxis.set_visible(False)
        axes.yaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)

    return as_svg(name, (_NARROW, 2.7), paint)


def spread(heights: Sequence[float], apart: float, top: float) -> list[float]:
    """The same heights moved so far that no two are nearer than `apart`, between 0 and `top`; in the order given."""
    order = sorted(range(len(heights)), key=lambda number: heights[number])
    found = [0.0] * len(heights)
    below = -math.inf
    for number in order:
        below = found[number] = max(heights[number], below + apart, apart / 2)
    above = top + apart / 2
    for number in reversed(order):
        above = found[number] = min(found[number], above - apart)
    return found


def _style(number: int) -> tuple[str, tuple[float, tuple[float, ...]]]:
    return _MORE_COLOURS[number % len(_MORE_COLOURS)], _DASHES[number // len(_MORE_COLOURS) % len(_DASHES)]


def _percent(value: float, _: object = None) -> str:
    return f"{100 * value:.0f} %"


def _doubled(axes: Axes, ticks: Sequence[float]) -> None:
    """A binary logarithm along x, with these ticks alone."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.tick_params(axis="x", which="both", length=0, labelcolor=INK, pad=5)


def _places(counts: Mapping[str, int]) -> dict[str, list[int]]:
    """Where the rows of each group stand; a line is left for the group's head."""
    found, place = {}, 0
    for head, count in counts.items():
        found[head] = list(range(place + 1, place + 1 + count))
        place += count + 1
    return found


def _rows(axes: Axes, places: Mapping[str, Sequence[int]], labels: Sequence[str]) -> None:
    heights = [place for of in places.values() for place in of]
    bare(axes)
    axes.spines["bottom"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.set_yticks(heights, labels)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylim(heights[-1] + 0.6, -0.5)
    for head, of in places.items():
        axes.annotate(head, (0, of[0] - 1), (0, 0), ("axes fraction", "data"), "offset points", color=INK, fontsize=8.5,
                      fontweight="bold", va="center_baseline")  # fmt: skip
