"""The phases of a run: the recipe's masking, image and optimizer, with each phase's overrides applied. Torch-free."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from cmpt.recipe.durations import Duration, parse_duration
from cmpt.recipe.schema import Image, Masking, Optimizer, Phase, Recipe, TextMasking
from cmpt.recipe.typed import RecipeError, Report, convert, fault_line, field_types, nearest_key

PHASE_KEYS = (
    *(f"masking.{name}" for name in field_types(Masking)),
    *(f"text_masking.{name}" for name in field_types(TextMasking)),
    "image.size",
    "image.crop_scale",
    "optimizer.lr",
    "optimizer.min_lr",
    "optimizer.warmup",
)
_SECTIONS = {"masking": Masking, "text_masking": TextMasking, "image": Image, "optimizer": Optimizer}
_ALLOWED = (
    "masking.*, text_masking.*, image.size, image.crop_scale, optimizer.lr, optimizer.min_lr and optimizer.warmup"
)


@dataclass(frozen=True)
class ResolvedPhase:
    """One phase as it runs."""

    name: str
    duration: Duration
    masking: Masking
    text_masking: TextMasking
    image: Image
    optimizer: Optimizer


def phases(recipe: Recipe) -> list[ResolvedPhase]:
    """The phases in order; without any in the recipe, a single one, "main", of `run.duration`.

    Raises RecipeError with every unknown key, wrong type and wrong duration.
    """
    faults: list[str] = []

    def report(key: str, value: Any, constraint: str) -> None:
        faults.append(fault_line(key, value, constraint))

    if (recipe.run.duration is None) == (not recipe.phases):
        report("run.duration", recipe.run.duration, "exactly one of run.duration and phases must be set")
        raise RecipeError(faults)
    resolved = []
    listed = recipe.phases or [Phase(name="main", duration=recipe.run.duration or "")]
    for index, phase in enumerate(listed):
        sections = apply_phase(recipe, phase, f"phases.{index}.set", report)
        try:
            duration = parse_duration(phase.duration)
        except ValueError as error:
            report(f"phases.{index}.duration" if recipe.phases else "run.duration", phase.duration, str(error))
            continue
        resolved.append(ResolvedPhase(phase.name or f"phase {index + 1}", duration, **sections))
    if faults:
        raise RecipeError(faults)
    return resolved


def apply_phase(recipe: Recipe, phase: Phase, key: str, report: Report) -> dict[str, Any]:
    """The sections by name as they are during `phase`; faults of its `set`, whose dotted key is `key`, are reported."""
    sections = {name: deepcopy(getattr(recipe, name)) for name in _SECTIONS}
    for name, value in convert_set(phase, key, report).items():
        section, _, field = name.partition(".")
        setattr(sections[section], field, value)
    return sections


def convert_set(phase: Phase, key: str, report: Report) -> dict[str, Any]:
    """The overrides of a phase as typed values; unknown keys and wrong types are reported and left out."""
    converted = {}
    wrong: set[str] = set()

    def note(where: str, value: Any, constraint: str) -> None:
        wrong.add(name)
        report(where, value, constraint)

    for name, value in (phase.set or {}).items():
        if name not in PHASE_KEYS:
            report(f"{key}.{name}", value, f"a phase sets only {_ALLOWED}{nearest_key(name, PHASE_KEYS)}")
            continue
        section, _, field = name.partition(".")
        converted[name] = convert(field_types(_SECTIONS[section])[field], value, f"{key}.{name}", note)
    return {name: value for name, value in converted.items() if name not in wrong}
