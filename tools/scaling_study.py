"""A scaling study as its YAML file describes it, and the points that it consists of. Torch-free."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cmpt.recipe import RecipeError, check_recipe, load_recipe
from cmpt.recipe.layers import COMMAND_LINE, SCHEMA_DEFAULT, Layers
from cmpt.recipe.load import LoadedRecipe
from cmpt.recipe.typed import convert, show, without_unknown
from hosts import Slots, parse_hostfile

MOST_STEPS = 10**9  # of a point's schedule: it never comes to its end
_NAME = re.compile(r"[\w-][\w.-]*")
_AT_LEAST: dict[str, float] = {
    "nodes": 1,
    "processes": 1,
    "processes_per_node": 1,
    "weak": 1,
    "strong": 2,
    "warmup_steps": 1,
    "measured_steps": 4,
    "repeats": 1,
}
_ABOVE_ZERO = ("timeout_minutes", "collectives_seconds")


@dataclass
class Study:
    """The keys of a study file."""

    recipe: str = ""
    """The recipe that every point trains."""
    name: str = "scaling"
    """Of the study; its folder is `folder/name`."""
    folder: str = "runs"
    """Where studies live; with several nodes on a file system that all of them share."""
    hostfile: str | None = None
    """DeepSpeed's hostfile: points take its first hosts. Null: everything runs on this host."""
    nodes: list[int] = field(default_factory=list)
    """Numbers of hosts; needs `hostfile`."""
    processes_per_node: int | None = None
    """Of every host, at most its slots; null: the fewest slots of the hosts that are used."""
    processes: list[int] = field(default_factory=list)
    """Numbers of processes on this host; instead of `nodes`."""
    weak: list[int] = field(default_factory=list)
    """Weak scaling: pairs per process; the global batch grows with the processes."""
    strong: list[int] = field(default_factory=list)
    """Strong scaling: global batches, shared by the processes."""
    sweep: dict[str, Any] = field(default_factory=dict)
    """Recipe key -> list of values; a point for every combination, e.g. {engine.zero_stage: [1, 2, 3]}."""
    overrides: list[str] = field(default_factory=list)
    """key=value for every point; of other keys than the study decides (DECIDED), as in a sweep."""
    warmup_steps: int = 5
    """Steps of a point that are not measured: compilation, the first batches, full caches."""
    measured_steps: int = 20
    """Steps of a point that are."""
    repeats: int = 1
    """Starts of every point, all points once before any a second time. The one in the middle counts; of an even number
    the faster of the two."""
    timeout_minutes: float = 30.0
    """A point that takes longer has failed."""
    collectives_seconds: float = 20.0
    """For the benchmark of collectives on every set of hosts with more than one process."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Variables of the processes on every host, e.g. {OMP_NUM_THREADS: 1, GLOO_SOCKET_IFNAME: eth0}."""
    launcher: list[str] = field(default_factory=list)
    """More options for `deepspeed`, e.g. [--no_ssh_check, --master_addr, 10.0.0.1]."""

    @property
    def path(self) -> Path:
        return Path(self.folder) / self.name


def _short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each dotted key, or all of it where several end alike."""
    last = {key: key.rsplit(".", 1)[-1] for key in keys}
    return {key: key if list(last.values()).count(short) > 1 else short for key, short in last.items()}


@dataclass(frozen=True)
class Point:
    """One setting to measure."""

    scaling: str
    """"weak" or "strong"."""
    hosts: tuple[tuple[str, int], ...]
    """(name, processes); the name is empty for this host."""
    batch_size: int
    """Global."""
    settings: tuple[tuple[str, Any], ...] = ()
    """Of the sweep."""

    @property
    def nodes(self) -> int:
        return len(self.hosts)

    @property
    def ranks_per_node(self) -> int:
        return self.hosts[0][1]

    @property
    def world_size(self) -> int:
        return sum(processes for _, processes in self.hosts)

    @property
    def name(self) -> str:
        """Says what it is; part of file names."""
        parts = [self.scaling, f"{self.nodes}x{self.ranks_per_node}", f"batch{self.batch_size}"]
        names = _short_names(dict(self.settings))
        parts += [f"{names[key]}{value}" for key, value in self.settings]
        return re.sub(r"[^\w.-]+", "_", "-".join(parts))

    @property
    def include(self) -> str:
        """For the launcher's --include: the first slots of every host."""
        return "@".join(f"{name}:{','.join(map(str, range(count)))}" for name, count in self.hosts)


