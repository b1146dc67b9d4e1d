"""scaling.html: a study on one page that needs nothing else; what is measured and what is foretold stand apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from cmpt.monitor.page import facts, figures, page, plot_figure, section, table
from cmpt.monitor.records import utc_now
from scaling_extrapolate import Curve, largest_loss, moves, shares_of, takeovers
from scaling_fit import Sample
from scaling_plots import Line, against, bars, lines, values
from scaling_report import Report, curve_title, link_text
from scaling_study import describe

BAND = 0.15
_FORETOLD = "Foretold by the fitted model, not measured."


def write_page(report: Report, path: Path) -> Path:
    """Writes the page and returns its path."""
    body = [_head(report)]
    if report.samples:
        body += [_throughput(report), _time(report), _memory(report), _model(report), *_foretold(report)]
    body += [_points(report), _failed(report)]
    path.write_text(page(f"{report.study.name}: scaling", [part for part in body if part]))
    return path


def _head(report: Report) -> str:
    tiles = [(f"{len(report.samples)}", "points measured"), (f"{len(report.failed)}", "starts that failed")]
    if report.samples:
        most = max(report.samples, key=lambda s: (s.work.world_size, report.efficiency(s) or 0))
        tiles.append((f"{100 * (report.efficiency(most) or 0):.0f} %", f"efficiency, best at {most.work.world_size} "
                      "processes"))  # fmt: skip
    if report.errors:
        told = f"{100 * statistics.median(report.errors):.1f} %"
        tiles.append((told, f"held-out error, median; {100 * max(report.errors):.1f} % at most"))
    if report.bytes:
        apart = max(found.apart for found in report.bytes.values())
        tiles.append((f"{100 * apart:.2f} %", "most that counted bytes differ from arithmetic"))
    pairs = [("Recipe", report.study.recipe), ("Written", utc_now()[:16].replace("T", " ") + " UTC")]
    if report.samples:
        record = report.samples[0].record
        pairs += [("Device", str(record["device"])), ("Revision", str(record["revision"]))]
    hosts = sorted({host for record in report.records for host in record["hosts"]})
    pairs.append(("Hosts", ", ".join(hosts) or "one"))
    lead = "How long a step takes on more processes, where its time goes, and what a model fitted to it foretells."
    title = f'<p class="kicker">Scaling study</p><h1>{escape(report.study.name)}</h1><p class="lead">{lead}</p>'
    empty = "" if report.samples else '<p class="note">No point was measured: there is nothing to draw.</p>'
    return title + figures(tiles) + facts(pairs) + empty


def _series(report: Report) -> dict[str, list[Sample]]:
    """Points that belong on one line, by what they have in common."""
    found: dict[str, list[Sample]] = {}
    for sample in report.samples:
        record = sample.record
        weak = record["scaling"] == "weak"
        size = f"{record['batch_size'] // record['world_size']} each" if weak else f"batch {record['batch_size']:,}"
        name = f"{record['scaling']}, {size}" + (f", {describe(record['settings'])}" if record["settings"] else "")
        found.setdefault(name, []).append(sample)
    return {name: sorted(of, key=lambda s: s.work.world_size) for name, of in found.items()}


def _throughput(report: Report) -> str:
    """Two plots for weak and two for strong scaling; settings share them."""
    drawn = []
    series = _series(report)
    for scaling in ("weak", "strong"):
        chosen = {name.partition(", ")[2]: of for name, of in series.items() if of[0].record["scaling"] == scaling}
        if not chosen:
            continue
        rates, shares = [], []
        for number, (name, of) in enumerate(chosen.items()):
            x = [s.work.world_size for s in of]
            rate = [s.record["batch_size"] / s.step_s for s in of]
            low = [s.record["batch_size"] / s.record["step_high_s"] for s in of]
            high = [s.record["batch_size"] / s.record["step_low_s"] for s in of]
            rates.append(Line(name, x, rate, low, high, colour=number))
            shares.append(Line(name, x, [report.efficiency(s) or 0.0 for s in of], colour=number))
        first = rates[0]
        linear = Line("linear", first.x, [first.y[0] * x / first.x[0] for x in first.x], dots=False, dashed=True,
                      colour=-1)  # fmt: skip
        ones = Line("linear", first.x, [1.0 for _ in first.x], dots=False, dashed=True, colour=-1)
        pairs = "; so many pairs for each process" if scaling == "weak" else ""
        caption = f"Measured, over processes{pairs}; bars: slowest to fastest step."
        svg = lines(f"{scaling}-rate", [*rates, linear], log_y=len(first.x) > 2)
        drawn.append(plot_figure(svg, f"Images per second, {scaling} scaling", caption))
        svg = lines(f"{scaling}-share", [*shares, ones], percent=True)
        drawn.append(plot_figure(svg, f"Efficiency, {scaling} scaling", "Images per second and process, against the "
                                 "fewest processes measured."))  # fmt: skip
    return section("Throughput", f'<div class="plots">{"".join(drawn)}</div>')


def _time(report: Report) -> str:
    rows = {sample.name: shares_of(sample.terms_s) for sample in report.samples}
    note = (
        "Of a step, measured, the mean over ranks. A collective takes what the rank that came last waited in it; what "
        "the others waited longer is stragglers. Compute holds masking, forward and backward pass, and the loss."
    )
    figure = plot_figure(bars("time", rows), "Share of the step by term", "Every point.", wide=True)
    return section("Where the time goes", f'<div class="plots">{figure}</div>', note=note)


def _memory(report: Report) -> str:
    peaks = {sample.name: max(sample.record["peak_memory_bytes"]) / 2**30 for sample in report.samples}
    text = {name: f"{value:.2f} GiB" for name, value in peaks.items()}
    figure = plot_figure(values("memory", peaks, text), "Peak memory of a rank", "The rank that took most; on a CPU "
                         "of the whole process, interpreter and libraries included.", wide=True)  # fmt: skip
    rows = []
    for name, sent in report.bytes.items():
        record = next(sample.record for sample in report.samples if sample.name == name)
        cells = [f"{1e-6 * sent.counted[kind]:,.2f} <small>{1e-6 * sent.expected[kind]:,.2f}</small>"
                 for kind in sent.expected]  # fmt: skip
        wire = f"{1e-6 * record['wire_bytes']:,.2f}" if record["nodes"] > 1 else ""
        rows.append((escape(name), *cells, f"{100 * sent.apart:.3f} %", wire))
    head = ("point", "features", "gradients", "parameters", "most apart", "on the wire")
    note = (
        "MB that a rank sends in a step, in the ring count: counted, and small beside it by arithmetic. On the wire: "
        "what the network interfaces of a host sent in the same steps, headers and watchdog included."
    )
    moved = section("Bytes", table(head, rows), note=note) if rows else ""
    return section("Memory", f'<div class="plots">{figure}</div>') + moved


def _model(report: Report) -> str:
    found = report.fit
    assert found is not None
    pairs = []
    for ranks, seconds in found.seconds_per_flop.items():
        pairs.append((f"compute, {ranks} processes a node", f"{1e-9 / seconds:,.1f} GFLOP/s of a process"))
    pairs.append(("compute, constant", f"{1000 * found.fixed_s:.1f} ms a step, with several processes "
                  f"{1000 * found.sharded_s.get(1, 0):.1f} ms more at ZeRO 1 and 2, "
                  f"{1000 * found.sharded_s.get(3, 0):.1f} ms at 3"))  # fmt: skip
    per = found.optimizer_s_per_element
    pairs.append(("optimizer", f"{1000 * found.optimizer_fixed_s:.1f} ms, and {1e9 * per:.2f} ns for every element"))
    for name, link in (("link inside a node", found.inside), ("link between nodes", found.between)):
        if link.bytes_per_s != float("inf"):
            pairs.append((name, f"{link_text(link)} (all-reduce, benchmark of collectives)"))
    for name, link in report.training_links.items():
        pairs.append((f"the same {name}", f"{link_text(link)} (training's own all-reduces)"))
    pairs.append(("stragglers", f"compute of the ranks spreads by {100 * found.straggler_deviation:.1f} % of its mean"))
    loader = found.loader_samples_per_s
    pairs.append(("loader", "never waited for" if loader is None else f"{loader:,.1f} samples/s of a process"))
    if found.exposed:
        shares = ", ".join(f"{kind} {share:.2f} at ZeRO {stage}" for (kind, stage), share in found.exposed.items())
        pairs.append(("collectives against their link", shares))
    held = [s for s in report.samples if report.error(s) is not None]
    drawn = ""
    if held:
        predicted = [sum(report.predicted[s.name].values()) for s in held]
        svg = against("held-out", [s.step_s for s in held], predicted, BAND)
        caption = "Seconds of a step; each point predicted by a fit to all other points."
        drawn = f'<div class="plots">{plot_figure(svg, "Predicted against measured", caption)}</div>'
    note = "Compute from FLOPs, collectives from latency and bytes, stragglers from the spread of the ranks."
    return section("The fitted model", facts(pairs), drawn, note=note)


def _foretold(report: Report) -> list[str]:
    """A section for the extrapolation; nothing where collectives were never measured."""
    curves = report.curves
    if not curves:
        return [section("More nodes", note="Only single processes were measured: nothing is known of collectives.")]
    shown = []
    for scaling in ("weak", "strong"):
        of = [curve for curve in curves if curve.scaling == scaling]
        if of:
            drawn = [
                Line(f"ZeRO {c.zero_stage}", c.nodes, [c.efficiency(n) for n in c.nodes], colour=number)
                for number, c in enumerate(of)
            ]
            svg = lines(f"foretold-{scaling}", drawn, percent=True, top=1.05)
            title = curve_title(of[0]).replace(f", ZeRO {of[0].zero_stage}", "")
            shown.append(plot_figure(svg, f"Efficiency over nodes, {scaling} scaling", f"{title}. {_FORETOLD}"))
    for curve in curves:
        rows = {f"{n:,} node{'s' if n > 1 else ''}": shares_of(curve.terms(n)) for n in curve.nodes}
        name = f"terms-{curve.scaling}-{curve.zero_stage}"
        shown.append(
            plot_figure(bars(name, rows), f"Where the time would go: {curve_title(curve)}", _FORETOLD, wide=True)
        )
        shown.append(_moved(curve))
    head = ("curve", "a tenth of the step or more", "largest loss at the end")
    note = (
        "The work of a step at each number of nodes is arithmetic: FLOPs, bytes of every collective, their number. How "
        "fast it is done is the fitted model's; latency grows with log2 of the processes, as in a tree, and the links "
        "are as fast between all nodes as between those that were measured."
    )
    if report.fit is not None and report.fit.between.bytes_per_s == float("inf"):
        note += " Only one host was measured: its own link stands in for the network between nodes."
    return [
        section("More nodes", f'<div class="plots">{"".join(shown)}</div>', note=note),
        section("Which term takes over", table(head, [_takeover(curve) for curve in curves])),
    ]


def _moved(curve: Curve) -> str:
    last = curve.nodes[-1]
    found = dict(sorted(moves(curve, last).items(), key=lambda pair: -pair[1]))
    text = {name: f"{value:.2f} times" for name, value in found.items()}
    svg = values(f"moves-{curve.scaling}-{curve.zero_stage}", found, text, one=1.0)
    title = f"What would change images per second at {last:,} nodes: {curve_title(curve)}"
    return plot_figure(svg, title, _FORETOLD, wide=True)


def _takeover(curve: Curve) -> tuple[str, str, str]:
    found = [f"{term} from {nodes:,} nodes" for term, nodes in takeovers(curve).items() if nodes]
    term, share = largest_loss(curve, curve.nodes[-1])
    return escape(curve_title(curve)), ", ".join(found) or "none", f"{term}, {100 * share:.1f} %"


def _points(report: Report) -> str:
    if not report.samples:
        return ""
    head = ("point", "images/s", "efficiency", "s/step", "slowest", "fastest", "predicted", "error")
    rows: list[Sequence[Any]] = []
    for sample in report.samples:
        record, error = sample.record, report.error(sample)
        predicted = sum(report.predicted.get(sample.name, {}).values())
        rows.append(
            (
                escape(sample.name),
                f"{record['batch_size'] / sample.step_s:,.1f}",
                f"{100 * (report.efficiency(sample) or 0):.0f} %",
                f"{sample.step_s:.3f}",
                f"{record['step_high_s']:.3f}",
                f"{record['step_low_s']:.3f}",
                f"{predicted:.3f}" if predicted else "",
                "" if error is None else f"{100 * error:+.1f} %",
            )
        )
    return section("All points", table(head, rows), note="Measured; predicted by a fit to the other points.")


def _failed(report: Report) -> str:
    if not report.failed:
        return ""
    rows = [
        (escape(record["point"]), str(record["repeat"] + 1), escape(record["cause"]), escape(record["log"]))
        for record in report.failed
    ]
    items = "".join(
        f"<p><b>{name}</b>, repeat {repeat}: {cause}<br><small>{log}</small></p>" for name, repeat, cause, log in rows
    )  # noqa: E501
    return section("Failed", items)
