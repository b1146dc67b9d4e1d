"""Files and folders of others: what is read, and the one line that says what is wrong with the rest."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cmpt.engine.opened import open_model
from cmpt.models.clip import CLIP
from cmpt.models.open_clip_format import FormatError, to_config, to_open_clip
from cmpt.models.pretrained import CONFIG_FILE, WEIGHTS_FILE, load_pretrained, read_pretrained
from cmpt.recipe import RecipeError
from cmpt.recipe.schema import Image, Model, Recipe, Text, Tokenizer, Vision

MODEL = Model(
    patch_size=8,
    embed_dim=24,
    vision=Vision(width=64, layers=2, heads=1),
    text=Text(width=64, layers=1, heads=1, pooling="argmax"),
    context_length=16,
    vocab_size=49408,
)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return to_open_clip({name: p.detach() for name, p in CLIP(MODEL, 32, seed=7).named_parameters()}, MODEL)


@pytest.fixture
def folder(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    save_file(weights, tmp_path / WEIGHTS_FILE)
    config = {"model_cfg": to_config(MODEL, 32, 49407, {}), "preprocess_cfg": {"mean": [0.5, 0.4, 0.3]}}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    return tmp_path


def loaded(path: Path, model: Model = MODEL, **image: Any) -> CLIP:
    settings = Image(**{"size": 32, "mean": (0.5, 0.4, 0.3), **image})
    recipe = Recipe(model=replace(model, init_from=str(path)), image=settings, tokenizer=Tokenizer(kind="clip_bpe"))
    clip = CLIP(model, settings.size, seed=1)
    load_pretrained(clip, recipe, 49407)
    return clip


def assert_same(clip: CLIP) -> None:
    expected = CLIP(MODEL, 32, seed=7).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in clip.state_dict().items())


def test_a_folder_a_safetensors_and_pickled_state_dicts_are_read(
    folder: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    assert_same(loaded(folder))
    assert_same(loaded(folder / WEIGHTS_FILE))
    for name, content in (("a.pt", weights), ("b.bin", {"state_dict": weights, "epoch": 3})):
        torch.save(content, tmp_path / name)
        assert_same(loaded(tmp_path / name))
    (folder / WEIGHTS_FILE).rename(folder / "open_clip_pytorch_model.safetensors")
    assert_same(loaded(folder))


def test_half_precision_weights_become_fp32(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.half() for name, tensor in weights.items()}, folder / WEIGHTS_FILE)
    clip = loaded(folder)
    assert clip.visual.proj.weight.dtype == torch.float32
    assert torch.equal(clip.visual.proj.weight, weights["visual.proj"].half().float().T)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"quick_gelu": True}, "another architecture or setting: model.quick_gelu is True, there it is False"),
        ({"context_length": 32}, "model.context_length is 32, there it is 16"),
        ({"logit_bias_init": -10.0}, "model.logit_bias_init is given, there it is null"),
        ({"vision": replace(MODEL.vision, layer_norm_eps=1e-6)}, "model.vision.layer_norm_eps is 1e-06"),
        ({"vision": replace(MODEL.vision, pooling="average")}, "model.vision.pooling is average"),
        ({"text": replace(MODEL.text, heads=2)}, "model.text.heads is 2, there it is 1"),
        ({"text": replace(MODEL.text, mlp_ratio=2.0)}, "model.text.mlp_ratio is 2.0, there it is 4.0"),
        ({"vision": replace(MODEL.vision, layer_scale_init=0.1)}, "model.vision.layer_scale_init is given"),
    ],
)  # fmt: skip
def test_another_architecture_is_refused_field_by_field(folder: Path, change: dict[str, Any], fault: str) -> None:
    with pytest.raises(FormatError, match=fault):
        loaded(folder, replace(MODEL, **change))


def test_another_image_size_is_refused_not_interpolated(folder: Path) -> None:
    with pytest.raises(FormatError, match="image.size is 64, there it is 32"):
        loaded(folder, size=64)
    with pytest.raises(FormatError, match=r"visual.positional_embedding is \[17, 64\], expected \[65, 64\]"):
        loaded(folder / WEIGHTS_FILE, size=64)


def test_missing_and_surplus_tensors_are_named(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    changed = {**weights, "extra.weight": torch.zeros(1)}
    changed.pop("visual.ln_pre.bias")
    save_file(changed, folder / WEIGHTS_FILE)
    with pytest.raises(FormatError, match=r"model.init_from = .*: missing: visual.ln_pre.bias; surplus: extra.weight"):
        loaded(folder)


class Malicious:
    """Leaves a file where it is unpickled by a reader that runs what it reads."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch '{self.trace}'",)


