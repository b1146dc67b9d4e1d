"""A study's report for the console, as CSV and as JSON, and the words that its page shares with it."""

from __future__ import annotations

import csv
import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scaling_extrapolate import Curve, largest_loss, moves, shares_of, takeovers
from scaling_fit import Record, Sample
from scaling_report import BYTES, Report
from scaling_study import describe
from step_model import Link

COLUMNS = (
    "point", "scaling", "nodes", "ranks_per_node", "world_size", "batch_size", "settings", "repeats", "status",
    "images_per_s", "step_s", "efficiency", "compute_s", "optimizer_s", "features_s", "gradients_s", "parameters_s",
    "control_s", "stragglers_s", "data_s", "predicted_step_s", "error", "peak_memory_bytes", "sent_bytes",
    "expected_bytes", "wire_bytes", "cause",
)  # fmt: skip


def text(report: Report) -> str:
    """Everything as Markdown tables and lines for the console."""
    lines = [_points_table(report)]
    if report.failed:
        lines += ["", "failed:"]
        lines += [f"- {r['point']}, repeat {r['repeat'] + 1}: {r['cause']}" for r in report.failed]
    if report.missing:
        lines += ["", f"missing: {counted(report.missing, 'start')}; the study goes on without --report-only"]
    if report.fit is not None:
        lines += ["", *_fit_lines(report)]
    lines += [line for caveat in report.caveats for line in ("", caveat)]
    for curve in report.curves:
        lines += ["", *_curve_lines(report, curve)]
    return "\n".join(lines)


def _points_table(report: Report) -> str:
    head = ("point", "images/s", "efficiency", "s/step", "compute", "optimizer", "features", "gradients", "parameters",
            "control", "stragglers", "data", "predicted", "error", "bytes apart", "GiB a rank")  # fmt: skip
    rows = []
    for sample in report.samples:
        shares = shares_of(sample.terms_s)
        error, sent = report.error(sample), report.bytes.get(sample.name)
        predicted = sum(report.predicted.get(sample.name, {}).values())
        efficiency = report.efficiency(sample)
        rows.append(
            (
                sample.name,
                f"{sample.images_per_s:,.1f}",
                "" if efficiency is None else f"{100 * efficiency:.0f} %",
                f"{sample.step_s:.3f}",
                *(f"{100 * share:.1f} %" for share in shares.values()),
                f"{predicted:.3f}" if predicted else "",
                "" if error is None else f"{100 * error:+.0f} %",
                "" if sent is None else f"{100 * sent.apart:.2f} %",
                f"{max(sample.record['peak_memory_bytes']) / 2**30:.2f}",
            )
        )
    ruler = "|-|" + "-:|" * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", ruler, *(f"| {' | '.join(row)} |" for row in rows)])


def _fit_lines(report: Report) -> list[str]:
    found = report.fit
    assert found is not None
    lines = ["fitted:"]
    for ranks, seconds in found.seconds_per_flop.items():
        lines.append(f"- compute, {processes(ranks)} a node: {1e-9 / seconds:.1f} GFLOP/s each, "
                     f"{1000 * found.fixed_s:.1f} ms whatever the batch")  # fmt: skip
    if report.mfu is not None:
        lines.append(f"- MFU while computing: {report.mfu:.3f} of the bf16 peak, the median over points (for plan.py)")
    for key, link, source in report.links:
        place = {"inside": "inside a node", "between": "between nodes"}[key]
        lines.append(f"- link {place}: {link_text(link)} ({source})")
    if max(sample.work.world_size for sample in report.samples) > 1:
        lines.append(f"- spread of compute over ranks: {100 * found.straggler_deviation:.1f} %")
    if report.errors:
        worst, middle = max(report.errors), statistics.median(report.errors)
        lines.append(f"- every point predicted by a fit to the others: {100 * middle:.1f} % off in the median, "
                     f"{100 * worst:.1f} % at most ({len(report.errors)} points)")  # fmt: skip
    if report.bytes:
        apart = max(found.apart for found in report.bytes.values())
        lines.append(f"- bytes counted against arithmetic: at most {100 * apart:.3f} % apart")
    return lines


def link_text(link: Link) -> str:
    return f"{bandwidth_text(link)}, {1000 * link.latency_s:.3f} ms a round"


def bandwidth_text(link: Link) -> str:
    bits = 8 * link.bytes_per_s
    for unit, size in (("Tbit/s", 1e12), ("Gbit/s", 1e9)):
        if bits >= size:
            return f"{digits(bits / size)} {unit}"
    return f"{digits(bits / 1e6)} Mbit/s"


