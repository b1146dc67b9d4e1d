"""What a study says: its points, the model fitted to them with its error, what it foretells."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cmpt.data.tokenizer import open_tokenizer, with_vocabulary
from cmpt.engine.build import by_layer
from cmpt.engine.traffic import parameter_sizes, recipe_bytes
from cmpt.models.clip import CLIP
from cmpt.models.flops import peak_flops
from cmpt.recipe.schema import Recipe
from scaling_extrapolate import Curve, curve_of, shape_of
from scaling_fit import Fit, Record, Sample, fit, held_out, largest_held_out, read_links, samples_of, training_link
from scaling_study import Point, Study, describe, point_recipe
from step_model import Link

BYTES = ("features", "gradients", "parameters")
"""Kinds whose bytes arithmetic gives to the last one; "control" holds Python objects too."""
BAND = 0.15
"""Share by which a prediction may be off."""
TRAINED = "of training's own all-reduces, less what compute hides"
BENCHMARKED = "of the benchmark's all-reduces"


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
    from_fewer: Mapping[str, Mapping[str, float]]
    """By point with the most processes: terms predicted by a fit to those with fewer."""
    bytes: Mapping[str, Bytes]
    """By point with several ranks."""
    curves: Sequence[Curve]
    training_links: Mapping[str, Link]
    """"inside" and "between", as training's own all-reduces show them."""
    missing: int
    """Starts that were not made yet."""

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
    def errors_from_fewer(self) -> dict[str, float]:
        """By point with the most processes: its step as those with fewer foretell it against the measured one, as a
        share."""
        steps = {sample.name: sample.step_s for sample in self.samples}
        return {name: sum(terms.values()) / steps[name] - 1 for name, terms in self.from_fewer.items()}

    @property
    def caveats(self) -> list[str]:
        """What a reader of the forecasts has to know of this study."""
        if not self.curves:
            return []
        most = max(sample.work.world_size for sample in self.samples)
        found = [f"Measured with up to {most:,} processes; what is foretold for more was not checked."]
        if off := [abs(error) for error in self.errors_from_fewer.values()]:
            alone = sorted({sample.work.world_size for sample in self.samples})[-2] == 1
            fewer = "single processes alone, which show nothing of collectives," if alone else "fewer processes alone"
            told = f"{100 * statistics.median(off):.0f} % off in the median, {100 * max(off):.0f} % at most"
            found.append(f"From {fewer} the points with {most:,} are foretold {told}.")
        if not self.errors:
            found.append("No point could be held out: how far the model is off is not known.")
        elif (middle := statistics.median(self.errors)) > BAND:
            told = f"On points that it was not fitted to, the model is {100 * middle:.0f} % off in the median"
            found.append(f"{told}: what it foretells is no better than that.")
        assert self.fit is not None
        if max(sample.work.nodes for sample in self.samples) == 1:
            told = "Only one host was measured: its own link stands in for the network between nodes"
            found.append(f"{told}, and the spread of its processes for that of many hosts.")
        elif self.fit.between.bytes_per_s == float("inf"):
            found.append("No bandwidth between nodes could be fitted: the network is taken for infinitely fast.")
        return found

    @property
    def mfu(self) -> float | None:
        """Share of the device's peak that ranks reach while they compute, the median over points; None for a device
        whose peak is not known."""
        peak = peak_flops(self.samples[0].record["device"]) if self.samples else None
        if peak is None:
            return None
        return statistics.median(of.work.flops / of.terms_s["compute"] / peak for of in self.samples)

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

    def measured_on(self, curve: Curve) -> dict[int, float]:
        """By nodes: images per second of the measured points that lie on the curve."""
        return {s.work.nodes: s.images_per_s for s in self.samples if _is_on(s, curve)}

    def efficiency(self, sample: Sample) -> float | None:
        """Images per second and process, against the fewest processes of the same scaling, settings and size."""
        same = [other for other in self.samples if _series(other) == _series(sample)]
        least = min(same, key=lambda other: other.work.world_size)
        return sample.images_per_s / sample.work.world_size / (least.images_per_s / least.work.world_size)


def _series(sample: Sample) -> tuple[Any, ...]:
    return sample.record["scaling"], sample.size, tuple(sample.record["settings"].items())


def _is_on(sample: Sample, curve: Curve) -> bool:
    record, work = sample.record, sample.work
    same_size = record["batch_size"] == curve.batch_of(work.world_size) and record["scaling"] == curve.scaling
    return bool(same_size and work.ranks_per_node == curve.ranks_per_node and record["settings"] == curve.settings)


def build(study: Study, points: Sequence[Point], records: Sequence[Record], collectives: Sequence[Path]) -> Report:
    """`collectives`: files of the benchmark on the study's sets of hosts. Records of other points are left out.
    Raises CollectivesError where a file cannot be used."""
    by_name = {point.name: point for point in points}
    records = [record for record in records if record["point"] in by_name]
    made = {(record["point"], record["repeat"]) for record in records}
    missing = sum((name, repeat) not in made for name in by_name for repeat in range(study.repeats))
    recipes = {name: _with_vocabulary(point_recipe(study, point).recipe) for name, point in by_name.items()}
    sizes = model_sizes(recipes)
    samples = samples_of(records, recipes, {name: sum(map(sum, of_model)) for name, of_model in sizes.items()})
    if not samples:
        return Report(study, records, [], None, {}, {}, {}, [], {}, missing)
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
        largest_held_out(samples, benchmarked),
        {s.name: _bytes(s, recipes[s.name], sizes[s.name], nccl) for s in samples if s.work.world_size > 1},
        _curves(study, samples, recipes, sizes, nccl, found),
        {name: link for name, link in links.items() if link is not None},
        missing,
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
    per node that were measured. Settings that only single processes ran are left out."""
    per_node = max(sample.work.ranks_per_node for sample in samples)
    by_settings: dict[str, list[Sample]] = {}
    for sample in samples:
        by_settings.setdefault(describe(sample.record["settings"]), []).append(sample)
    curves = []
    for same in by_settings.values():
        shape = shape_of(same, recipes[same[0].name], sizes[same[0].name], nccl)
        if shape is None:
            continue
        settings = same[0].record["settings"]
        for scaling, of_study in (("weak", study.weak), ("strong", study.strong)):
            curves += [curve_of(scaling, size, settings, per_node, shape, found) for size in of_study[:1]]
    return curves
