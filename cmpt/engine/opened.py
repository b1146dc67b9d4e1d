"""Any model that cmpt can read, ready to be evaluated or exported: a run, one of its checkpoints, an exported folder,
or somebody else's weights of open_clip's native ViT kind."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmpt.data.tokenizer import open_tokenizer, with_vocabulary
from cmpt.engine.manifest import MANIFEST, STATE, CheckpointError, check_shapes, newest_sound, verify
from cmpt.engine.parts import Parts
from cmpt.engine.sharded import AVERAGE, PARAMETER
from cmpt.models.clip import CLIP
from cmpt.models.open_clip_format import (
    ASSUMED,
    FormatError,
    from_config,
    from_open_clip,
    model_of_weights,
    temperature_bound,
    to_open_clip,
)
from cmpt.models.pretrained import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    Pretrained,
    architecture_differences,
    check_eos,
    read_pretrained,
)
from cmpt.recipe import LoadedRecipe, RecipeError, check_model, load_recipe
from cmpt.recipe.schema import Image, Model, Recipe, Tokenizer

WITH_THE_WEIGHTS = ("model.", "image.size", "image.mean", "image.std", "tokenizer.")
"""What a checkpoint or a folder decides, and an override must not."""


@dataclass(frozen=True)
class OpenedModel:
    clip: CLIP  # fp32, on the CPU
    recipe: Recipe  # with architecture, image and tokenizer settings that belong to the weights
    state: dict[str, Any] = field(default_factory=dict)  # of a checkpoint: its state.json
    checkpoint: Path | None = None  # the folder it came from, for a run
    notes: tuple[str, ...] = ()  # what was assumed or changed, for people to read

    def weights(self) -> dict[str, Tensor]:
        """open_clip's state dict. The temperature is the one in use: a parameter beyond its bound acts as the bound."""
        parameters = {name: p.detach() for name, p in self.clip.named_parameters()}
        bounded = parameters["logit_scale"].clamp(0.0, self.clip.logit_scale_max)
        return to_open_clip({**parameters, "logit_scale": bounded}, self.recipe.model)


def open_model(path: str, overrides: Sequence[str] = (), average: bool = False) -> OpenedModel:
    """Open what lies at `path`; `overrides` (key=value) go over its recipe, for what the weights do not decide.

    `average`: of a run or a checkpoint, the average of the weights that optimizer.ema_decay keeps.

    Raises CheckpointError, FormatError, RecipeError or, for its tokenizer, DataError; each in one line.
    """
    place = Path(path).expanduser()
    if (place / "checkpoints").is_dir():
        opened = _open_verified(_newest_sound(place), overrides, average)
    elif (place / MANIFEST).is_file() or (place / STATE).is_file():
        opened = open_checkpoint(place, overrides, average)
    elif average and place.exists():
        raise FormatError(f"{path}: only a run or a checkpoint has an average of the weights (EMA)")
    elif place.is_file() or (place / CONFIG_FILE).is_file():
        opened = _open_foreign(place, overrides)
    elif place.exists():
        kinds = f"a run (checkpoints/), a checkpoint ({MANIFEST}) or an open_clip folder ({CONFIG_FILE})"
        raise FormatError(f"{path}: is not {kinds}")
    else:
        raise FormatError(f"{path}: no such file or folder")
    recipe = opened.recipe
    faults = check_model(recipe)
    if faults:
        raise RecipeError(faults)
    with_vocabulary(recipe, open_tokenizer(recipe.tokenizer, recipe.model.context_length))
    return opened


def _newest_sound(run: Path) -> Path:
    chosen, passed_over = newest_sound(run / "checkpoints")
    if chosen is None:
        faults = "; ".join(str(fault) for _, fault in passed_over)
        raise CheckpointError(f"{run}: holds no sound checkpoint" + (f": {faults}" if faults else ""))
    return chosen


def open_checkpoint(folder: Path, overrides: Sequence[str] = (), average: bool = False) -> OpenedModel:
    """One checkpoint of a run, `<run>/checkpoints/step_<8 digits>`; nothing of it is used before its hashes agree.

    After a phase with another image size the model is of that size: its position table is the interpolated one.
    """
    verify(folder)
    return _open_verified(folder, overrides, average)


def _open_verified(folder: Path, overrides: Sequence[str], average: bool) -> OpenedModel:
    recipe_file = folder.resolve().parent.parent / "recipe.yaml"
    if not recipe_file.is_file():
        raise CheckpointError(f"{folder}: the run's recipe is missing; expected {recipe_file}")
    loaded = load_recipe(str(recipe_file), overrides)
    _refuse(loaded, WITH_THE_WEIGHTS, "was decided when the model was trained")
    recipe = loaded.recipe
    parts = Parts(folder)
    if average and not parts.has(AVERAGE):
        raise CheckpointError(f"{folder}: has no average of the weights; the run had no optimizer.ema_decay")
    parameters, state = parts.full(AVERAGE if average else PARAMETER), parts.state
    clip = _filled(recipe.model, recipe.image.size, parameters, folder)
    size = state.get("image_size") or recipe.image.size
    notes: tuple[str, ...] = ()
    if size != recipe.image.size:
        assert recipe.model.patch_size
        side = size // recipe.model.patch_size
        table = clip.visual.positions((side, side)).detach()
        notes = (f"at {size} px, as in its last phase; the position table is interpolated from {recipe.image.size} px",)
        clip = _filled(recipe.model, size, {**parameters, "visual.positional_embedding": table}, folder)
        recipe = replace(recipe, image=replace(recipe.image, size=size))
    return OpenedModel(clip, recipe, state, folder, notes)


