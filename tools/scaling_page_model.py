"""The part of scaling.html that is about the model: what was fitted, how far it is off, and what it foretells."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape

from cmpt.monitor.page import plot_figure, section, table
from scaling_extrapolate import LOSSES, Curve, largest_loss, moves, shares_of, takeovers
from scaling_fit import Fit
from scaling_plots import Told, against, areas, changes, over_nodes
from scaling_plots import errors as errors_plot
from scaling_report import BAND, Report
from scaling_study import describe
from scaling_text import bandwidth_text, curve_label, curve_title, digits, processes
from step_model import COMMUNICATION, TERMS, Link

FORETOLD = "Foretold by the fitted model, not measured."
_MOST_NAMED = 5


def milliseconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{digits(1e3 * seconds)} ms" if seconds >= 1e-3 or seconds == 0 else f"{digits(1e6 * seconds)} µs"


def rate_text(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 1000 else f"{per_s:,.1f}"


def drawn(svg: str, title: str, caption: str, wide: bool = False) -> str:
    """A plot on the page, with its title for readers who do not see it; a wide one scrolls where there is no room."""
    told = f'<svg role="img" aria-label="{escape(title)}"' + (' style="min-width: 640px"' if wide else "")
    svg = svg.replace("<svg", told, 1)
    return plot_figure(f'<div class="scroll">{svg}</div>' if wide else svg, title, caption, wide)


def fitted(report: Report) -> str:
    """The model in words with its figures, and how far it is off where it was not fitted."""
    found = report.fit
    assert found is not None
    note = (
        "Measured points are explained by these figures: compute from FLOPs, collectives from latency and bytes, "
        "stragglers from the spread of the ranks. Each is a least-squares fit to the points, or a link's own benchmark."
    )
    rows = [
        (f"<b>{escape(name)}</b><small>{escape(meaning)}</small>", escape(value))
        for name, value, meaning in _parameters(report, found)
    ]
    parts = [table(("parameter", "value"), rows)]
    stages = sorted({stage for _, stage in found.collectives})
    if stages:
        kinds = [kind for kind in COMMUNICATION if any((kind, stage) in found.collectives for stage in stages)]
        cells = [(kind, *(_in_training(found, kind, stage) for stage in stages)) for kind in kinds]
        head = ("collectives", *(f"ZeRO {stage}" for stage in stages))
        told = (
            "What collectives take in training, in units of what latency and bandwidth of the link make of all-reduces "
            "with as many calls and bytes; exposed: the share of that which compute does not hide."
        )
        parts.append(f'<p class="note" style="margin-top: 28px">{told}</p>{table(head, cells)}')
    return section("The fitted model", *parts, note=note) + _held_out(report)


def _in_training(found: Fit, kind: str, stage: int) -> str:
    known = found.collectives.get((kind, stage))
    if known is None:
        return ""
    return f"{known.cost:.2f}" if known.exposed == 1 else f"{100 * known.exposed:.0f} % exposed"


def _parameters(report: Report, found: Fit) -> list[tuple[str, str, str]]:
    """(name, value, meaning)."""
    rows = []
    for ranks, seconds in found.seconds_per_flop.items():
        rate = 1 / seconds
        value = f"{1e-12 * rate:,.1f} TFLOP/s" if rate >= 1e12 else f"{1e-9 * rate:,.1f} GFLOP/s"
        rows.append((f"Compute, {processes(ranks)} a host", value, "of a process, in the towers and the loss"))
    if report.mfu is not None:
        rows.append(("Compute, MFU", f"{report.mfu:.3f}", "of the device's bf16 peak while ranks compute, the median"))
    rows.append(("Compute, constant", milliseconds(found.fixed_s), "of every step, whatever the batch"))
    stages = [("1 and 2", found.sharded_s.get(1, 0.0)), ("3", found.sharded_s.get(3, 0.0))]
    rows += [
        (f"Compute, more at ZeRO {name}", milliseconds(seconds), "of every step with several processes")
        for name, seconds in stages
        if seconds
    ]
    rows.append(("Optimizer, constant", milliseconds(found.optimizer_fixed_s), "of every step"))
    if found.optimizer_sharded_s:
        rows.append(
            ("Optimizer, more with ZeRO", milliseconds(found.optimizer_sharded_s), "of every step, above stage 0")
        )
    per_element = f"{1e9 * found.optimizer_s_per_element:.3g} ns"
    rows.append(("Optimizer, per element", per_element, "for every parameter that a rank steps"))
    for key, link, source in report.links:
        place = {"inside": "inside a host", "between": "between nodes"}[key]
        in_training = "" if link == getattr(found, key) else ", in training"
        rows += _link_rows(f"Link {place}{in_training}", link, source)
    spread = f"{100 * found.straggler_deviation:.1f} %"
    rows.append(("Stragglers", spread, "standard deviation of a rank's compute within a step, of the mean"))
    loader = found.loader_samples_per_s
    told = "never waited for" if loader is None else f"{loader:,.1f} samples/s"
    rows.append(("Loader", told, "of a process, where steps waited for data"))
    return rows


def _link_rows(name: str, link: Link, source: str) -> list[tuple[str, str, str]]:
    return [
        (f"{name}, bandwidth", bandwidth_text(link), source),
        (f"{name}, latency", milliseconds(link.latency_s), "of one round of a collective"),
    ]


def _held_out(report: Report) -> str:
    held = [(sample, error) for sample in report.samples if (error := report.error(sample)) is not None]
    if not held:
        return section("Predicted against measured", note="One point was measured: none could be held out.")
    points: dict[str, list[tuple[float, float]]] = {}
    errors: dict[str, list[tuple[float, float]]] = {}
    for sample, error in held:
        name = sample.record["scaling"] + ("" if sample.work.world_size > 1 else ", one process")
        predicted = sum(report.predicted[sample.name].values())
        points.setdefault(name, []).append((sample.step_s, predicted))
        errors.setdefault(name, []).append((sample.work.world_size, error))
    outside = sorted((pair for pair in held if abs(pair[1]) > BAND), key=lambda pair: -abs(pair[1]))
    note = (
        f"Each point is predicted by a fit to all others: {100 * statistics.median(report.errors):.1f} % off in the "
        f"median, {100 * max(report.errors):.1f} % at worst; {len(held) - len(outside)} of {len(held)} points are "
        f"within {100 * BAND:.0f} %."
    )
    if outside:
        told = "; ".join(f"{sample.name} {100 * error:+.0f} %" for sample, error in outside[:_MOST_NAMED])
        note += f" Outside: {told}" + ("; …" if len(outside) > _MOST_NAMED else "") + "."
    plots = [
        drawn(against("held-out", points, BAND), "Step time", "Predicted over measured; a dot is a point."),
        drawn(errors_plot("errors", errors, BAND), "Error", "Over processes; above 0 the model says longer."),
    ]
    return section("Predicted against measured", f'<div class="plots">{"".join(plots)}</div>', note=note)


def extrapolation(report: Report) -> list[str]:
    """Sections of what is foretold; one that says why where collectives were never measured."""
    curves = report.curves
    if not curves:
        return [section("More nodes", note="Only single processes were measured: nothing is known of collectives.")]
    note = (
        "Foretold by the fitted model, not measured. The work of a step at each number of nodes is arithmetic: FLOPs, "
        "the bytes and the number of its collectives. How fast it is done is fitted. Assumed: latency grows with log2 "
        "of the processes, as in a tree, and all nodes are joined as fast as those that were measured."
    )
    note = " ".join([note, *report.caveats])
    parts = []
    lines = [(_told(report, curve), curve) for curve in curves if len(curve.nodes) > 1]
    if lines:
        most = max(sample.work.nodes for sample in report.samples)
        svg = over_nodes("over-nodes", [told for told, _ in lines], most)
        caption = (
            f"Images per second and node over nodes, against one node of {processes(curves[0].ranks_per_node)}. Lines "
            "are foretold by the fitted model, not measured; dots are measured, where one node was measured too."
        )
        parts.append(drawn(svg, "Efficiency over nodes", caption, wide=True))
    for number, (_, curve) in enumerate(lines):
        parts += _of_curve(number, curve)
    nodes = sorted({n for curve in curves for n in curve.nodes})
    rows = [(f"{n:,}", *(_foretold_cell(curve, n) for curve in curves)) for n in nodes]
    numbers = table(("nodes", *map(curve_label, curves)), rows)
    head = ("curve", *LOSSES, "largest at the end")
    return [
        section("More nodes", f'<div class="plots">{"".join(parts)}</div>', note=note),
        section("Which term takes over", table(head, [_takeover(curve) for curve in curves]),
                note="Nodes from which a term is a tenth of the step or more. " + FORETOLD),
        section("Images per second by nodes", numbers, note=f"Small beside it: efficiency. {FORETOLD}"),
    ]  # fmt: skip


def _told(report: Report, curve: Curve) -> Told:
    """With the measured points that lie on the curve, where one node is among them."""
    settings = list(dict.fromkeys(describe(other.settings) for other in report.curves))
    rates = report.measured_on(curve)
    measured = {nodes: rate / nodes / rates[1] for nodes, rate in sorted(rates.items())} if 1 in rates else {}
    efficiency = [curve.efficiency(nodes) for nodes in curve.nodes]
    dashed = curve.scaling == "strong"
    colour = settings.index(describe(curve.settings))
    return Told(curve_label(curve), curve.nodes, efficiency, measured, colour, dashed)


def _of_curve(number: int, curve: Curve) -> Sequence[str]:
    """Where the time would go, and beside it what would change that."""
    last = curve.nodes[-1]
    every = [shares_of(curve.terms(nodes)) for nodes in curve.nodes]
    shares = {term: [of[term] for of in every] for term in TERMS if any(of[term] for of in every)}
    factors = dict(sorted(moves(curve, last).items(), key=lambda pair: -pair[1]))
    what = f"{curve_title(curve).partition('a node, ')[2]}. {FORETOLD}"
    title = f"Images per second at {last:,} nodes: {curve_label(curve)}"
    return (
        drawn(
            areas(f"terms-{number}", curve.nodes, shares),
            f"Share of the step: {curve_label(curve)}",
            "Over nodes; " + what,
        ),
        drawn(changes(f"moves-{number}", factors), title, "How many times as many with one change; " + what),
    )


def _foretold_cell(curve: Curve, nodes: int) -> str:
    if nodes not in curve.nodes:
        return ""
    return f"{rate_text(curve.images_per_s(nodes))} <small>{100 * curve.efficiency(nodes):.0f} %</small>"


def _takeover(curve: Curve) -> Sequence[str]:
    found = takeovers(curve)
    last = curve.nodes[-1]
    term, share = largest_loss(curve, last)
    cells = (f"{nodes:,}" if nodes else "–" for nodes in (found[name] for name in LOSSES))
    return escape(curve_label(curve)), *cells, f"{term} {100 * share:.0f} % at {last:,}"
