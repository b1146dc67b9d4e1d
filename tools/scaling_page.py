"""scaling.html: a study on one page that needs nothing else; what is measured and what is foretold stand apart."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from cmpt.monitor.page import facts, figures, page, section, table
from cmpt.monitor.records import utc_now
from scaling_extrapolate import shares_of
from scaling_fit import Sample
from scaling_page_model import drawn, extrapolation, fitted, milliseconds, rate_text
from scaling_plots import Line, Row, bars, lines, values
from scaling_read import MEASURED_TERMS
from scaling_report import BYTES, Report
from scaling_study import describe
from scaling_text import bandwidth_text

_MOST_HOSTS = 8
_MOST_MODELLED = 6
"""Settings in a plot whose fitted model can still be told apart from what was measured."""

Groups = Mapping[tuple[str, int], Mapping[str, Sequence[Sample]]]
"""Points by (scaling, size), the size being pairs per process or the global batch, then by settings."""


def write_page(report: Report, path: Path) -> Path:
    """Writes the page and returns its path."""
    groups = grouped(report.samples)
    body = [_head(report, groups)]
    if report.samples:
        body += [_throughput(report, groups), _time(groups), _memory(groups), _bytes(report, groups), fitted(report)]
        body += [*extrapolation(report), _points(report, groups)]
    body += [_failed(report), _foot(report)]
    path.write_text(page(f"{report.study.name}: how it scales", [part for part in body if part]))
    return path


def grouped(samples: Iterable[Sample]) -> Groups:
    found: dict[tuple[str, int], dict[str, list[Sample]]] = {}
    for sample in samples:
        settings = found.setdefault((sample.record["scaling"], sample.size), {})
        settings.setdefault(describe(sample.record["settings"]) or "the recipe", []).append(sample)
    return {
        group: {name: sorted(of, key=lambda sample: sample.work.world_size) for name, of in sorted(settings.items())}
        for group, settings in sorted(found.items(), key=lambda item: (item[0][0] != "weak", item[0][1]))
    }


def _group_name(group: tuple[str, int]) -> str:
    scaling, size = group
    return f"Weak scaling, {size:,} pairs per process" if scaling == "weak" else f"Strong scaling, batch {size:,}"


def _short_name(group: tuple[str, int]) -> str:
    scaling, size = group
    return f"weak, {size:,} pairs each" if scaling == "weak" else f"strong, batch {size:,}"


def _scales(settings: Mapping[str, Sequence[Sample]]) -> bool:
    """Whether there is anything to draw over numbers of processes."""
    return len({sample.work.world_size for of in settings.values() for sample in of}) > 1


def _processes(sample: Sample) -> str:
    work = sample.work
    if work.nodes > 1 or sample.record["hosts"]:
        return f"{work.nodes:,} × {work.ranks_per_node}"
    return f"{work.world_size} process{'es' if work.world_size > 1 else ''}"


def _label(sample: Sample) -> str:
    settings = describe(sample.record["settings"])
    return _processes(sample) + (f", {settings}" if settings else "")


def _head(report: Report, groups: Groups) -> str:
    study = report.study
    failed = len(report.failed)
    measured = len(report.samples)
    tiles = [(f"{measured}", f"point{'' if measured == 1 else 's'} measured" + ("" if failed else ", none failed"))]
    if failed:
        tiles.append((f"{failed}", f"start{'' if failed == 1 else 's'} failed, see the end of the page"))
    if report.missing:
        tiles.append((f"{report.missing}", f"start{'' if report.missing == 1 else 's'} missing: the study is not over"))
    scaled = [s for of in groups.values() if _scales(of) for points in of.values() for s in points]
    if scaled:
        most = max(scaled, key=lambda s: (s.work.world_size, report.efficiency(s) or 0))
        told = f"best efficiency at {most.work.world_size:,} processes: {most.record['scaling']} scaling"
        settings = describe(most.record["settings"])
        tiles.append((f"{100 * (report.efficiency(most) or 0):.0f} %", told + (f", {settings}" if settings else "")))
    if report.errors:
        worst = f"median error of the model on held-out points; {100 * max(report.errors):.1f} % at worst"
        tiles.append((f"{100 * statistics.median(report.errors):.1f} %", worst))
    tiles += _link_tile(report)
    if report.bytes:
        apart = max(sent.apart for sent in report.bytes.values())
        tiles.append((f"{100 * apart:.2f} %", "largest gap between bytes counted and bytes by arithmetic"))
    pairs = [("Recipe", study.recipe)]
    if report.samples:
        pairs += [(name, _each(report, key)) for name, key in (("Device", "device"), ("Revision", "revision"))]
    pairs += [("Ran on", _hosts(report)), ("Of each point", _of_each_point(report))]
    pairs.append(("Written", utc_now()[:16].replace("T", " ") + " UTC"))
    lead = "How long a step takes on more processes, where its time goes, and what a model fitted to it foretells."
    title = f'<p class="kicker">Scaling study</p><h1>{escape(study.name)}</h1><p class="lead">{lead}</p>'
    empty = "" if report.samples else '<p class="note">No point was measured: there is nothing to draw.</p>'
    return title + figures(tiles) + facts(pairs) + empty


def _each(report: Report, key: str) -> str:
    return ", ".join(sorted({str(sample.record[key]) for sample in report.samples}))


def _hosts(report: Report) -> str:
    hosts = list(dict.fromkeys(host for record in report.records for host in record["hosts"]))
    counts = sorted({record["world_size"] for record in report.records})
    processes = f"{', '.join(map(str, counts))} process{'' if counts == [1] else 'es'}"
    if not hosts:
        return f"one host, {processes}"
    shown = hosts if len(hosts) <= _MOST_HOSTS else [*hosts[:3], "…", hosts[-1]]
    return f"{len(hosts)} host{'s' if len(hosts) > 1 else ''} ({', '.join(shown)}), {processes}"


def _of_each_point(report: Report) -> str:
    study = report.study
    told = f"{study.measured_steps} steps after {study.warmup_steps} that are not measured; means over the middle half"
    return told + (f"; started {study.repeats} times, the middle one counts" if study.repeats > 1 else "")


def _link_tile(report: Report) -> list[tuple[str, str]]:
    """Of the slowest kind of link that was measured."""
    if report.fit is None:
        return []
    for place, name, link in (
        ("between nodes", "between", report.fit.between),
        ("between the processes of a host", "inside", report.fit.inside),
    ):
        if link.bytes_per_s != float("inf"):
            trained = report.training_links.get(name) == link
            source = "from training's all-reduces" if trained else "of an all-reduce alone"
            return [(bandwidth_text(link), f"bandwidth {place}, {source}")]
    return []


def _throughput(report: Report, groups: Groups) -> str:
    """Two plots for each size; settings share them, and their colours are the same in all."""
    colours = _colours(groups)
    plots, alone = [], {}
    for group, settings in groups.items():
        name, key = _group_name(group), f"{group[0]}-{group[1]}"
        if not _scales(settings):
            alone[name] = [
                (_label(s), s.images_per_s, rate_text(s.images_per_s)) for of in settings.values() for s in of
            ]
            continue
        rates, shares = [], []
        for setting, of in settings.items():
            x = [s.work.world_size for s in of]
            rates.append(
                Line(
                    setting,
                    x,
                    [s.images_per_s for s in of],
                    [s.record["batch_size"] / s.record["step_high_s"] for s in of],
                    [s.record["batch_size"] / s.record["step_low_s"] for s in of],
                    _modelled(report, of) if len(settings) <= _MOST_MODELLED else None,
                    colours[setting],
                )
            )
            first, modelled = rates[-1].y[0] / x[0], rates[-1].model
            relative = modelled and [rate / count / first for rate, count in zip(modelled, x, strict=True)]
            efficiency = [report.efficiency(s) or 0.0 for s in of]
            shares.append(Line(setting, x, efficiency, model=relative, colour=colours[setting]))
        counts = sorted({x for line in rates for x in line.x})
        least = statistics.fmean(line.y[0] for line in rates if line.x[0] == counts[0]) / counts[0]
        linear = Line("linear", counts, [least * count for count in counts])
        caption = "Over processes. Measured: a step in the mean, bars from the slowest to the fastest one."
        svg = lines(f"rate-{key}", rates, linear, log_y=counts[-1] > 4 * counts[0])
        plots.append(drawn(svg, f"Images per second: {_short_name(group)}", caption))
        caption = "Images per second and process, against the fewest processes measured with the same settings."
        svg = lines(f"share-{key}", shares, Line("linear", counts, [1.0] * len(counts)), percent=True)
        plots.append(drawn(svg, f"Efficiency: {_short_name(group)}", caption))
    told = "One number of processes was measured: this study says nothing on scaling yet."
    if plots:
        told = (
            "Weak scaling gives every process as many pairs, strong scaling shares one batch among them. Dots are "
            "measured; crosses, where there is room for them, are what the model says that was fitted to the dots. "
            "Linear is the mean at the fewest processes, times their number."
        )
    if alone:
        svg = values("rate-alone", alone)
        plots.append(drawn(svg, "Images per second", "Measured, at a single number of processes.", wide=True))
    return section("Throughput", f'<div class="plots">{"".join(plots)}</div>', note=told)


def _modelled(report: Report, of: Sequence[Sample]) -> list[float] | None:
    found = report.fit
    return None if found is None else [s.record["batch_size"] / sum(found.terms(s).values()) for s in of]


def _colours(groups: Groups) -> dict[str, int]:
    return {name: number for number, name in enumerate(sorted({name for of in groups.values() for name in of}))}


def _time(groups: Groups) -> str:
    rows = {
        _group_name(group): [
            Row(_label(s), shares_of(s.terms_s), milliseconds(s.step_s)) for of in settings.values() for s in of
        ]
        for group, settings in groups.items()
    }
    note = (
        "Measured, the mean over ranks. Compute is masking, forward and backward pass, and the loss. A collective "
        "takes what the rank that came last waited in it; what the others waited longer for that rank is stragglers. "
        "So collectives stand here as far as compute does not hide them."
    )
    caption = (
        "Every measured point: nodes × processes, or the processes of one host. Numbers in the bars are per cent, "
        "those at their ends the step."
    )
    plot = drawn(bars("time", rows, percent=True), "Share of the step by term", caption, wide=True)
    return section("Where the time goes", f'<div class="plots">{plot}</div>', note=note)


def _memory(groups: Groups) -> str:
    colours = _colours(groups)
    plots, alone = [], {}
    for group, settings in groups.items():
        name = _group_name(group)
        peaks = {setting: [[peak / 2**30 for peak in s.record["peak_memory_bytes"]] for s in of]
                 for setting, of in settings.items()}  # fmt: skip
        if not _scales(settings):
            alone[name] = [
                (_label(s), max(peak), f"{max(peak):.2f} GiB")
                for setting, of in settings.items()
                for s, peak in zip(of, peaks[setting], strict=True)
            ]
            continue
        of_settings = [
            Line(
                setting,
                [s.work.world_size for s in of],
                [max(peak) for peak in peaks[setting]],
                [min(peak) for peak in peaks[setting]],
                [max(peak) for peak in peaks[setting]],
                colour=colours[setting],
            )
            for setting, of in settings.items()
        ]
        svg = lines(f"memory-{group[0]}-{group[1]}", of_settings)
        caption = "Over processes. Measured: the rank that took most, and down to the one that took least."
        plots.append(drawn(svg, f"Peak GiB of a rank: {_short_name(group)}", caption))
    if alone:
        caption = "Measured: the rank that took most."
        plots.append(drawn(values("memory-alone", alone), "Peak memory of a rank", caption, wide=True))
    note = "On a GPU what PyTorch allocated; on a CPU the whole process, interpreter and libraries included."
    return section("Memory", f'<div class="plots">{"".join(plots)}</div>', note=note)


def _bytes(report: Report, groups: Groups) -> str:
    rows: dict[str, list[Row]] = {}
    cells: list[Sequence[str]] = []
    for group, settings in groups.items():
        for sample in (s for of in settings.values() for s in of if s.name in report.bytes):
            sent = report.bytes[sample.name]
            counted = {kind: 1e-6 * sent.counted[kind] for kind in BYTES}
            expected = 1e-6 * sum(sent.expected.values())
            row = Row(_label(sample), counted, f"{_megabytes(sum(counted.values()))} MB", expected)
            rows.setdefault(_group_name(group), []).append(row)
            both = (
                f"{_megabytes(counted[kind])} <small>{_megabytes(1e-6 * sent.expected[kind])}</small>" for kind in BYTES
            )
            wire = _megabytes(1e-6 * sample.record["wire_bytes"]) if sample.record["nodes"] > 1 else ""
            cells.append((escape(sample.name), *both, f"{100 * sent.apart:.3f} %", wire))
    if not rows:
        return section("Bytes", note="No point had several processes: nothing was sent.")
    note = "What a rank sends in a step, in the ring count. The line across a bar is what arithmetic gives."
    svg = bars("bytes", rows, percent=False, mark="by arithmetic")
    caption = "Counted in training, at every point of several processes."
    plot = drawn(svg, "MB that a rank sends in a step, by kind", caption, wide=True)
    head = ("point", *BYTES, "most apart", "on the wire")
    told = (
        "MB counted, and small beside it by arithmetic. On the wire: what the network interfaces of a host sent "
        "in the same steps, headers and the watchdog included."
    )
    folded = (
        f"<details><summary>Every point <span>counted, by arithmetic, on the wire</span></summary>"
        f'<p class="note">{told}</p>{table(head, cells)}</details>'
    )
    return section("Bytes", f'<div class="plots">{plot}</div>', folded, note=note)


def _megabytes(count: float) -> str:
    return f"{count:,.0f}" if count >= 1000 else f"{count:.2f}"


def _points(report: Report, groups: Groups) -> str:
    rates: list[Sequence[str]] = []
    terms: list[Sequence[str]] = []
    for group, settings in groups.items():
        for rows in (rates, terms):
            rows.append((escape(_group_name(group)),))
        for sample in (s for of in settings.values() for s in of):
            record, error = sample.record, report.error(sample)
            predicted = sum(report.predicted.get(sample.name, {}).values())
            rates.append(
                (
                    escape(sample.name),
                    rate_text(sample.images_per_s),
                    f"{100 * (report.efficiency(sample) or 0):.1f} %",
                    f"{1000 * sample.step_s:,.1f}",
                    f"{1000 * record['step_low_s']:,.1f} to {1000 * record['step_high_s']:,.1f}",
                    f"{1000 * predicted:,.1f}" if predicted else "",
                    "" if error is None else f"{100 * error:+.1f} %",
                    f"{max(record['peak_memory_bytes']) / 2**30:.2f}",
                )
            )
            of_terms = (f"{1000 * sample.terms_s[term]:,.1f}" for term in MEASURED_TERMS)
            terms.append((escape(sample.name), *of_terms))
    head = ("point", "images/s", "efficiency", "ms a step", "fastest to slowest", "predicted", "error", "GiB")
    note = "Measured, as in points.csv. Predicted: by a fit to all other points. GiB: of the rank that took most."
    by_term = f"<h2>Milliseconds of a step by term</h2>{table(('point', *MEASURED_TERMS), terms)}"
    return section("All points", table(head, rates), note=note) + f"<section>{by_term}</section>"


def _failed(report: Report) -> str:
    if not report.failed:
        return ""
    items = [
        f"<p><b>{escape(record['point'])}</b>, start {record['repeat'] + 1}<br>{escape(record['cause'])}<br>"
        f"<code>{escape(str(record['log']))}</code></p>"
        for record in report.failed
    ]
    note = "Starts that ended without a measurement, with the cause and the log. Nothing above counts them."
    return section("Failed", *items, note=note)


def _foot(report: Report) -> str:
    folder = escape(report.study.name)
    return f"<footer>Written by tools/scaling.py; points.csv and fit.json of {folder} hold the same figures.</footer>"
