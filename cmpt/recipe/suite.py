"""A suite file: which evaluations there are, where their data lie, and the published figures beside them. Torch-free.

YAML, read as strictly as a recipe. `recipes/eval/` holds the shipped ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from cmpt.recipe.layers import SCHEMA_DEFAULT, Layers
from cmpt.recipe.paths import resolve_path
from cmpt.recipe.typed import RecipeError, Report, convert, nearest_choice, without_unknown

FORMATS = {
    "zero_shot": ("webdataset", "image_folder"),
    "retrieval": ("webdataset",),
    "linear_probe": ("webdataset", "image_folder"),
    "composition": ("sugarcrepe",),
}
"""Formats in which the sets of each kind of task may lie, the default first."""

METRICS = {
    "zero_shot": ("top1", "top5", "mean_per_class"),
    "retrieval": tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)),
    "linear_probe": ("top1", "mean_per_class"),
    "composition": ("accuracy",),
}
"""Results of each kind that may stand in the table; a composition's categories, by their names, come on top."""

_STANDING = {
    "zero_shot": ("top1",),
    "retrieval": ("image_to_text_r1", "text_to_image_r1"),
    "linear_probe": ("top1",),
    "composition": ("accuracy",),
}
_ONLY_FOR = {
    "train_split": ("linear_probe",),
    "validation_split": ("linear_probe",),
    "images": ("composition",),
    "categories": ("composition",),
}
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Task:
    """One evaluation on one set."""

    name: str
    """Unique in its suite; letters, digits, _ and -."""
    kind: str
    """"zero_shot", "retrieval", "linear_probe" or "composition"."""
    path: str
    """The set's folder: below the data folder, absolute, or pkg:."""
    format: str = ""
    """"webdataset" as CLIP_benchmark and DataComp publish it, "image_folder" with a folder per class, or "sugarcrepe":
    JSON files beside an image folder. "": the first that FORMATS has for the kind; a loaded task always has one."""
    split: str = "test"
    """The folder below `path` that is evaluated; "." where shards or class folders lie in `path` itself."""
    metric: str | None = None
    """The result that stands in the table; None: top-1, R@1 in both directions, or the mean accuracy, by kind."""
    train_split: str = "train"
    """linear_probe: what the probe is fitted on."""
    validation_split: str | None = None
    """linear_probe: what its L2 is chosen on; None: a tenth of the train split."""
    images: str = "images"
    """sugarcrepe: the image folder, below `path` or absolute."""
    categories: list[str] = field(default_factory=list)
    """sugarcrepe: the JSON files to use, without ".json"; empty: all that are there."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The results that stand in the table."""
        return (self.metric,) if self.metric else _STANDING[self.kind]

    def folder(self, data: Path) -> Path:
        """Where the set lies if the data folder is `data`."""
        return data / resolve_path(self.path)


@dataclass(frozen=True)
class Rows:
    """Published figures."""

    source: str
    """Where they were published."""
    values: dict[str, dict[str, float]]
    """Model -> task name, or task name + "/" + metric -> per cent."""


@dataclass(frozen=True)
class Suite:
    """The evaluations of one suite file, in its order."""

    tasks: list[Task]
    rows: Rows | None = None