def digits(value: float) -> str:
    """Three of them, or the whole part."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 or value == 0 else f"{value:.2f}"


def _curve_lines(report: Report, curve: Curve) -> list[str]:
    measured = report.measured_on(curve)
    lines = [
        f"{curve_title(curve)}, foretold:",
        "",
        "| nodes | images/s | measured | per node, against one | largest loss |",
        "|-:|-:|-:|-:|-|",
    ]
    for nodes in curve.nodes:
        term, share = largest_loss(curve, nodes)
        seen = f"{measured[nodes]:,.0f}" if nodes in measured else ""
        against_one = f"{100 * curve.efficiency(nodes):.1f} %"
        rate = f"{curve.images_per_s(nodes):,.0f}"
        lines.append(f"| {nodes} | {rate} | {seen} | {against_one} | {term} {100 * share:.1f} % |")
    found = [f"{term} from {counted(nodes, 'node')}" for term, nodes in takeovers(curve).items() if nodes]
    lines += ["", f"a tenth of the step or more: {', '.join(found) or 'no term'}"]
    last = curve.nodes[-1]
    moved = sorted(moves(curve, last).items(), key=lambda pair: -pair[1])
    told = "; ".join(f"{factor:.2f} times as many with {change}" for change, factor in moved)
    lines.append(f"images/s at {counted(last, 'node')} would be {told}")
    return lines


def curve_title(curve: Curve) -> str:
    size = curve.batch_of(1)
    what = f"{size} pairs per process" if curve.scaling == "weak" else f"batch {size:,}"
    return f"{curve_label(curve, ' scaling')}, {processes(curve.ranks_per_node)} a node, {what}"


def processes(count: int) -> str:
    return counted(count, "process", "processes")


def counted(count: int, one: str, several: str | None = None) -> str:
    return f"1 {one}" if count == 1 else f"{count:,} {several or one + 's'}"


def curve_label(curve: Curve, word: str = "") -> str:
    settings = describe(curve.settings)
    return f"{curve.scaling}{word}" + (f", {settings}" if settings else "")


def write_csv(report: Report, path: Path) -> None:
    """A line for every point, failed ones too; columns: COLUMNS."""
    by_name = {sample.name: sample for sample in report.samples}
    repeats: dict[str, list[Record]] = {}
    for record in report.records:
        repeats.setdefault(record["point"], []).append(record)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for name, records in repeats.items():
            row: dict[str, Any] = {key: records[0][key] for key in COLUMNS[:6]}
            row |= {"settings": describe(records[0]["settings"]), "repeats": len(records), "status": "failed"}
            row["cause"] = "; ".join(record["cause"] for record in records if record["status"] == "failed")
            if name in by_name:
                row |= _csv_values(report, by_name[name])
            writer.writerow(row)


def _csv_values(report: Report, sample: Sample) -> dict[str, Any]:
    sent = report.bytes.get(sample.name)
    return {
        "status": "done",
        "images_per_s": sample.images_per_s,
        "step_s": sample.step_s,
        "efficiency": report.efficiency(sample),
        **{f"{term}_s": seconds for term, seconds in sample.terms_s.items()},
        "predicted_step_s": sum(report.predicted.get(sample.name, {}).values()) or None,
        "error": report.error(sample),
        "peak_memory_bytes": max(sample.record["peak_memory_bytes"]),
        "sent_bytes": None if sent is None else sum(sent.counted[kind] for kind in BYTES),
        "expected_bytes": None if sent is None else sum(sent.expected.values()),
        "wire_bytes": sample.record["wire_bytes"],
    }


def write_json(report: Report, path: Path) -> None:
    """The fit, its errors and what it foretells, for other programs."""
    found = report.fit
    told: dict[str, Any] = {
        "points": len(report.samples),
        "failed": len(report.failed),
        "missing": report.missing,
        "caveats": report.caveats,
    }
    if found is not None:
        plain = asdict(found)
        plain["collectives"] = {
            f"{kind} at ZeRO {stage}": each._asdict() for (kind, stage), each in found.collectives.items()
        }
        told |= {
            "device": report.samples[0].record["device"],
            "mfu": report.mfu,
            "fit": plain,
            "errors": {sample.name: report.error(sample) for sample in report.samples},
            "errors_from_fewer_processes": report.errors_from_fewer,
            "bytes_apart": max((sent.apart for sent in report.bytes.values()), default=None),
            "training_links": {name: asdict(link) for name, link in report.training_links.items()},
            "curves": [
                {
                    "title": curve_title(curve),
                    "images_per_s": {nodes: curve.images_per_s(nodes) for nodes in curve.nodes},
                    "measured_images_per_s": report.measured_on(curve),
                    "efficiency": {nodes: curve.efficiency(nodes) for nodes in curve.nodes},
                    "terms_s": {nodes: curve.terms(nodes) for nodes in curve.nodes},
                }
                for curve in report.curves
            ],
        }
    path.write_text(json.dumps(_finite(told), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """Infinity, of a link that was not measured, is no JSON: null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and math.isinf(value) else value
