"""Results of a suite's tasks, which records hold as "task/measure", in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MEASURES = {
    "top1": "Top-1",
    "mean_per_class": "Mean per class",
    "top5": "Top-5",
    **{f"image_to_text_r{k}": f"Image to text R@{k}" for k in (1, 5, 10)},
    **{f"text_to_image_r{k}": f"Text to image R@{k}" for k in (1, 5, 10)},
    "accuracy": "Accuracy",
}
_NO_MEASURES = ("samples", "classes", "images", "texts", "train_samples", "l2", "validation_top1", "converged")
_SIZES = ("samples", "images", "texts", "classes")


def by_task(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Task -> measure -> value, in the order of the record."""
    tasks: dict[str, dict[str, Any]] = {}
    for key, value in results.items():
        task, slash, measure = key.partition("/")
        if slash and value is not None:
            tasks.setdefault(task, {})[measure] = value
    return tasks


def fractions(found: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(measure, label) of the results of a task that are fractions, the best known first."""
    names = [name for name in found if name not in _NO_MEASURES and not name.endswith(("seconds", "_s"))]
    for name in sorted(names, key=lambda name: list(MEASURES).index(name) if name in MEASURES else len(MEASURES)):
        yield name, MEASURES.get(name, name.replace("_", " ").capitalize())


def chance_of(measure: str, found: Mapping[str, Any]) -> float | None:
    """What guessing gives, where that is known."""
    if measure in ("top1", "mean_per_class", "top5") and found.get("classes"):
        return min(1.0, (5 if measure == "top5" else 1) / found["classes"])
    if not {"images", "texts", "classes"} & found.keys():
        return 0.5  # composition: one of two captions
    return None


def sizes(found: Mapping[str, Any]) -> str:
    """E.g. "500 samples, 20 classes, 3.1 s"."""
    counts = [f"{int(found[name]):,} {name}" for name in _SIZES if name in found]
    return ", ".join([*counts, *([f"{found['seconds']:,.1f} s"] if "seconds" in found else [])])