def load_study(path: str | Path) -> Study:
    """Reads a study file. Raises RecipeError with every fault: field, value, constraint and line."""
    layers = Layers()
    layers.tree = {}
    file = str(path)
    if not Path(file).is_file():
        raise RecipeError([f"{path}: there is no such study file"])
    if not layers.add_file(file):
        raise RecipeError(layers.faults)

    def report(key: str, value: Any, constraint: str) -> None:
        origin = layers.origin(key)
        layers.fault(key, value, constraint, file if origin == SCHEMA_DEFAULT else origin)

    tree = without_unknown(layers.tree, "", [item.name for item in fields(Study)], report)
    study: Study = convert(Study, tree, "", report)
    if layers.faults:
        raise RecipeError(layers.faults)
    _check(study, report)
    if layers.faults:
        raise RecipeError(layers.faults)
    return study


def _check(study: Study, report: Any) -> None:
    if not study.recipe:
        report("recipe", study.recipe, "must be given: the recipe that the points train")
    if not _NAME.fullmatch(study.name):
        report("name", study.name, "expected letters, digits, _, - and . only, not . first")
    for key, least in _AT_LEAST.items():
        value = getattr(study, key)
        for item in value if isinstance(value, list) else [value]:
            if item is not None and item < least:
                report(key, value, f"must be at least {least:g}")
    for key in _ABOVE_ZERO:
        if not 0 < getattr(study, key) < math.inf:
            report(key, getattr(study, key), "must be above 0, and finite")
    for key, values in study.sweep.items():
        if not isinstance(values, list) or not values:
            report(f"sweep.{key}", values, "expected a list of values, at least one")
        elif twice := [value for place, value in enumerate(values) if value in values[:place]]:
            report(f"sweep.{key}", values, f"has {show(twice[0])} more than once")
        if key in DECIDED:
            report(f"sweep.{key}", values, _decided_by(key))
    for override in study.overrides:
        if (key := override.partition("=")[0].strip()) in DECIDED:
            report("overrides", override, _decided_by(key))
    for key, value in study.environment.items():
        if isinstance(value, dict | list) or value is None:
            report(f"environment.{key}", value, "expected a text or a number")
    if study.nodes and study.processes:
        report("processes", study.processes, "give nodes of a hostfile, or processes on this host, not both")
    elif not study.nodes and not study.processes:
        report("processes", study.processes, "the study has no points: give processes, or nodes with a hostfile")
    if study.nodes and study.hostfile is None:
        report("nodes", study.nodes, "needs hostfile")
    if study.processes and study.hostfile is not None:
        report("processes", study.processes, "is for this host alone; with a hostfile give nodes")
    if not study.weak and not study.strong:
        report("weak", study.weak, "the study has no points: give weak (pairs per process), strong (batches), or both")


def _decided_by(key: str) -> str:
    return "is decided by " + ("weak and strong" if key == "engine.batch_size" else "the study itself")


def study_hosts(study: Study) -> Slots:
    """The hosts of the study's hostfile; empty where it has none. Raises RecipeError."""
    if study.hostfile is None:
        return {}
    try:
        hosts = parse_hostfile(Path(study.hostfile).read_text())
    except OSError as error:
        raise RecipeError([f'hostfile = "{study.hostfile}": cannot be read ({error.strerror})']) from error
    except ValueError as error:
        raise RecipeError([f"{study.hostfile}: {error}"]) from error
    if max(study.nodes) > len(hosts):
        raise RecipeError(
            [f"nodes = {show(study.nodes)}: {study.hostfile} lists {len(hosts)} host{'s' * (len(hosts) != 1)}"]
        )
    return hosts


