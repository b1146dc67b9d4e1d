"""One page about a run, to read and to show: `python -m cmpt.monitor.report RUN_FOLDER` writes `report.html`.

It is made from what lies in the run folder alone, at any time, also while the run goes on. A piece that is missing is
said to be missing. The page is one file: pictures are inside, nothing is loaded, and it works without JavaScript.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from operator import itemgetter
from pathlib import Path
from typing import Any

from PIL import Image

from cmpt.monitor.curves import DIRECTIONS, Records, heldout_curves, training_curves
from cmpt.monitor.header import header
from cmpt.monitor.incidents import incidents
from cmpt.monitor.page import folded, page, picture_figure, section, table
from cmpt.monitor.records import read_records
from cmpt.monitor.tasks import by_task, chance_of, fractions, sizes

_PNG_LIMIT_BYTES = 500_000  # a larger picture goes into the page as JPEG
_PICTURES = {
    "masks": ("What is left of an image.", "Original and masked; grey patches never reach the model."),
    "queries": (
        "Searching by caption.",
        "Held-out captions and the pictures nearest to them; green marks the right one.",
    ),
}


def write_report(run_folder: str | Path) -> Path:
    """Writes `report.html` into the run folder and returns its path. Raises ValueError if there is no such folder."""
    folder = Path(run_folder)
    if not folder.is_dir():
        raise ValueError(f"run folder: {folder} is not a folder")
    metrics = read_records(folder / "metrics.jsonl")
    evaluations = list({row.get("step"): row for row in read_records(folder / "evaluations.jsonl")}.values())
    events = read_records(folder / "events.jsonl")
    environment = _environment(folder)
    name = folder.resolve().name
    body = [
        header(name, metrics, evaluations, events, environment),
        _results(evaluations),
        _pictures(folder),
        training_curves(metrics),
        heldout_curves(evaluations),
        incidents(metrics, events),
        _skips(metrics, events),
        _details(folder, environment),
        "<footer>Written by <code>python -m cmpt.monitor.report</code> from the records of the run.</footer>",
    ]
    path = folder / "report.html"
    beside = folder / ".report.html.new"
    beside.write_text(page(f"{name} · cmpt", body), encoding="utf-8")
    os.replace(beside, path)
    return path


def _results(evaluations: Records) -> str:
    if not evaluations:
        return section("Results", note="This run has not been evaluated yet, or has nothing to be evaluated on.")
    last = evaluations[-1]
    pairs, classes = last.get("pairs"), last.get("classes")
    rows: list[Sequence[str]] = []
    for key, label in DIRECTIONS:
        measures = [(f"{key}_r{k}", f"R@{k}", min(1.0, k / pairs) if pairs else None) for k in (1, 5, 10)]
        measures.append((f"{key}_median_rank", "Median rank", (pairs + 1) / 2 if pairs else None))
        rows += _result_group(label, measures, evaluations)
    zero_shot = [
        ("zero_shot_top1", "Top-1", 1 / classes if classes else None),
        ("zero_shot_top5", "Top-5", min(1.0, 5 / classes) if classes else None),
        ("zero_shot_mean_per_class", "Mean per class", 1 / classes if classes else None),
    ]
    rows += _result_group("Zero-shot classification", zero_shot, evaluations)
    for task, found in by_task(last).items():
        measures = [(f"{task}/{key}", label, chance_of(key, found)) for key, label in fractions(found)]
        rows += _result_group(f"{task} ({sizes(found)})", measures, evaluations)
    if not rows:
        return section("Results", note="The evaluations of this run hold none of the known measures.")
    note = "Every patch kept."
    if pairs:
        note = f"{int(pairs):,} held-out pairs" + (f" in {int(classes):,} classes" if classes else "")
        note += ", every patch kept. R@k: the right one is among the first k."
    head = ("Measure", f"Last, step {last.get('step', 0):,}", "Best", "Chance")
    return section("Results", table(head, rows, strong=1), note=note)


def _result_group(
    title: str, measures: Sequence[tuple[str, str, float | None]], evaluations: Records
) -> Iterator[Sequence[str]]:
    present = [measure for measure in measures if evaluations[-1].get(measure[0]) is not None]
    if present:
        yield (escape(title),)
    for key, label, chance in present:
        is_rank = key.endswith("rank")
        known = [(row[key], row.get("step", 0)) for row in evaluations if row.get(key) is not None]
        best, step = min(known) if is_rank else max(known, key=itemgetter(0))
        at = f"{_shown(best, is_rank)} <small>step {step:,}</small>"
        last = _shown(evaluations[-1][key], is_rank)
        yield label, last, at, "unknown" if chance is None else _shown(chance, is_rank)


def _shown(value: float, is_rank: bool) -> str:
    if is_rank:
        return f"{value:,.1f}".removesuffix(".0")
    return f"{100 * value:.2f} %" if 0 < value < 0.002 else f"{100 * value:.1f} %"


def _pictures(folder: Path) -> str:
    found = {path.stem: path for path in sorted((folder / "pictures").glob("*.png"))}
    if not found:
        return section("Pictures", note="This run has written no pictures.")
    ordered = [name for name in _PICTURES if name in found] + [name for name in found if name not in _PICTURES]
    parts = []
    for name in ordered:
        title, caption = _PICTURES.get(name, (name.replace("_", " "), ""))
        parts.append(picture_figure(_data_uri(found[name].read_bytes()), title, caption))
    return section("Pictures", *parts)


def _skips(metrics: Records, events: Records) -> str:
    skips = [event for event in events if event.get("kind") == "skip"]
    causes: Counter[str] = Counter()
    for event in skips:
        causes[str(event.get("cause", "unknown"))] += event.get("samples", 1)
    told = causes.total()
    examples = {str(event.get("cause", "unknown")): str(event.get("key", "")) for event in reversed(skips)}
    last = metrics[-1] if metrics else {}
    count = max(told, last.get("skipped_samples") or 0)
    note = "No sample was skipped." if metrics or events else "Nothing is recorded yet."
    if count:
        beside = f" beside {last['samples_seen']:,} used" if last.get("samples_seen") else ""
        note = f"{count:,} {'sample was' if count == 1 else 'samples were'} skipped{beside}; "
        note += "each is in events.jsonl with its key." if count == told else f"{told:,} are in events.jsonl."
    rows = [
        (escape(cause.replace("_", " ")), f"{count:,}", f"<code>{escape(examples[cause])}</code>")
        for cause, count in causes.most_common()
    ]
    parts = [table(("Cause", "Samples", "First of them"), rows)] if rows else []
    return section("Skipped samples", *parts, note=note)


def _details(folder: Path, environment: Mapping[str, Any]) -> str:
    parts, missing = [], []
    if (folder / "recipe.yaml").is_file():
        parts.append(
            folded("Resolved recipe", "every setting of this run", (folder / "recipe.yaml").read_text("utf-8"))
        )
    else:
        missing.append("recipe.yaml")
    if environment:
        text = json.dumps(environment, indent=2, ensure_ascii=False)
        parts.append(folded("Environment", "revision, versions, hardware", text))
    else:
        missing.append("environment.json")
    note = f"The run folder holds no {' and no '.join(missing)}." if missing else ""
    return section("How it was made", *parts, note=note)


def _environment(folder: Path) -> dict[str, Any]:
    path = folder / "environment.json"
    if not path.is_file():
        return {}
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got a JSON {type(content).__name__}, expected an object")
    return content


def _data_uri(png: bytes) -> str:
    if len(png) <= _PNG_LIMIT_BYTES:
        return "data:image/png;base64," + base64.b64encode(png).decode()
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(out, "JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cmpt.monitor.report", description="Write a run's report.html.")
    parser.add_argument("run_folder", help="e.g. runs/quickstart")
    try:
        print(write_report(parser.parse_args().run_folder))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
