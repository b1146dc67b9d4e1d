from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from cmpt.recipe import load_recipe
from cmpt.recipe.presets import PRESETS
from cmpt.recipe.schema import Model, Tower


def model(tmp_path: Path, *overrides: str) -> Model:
    path = tmp_path / "r.yaml"
    path.write_text("")
    return load_recipe(str(path), overrides).recipe.model


def test_a_preset_fills_what_is_null(tmp_path: Path) -> None:
    filled = model(tmp_path, "model.preset=ViT-H-14")
    assert (filled.patch_size, filled.embed_dim) == (14, 1024)
    assert filled.vision == Tower(1280, 32, 16) and filled.text == Tower(1024, 24, 16)
    assert filled.vocab_size is None


def test_what_a_recipe_says_wins_over_its_preset(tmp_path: Path) -> None:
    filled = model(tmp_path, "model.preset=ViT-B-16", "model.vision.layers=2", "model.embed_dim=64")
    assert (filled.vision, filled.embed_dim) == (Tower(768, 2, 12), 64)


def test_without_a_preset_nothing_is_filled(tmp_path: Path) -> None:
    assert model(tmp_path) == Model()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_complete_and_its_heads_divide_its_widths(tmp_path: Path, name: str) -> None:
    filled = model(tmp_path, f"model.preset={name}")
    assert filled.patch_size and filled.embed_dim
    for tower in (filled.vision, filled.text):
        assert tower.width and tower.layers and tower.heads and tower.width % tower.heads == 0


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("ViT-")])
def test_sizes_are_those_of_open_clip(tmp_path: Path, name: str) -> None:
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("open_clip_torch is not installed")
    file = Path(spec.submodule_search_locations[0]) / "model_configs" / f"{name}.json"
    theirs = json.loads(file.read_text())
    vision, text, ours = theirs["vision_cfg"], theirs["text_cfg"], model(tmp_path, f"model.preset={name}")
    assert ours.embed_dim == theirs["embed_dim"] and ours.patch_size == vision["patch_size"]
    heads = vision["width"] // vision.get("head_width", 64)
    assert ours.vision == Tower(vision["width"], vision["layers"], heads)
    assert ours.text == Tower(text["width"], text["layers"], text["heads"])
