"""What a simulation says, as text and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from cmpt.monitor.page import facts, figures, page, plot_figure, section, table
from cmpt.monitor.plots import COLOURS, GRID, Curve, Plot, as_svg, bare, draw, legend_above, short
from scaling_faults import ALIKE, DAY_S, HOUR_S, Faults, Played, expected_wall_s

_EDGES = {
    "shortest": "the shortest that the time to write allows",
    "longest": "the whole run: no checkpoint before its end pays",
}
_WHEN_LOST = {
    "spare": "a spare takes its place",
    "fewer": "fewer nodes go on, with one lost at {1:.3g} % of the speed, until it is back after {0:g} h",
    "wait": "the run waits {0:g} h for it",
}


def text(values: dict[str, Any]) -> str:
    lost = {name: days for name, days in values["lost_days"].items() if days}
    low, high = values["as_good_s"]
    share = values["effective_closed_form"]
    formula = "" if share is None else f"; closed form: {100 * share:.2f} %"
    lines = [
        f"best interval {seconds(values['best_interval_s'])} s; from {seconds(low)} to {seconds(high)} s less than "
        f"{100 * ALIKE:g} % of the time is lost against it"
        + "".join(f" ({told})" for told in [_EDGES.get(values["at_edge"])] if told),
        f"closed forms, which know no absent or slow nodes: Young {seconds(values['young_interval_s'])} s, "
        f"Daly {seconds(values['daly_interval_s'])} s",
        f"with a checkpoint every {seconds(values['interval_s'])} s: {100 * values['effective']:.2f} % of the time is "
        f"useful (± {100 * values['effective_spread']:.2f} over trials{formula})",
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
    simulated = [row["useful"] for row in told["by_interval"]]
    formula = [faults.work_s / expected_wall_s(faults, i) for i in intervals] if faults.has_closed_form else None
    low, high = told["as_good_s"]
    minutes = [interval / 60 for interval in intervals]
    shares = over_minutes("shares", minutes, simulated, formula, (low / 60, high / 60))
    days = [wall / DAY_S for wall, _ in played.course]
    hours = [(wall - done) / HOUR_S for wall, done in played.course]
    course = Plot("course", [Curve("", days, hours)], from_zero=True)
    tiles = [
        (f"{100 * told['effective']:.1f} %", "of the time is useful"),
        (f"{told['wall_days']:.1f}", f"days for {faults.work_s / DAY_S:g} days of training"),
        (f"{told['faults_met']:.1f}", "faults"),
        (
            _minutes(told["best_interval_s"]),
            f"best between checkpoints; {_minutes(low, high)} to {_minutes(high)} are as good",
        ),
        (_minutes(told["interval_s"]), "between checkpoints here"),
    ]
    if faults.has_closed_form:
        tiles.append((_minutes(told["daly_interval_s"]), "by Daly's formula"))
    assumed = [
        ("nodes", f"{faults.nodes}"),
        (
            "fault of a node",
            f"every {faults.node_mtbf_s / HOUR_S:,.0f} h, of the run every {faults.mtbf_s / HOUR_S:.1f} h",
        ),
        ("checkpoint", f"holds training up for {faults.stall_s:g} s, can be used after {faults.write_s:g} s"),
        ("restart", f"{faults.restart_s:g} s"),
        ("a lost node", _WHEN_LOST[faults.when_lost].format(faults.repair_s / HOUR_S, 100 * faults.share(1))),
    ]
    if faults.has_stragglers:
        spells = f"{faults.slow_per_node_s * DAY_S:g} times a day for {_minutes(faults.slow_length_s)}"
        assumed.append(("a slow node", f"{spells} a step takes {faults.slow_factor:g} times as long"))
    rows = [
        (name, f"{lost:.3f}", f"{100 * lost / told['wall_days']:.2f} %")
        for name, lost in told["lost_days"].items()
        if lost
    ]
    left_out = [f"{line.capitalize()}." for line in _left_out(told["left_out"])]
    note = " ".join([f"Grey: less than {100 * ALIKE:g} % of the time is lost against the best.", *left_out])
    lost_note = f"The first trial of seed {told['seed']}: hours lost so far over days; a fault is a jump."
    drawn = [
        plot_figure(shares, "Useful share over minutes between checkpoints", f"Of {told['trials']} trials together."),
        plot_figure(draw(course), "One run", lost_note),
    ]
    body = [
        '<p class="kicker">Simulated, not measured</p><h1>A run with faults</h1>',
        figures(tiles),
        facts(assumed),
        section("Checkpoints", f'<div class="plots">{"".join(drawn)}</div>', note=note),
        section("Where the time goes", table(("lost by", "days", "of all"), rows), note="Mean over trials."),
    ]
    return page("A run with faults", body)


def over_minutes(
    name: str,
    minutes: Sequence[float],
    simulated: Sequence[float],
    formula: Sequence[float] | None,
    as_good: tuple[float, float],
) -> str:
    """Shares over a logarithm of the minutes between checkpoints, `as_good` shaded; what lies far below the best is not
    drawn."""
    best = max(simulated)
    least = best - min(max(12 * (1 - best), 0.01), 0.2)
    shown = [n for n, share in enumerate(simulated) if share >= least]
    x = [minutes[n] for n in shown]

    def paint(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.axvspan(*as_good, color=GRID, linewidth=0)
        if formula is not None:
            axes.plot(x, [formula[n] for n in shown], color=COLOURS[1], linewidth=1.6, label="closed form")
        axes.plot(x, [simulated[n] for n in shown], color=COLOURS[0], linewidth=0.6, marker="o", markersize=3,
                  label="simulated")  # fmt: skip
        bare(axes)
        axes.set_xlim(x[0] / 1.2, x[-1] * 1.2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(short))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
        legend_above(axes, 2)

    return as_svg(name, (4.7, 2.55), paint)


def _minutes(interval_s: float, beside_s: float = 0.0) -> str:
    """In the unit of the longer of the two."""
    if max(interval_s, beside_s) < 600:
        return f"{seconds(interval_s)} s"
    return f"{interval_s / 60:.0f} min" if interval_s >= 600 else f"{interval_s / 60:.1f} min"
