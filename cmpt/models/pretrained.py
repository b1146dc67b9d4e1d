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
from cmpt.models.open_clip_format import FormatError, from_config, from_open_clip
from cmpt.recipe.paths import resolve_path
from cmpt.recipe.schema import Model

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
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
    found = [place / name for name in _WEIGHT_FILES if (place / name).is_file()]
    if not found:
        raise FormatError(f"{place}: holds none of {', '.join(_WEIGHT_FILES)}")
    return Pretrained(_read_weights(found[0]), config, preprocess)


def load_pretrained(clip: CLIP, model: Model, image_size: int, path: str) -> None:
    """Put the weights at `path` into `clip`, which was built from `model` and `image_size`, as fp32.

    Raises FormatError, naming fields and tensors, unless architecture, tensors and shapes agree in full.
    """
    pretrained = read_pretrained(path)
    try:
        if pretrained.config is not None:
            theirs, their_size = from_config(pretrained.config)
            faults = _differences(model, theirs)
            if their_size != image_size:
                faults.append(f"image.size is {image_size}, there it is {their_size}; a phase can change it afterwards")
            if faults:
                raise FormatError("another architecture: " + "; ".join(faults))
        parameters = from_open_clip(pretrained.weights, model, image_size)
    except FormatError as error:
        raise FormatError(f"model.init_from = {path}: {error}") from error
    clip.load_state_dict(parameters)


def _differences(ours: Model, theirs: Model) -> list[str]:
    """Fields that change what the weights compute; the place of text pooling also follows from the tokenizer."""
    left, right = _comparable(ours), _comparable(theirs)
    return [f"model.{key} is {left[key]}, there it is {right[key]}" for key in left if left[key] != right[key]]


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