def study_points(study: Study, hosts: Slots) -> list[Point]:
    """All points, in the order in which they run. Weak and strong scaling have points of their own, also where they
    share a batch.

    Raises RecipeError where a point's recipe has faults, hosts have too few slots, or two points have one name.
    """
    layouts: list[tuple[tuple[str, int], ...]] = [(("", count),) for count in study.processes]
    for count in study.nodes:
        names = list(hosts)[:count]
        per_node = study.processes_per_node or min(hosts[name] for name in names)
        short = [name for name in names if hosts[name] < per_node]
        if short:
            told = f"processes_per_node = {per_node}: {short[0]} has {hosts[short[0]]} slots in {study.hostfile}"
            raise RecipeError([told])
        layouts.append(tuple((name, per_node) for name in names))
    swept = [tuple(zip(study.sweep, values, strict=True)) for values in itertools.product(*study.sweep.values())]
    points = []
    for layout, settings in itertools.product(dict.fromkeys(layouts), swept):
        world = sum(count for _, count in layout)
        points += [Point("weak", layout, pairs * world, settings) for pairs in dict.fromkeys(study.weak)]
        points += [Point("strong", layout, batch, settings) for batch in dict.fromkeys(study.strong)]
    names = [point.name for point in points]
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise RecipeError([f"sweep: two points have the name {twice[0]}; give values that differ in letters or digits"])
    faults: dict[str, str] = {}
    for point in points:
        loaded = point_recipe(study, point)
        for fault in check_recipe(loaded.recipe, point.world_size, loaded.origins):
            faults.setdefault(fault, f"{point.name}: {fault}")
    if faults:
        raise RecipeError(faults.values())
    return points


def point_recipe(study: Study, point: Point, repeat: int = 0) -> LoadedRecipe:
    """What a start of the point trains: no evaluation, no checkpoint but the last, and an end after the measured steps.

    One step follows them, for the last step of a run compares weights. Raises RecipeError.
    """
    overrides = [
        f"run.log_every={_steps(study)} steps",
        *study.overrides,
        *(f"{key}={show(value, None)}" for key, value in point.settings),
        *(f"{key}={value}" for key, value in _decided(study, point, repeat).items()),
    ]
    try:
        loaded = load_recipe(study.recipe, overrides)
    except RecipeError as error:
        raise RecipeError([fault.replace(COMMAND_LINE, "the study") for fault in error.faults]) from error
    origins = {key: "the study" if origin == COMMAND_LINE else origin for key, origin in loaded.origins.items()}
    return LoadedRecipe(loaded.recipe, origins)


def _steps(study: Study) -> int:
    return study.warmup_steps + study.measured_steps + 1


def _decided(study: Study, point: Point, repeat: int) -> dict[str, str]:
    """Recipe keys and their values, as text, that a study sets in every point."""
    return {
        "engine.batch_size": str(point.batch_size),
        "run.folder": str(study.path.absolute() / "runs"),
        "run.name": run_name(point, repeat),
        "run.overwrite": "true",
        "run.timings": "true",
        "run.stop_after": f"{_steps(study)} steps",
        "run.checkpoint_every": f"{MOST_STEPS} steps",
        "run.copy_checkpoints_to": "null",
        "guard.weights_every": "null",
        "data.heldout": "[]",
        "evaluation.suite": "null",
        "evaluation.every": "null",
    }


def run_name(point: Point, repeat: int) -> str:
    return f"{point.name}-r{repeat}"


DECIDED = tuple(_decided(Study(), Point("weak", (("", 1),), 1), 0))
"""Recipe keys that no sweep and no override of a study may set."""


def describe(settings: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> str:
    """Swept settings for people: "ZeRO 1, ratio 0.5"."""
    names = _short_names(dict(settings)) | {"engine.zero_stage": "ZeRO"}
    return ", ".join(f"{names[key]} {value}" for key, value in dict(settings).items())
