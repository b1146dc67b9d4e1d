"""open_clip's names, shapes and configuration for a cmpt model, in both directions. Pure: no files, no open_clip.

Format: open_clip 3.3.0, its native ViT with its native causal text transformer. Each parameter of ours is one tensor of
theirs, so export(import(x)) is x, bit by bit. Three shapes differ:

    patch embedding   [D, P]  -> conv1.weight [D, 3, p, p], the same numbers (a patch is channel-major)
    projections       [E, D]  -> [D, E], which they use as x @ P
    logit_scale       [1]     -> []
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cmpt.models.clip import CLIP
from cmpt.recipe.presets import PRESETS
from cmpt.recipe.schema import Model, Text, Tower, Vision

# Ours -> theirs, by parts of a name, applied in this order.
_RENAMED = (
    (r"^text\.proj\.weight$", "text_projection"),
    (r"^text\.", ""),
    (r"^visual\.proj\.weight$", "visual.proj"),
    (r"^visual\.patch_embedding\.", "visual.conv1."),
    (r"\.?\btransformer\.blocks\.", lambda found: found[0].replace("blocks", "resblocks")),
    (r"\.attn\.in_proj\.", ".attn.in_proj_"),
    (r"\.(c_fc|c_proj)\.", r".mlp.\1."),
    (r"\.(ls_[12])\.gain$", r".\1.gamma"),
)
_TRANSPOSED = {"text_projection", "visual.proj"}
# What OpenAI's state dicts hold besides weights, and the mask that older releases saved.
_NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask"}
_OF_TEXT = ("text_projection", "positional_embedding", "token_embedding.", "transformer.", "ln_final.")
_SHOWN = 6


class FormatError(ValueError):
    """Weights or a configuration that are not of the kind that cmpt and open_clip share; names keys and values."""


def open_clip_name(name: str) -> str:
    """Their name of the parameter that is called `name` here."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def to_open_clip(parameters: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Parameters of a `CLIP` by name -> open_clip's state dict, contiguous and in the same dtype."""
    assert model.patch_size
    weights = {}
    for name, tensor in parameters.items():
        theirs = open_clip_name(name)
        if theirs == "visual.conv1.weight":
            tensor = tensor.view(len(tensor), 3, model.patch_size, model.patch_size)
        elif theirs in _TRANSPOSED:
            tensor = tensor.T
        elif theirs in ("logit_scale", "logit_bias"):
            tensor = tensor.view([])
        weights[theirs] = tensor.contiguous()
    return weights


def temperature_bound(weights: Mapping[str, Tensor], least: float) -> float:
    """A `model.logit_scale_max` under which these weights keep their temperature; at least `least`.

    Others do not bound it as CLIP does: SigLIP's weights reach 118.
    """
    logit_scale = plain_names(weights).get("logit_scale")
    if logit_scale is None or logit_scale.numel() != 1:
        return least  # reported with the other tensors
    if float(logit_scale) < 0:
        raise FormatError(f"logit_scale = {float(logit_scale):.4g}: must be >= 0")
    reached = math.exp(float(logit_scale))
    return reached * (1 + 1e-6) if reached > least else least


