"""What a study says: its points, the model fitted to them with its error, what it foretells; as text, CSV and JSON."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cmpt.data.tokenizer import open_tokenizer, with_vocabulary
from cmpt.engine.build import by_layer
from cmpt.engine.traffic import parameter_sizes, recipe_bytes
from cmpt.models.clip import CLIP
from cmpt.models.flops import peak_flops
from cmpt.recipe.schema import Recipe
from scaling_extrapolate import Curve, Shape, calls_of, curve_of, largest_loss, moves, shares_of, takeovers
from scaling_fit import Fit, Record, Sample, fit, held_out, read_links, samples_of, training_link
from scaling_study import Point, Study, describe, point_recipe
from step_model import Link

BYTES = ("features", "gradients", "parameters")
"""Kinds whose bytes arithmetic gives to the last one; "control" holds Python objects too."""
TRAINED = "of training's own all-reduces, less what compute hides"
BENCHMARKED = "of the benchmark's all-reduces"
COLUMNS = (
    "point", "scaling", "nodes", "ranks_per_node", "world_size", "batch_size", "settings", "repeats", "status",
    "images_per_s", "step_s", "efficiency", "compute_s", "optimizer_s", "features_s", "gradients_s", "parameters_s",
    "control_s", "stragglers_s", "data_s", "predicted_step_s", "error", "peak_memory_bytes", "sent_bytes",
    "expected_bytes", "wire_bytes", "cause",
)  # fmt: skip


@dataclass(frozen=True)
class Bytes:
    """Sent by one rank in a step, by kind of BYTES."""

    counted: Mapping[str, float]
    expected: Mapping[str, float]

    @property
    def apart(self) -> float:
        """The largest difference of a kind, as a share of what is expected."""
        return max(
            abs(self.counted[kind] - expected) / expected if expected else float(self.counted[kind] > 0)
            for kind, expected in self.expected.items()
        )


@dataclass(frozen=True)
class Report:
    study: Study
    records: Sequence[Record]
    samples: Sequence[Sample]
    """Measured points; of repeats the middle one."""
    fit: Fit | None
    """None where nothing was measured."""
    predicted: Mapping[str, Mapping[str, float]]
    """By point: terms predicted by a fit to the others."""
    bytes: Mapping[str, Bytes]
    """By point with several ranks."""
    curves: Sequence[Curve]
    training_links: Mapping[str, Link]
    """"inside" and "between", as training's own all-reduces show them."""

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if record["status"] == "failed"]

    def error(self, sample: Sample) -> float | None:
        """Predicted against measured step, as a share; None where nothing could be held out."""
        terms = self.predicted.get(sample.name)
        return None if terms is None else sum(terms.values()) / sample.step_s - 1

    @property
    def errors(self) -> list[float]:
        return [abs(error) for sample in self.samples if (error := self.error(sample)) is not None]

    @property
    def mfu(self) -> float | None:
        """Share of the device's peak that ranks reach while they compute, the median over points; None for a device
        whose peak is not known."""
        peak = peak_flops(self.samples[0].record["device"]) if self.samples else None
        if peak is None:
            return None
        return statistics.median(
            (of.work.tower_flops + of.work.loss_flops) / of.terms_s["compute"] / peak for of in self.samples
        )

    @property
    def links(self) -> list[tuple[str, Link, str]]:
        """("inside" or "between", link, where its figures come from): what the fit has, and after it what training's
        own all-reduces show where that is another."""
        found = []
        for key in ("inside", "between"):
            used, trained = getattr(self.fit, key), self.training_links.get(key)
            if used.bytes_per_s != float("inf"):
                found.append((key, used, TRAINED if used == trained else BENCHMARKED))
            if trained is not None and trained != used:
                found.append((key, trained, TRAINED))
        return found

    def efficiency(self, sample: Sample) -> float | None:
        """Images per second and process, against the fewest processes of the same scaling, settings and size."""
        same = [other for other in self.samples if _series(other) == _series(sample)]
        least = min(same, key=lambda other: other.work.world_size)
        return sample.images_per_s / sample.work.world_size / (least.images_per_s / least.work.world_size)


def _series(sample: Sample) -> tuple[Any, ...]:
    return sample.record["scaling"], sample.size, tuple(sample.record["settings"].items())


def build(study: Study, points: Sequence[Point], records: Sequence[Record], collectives: Sequence[Path]) -> Report:
    """`collectives`: files of the benchmark on the study's sets of hosts. Records of other points are left out."""
    by_name = {point.name: point for point in points}
    records = [record for record in records if record["point"] in by_name]
    recipes = {name: _with_vocabulary(point_recipe(study, point).recipe) for name, point in by_name.items()}
    sizes = model_sizes(recipes)
    samples = samples_of(records, recipes, {name: sum(map(sum, of_model)) for name, of_model in sizes.items()})
    if not samples:
        return Report(study, records, [], None, {}, {}, [], {})
    nccl = samples[0].record["gpu"]
    benchmarked = read_links(collectives)
    found = fit(samples, benchmarked)
    links = {name: training_link(samples, several) for name, several in (("inside", False), ("between", True))}
    return Report(
        study,
        records,
        samples,
        found,
        held_out(samples, benchmarked),
        {s.name: _bytes(s, recipes[s.name], sizes[s.name], nccl) for s in samples if s.work.world_size > 1},
        _curves(study, samples, recipes, sizes, nccl, found),
        {name: link for name, link in links.items() if link is not None},
    )


