"""What a simulation says, as text and as a page."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cmpt.monitor.page import facts, figures, page, plot_figure, section, table
from cmpt.monitor.plots import Curve, Plot, draw
from scaling_faults import DAY_S, HOUR_S, Faults, Played, daly_wall_s


def text(values: dict[str, Any]) -> str:
    lost = {name: days for name, days in values["lost_days"].items() if days}
    lines = [
        f"best interval found {values['best_interval_s']:,.0f} s; Young {values['young_interval_s']:,.0f} s, "
        f"Daly {values['daly_interval_s']:,.0f} s",
        f"with a checkpoint every {values['interval_s']:,.0f} s: {100 * values['effective']:.2f} % of the time is "
        f"useful (± {100 * values['effective_spread']:.2f} over trials; Daly's formula: "
        f"{100 * values['effective_daly']:.2f} %)",
        f"{values['wall_days']:.2f} days, {values['faults_met']:.1f} faults; lost, in days: "
        + (", ".join(f"{name} {days:.3f}" for name, days in lost.items()) or "nothing"),
        "",
        "| seconds between checkpoints | useful |",
        "|-:|-:|",
    ]
    lines += [f"| {int(interval):,} | {100 * share:.2f} % |" for interval, share in values["by_interval"].items()]
    return "\n".join(lines)


def html(told: dict[str, Any], faults: Faults, played: Played) -> str:
    """One page: the shares over intervals beside the closed form, one played run, where its time went."""
    intervals = [float(interval) for interval in told["by_interval"]]
    simulated = Curve("simulated", [i / 60 for i in intervals], list(told["by_interval"].values()))
    plain = replace(faults, when_lost="spare", slow_per_node_s=0.0)
    formula = Curve("Daly's formula", simulated.x, [faults.work_s / daly_wall_s(plain, i) for i in intervals])
    shares = Plot("shares", [simulated, formula], percent=True, wide=True)
    hours = [wall / HOUR_S for wall, _ in played.course]
    course = Plot("course", [Curve("", hours, [done / DAY_S for _, done in played.course])], from_zero=True, wide=True)
    tiles = [
        (f"{100 * told['effective']:.1f} %", "of the time is useful"),
        (f"{told['wall_days']:.1f}", f"days for {faults.work_s / DAY_S:g} days of training"),
        (f"{told['faults_met']:.0f}", "faults"),
        (f"{told['best_interval_s'] / 60:.0f} min", "best between checkpoints"),
        (f"{told['daly_interval_s'] / 60:.0f} min", "Daly's formula"),
    ]
    assumed = [
        ("nodes", f"{faults.nodes}"),
        (
            "fault of a node",
            f"every {faults.node_mtbf_s / HOUR_S:,.0f} h, of the run every {faults.mtbf_s / HOUR_S:.1f} h",
        ),
        ("checkpoint", f"holds training up for {faults.stall_s:g} s, can be used after {faults.write_s:g} s"),
        ("restart", f"{faults.restart_s:g} s"),
        ("a lost node", f"{faults.when_lost}; back after {faults.repair_s / HOUR_S:g} h"),
    ]
    rows = [
        (name, f"{days:.3f}", f"{100 * days / told['wall_days']:.2f} %") for name, days in told["lost_days"].items()
    ]
    drawn = [
        plot_figure(draw(shares), "Useful share over minutes between checkpoints", "Mean over trials.", wide=True),
        plot_figure(draw(course), "One run", "Days of training done over hours; a fall is work that is done again.",
                    wide=True),
    ]  # fmt: skip
    body = [
        '<p class="kicker">Simulated, not measured</p><h1>A run with faults</h1>',
        figures(tiles),
        facts(assumed),
        section("Checkpoints", f'<div class="plots">{"".join(drawn)}</div>'),
        section("Where the time goes", table(("lost by", "days", "of all"), rows), note="Mean over trials."),
    ]
    return page("A run with faults", body)