def halved(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's state dict in fp16, but for the scalars, which that would move by up to 5e-4 of themselves.

    Raises FormatError naming tensors with values that fp16 cannot hold.
    """
    small = {name: weight if weight.ndim == 0 else weight.half() for name, weight in weights.items()}
    check_finite(small, "values beyond fp16 in")
    return small


def check_finite(weights: Mapping[str, Tensor], fault: str) -> None:
    """Raises FormatError: `fault`, and the tensors with an infinity or a NaN."""
    broken = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
    if broken:
        raise FormatError("; ".join(_listed(fault, broken)))


def from_open_clip(weights: Mapping[str, Tensor], model: Model, image_size: int) -> dict[str, Tensor]:
    """open_clip's state dict -> parameters of a `CLIP` of this architecture by name, in the same dtype.

    Understood besides the plain names: the prefix "text." (custom_text) and "module." (saved from DDP). Raises
    FormatError that names every tensor that is missing, surplus or of another shape; nothing is interpolated.
    """
    found = plain_names(weights)
    with torch.device("meta"):
        ours = {name: parameter for name, parameter in CLIP(model, image_size).named_parameters()}
    expected = to_open_clip(ours, model)
    faults = _listed("missing", expected.keys() - found.keys()) + _listed("surplus", found.keys() - expected.keys())
    # Older releases kept the temperature in shape [1], as cmpt does.
    scalars = ("logit_scale", "logit_bias")
    wrong = [
        f"{name} is {list(found[name].shape)}, expected {list(expected[name].shape)}"
        for name in expected.keys() & found.keys()
        if found[name].shape != expected[name].shape and not (name in scalars and found[name].numel() == 1)
    ]
    faults += wrong[:_SHOWN] + ([f"{len(wrong) - _SHOWN} more of another shape"] if len(wrong) > _SHOWN else [])
    if faults:
        raise FormatError("; ".join(faults))
    parameters = {}
    for name, parameter in ours.items():
        theirs = open_clip_name(name)
        tensor = found[theirs].T if theirs in _TRANSPOSED else found[theirs]
        parameters[name] = tensor.reshape(parameter.shape)
    return parameters


def plain_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict without prefixes and without entries that are no weights."""
    if weights and all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return {
        name.removeprefix("text.") if name.removeprefix("text.").startswith(_OF_TEXT) else name: value
        for name, value in weights.items()
        if name not in _NOT_WEIGHTS
    }


def to_config(model: Model, image_size: int, eos_id: int, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's `model_cfg`. `tokenizer`: further entries of its text_cfg; `eos_id`: the end-of-text id."""
    assert model.vision.width and model.vision.heads
    config: dict[str, Any] = {"embed_dim": model.embed_dim}
    if model.quick_gelu:
        config["quick_gelu"] = True
    if model.logit_bias_init is not None:  # without it their loader refuses the bias in the weights
        config["init_logit_bias"] = model.logit_bias_init
    vision = {
        "image_size": image_size,
        "patch_size": model.patch_size,
        "head_width": model.vision.width // model.vision.heads,
        **_tower_config(model.vision),
    }
    if model.vision.pooling == "average":
        vision["pool_type"] = "avg"
    text = {
        "context_length": model.context_length,
        "vocab_size": model.vocab_size,
        "heads": model.text.heads,
        **_tower_config(model.text),
    }
    if model.text.pooling == "eos":
        text |= {"pool_type": "eos", "eos_id": eos_id}
    return {**config, "vision_cfg": vision, "text_cfg": {**text, **tokenizer}}


def _tower_config(tower: Tower) -> dict[str, Any]:
    config: dict[str, Any] = {"width": tower.width, "layers": tower.layers}
    if tower.mlp_ratio != 4.0:
        config["mlp_ratio"] = tower.mlp_ratio
    if tower.layer_norm_eps != 1e-5:
        config["norm_kwargs"] = {"eps": tower.layer_norm_eps}
    if tower.layer_scale_init is not None:
        config["ls_init_value"] = tower.layer_scale_init
    return config


# Entries of a configuration that change nothing in what the weights compute, whatever their value.
_IGNORED = {"patch_dropout", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop",
            "timm_drop_path", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "attn_pooler_queries",
            "attn_pooler_heads", "pad_id", "hf_tokenizer_name"}  # fmt: skip
# Entries that are allowed with the value that changes nothing: their defaults.
_NEUTRAL: dict[str, Any] = {"pos_embed_type": "learnable", "proj_type": "linear", "block_type": "default"}
_TOWER_KEYS = {"width", "layers", "mlp_ratio", "norm_kwargs", "ls_init_value"}
_VISION_KEYS = _TOWER_KEYS | {"image_size", "patch_size", "head_width", "pool_type"}
_TEXT_KEYS = _TOWER_KEYS | {"context_length", "vocab_size", "heads", "pool_type", "eos_id"}
_MODEL_KEYS = {"embed_dim", "quick_gelu", "init_logit_bias", "init_logit_scale", "custom_text", "vision_cfg",
               "text_cfg"}  # fmt: skip
_POOLING = {"tok": "class_token", "avg": "average", "argmax": "argmax", "eos": "eos"}


def from_config(config: Mapping[str, Any]) -> tuple[Model, int]:
    """open_clip's `model_cfg` -> architecture and image size. Raises FormatError naming what cmpt has no part for."""
    faults = _unknown(config, _MODEL_KEYS, "")
    if not isinstance(config.get("embed_dim"), int):
        faults.append(f"embed_dim = {config.get('embed_dim')}: must be a whole number")
    vision, text = config.get("vision_cfg") or {}, config.get("text_cfg") or {}
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise FormatError("vision_cfg and text_cfg must be mappings")
    faults += _unknown(vision, _VISION_KEYS, "vision_cfg.") + _unknown(text, _TEXT_KEYS, "text_cfg.")
    if not isinstance(vision.get("layers", 12), int):
        faults.append(f"vision_cfg.layers = {vision['layers']}: not a ViT")
    patch_size, image_size = vision.get("patch_size", 16), vision.get("image_size", 224)
    for name, size in (("patch_size", patch_size), ("image_size", image_size)):
        if not isinstance(size, int):
            faults.append(f"vision_cfg.{name} = {size}: must be one number")
    for key, pooling in (("vision_cfg", vision.get("pool_type", "tok")), ("text_cfg", text.get("pool_type", "argmax"))):
        if pooling not in (("tok", "avg") if key == "vision_cfg" else ("argmax", "eos")):
            faults.append(f"{key}.pool_type = {pooling}: cmpt has no such pooling")
    if faults:
        raise FormatError("; ".join(faults))
    width = vision.get("width", 768)
    model = Model(
        patch_size=patch_size,
        embed_dim=config["embed_dim"],
        vision=Vision(
            **_tower(vision, 768),
            heads=width // vision.get("head_width", 64),
            pooling=_POOLING[vision.get("pool_type", "tok")],
        ),
        text=Text(**_tower(text, 512), heads=text.get("heads", 8), pooling=_POOLING[text.get("pool_type", "argmax")]),
        context_length=text.get("context_length", 77),
        vocab_size=text.get("vocab_size", 49408),
        quick_gelu=config.get("quick_gelu", False),
        logit_bias_init=config.get("init_logit_bias"),
    )
    return model, image_size


def _tower(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    return {
        "width": config.get("width", width),
        "layers": config.get("layers", 12),
        "mlp_ratio": float(config.get("mlp_ratio", 4.0)),
        "layer_norm_eps": float((config.get("norm_kwargs") or {}).get("eps", 1e-5)),
        "layer_scale_init": config.get("ls_init_value"),
    }


def _unknown(config: Mapping[str, Any], known: set[str], prefix: str) -> list[str]:
    """Entries that say something which cmpt cannot express."""
    return [
        f"{prefix}{key} = {value}: cmpt has no part for it"
        for key, value in config.items()
        if key not in known | _IGNORED and value and value != _NEUTRAL.get(key)
    ]


ASSUMED = "heads of open_clip's size of this width and depth, exact GELU, epsilon 1e-5, class-token pooling"
"""What `model_of_weights` takes for granted."""


def _heads(tower: str, width: int, layers: int) -> int:
    """As the named sizes have them; 64 channels each elsewhere."""
    for size in PRESETS.values():
        if (size[f"{tower}.width"], size[f"{tower}.layers"]) == (width, layers):
            return size[f"{tower}.heads"]
    return max(1, width // 64)


def model_of_weights(weights: Mapping[str, Tensor]) -> tuple[Model, int]:
    """Architecture and image size as far as shapes tell them; what they do not tell is in `ASSUMED`.

    Raises FormatError, naming tensors, if it is not a native ViT.
    """
    found = plain_names(weights)
    first_blocks = [f"{prefix}transformer.resblocks.0.mlp.c_fc.weight" for prefix in ("visual.", "")]
    needed = ["visual.conv1.weight", "visual.proj", "token_embedding.weight", *first_blocks]
    missing = [name for name in (*needed, "visual.positional_embedding", "positional_embedding") if name not in found]
    if missing:
        raise FormatError("; ".join(_listed("missing", missing)))
    patch_size = found["visual.conv1.weight"].shape[-1]
    side = math.isqrt(len(found["visual.positional_embedding"]) - 1)
    towers = {}
    for kind, prefix in ((Vision, "visual."), (Text, "")):
        hidden, width = found[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"].shape
        layers = sum(
            re.fullmatch(rf"{prefix}transformer\.resblocks\.\d+\.ln_1\.weight", name) is not None for name in found
        )
        scale = f"{prefix}transformer.resblocks.0.ls_1.gamma" in found
        towers[kind] = kind(
            width=width,
            layers=layers,
            heads=_heads("vision" if kind is Vision else "text", width, layers),
            mlp_ratio=hidden / width,
            layer_scale_init=1e-5 if scale else None,
        )
    vision, text = towers[Vision], towers[Text]
    assert isinstance(vision, Vision) and isinstance(text, Text)
    text.pooling = "argmax"
    model = Model(
        patch_size=patch_size,
        embed_dim=found["visual.proj"].shape[1],
        vision=vision,
        text=text,
        context_length=len(found["positional_embedding"]),
        vocab_size=len(found["token_embedding.weight"]),
        logit_bias_init=0.0 if "logit_bias" in found else None,
    )
    return model, side * patch_size


def _listed(what: str, names: Iterable[str]) -> list[str]:
    names = sorted(names)
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{what}: {', '.join(names[:_SHOWN])}{more}"]
