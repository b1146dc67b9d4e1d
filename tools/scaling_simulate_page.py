"""What a simulation says, as text and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from cmpt.monitor.page import facts, figures, page, plot_figure, section, table
from cmpt.monitor.plots import COLOURS, Curve, Plot, as_svg, bare, draw, legend_above
from scaling_faults import ALIKE, DAY_S, HOUR_S, Faults, Played, daly_wall_s

_EDGES = {
    "shortest": "the shortest that the time to write allows",
    "longest": "the whole run: no checkpoint before its end pays",
}
_WHEN_LOST = {
    "spare": "a spare takes its place",
    "fewer": "fewer nodes go on, at {1:.3g} % of the speed, until it is back after {0:g} h",
    "wait": "the run waits {0:g} h for it",
}


def text(values: dict[str, Any]) -> str:
    lost = {name: days for name, days in values["lost_days"].items() if days}
    low, high = values["as_good_s"]
    lines = [
        f"best interval {seconds(values['best_interval_s'])} s; from {seconds(low)} to {seconds(high)} s less than "
        f"{100 * ALIKE:g} % of the time is lost against it"
        + "".join(f" ({told})" for told in [_EDGES.get(values["at_edge"])] if told),
        f"closed forms, which know no write time, lost or slow nodes: Young {seconds(values['young_interval_s'])} s, "
        f"Daly {seconds(values['daly_interval_s'])} s",
        f"with a checkpoint every {seconds(values['interval_s'])} s: {100 * values['effective']:.2f} % of the time is "
        f"useful (± {100 * values['effective_spread']:.2f} over trials; Daly's formula: "
        f"{100 * values['effective_daly']:.2f} %)",
        f"{values['wall_days']:.2f} days, {values['faults_met']:.1f} faults; lost, in days: "
        + (", ".join(f"{name} {days:.3f}" for name, days in lost.items()) or "nothing"),
    ]
    lines += _left_out(values["left_out"])
    lines += ["", "| seconds between checkpoints | useful |", "|-:|-:|"]
    lines += [f"| {seconds(row['interval_s'])} | {100 * row['useful']:.2f} % |" for row in values["by_interval"]]
    return "\n".join(lines)


def seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _left_out(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each reason."""
    reasons = {row["why"]: [seconds(each["interval_s"]) for each in rows if each["why"] == row["why"]] for row in rows}
    return [f"not played, for {why}: {', '.join(of)} s between checkpoints" for why, of in reasons.items()]


def html(told: dict[str, Any], faults: Faults, played: Played) -> str:
    """One page: the shares over intervals beside the closed form, one played run, where its time went."""
    intervals = [row["interval_s"] for row in told["by_interval"]]
    simulated = Curve("simulated", [i / 60 for i in intervals], [row["useful"] for row in told["by_interval"]])
    plain = replace(faults, when_lost="spare", slow_per_node_s=0.0)
    plainly = "" if faults == plain else ", with spares and no slow nodes"
    formula = Curve(f"Daly's formula{plainly}", simulated.x, [faults.work_s / daly_wall_s(plain, i) for i in intervals])
    shares = over_minutes("shares", [simulated, formula])
    low, high = told["as_good_s"]
    hours = [wall / HOUR_S for wall, _ in played.course]
    course = Plot("course", [Curve("", hours, [done / DAY_S for _, done in played.course])], from_zero=True, wide=True)
    tiles = [
        (f"{100 * told['effective']:.1f} %", "of the time is useful"),
        (f"{told['wall_days']:.1f}", f"days for {faults.work_s / DAY_S:g} days of training"),
        (f"{told['faults_met']:.0f}", "faults"),
        (
            _minutes(told["best_interval_s"]),
            f"best between checkpoints; {_minutes(low)} to {_minutes(high)} are as good",
        ),
        (_minutes(told["daly_interval_s"]), "Daly's formula"),
    ]
    assumed = [
        ("nodes", f"{faults.nodes}"),
        (
            "fault of a node",
            f"every {faults.node_mtbf_s / HOUR_S:,.0f} h, of the run every {faults.mtbf_s / HOUR_S:.1f} h",
        ),
        ("checkpoint", f"holds training up for {faults.stall_s:g} s, can be used after {faults.write_s:g} s"),
        ("restart", f"{faults.restart_s:g} s"),
        ("a lost node", _WHEN_LOST[faults.when_lost].format(faults.repair_s / HOUR_S, 100 * faults.share_meanwhile)),
    ]
    rows = [
        (name, f"{days:.3f}", f"{100 * days / told['wall_days']:.2f} %") for name, days in told["lost_days"].items()
    ]
    left_out = [f"{line.capitalize()}." for line in _left_out(told["left_out"])]
    note = " ".join([f"Of all {told['trials']} trials together.", *left_out])
    course_note = (
        f"The first trial of seed {told['seed']}: days of training done over hours; a fall is work that is done again."
    )
    drawn = [
        plot_figure(shares, "Useful share over minutes between checkpoints", note, wide=True),
        plot_figure(draw(course), "One run", course_note, wide=True),
    ]
    body = [
        '<p class="kicker">Simulated, not measured</p><h1>A run with faults</h1>',
        figures(tiles),
        facts(assumed),
        section("Checkpoints", f'<div class="plots">{"".join(drawn)}</div>'),
        section("Where the time goes", table(("lost by", "days", "of all"), rows), note="Mean over trials."),
    ]
    return page("A run with faults", body)


def over_minutes(name: str, curves: Sequence[Curve]) -> str:
    """Shares over minutes between checkpoints, each axis mark ten times the one before."""

    def paint(axes: Axes) -> None:
        for curve, colour in zip(curves, COLOURS, strict=False):
            axes.plot(
                curve.x,
                [y or 0.0 for y in curve.y],
                color=colour,
                linewidth=1.6,
                marker="o",
                markersize=3,
                label=curve.label,
            )
        bare(axes)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))
        legend_above(axes)

    return as_svg(name, (9.6, 2.9), paint)


def _minutes(interval_s: float) -> str:
    return f"{interval_s / 60:.0f} min" if interval_s >= 600 else f"{seconds(interval_s)} s"
