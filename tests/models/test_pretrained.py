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
from cmpt.recipe.schema import Model, Text, Vision

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


def loaded(path: Path, model: Model = MODEL, image_size: int = 32) -> CLIP:
    clip = CLIP(model, image_size, seed=1)
    load_pretrained(clip, model, image_size, str(path))
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
        ({"quick_gelu": True}, "another architecture: model.quick_gelu is True, there it is False"),
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
        loaded(folder, image_size=64)
    with pytest.raises(FormatError, match=r"visual.positional_embedding is \[17, 64\], expected \[65, 64\]"):
        loaded(folder / WEIGHTS_FILE, image_size=64)


def test_missing_and_surplus_tensors_are_named(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    changed = {**weights, "extra.weight": torch.zeros(1)}
    changed.pop("visual.ln_pre.bias")
    save_file(changed, folder / WEIGHTS_FILE)
    with pytest.raises(FormatError, match=r"model.init_from = .*: missing: visual.ln_pre.bias; surplus: extra.weight"):
        loaded(folder)


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch /tmp/cmpt_was_here",)


def test_what_is_no_weights_is_refused_and_nothing_in_it_runs(folder: Path, tmp_path: Path) -> None:
    half = (folder / WEIGHTS_FILE).read_bytes()
    (tmp_path / "half.safetensors").write_bytes(half[: len(half) // 2])
    (tmp_path / "text.pt").write_text("not weights")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": {"x": Malicious()}}, tmp_path / "malicious.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    for name in ("half.safetensors", "text.pt", "empty.pt", "list.pt", "malicious.pt", "program.pt"):
        with pytest.raises(FormatError, match=f"{name}: (cannot be read as weights|holds no state dict)"):
            read_pretrained(str(tmp_path / name))
    assert not Path("/tmp/cmpt_was_here").exists()


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
    with pytest.raises(RecipeError, match="model.quick_gelu: open_clip_config.json says what the architecture is"):
        open_model(str(folder), ["model.quick_gelu=true"])
    assert open_model(str(folder / WEIGHTS_FILE), ["model.quick_gelu=true"]).recipe.model.quick_gelu
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "bert-base-uncased"
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(FormatError, match="= bert-base-uncased: cmpt reads sentencepiece models only"):
        open_model(str(folder))
