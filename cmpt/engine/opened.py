"""Any model that cmpt can read, ready to be evaluated or exported: a run, one of its checkpoints, an exported folder,
or somebody else's weights of open_clip's native ViT kind."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cmpt.engine.manifest import PARAMETERS, STATE, CheckpointError, checkpoints_newest_first, verify
from cmpt.models.clip import CLIP
from cmpt.models.open_clip_format import FormatError, from_config, from_open_clip, model_of_weights
from cmpt.models.pretrained import CONFIG_FILE, read_pretrained
from cmpt.recipe import RecipeError, load_recipe
from cmpt.recipe.schema import Image, Recipe, Tokenizer


@dataclass(frozen=True)
class OpenedModel:
    clip: CLIP  # fp32, on the CPU
    recipe: Recipe  # with architecture, image and tokenizer settings that belong to the weights
    state: dict[str, Any] = field(default_factory=dict)  # of a checkpoint: its state.json
    checkpoint: Path | None = None  # the folder it came from, for a run


def open_model(path: str, overrides: Sequence[str] = ()) -> OpenedModel:
    """Open what lies at `path`; `overrides` (key=value) go over its recipe, for what the weights do not decide.

    Raises CheckpointError, FormatError or RecipeError, in one line.
    """
    place = Path(path).expanduser()
    if (place / "checkpoints").is_dir():
        return open_checkpoint(newest_sound(place), overrides)
    if place.is_dir() and not (place / CONFIG_FILE).is_file():
        return open_checkpoint(place, overrides)
    if not place.exists():
        raise FormatError(f"{path}: no such file or folder")
    return _open_foreign(place, overrides)


def newest_sound(run: Path) -> Path:
    """The newest checkpoint of a run that its manifest confirms. Raises CheckpointError where there is none."""
    faults = []
    for candidate in checkpoints_newest_first(run / "checkpoints"):
        try:
            verify(candidate)
        except CheckpointError as fault:
            faults.append(str(fault))
            continue
        return candidate
    raise CheckpointError(f"{run}: holds no sound checkpoint" + (": " + "; ".join(faults) if faults else ""))


def open_checkpoint(folder: Path, overrides: Sequence[str] = ()) -> OpenedModel:
    """One checkpoint of a run, `<run>/checkpoints/step_<8 digits>`; nothing of it is used before its hashes agree."""
    verify(folder)
    recipe_file = folder.resolve().parent.parent / "recipe.yaml"
    if not recipe_file.is_file():
        raise CheckpointError(f"{folder}: the run's recipe is missing; expected {recipe_file}")
    recipe = load_recipe(str(recipe_file), overrides).recipe
    clip = CLIP(recipe.model, recipe.image.size)
    try:
        parameters = load_file(folder / PARAMETERS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / PARAMETERS}: {error}") from error
    _fill(clip, parameters, str(folder))
    return OpenedModel(clip, recipe, json.loads((folder / STATE).read_text()), folder)


def _open_foreign(place: Path, overrides: Sequence[str]) -> OpenedModel:
    """An open_clip folder or a bare file, of which the shapes tell the architecture; model.* overrides say the rest."""
    pretrained = read_pretrained(str(place))
    own = place / "recipe.yaml"
    loaded = load_recipe(str(own) if own.is_file() else os.devnull, overrides)
    recipe = loaded.recipe
    try:
        if pretrained.config is not None:
            model, image_size = from_config(pretrained.config)
        else:
            model, image_size = model_of_weights(pretrained.weights)
        for key, origin in loaded.origins.items():
            if origin == "command line" and key.startswith("model."):
                if pretrained.config is not None:
                    raise RecipeError([f"{key}: {CONFIG_FILE} says what the architecture is"])
                _copy_field(key, recipe, model)
        parameters = from_open_clip(pretrained.weights, model, image_size)
    except FormatError as error:
        raise FormatError(f"{place}: {error}") from error
    default = Image()
    image = replace(
        recipe.image,
        size=image_size,
        mean=tuple(pretrained.preprocess.get("mean", default.mean)),
        std=tuple(pretrained.preprocess.get("std", default.std)),
    )
    text_config = (pretrained.config or {}).get("text_cfg") or {}
    tokenizer = recipe.tokenizer
    if not any(loaded.origins[key] == "command line" for key in ("tokenizer.kind", "tokenizer.path")):
        tokenizer = _tokenizer(place, text_config)
    clip = CLIP(model, image_size)
    _fill(clip, parameters, str(place))
    return OpenedModel(clip, replace(recipe, model=model, image=image, tokenizer=tokenizer))


def _tokenizer(place: Path, text_config: dict[str, Any]) -> Tokenizer:
    if not text_config.get("hf_tokenizer_name"):
        return Tokenizer(kind="clip_bpe")
    file = place / "tokenizer.model"
    if not file.is_file():
        name = text_config["hf_tokenizer_name"]
        raise FormatError(f"text_cfg.hf_tokenizer_name = {name}: cmpt reads sentencepiece models only, expected {file}")
    return Tokenizer(kind="sentencepiece", path=str(file))


def _copy_field(key: str, recipe: Recipe, model: Any) -> None:
    owner, source = model, recipe.model
    *sections, name = key.split(".")[1:]
    for section in sections:
        owner, source = getattr(owner, section), getattr(source, section)
    setattr(owner, name, getattr(source, name))


def _fill(clip: CLIP, parameters: dict[str, Tensor], source: str) -> None:
    expected = {name: tuple(parameter.shape) for name, parameter in clip.named_parameters()}
    found = {name: tuple(value.shape) for name, value in parameters.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(f"{source}: {len(wrong)} tensors do not fit the recipe's model: {', '.join(wrong[:6])}")
    with torch.no_grad():
        clip.load_state_dict(parameters)