def load_suite(path: str | Path) -> Suite:
    """Reads a suite file.

    Raises RecipeError with every fault found, each naming the task, the field, the value and the line of the file.
    """
    layers = Layers()
    layers.tree = {}
    file = resolve_path(str(path))
    if not Path(file).is_file():
        raise RecipeError([f"{path}: there is no such suite file"])
    if not layers.add_file(file):
        raise RecipeError(layers.faults)
    tree = layers.tree
    entries: Any = tree.get("tasks")
    names = {i: _label(entry, i) for i, entry in enumerate(entries)} if isinstance(entries, list) else {}

    def report(key: str, value: Any, constraint: str) -> None:
        origin = layers.origin(key)
        parts = key.split(".")
        if parts[0] == "tasks" and len(parts) > 1:
            parts[1] = names[int(parts[1])]
        layers.fault(".".join(parts), value, constraint, file if origin == SCHEMA_DEFAULT else origin)

    tree = without_unknown(tree, "", ("tasks", "rows"), report)
    tasks: list[Task] = []
    if isinstance(entries, list) and entries:
        tasks = [_task(entry, f"tasks.{i}", report) for i, entry in enumerate(entries)]
    else:
        report("tasks", entries, "expected a list of tasks, at least one")
    if layers.faults:
        raise RecipeError(layers.faults)
    for i, task in enumerate(tasks):
        _check_task(task, entries[i], f"tasks.{i}", report)
        if task.name in [earlier.name for earlier in tasks[:i]]:
            report(f"tasks.{i}.name", task.name, "two tasks have this name")
    section = tree.get("rows")
    rows = None if section is None else _rows(section, tasks, report)
    if layers.faults:
        raise RecipeError(layers.faults)
    return Suite([replace(task, format=task.format or FORMATS[task.kind][0]) for task in tasks], rows)


def _label(entry: Any, index: int) -> str:
    """What faults call a task: its name where it has a usable one, else its place in the list."""
    name = entry.get("name") if isinstance(entry, dict) else None
    return name if isinstance(name, str) and _NAME.fullmatch(name) else str(index)


def _task(entry: Any, key: str, report: Report) -> Any:
    """A Task, unusable where something was reported."""
    if isinstance(entry, dict):
        entry = without_unknown(entry, f"{key}.", [item.name for item in fields(Task)], report)
        for name in ("name", "kind", "path"):
            if entry.setdefault(name, None) is None:
                report(f"{key}.{name}", None, "must be given")
    return convert(Task, entry, key, report)


def _check_task(task: Task, entry: dict[str, Any], key: str, report: Report) -> None:
    if not _NAME.fullmatch(task.name):
        report(f"{key}.name", task.name, "expected letters, digits, _ and - only")
    if not task.path:
        report(f"{key}.path", task.path, "expected a folder")
    if task.kind not in FORMATS:
        report(f"{key}.kind", task.kind, nearest_choice(task.kind, FORMATS))
        return
    if task.format and task.format not in FORMATS[task.kind]:
        constraint = f"for {task.kind} {nearest_choice(task.format, FORMATS[task.kind])}"
        report(f"{key}.format", task.format, constraint)
    for name, kinds in _ONLY_FOR.items():
        if name in entry and task.kind not in kinds:
            report(f"{key}.{name}", entry[name], f"belongs to {' and '.join(kinds)}, this is {task.kind}")
    choices = METRICS[task.kind]
    if task.metric is not None and task.metric not in choices and task.kind != "composition":
        report(f"{key}.metric", task.metric, nearest_choice(task.metric, choices))


def _rows(section: Any, tasks: list[Task], report: Report) -> Any:
    """Rows, unusable where something was reported."""
    if isinstance(section, dict):
        section = without_unknown(section, "rows.", ("source", "values"), report)
        for name in ("source", "values"):
            if section.setdefault(name, None) is None:
                report(f"rows.{name}", None, "must be given")
        for row, figures in (section["values"] or {}).items() if isinstance(section["values"], dict) else ():
            if not isinstance(figures, dict):
                report(f"rows.values.{row}", figures, "expected task: per cent")
                continue
            for name, value in figures.items():
                _check_figure(f"rows.values.{row}.{name}", name, value, tasks, report)
    return convert(Rows, section, "rows", report)


def _check_figure(key: str, name: str, value: Any, tasks: list[Task], report: Report) -> None:
    task_name, slash, metric = name.partition("/")
    kinds = {task.name: task.kind for task in tasks}
    kind = kinds.get(task_name, "")
    if not kind:
        report(key, value, f"no task has this name: {nearest_choice(task_name, kinds)}")
    elif slash and kind in METRICS and kind != "composition" and metric not in METRICS[kind]:
        report(key, value, f"no such result of {kind}: {nearest_choice(metric, METRICS[kind])}")
    if type(value) not in (int, float) or not 0 <= value <= 100:
        report(key, value, "expected per cent, 0 to 100")