def test_what_is_no_weights_is_refused_and_nothing_in_it_runs(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "it_ran"
    half = (folder / WEIGHTS_FILE).read_bytes()
    (tmp_path / "half.safetensors").write_bytes(half[: len(half) // 2])
    (tmp_path / "text.pt").write_text("not weights")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": {"x": Malicious(trace)}}, tmp_path / "malicious.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    for name in ("half.safetensors", "text.pt", "empty.pt", "list.pt", "malicious.pt", "program.pt"):
        with pytest.raises(FormatError, match=f"{name}: (cannot be read as weights|holds no state dict)"):
            read_pretrained(str(tmp_path / name))
    assert not trace.exists()


def test_a_folder_without_weights_or_with_a_broken_configuration_is_named(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "other.safetensors")
    with pytest.raises(FormatError, match=f"holds none of {WEIGHTS_FILE}"):
        read_pretrained(str(folder))
    (folder / CONFIG_FILE).write_text("{}")
    with pytest.raises(FormatError, match="cannot be read as an open_clip configuration: KeyError"):
        read_pretrained(str(folder))
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(FormatError, match=CONFIG_FILE):
        read_pretrained(str(folder))


def test_a_foreign_model_brings_its_own_image_settings_and_says_what_it_does_not_know(folder: Path) -> None:
    opened = open_model(str(folder), ["evaluation.batch_size=7"])
    assert opened.recipe.image.mean == (0.5, 0.4, 0.3) and opened.recipe.image.size == 32
    assert opened.recipe.model == MODEL and opened.recipe.evaluation.batch_size == 7
    with pytest.raises(RecipeError, match="model.quick_gelu: cannot be overridden: open_clip_config.json decides it"):
        open_model(str(folder), ["model.quick_gelu=true"])
    assert open_model(str(folder / WEIGHTS_FILE), ["model.quick_gelu=true"]).recipe.model.quick_gelu
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "bert-base-uncased"
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(FormatError, match="= bert-base-uncased: cmpt reads sentencepiece models only"):
        open_model(str(folder))


@pytest.mark.parametrize(
    ("section", "key", "value", "fault"),
    [
        (
            "preprocess_cfg",
            "interpolation",
            "bilinear",
            "preprocess_cfg.interpolation = bilinear: cmpt has bicubic only",
        ),
        ("preprocess_cfg", "resize_mode", "squash", "preprocess_cfg.resize_mode = squash"),
        ("preprocess_cfg", "mean", [0.5], "mean and std must have three values"),
        ("text_cfg", "tokenizer_kwargs", {"clean": "canonicalize"}, "text_cfg.tokenizer_kwargs = .*canonicalize"),
        ("text_cfg", "pool_type", "eos", "text_cfg.eos_id = 2: the end of text of the tokenizer is 49407"),
        ("model_cfg", "embed_dim", None, "embed_dim = None: must be a whole number"),
        ("model_cfg", "vision_cfg", [1], "vision_cfg and text_cfg must be mappings"),
    ],
)
def test_what_changes_the_model_besides_its_weights_is_not_ignored(
    folder: Path, section: str, key: str, value: Any, fault: str
) -> None:
    content = json.loads((folder / CONFIG_FILE).read_text())
    owner = content["model_cfg"]["text_cfg"] if section == "text_cfg" else content[section]
    owner[key] = value
    (folder / CONFIG_FILE).write_text(json.dumps(content))
    with pytest.raises(FormatError, match=fault):
        open_model(str(folder))


def test_a_higher_temperature_than_clips_is_kept_and_refused_as_a_start(
    folder: Path, weights: dict[str, torch.Tensor]
) -> None:
    save_file({**weights, "logit_scale": torch.tensor(4.77)}, folder / WEIGHTS_FILE)
    opened = open_model(str(folder))
    assert opened.weights()["logit_scale"] == torch.tensor(4.77)
    assert opened.clip.scale().item() == pytest.approx(117.9, abs=0.1)
    with pytest.raises(FormatError, match="model.logit_scale_max is 100.0, the weights have 117.9"):
        loaded(folder)
    save_file({**weights, "logit_scale": torch.tensor(-1.0)}, folder / WEIGHTS_FILE)
    with pytest.raises(FormatError, match="logit_scale = -1: must be >= 0"):
        open_model(str(folder))


def test_another_tokenizer_or_other_image_statistics_are_refused_as_a_start(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"image.std is \[0.5, 0.5, 0.5\], there it is"):
        content = json.loads((folder / CONFIG_FILE).read_text())
        content["preprocess_cfg"]["std"] = [0.25, 0.25, 0.25]
        (folder / CONFIG_FILE).write_text(json.dumps(content))
        loaded(folder, std=(0.5, 0.5, 0.5))
    content["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "x"
    (folder / CONFIG_FILE).write_text(json.dumps(content))
    with pytest.raises(FormatError, match="tokenizer.kind is clip_bpe, there it is sentencepiece"):
        loaded(folder, std=(0.25, 0.25, 0.25))


def test_a_bare_file_with_fewer_ids_than_its_tokenizer_is_refused(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    small = {**weights, "token_embedding.weight": weights["token_embedding.weight"][:100].clone()}
    save_file(small, tmp_path / "small.safetensors")
    with pytest.raises(RecipeError, match="model.vocab_size = 100: must be at least the tokenizer's 49408"):
        open_model(str(tmp_path / "small.safetensors"))
