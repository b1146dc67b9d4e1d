"""Names, shapes and configurations against open_clip's own models and files."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from cmpt.models.clip import CLIP
from cmpt.models.open_clip_format import (
    FormatError,
    from_config,
    from_open_clip,
    halved,
    model_of_weights,
    to_config,
    to_open_clip,
)
from cmpt.recipe import load_recipe
from cmpt.recipe.presets import PRESETS
from cmpt.recipe.schema import Model, Text, Vision

# open_clip's name -> ours, and what must be said besides the preset.
SHARED: dict[str, tuple[str, list[str]]] = {
    **{name: (name, []) for name in PRESETS if name.split("-")[1] in ("S", "M", "B", "L", "H", "g", "bigG", "e")},
    "ViT-B-32-plus-256": ("ViT-B-32-plus", ["image.size=256"]),
    "ViT-B-16-plus-240": ("ViT-B-16-plus", ["image.size=240"]),
    "ViT-B-32-256": ("ViT-B-32", ["image.size=256"]),
    "ViT-L-14-336-quickgelu": ("ViT-L-14", ["image.size=336", "model.quick_gelu=true"]),
    "ViT-H-14-378": ("ViT-H-14", ["image.size=378"]),
}
NOT_IN_OPEN_CLIP = {"ViT-S-8", "ViT-S-14", "ViT-B-8", "ViT-B-14", "ViT-B-32-plus"}
SHARED = {name: value for name, value in SHARED.items() if name not in NOT_IN_OPEN_CLIP}
SMALL = Model(
    patch_size=8,
    embed_dim=24,
    vision=Vision(width=32, layers=2, heads=2, layer_scale_init=0.1, pooling="average"),
    text=Text(width=48, layers=1, heads=3, layer_norm_eps=1e-6),
    context_length=16,
    vocab_size=50,
    logit_bias_init=-10.0,
)


def ours_of(name: str) -> tuple[Model, int]:
    preset, more = SHARED[name]
    recipe = load_recipe("/dev/null", [f"model.preset={preset}", "model.vocab_size=49408", *more]).recipe
    return recipe.model, recipe.image.size


def shapes(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state.items()}


def test_every_preset_is_compared_with_open_clip_or_known_to_be_missing_there(open_clip: ModuleType) -> None:
    theirs = set(open_clip.list_models())
    compared = {preset for preset, _ in SHARED.values()}
    assert set(SHARED) <= theirs
    assert {name for name in PRESETS if name not in compared} == {"tiny-8", "ViT-Ti-16", "ViT-Ti-8"} | (
        NOT_IN_OPEN_CLIP - {"ViT-B-32-plus"}
    )
    assert not theirs & (set(PRESETS) - compared)


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_preset_has_open_clips_keys_shapes_and_parameter_count(name: str, open_clip: ModuleType) -> None:
    model, image_size = ours_of(name)
    with torch.device("meta"):
        theirs = open_clip.create_model(name, load_weights=False, device="meta")
        ours = CLIP(model, image_size)
    exported = to_open_clip(dict(ours.named_parameters()), model)
    assert shapes(exported) == shapes(theirs.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert shapes(from_open_clip(theirs.state_dict(), model, image_size)) == shapes(dict(ours.named_parameters()))


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_presets_configuration_is_open_clips(name: str, open_clip: ModuleType) -> None:
    """Theirs, read by us, is our preset; ours, read by them, builds the same model."""
    model, image_size = ours_of(name)
    theirs, their_size = from_config(open_clip.get_model_config(name))
    theirs.preset, theirs.text.pooling = model.preset, model.text.pooling
    assert (theirs, their_size) == (model, image_size)
    with torch.device("meta"):
        built = open_clip.model.CLIP(**to_config(model, image_size, 49407, {}))  # unknown keys would raise TypeError
        ours = CLIP(model, image_size)
    assert shapes(built.state_dict()) == shapes(to_open_clip(dict(ours.named_parameters()), model))
    assert built.visual.transformer.resblocks[0].attn.num_heads == model.vision.heads
    assert built.transformer.resblocks[0].attn.num_heads == model.text.heads


@pytest.mark.parametrize("name", ["ViT-S-32-alt", "ViT-M-16-alt"])
def test_export_of_import_is_the_same_bit_by_bit(name: str, open_clip: ModuleType) -> None:
    model, image_size = ours_of(name)
    torch.manual_seed(0)
    theirs = open_clip.create_model(name, load_weights=False).state_dict()
    clip = CLIP(model, image_size)
    clip.load_state_dict(from_open_clip(theirs, model, image_size))
    back = to_open_clip({name: p.detach() for name, p in clip.named_parameters()}, model)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], theirs[key]) and back[key].dtype == theirs[key].dtype for key in theirs)


def test_options_survive_the_configuration() -> None:
    config = to_config(SMALL, 32, 1, {"hf_tokenizer_name": "x", "pad_id": 0})
    assert from_config(config) == (SMALL, 32)
    assert config["vision_cfg"]["pool_type"] == "avg" and config["vision_cfg"]["ls_init_value"] == 0.1
    assert config["text_cfg"]["norm_kwargs"] == {"eps": 1e-6} and config["init_logit_bias"] == -10.0
    assert (config["text_cfg"]["pool_type"], config["text_cfg"]["eos_id"]) == ("eos", 1)


def exported() -> dict[str, torch.Tensor]:
    return to_open_clip({name: p.detach() for name, p in CLIP(SMALL, 32).named_parameters()}, SMALL)


def test_prefixes_and_entries_that_are_no_weights_are_understood() -> None:
    plain = exported()
    of_text = {k: v for k, v in plain.items() if not k.startswith(("visual", "logit"))}
    dressed = {k: v for k, v in plain.items() if k not in of_text} | {f"text.{k}": v for k, v in of_text.items()}
    dressed["logit_scale"] = plain["logit_scale"].view(1)
    dressed = {f"module.{k}": v for k, v in dressed.items()}
    found = from_open_clip(dressed, SMALL, 32)
    expected = dict(CLIP(SMALL, 32).named_parameters())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert from_open_clip(plain | {"context_length": torch.tensor(16), "attn_mask": torch.zeros(16, 16)}, SMALL, 32)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda w: w.pop("ln_final.bias"), "^missing: ln_final.bias$"),
        (lambda w: w.update(extra=torch.zeros(1)), "^surplus: extra$"),
        (lambda w: w.pop("logit_bias"), "^missing: logit_bias$"),
        (lambda w: [w.pop(k) for k in list(w) if ".attn." in k], r"^missing: .*in_proj_bias.* and 6 more$"),
        (
            lambda w: w.update({"visual.positional_embedding": torch.zeros(26, 32)}),
            r"^visual.positional_embedding is \[26, 32\], expected \[17, 32\]$",
        ),
    ],
)
def test_weights_of_another_kind_name_the_keys(change: Any, fault: str) -> None:
    weights = exported()
    change(weights)
    with pytest.raises(FormatError, match=fault):
        from_open_clip(weights, SMALL, 32)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("RN50", "vision_cfg.layers = .*: not a ViT"),
        ("ViT-B-16-SigLIP", "vision_cfg.timm_model_name = vit_base_patch16_siglip_224.*text_cfg.no_causal_mask = True"),
        ("ViT-L-14-CLIPA", "vision_cfg.no_ln_pre = True.*text_cfg.no_causal_mask = True.*text_cfg.pool_type = last"),
        ("coca_ViT-B-32", "multimodal_cfg = .*vision_cfg.attentional_pool = True.*text_cfg.embed_cls = True"),
        ("roberta-ViT-B-32", "text_cfg.hf_model_name = roberta-base"),
    ],
)
def test_a_configuration_that_cmpt_has_no_part_for_names_the_fields(
    name: str, fault: str, open_clip: ModuleType
) -> None:
    with pytest.raises(FormatError, match=fault):
        from_config(open_clip.get_model_config(name))


def test_shapes_tell_the_architecture_of_a_bare_file(open_clip: ModuleType) -> None:
    with torch.device("meta"):
        theirs = open_clip.create_model("ViT-M-32-alt", load_weights=False, device="meta")
    found, size = model_of_weights(theirs.state_dict())
    expected, expected_size = from_config(open_clip.get_model_config("ViT-M-32-alt"))
    assert (found, size) == (expected, expected_size)
    for name in ("ViT-H-14", "ViT-g-14", "ViT-bigG-14"):  # whose heads are not 64 wide
        model, size = ours_of(name)
        with torch.device("meta"):
            weights = to_open_clip(dict(CLIP(model, size).named_parameters()), model)
        found, _ = model_of_weights(weights)
        assert (found.vision.heads, found.text.heads) == (model.vision.heads, model.text.heads)
    with pytest.raises(FormatError, match="missing: .*visual.conv1.weight"):
        model_of_weights({"weight": torch.zeros(1)})


def test_half_precision_spares_the_scalars_and_refuses_what_it_cannot_hold() -> None:
    small = halved(exported())
    assert small["logit_scale"].dtype == torch.float32 and small["visual.proj"].dtype == torch.float16
    weights = exported()
    weights["ln_final.weight"][0] = 1e6
    with pytest.raises(FormatError, match="values beyond fp16 in: ln_final.weight"):
        halved(weights)