def _open_foreign(place: Path, overrides: Sequence[str]) -> OpenedModel:
    """An open_clip folder, or a bare file, of which shapes and model.* overrides tell the architecture."""
    pretrained = read_pretrained(str(place))
    own = place / "recipe.yaml"
    loaded = load_recipe(str(own) if own.is_file() else os.devnull, overrides)
    notes: tuple[str, ...] = ()
    try:
        if pretrained.config is None:
            _refuse(loaded, ("image.size",), "follows from the weights")
            model, image_size = _bare(loaded, pretrained)
            image, tokenizer, notes = loaded.recipe.image, loaded.recipe.tokenizer, (f"assumed: {ASSUMED}",)
            if "command line" not in (loaded.origins["tokenizer.kind"], loaded.origins["tokenizer.path"]):
                tokenizer = Tokenizer(kind="clip_bpe")
        else:
            _refuse(loaded, WITH_THE_WEIGHTS, f"{CONFIG_FILE} decides it")
            model, image_size = from_config(pretrained.config)
            image, tokenizer = _image(loaded.recipe.image, pretrained), _tokenizer(place, pretrained)
            faults = check_eos(pretrained, open_tokenizer(tokenizer, model.context_length).eot_id)
            if own.is_file():  # one of ours, which knows more than the configuration can say
                faults += architecture_differences(loaded.recipe.model, model)
                model = loaded.recipe.model
            if faults:
                raise FormatError("; ".join(faults))
        model.logit_scale_max = temperature_bound(pretrained.weights, model.logit_scale_max)
        parameters = from_open_clip(pretrained.weights, model, image_size)
    except FormatError as error:
        raise FormatError(f"{place}: {error}") from error
    recipe = replace(loaded.recipe, model=model, image=replace(image, size=image_size), tokenizer=tokenizer)
    if model.logit_bias_init is not None:
        recipe.loss.kind = "sigmoid"
    clip = _filled(model, image_size, {name: value.float() for name, value in parameters.items()}, place)
    return OpenedModel(clip, recipe, notes=notes)


def _bare(loaded: LoadedRecipe, pretrained: Pretrained) -> tuple[Model, int]:
    """What shapes tell, and over it what the command line says of `model`, a preset included."""
    model, image_size = model_of_weights(pretrained.weights)
    for key, origin in loaded.origins.items():
        if key.startswith("model.") and (origin == "command line" or origin.startswith("preset ")):
            owner: Any = model
            source: Any = loaded.recipe.model
            *sections, name = key.split(".")[1:]
            for section in sections:
                owner, source = getattr(owner, section), getattr(source, section)
            setattr(owner, name, getattr(source, name))
    return model, image_size


def _image(image: Image, pretrained: Pretrained) -> Image:
    default = Image()
    mean, std = (tuple(pretrained.preprocess.get(name, getattr(default, name))) for name in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3:
        raise FormatError(f"preprocess_cfg: mean and std must have three values, got {list(mean)} and {list(std)}")
    return replace(image, mean=mean, std=std)


def _tokenizer(place: Path, pretrained: Pretrained) -> Tokenizer:
    name = ((pretrained.config or {}).get("text_cfg") or {}).get("hf_tokenizer_name")
    if not name:
        return Tokenizer(kind="clip_bpe")
    file = place / TOKENIZER_FILE
    if not file.is_file():
        raise FormatError(f"text_cfg.hf_tokenizer_name = {name}: cmpt reads sentencepiece models only, expected {file}")
    return Tokenizer(kind="sentencepiece", path=str(file))


def _refuse(loaded: LoadedRecipe, keys: Iterable[str], why: str) -> None:
    given = [key for key, origin in loaded.origins.items() if origin == "command line" and key.startswith(tuple(keys))]
    if given:
        raise RecipeError([f"{key}: cannot be overridden: {why}" for key in given])


def _filled(model: Model, image_size: int, parameters: dict[str, Tensor], source: Path) -> CLIP:
    with torch.device("meta"):
        clip = CLIP(model, image_size)
    expected = {name: tuple(parameter.shape) for name, parameter in clip.named_parameters()}
    found = {name: tuple(value.shape) for name, value in parameters.items()}
    check_shapes(source, expected, found)
    clip.load_state_dict({name: value.contiguous() for name, value in parameters.items()}, assign=True)
    return clip