def _with_vocabulary(recipe: Recipe) -> Recipe:
    return with_vocabulary(recipe, open_tokenizer(recipe.tokenizer, recipe.model.context_length))


def model_sizes(recipes: Mapping[str, Recipe]) -> dict[str, list[list[int]]]:
    """Of the parameters by optimizer group, by name of the recipe; no memory is taken for them."""
    found: dict[str, list[list[int]]] = {}  # a study has few models, and making one takes a moment
    by_name = {}
    for name, recipe in recipes.items():
        layered = by_layer(recipe.optimizer)
        model = repr((recipe.model, recipe.image.size, layered))
        if model not in found:
            with torch.device("meta"):
                found[model] = parameter_sizes(CLIP(recipe.model, recipe.image.size), layered)
        by_name[name] = found[model]
    return by_name


def _bytes(sample: Sample, recipe: Recipe, sizes: Sequence[Sequence[int]], nccl: bool) -> Bytes:
    expected = recipe_bytes(recipe, sizes, sample.work.world_size, sample.record["batch_size"], nccl)
    return Bytes(sample.record["sent_bytes"], {kind: expected[kind] for kind in BYTES})


def _curves(
    study: Study,
    samples: Sequence[Sample],
    recipes: Mapping[str, Recipe],
    sizes: Mapping[str, Sequence[Sequence[int]]],
    nccl: bool,
    found: Fit,
) -> list[Curve]:
    """Weak and strong scaling, each at the study's first size, with every setting of its sweep, at the most processes
    per node that were measured. Settings that only single processes ran are left out: of their collectives nothing is
    known."""
    per_node = max(sample.work.ranks_per_node for sample in samples)
    by_settings: dict[str, list[Sample]] = {}
    for sample in samples:
        by_settings.setdefault(describe(sample.record["settings"]), []).append(sample)
    curves = []
    for same in by_settings.values():
        calls = calls_of(same)
        if not calls:
            continue
        towers = [sample.work.tower_flops / sample.work.samples for sample in same]
        shape = Shape(recipes[same[0].name], sizes[same[0].name], statistics.fmean(towers), calls, nccl)
        settings = same[0].record["settings"]
        for scaling, of_study in (("weak", study.weak), ("strong", study.strong)):
            curves += [curve_of(scaling, size, settings, per_node, shape, found) for size in of_study[:1]]
    return curves


def text(report: Report) -> str:
    """Everything as Markdown tables and lines for the console."""
    lines = [_points_table(report)]
    if report.failed:
        lines += ["", "failed:"]
        lines += [f"- {r['point']}, repeat {r['repeat'] + 1}: {r['cause']}" for r in report.failed]
    if report.fit is not None:
        lines += ["", *_fit_lines(report)]
    for curve in report.curves:
        lines += ["", *_curve_lines(curve)]
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
        lines.append(f"- MFU while computing: {report.mfu:.3f} in the median over points (for plan.py --mfu)")
    for key, link, source in report.links:
        place = {"inside": "inside a node", "between": "between nodes"}[key]
        lines.append(f"- link {place}: {link_text(link)} ({source})")
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


def _curve_lines(curve: Curve) -> list[str]:
    lines = [f"{curve_title(curve)}, foretold:", "", "| nodes | images/s | efficiency | largest loss |", "|-:|-:|-:|-|"]
    for nodes in curve.nodes:
        term, share = largest_loss(curve, nodes)
        efficiency = f"{100 * curve.efficiency(nodes):.1f} %"
        lines.append(f"| {nodes} | {curve.images_per_s(nodes):,.0f} | {efficiency} | {term} {100 * share:.1f} % |")
    found = [f"{term} from {nodes} nodes" for term, nodes in takeovers(curve).items() if nodes]
    lines += ["", f"a tenth of the step or more: {', '.join(found) or 'no term'}"]
    last = curve.nodes[-1]
    moved = sorted(moves(curve, last).items(), key=lambda pair: -pair[1])
    lines.append(f"images/s at {last:,} nodes would change " + "; ".join(f"{v:.2f} times with {n}" for n, v in moved))
    return lines


def curve_title(curve: Curve) -> str:
    size = curve.batch_of(1)
    what = f"{size} pairs per process" if curve.scaling == "weak" else f"batch {size:,}"
    return f"{curve_label(curve, ' scaling')}, {processes(curve.ranks_per_node)} a node, {what}"


def processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


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
    told: dict[str, Any] = {"points": len(report.samples), "failed": len(report.failed)}
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
            "bytes_apart": max((sent.apart for sent in report.bytes.values()), default=None),
            "training_links": {name: asdict(link) for name, link in report.training_links.items()},
            "curves": [
                {
                    "title": curve_title(curve),
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
