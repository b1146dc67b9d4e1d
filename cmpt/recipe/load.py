"""A recipe file and key=value overrides -> the typed, resolved recipe and where each value came from. Torch-free.

OmegaConf is used here for interpolation (`${model.patch_size}`, `${oc.env:HOME}`) and nowhere else in cmpt.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cmpt.recipe.layers import RESOLVERS, Layers
from cmpt.recipe.phases import convert_set
from cmpt.recipe.presets import PRESETS
from cmpt.recipe.schema import Recipe
from cmpt.recipe.typed import RecipeError, convert, flat, nearest_choice, plain, show

# What a second start of the same run may change: none of it reaches the weights.
NOT_IDENTITY = (
    "run.name",
    "run.folder",
    "run.overwrite",
    "run.log_every",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.keep_checkpoints_hours",
    "run.copy_checkpoints_to",
    "run.stop_after",
    "run.timings",
    "data.heldout",
    "data.category_field",
    "data.cache_folder",
    "data.cache",
    "data.cache_limit_bytes",
    "data.fetch_workers",
    "data.fetch_attempts",
    "data.fetch_timeout_s",
    "data.allow_pipe",
    "data.broken_shards",
    "data.workers",
    "data.prefetch_batches",
    "data.stall_s",
    "decode",  # pixels of DALI and of the CPU differ by less than one of 255 in the mean, as a change of device does
    "model.preset",  # the sizes it stands for count
    "model.init_from",  # read only before the first step
    "model.activation_checkpointing",
    "loss.chunk_rows",
    "engine.micro_batch_size",
    "engine.zero_stage",
    "engine.offload_optimizer",
    "engine.overlap_communication",
    "engine.bucket_elements",
    "guard",
    "evaluation",
)


@dataclass(frozen=True)
class LoadedRecipe:
    """The typed recipe, and for each of its dotted keys where the value came from.

    An origin reads like "recipes/base.yaml:12", "command line", "preset ViT-B-16" or "schema default".
    """

    recipe: Recipe
    origins: dict[str, str]


def load_recipe(path: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read `path` and what it extends, apply the overrides, fill in the preset, resolve, convert.

    Raises RecipeError with every fault found; the ranges of values are the business of `check_recipe`.
    """
    layers = Layers()
    parsed = [layers.parse_override(override) for override in overrides]
    if not layers.add_file(str(path)):
        raise RecipeError(layers.faults)
    for override in parsed:
        if override:
            layers.add_override(override)
    _fill_preset(layers)
    recipe = convert(Recipe, _resolved(layers), "", layers.fault)
    for index, phase in enumerate(recipe.phases or []):
        if phase:
            convert_set(phase, f"phases.{index}.set", layers.fault)
    if layers.faults:
        raise RecipeError(layers.faults)
    return LoadedRecipe(recipe, {key: layers.origin(key) for key in flat(plain(recipe))})


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.dump(_escaped(plain(recipe)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def recipe_fingerprint(recipe: Recipe) -> str:
    """A hash over everything that decides the mathematics of the run, so not over NOT_IDENTITY.

    Values that are the schema's defaults do not count, so that a release with more fields still resumes older runs.
    """
    defaults = flat(plain(Recipe()))
    given = {key: leaf for key, leaf in _identity(recipe).items() if key not in defaults or leaf != defaults[key]}
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]


def differences(a: Recipe, b: Recipe) -> list[str]:
    """One line per dotted key in which two recipes' fingerprints differ, with both values."""
    left, right = _identity(a), _identity(b)
    keys = list(dict.fromkeys([*left, *right]))

    def side(values: dict[str, Any], key: str) -> str:
        return show(values[key]) if key in values else "not set"

    changed = [key for key in keys if key not in left or key not in right or left[key] != right[key]]
    return [f"{key}: {side(left, key)} against {side(right, key)}" for key in changed]


def _identity(recipe: Recipe) -> dict[str, Any]:
    excluded = tuple(f"{key}." for key in NOT_IDENTITY)
    return {
        key: leaf
        for key, leaf in flat(plain(recipe)).items()
        if not f"{key}.".startswith(excluded) and not re.fullmatch(r"phases\.\d+\.name", key)
    }


def _fill_preset(layers: Layers) -> None:
    model = layers.tree["model"]
    name = model.get("preset") if isinstance(model, dict) else None
    if not isinstance(name, str):
        return  # not set, or a fault that the conversion reports
    if "${" in name:
        try:
            name = OmegaConf.create(layers.tree).model.preset
        except OmegaConfBaseException:
            return  # the resolution below reports it
    if name not in PRESETS:
        layers.fault("model.preset", name, nearest_choice(str(name), PRESETS))
        return
    for key, size in PRESETS[name].items():
        section, _, field = key.rpartition(".")
        owner = model.get(section) if section else model
        if isinstance(owner, dict):
            layers.fill(owner, field, size, f"model.{key}", f"preset {name}")


def _resolved(layers: Layers) -> dict[str, Any]:
    """The tree with every `${...}` replaced."""

    def resolve(node: Any, key: str) -> Any:
        if isinstance(node, DictConfig):
            return {name: child(node, name, f"{key}.{name!s}" if key else str(name)) for name in node}
        if isinstance(node, ListConfig):
            return [child(node, index, f"{key}.{index}") for index in range(len(node))]
        return node

    def child(node: Any, name: Any, key: str) -> Any:
        try:
            return resolve(node[name], key)
        except OmegaConfBaseException as error:
            raw = OmegaConf.to_container(node)
            assert isinstance(raw, dict | list)
            layers.fault(key, raw[name], str(error).splitlines()[0])
            return None

    try:
        return resolve(OmegaConf.create(layers.tree), "")
    except OmegaConfBaseException as error:
        layers.fault(str(error.full_key), error.value, str(error).splitlines()[0])
        raise RecipeError(layers.faults) from error


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    # A backslash keeps OmegaConf from interpolating; backslashes before it are then doubled.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


class _Dumper(yaml.SafeDumper):
    """Quotes text that any YAML reader, or ours, would take for something else."""


for _tag, _pattern in RESOLVERS.items():
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, None)
