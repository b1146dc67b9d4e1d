"""Weights made elsewhere: open_clip folders and files of its native ViT kind; none of their code runs."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cmpt.models.clip import CLIP
from cmpt.models.open_clip_format import FormatError, from_config, from_open_clip, temperature_bound
from cmpt.recipe.paths import resolve_path
from cmpt.recipe.schema import Model, Recipe

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
TOKENIZER_FILE = "tokenizer.model"  # of a sentencepiece tokenizer, beside its Hugging Face form
# The names that open_clip looks for in a folder, in its order.
_WEIGHT_FILES = (
    WEIGHTS_FILE,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class Pretrained:
    """What a folder or a file holds, under open_clip's names."""

    weights: dict[str, Tensor]
    config: dict[str, Any] | None  # its `model_cfg`; a bare file has none
    preprocess: dict[str, Any]  # its `preprocess_cfg`: mean, std, ...


def read_pretrained(path: str) -> Pretrained:
    """Read a folder with `open_clip_config.json`, or a .safetensors, .pt, .pth or .bin file.

    Raises FormatError naming the file. Pickled files are read with torch's `weights_only`; a TorchScript archive, as
    OpenAI published its models, is a program and is refused.
    """
    place = Path(resolve_path(path))
    if place.is_file():
        return Pretrained(_read_weights(place), None, {})
    config_file = place / CONFIG_FILE
    try:
        content = json.loads(config_file.read_text(encoding="utf-8"))
        config, preprocess = content["model_cfg"], content.get("preprocess_cfg") or {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{config_file}: cannot be read as an open_clip configuration: {error!r}") from error
    for key, value in (("mode", "RGB"), ("interpolation", "bicubic"), ("resize_mode", "shortest")):
        if preprocess.get(key, value) != value:
            raise FormatError(f"{config_file}: preprocess_cfg.{key} = {preprocess[key]}: cmpt has {value} only")
    found = [place / name for name in _WEIGHT_FILES if (place / name).is_file()]
    if not found:
        raise FormatError(f"{place}: holds none of {', '.join(_WEIGHT_FILES)}")
    return Pretrained(_read_weights(found[0]), config, preprocess)


def load_pretrained(clip: CLIP, recipe: Recipe, eot_id: int) -> None:
    """Put the weights at `recipe.model.init_from` into `clip`, which was built from the recipe, as fp32.

    `eot_id`: end-of-text id of the recipe's tokenizer. Raises FormatError, naming fields and tensors, unless
    architecture, image statistics, tokenizer, tensors and shapes agree in full.
    """
    model, path = recipe.model, recipe.model.init_from
    assert path is not None
    try:
        pretrained = read_pretrained(path)
        faults = []
        if pretrained.config is not None:
            theirs, their_size = from_config(pretrained.config)
            faults += architecture_differences(model, theirs)
            if their_size != recipe.image.size:
                faults.append(
                    f"image.size is {recipe.image.size}, there it is {their_size}; a phase can change it afterwards"
                )
            faults += _surrounding_differences(recipe, pretrained, Path(resolve_path(path)), eot_id)
        bound = temperature_bound(pretrained.weights, model.logit_scale_max)
        if bound > model.logit_scale_max:
            faults.append(f"model.logit_scale_max is {model.logit_scale_max}, the weights have {bound:.4g}")
        if faults:
            raise FormatError("another architecture or setting: " + "; ".join(faults))
        parameters = from_open_clip(pretrained.weights, model, recipe.image.size)
    except FormatError as error:
        raise FormatError(f"model.init_from = {path}: {error}") from error
    clip.load_state_dict(parameters)


def architecture_differences(ours: Model, theirs: Model) -> list[str]:
    """Fields that change what the weights compute; the place of text pooling also follows from the tokenizer."""
    left, right = _comparable(ours), _comparable(theirs)
    return [f"model.{key} is {left[key]}, there it is {right[key]}" for key in left if left[key] != right[key]]


def check_eos(pretrained: Pretrained, eot_id: int) -> list[str]:
    """A fault where open_clip would pool captions at another token than the tokenizer's end of text."""
    text = (pretrained.config or {}).get("text_cfg") or {}
    theirs = text.get("eos_id", 2)  # open_clip's default
    wrong = text.get("pool_type") == "eos" and theirs != eot_id
    return [f"text_cfg.eos_id = {theirs}: the end of text of the tokenizer is {eot_id}"] if wrong else []


def _surrounding_differences(recipe: Recipe, pretrained: Pretrained, folder: Path, eot_id: int) -> list[str]:
    """Image statistics and tokenizer of the recipe against those of a folder."""
    faults = check_eos(pretrained, eot_id)
    for name in ("mean", "std"):
        ours, theirs = getattr(recipe.image, name), pretrained.preprocess.get(name)
        if theirs is not None and any(abs(a - b) > 1e-6 for a, b in zip(ours, theirs, strict=True)):
            faults.append(f"image.{name} is {list(ours)}, there it is {list(theirs)}")
    text = (pretrained.config or {}).get("text_cfg") or {}
    kind = "sentencepiece" if text.get("hf_tokenizer_name") else "clip_bpe"
    if recipe.tokenizer.kind != kind:
        faults.append(f"tokenizer.kind is {recipe.tokenizer.kind}, there it is {kind}")
    elif kind == "sentencepiece" and recipe.tokenizer.path:
        theirs_file = folder / TOKENIZER_FILE
        ours_file = Path(resolve_path(recipe.tokenizer.path))
        if not theirs_file.is_file() or theirs_file.read_bytes() != ours_file.read_bytes():
            faults.append(f"tokenizer.path is {recipe.tokenizer.path}, which is not the same as {theirs_file}")
    return faults


def _comparable(model: Model) -> dict[str, Any]:
    values: dict[str, Any] = {name: getattr(model, name) for name in ("patch_size", "embed_dim", "context_length")}
    values |= {"vocab_size": model.vocab_size, "quick_gelu": model.quick_gelu}
    values["vision.pooling"] = model.vision.pooling
    for name, tower in (("vision", model.vision), ("text", model.text)):
        assert tower.width
        for field in ("width", "layers", "heads", "layer_norm_eps"):
            values[f"{name}.{field}"] = getattr(tower, field)
        values[f"{name}.mlp_ratio"] = int(tower.width * tower.mlp_ratio) / tower.width
        values[f"{name}.layer_scale_init"] = "null" if tower.layer_scale_init is None else "given"
    values["logit_bias_init"] = "null" if model.logit_bias_init is None else "given"
    return values


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            weights: Any = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else repr(error)
        hint = "; a TorchScript archive must be saved as a state dict first" if "TorchScript" in str(error) else ""
        raise FormatError(f"{path}: cannot be read as weights: {reason}{hint}") from error
    if isinstance(weights, Mapping) and isinstance(weights.get("state_dict"), Mapping):
        weights = weights["state_dict"]
    if not isinstance(weights, Mapping) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise FormatError(f"{path}: holds no state dict, but {type(weights).__name__}")
    return {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}
