"""Curves of a run as inline SVG that takes its colours from the page, so that it is at home on light and dark.

matplotlib writes fixed colours; `_ROLES` maps each of them to a variable of the page's style sheet.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

COLOURS = ("#2f6fde", "#d9730d", "#12946a", "#8a4fd0")
INK, MUTED, GRID, PAPER = "#3a414d", "#7a8290", "#e4e7ec", "#ffffff"
_ROLES = {
    **{colour: f"var(--curve-{number})" for number, colour in enumerate(COLOURS, 1)},
    INK: "var(--ink-soft)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    PAPER: "var(--page)",
}
_MOST_POINTS = 600  # of one curve; more than a column of pixels each only makes the file large


@dataclass(frozen=True)
class Curve:
    label: str  # empty for a curve that needs no legend
    x: Sequence[float]  # steps
    y: Sequence[float | None]  # None where unknown; leaves a gap
    smooth: bool = False  # draw the values faintly and their moving average on top


@dataclass(frozen=True)
class Plot:
    name: str  # unique on the page
    curves: Sequence[Curve]
    percent: bool = False  # values are fractions
    from_zero: bool = False
    log: bool = False
    wide: bool = False  # over the full width of the page
    level: float | None = None  # a dashed horizontal line …
    level_label: str = ""  # … and what it is
    marks: Mapping[float, str] | None = None  # dashed vertical lines: step -> label

    def has_values(self) -> bool:
        """False if there is nothing to draw a line through."""
        return any(sum(value is not None for value in curve.y) > 1 for curve in self.curves)


def draw(plot: Plot) -> str:
    """The plot as an <svg> element. Deterministic."""

    def paint(axes: Axes) -> None:
        for number, curve in enumerate(plot.curves):
            _draw_curve(axes, curve, COLOURS[number % len(COLOURS)])
        _dress(axes, plot)

    return as_svg(plot.name, (9.6, 2.9) if plot.wide else (4.7, 2.55), paint)


def as_svg(name: str, inches: tuple[float, float], paint: Callable[[Axes], None]) -> str:
    """What `paint` draws on empty axes, as an <svg> element in the colours of the page; `name` is unique on it."""
    look: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 9,
        "text.parse_math": False,
    }
    with matplotlib.rc_context(look):
        figure = Figure(figsize=inches, layout="constrained")
        figure.patch.set_alpha(0)
        FigureCanvasSVG(figure)
        paint(figure.add_subplot(facecolor="none"))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return _for_the_page(out.getvalue())


def bare(axes: Axes) -> None:
    """Light grid, no frame, ticks without lines."""
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(axis="both", which="both", length=0, labelcolor=INK, pad=5)


def legend_above(axes: Axes, columns: int = 5) -> None:
    axes.legend(
        frameon=False, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, labelcolor=INK, borderpad=0,
        handlelength=1.4, columnspacing=1.6, borderaxespad=0.2,
    )  # fmt: skip


def _draw_curve(axes: Axes, curve: Curve, colour: str) -> None:
    x = np.asarray(curve.x, dtype=float)
    y = np.array([np.nan if value is None else value for value in curve.y], dtype=float)
    if curve.smooth and len(y) >= 30:
        faint_x, faint_y = _thinned(x, y)
        axes.plot(faint_x, faint_y, color=colour, alpha=0.28, linewidth=0.8)
        y = _moving_average(y, window=max(5, len(y) // 40))
    x, y = _thinned(x, y)
    few = len(x) <= 40
    axes.plot(x, y, color=colour, linewidth=1.6, label=curve.label, marker="o" if few else "", markersize=2.8)


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most `_MOST_POINTS` points, the last one always among them."""
    if len(x) <= _MOST_POINTS:
        return x, y
    chosen = np.unique(np.linspace(0, len(x) - 1, _MOST_POINTS).round().astype(int))
    return x[chosen], y[chosen]


def _moving_average(y: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred, cut off at the ends, over what is known; unknown where nothing is."""
    known = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    centre = np.arange(len(y))
    low, high = np.maximum(centre - window // 2, 0), np.minimum(centre + window // 2 + 1, len(y))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def _dress(axes: Axes, plot: Plot) -> None:
    if plot.log:
        axes.set_yscale("log")
    if plot.level is not None:
        axes.axhline(plot.level, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label=plot.level_label)
    if plot.from_zero:
        axes.set_ylim(bottom=0)
    for step, label in (plot.marks or {}).items():
        axes.axvline(step, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.annotate(
            label, (step, 1), (4, -3), ("data", "axes fraction"), "offset points", color=MUTED, fontsize=8, va="top"
        )
    axes.margins(x=0.01)
    bare(axes)
    axes.xaxis.set_major_locator(MaxNLocator(8 if plot.wide else 5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if plot.percent:
        low, high = axes.get_ylim()
        digits = 0 if high - low > 0.04 else 1 if high - low > 0.004 else 2
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.{digits}f} %"))
    elif not plot.log:
        axes.yaxis.set_major_formatter(FuncFormatter(short))
    if not plot.log:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    if sum(bool(curve.label) for curve in plot.curves) + bool(plot.level_label):
        legend_above(axes)


def short(value: float, _: object = None) -> str:
    """Tick labels: 1.5M, 12,000, 0.25, 5e-04."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:,.4g}M"
    if size >= 1000:
        return f"{value:,.0f}"
    return "0" if size == 0 else f"{value:.4g}" if size >= 1e-3 else f"{value:.1e}"


def _for_the_page(svg: str) -> str:
    """Only the <svg> element, without namespaces, metadata and fixed size; colours and font come from the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", svg)
    svg = re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", svg)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href=", "href=")
    referenced = set(re.findall(r"[(\"]#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in referenced else "", svg)
    svg = re.sub(r"(font(?:-family)?: [\d.]*(?:px)? ?)[^;\"]*sans-serif", r"\1var(--font)", svg)
    for colour, role in _ROLES.items():
        svg = svg.replace(colour, role)
    return svg.strip()
