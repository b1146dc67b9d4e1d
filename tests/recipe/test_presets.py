from __future__ import annotations

from pathlib import Path

import pytest

from cmpt.recipe import load_recipe
from cmpt.recipe.presets import PRESETS
from cmpt.recipe.schema import Model, Text, Vision


def model(tmp_path: Path, *overrides: str) -> Model:
    path = tmp_path / "r.yaml"
    path.write_text("")
    return load_recipe(str(path), overrides).recipe.model


def test_a_preset_fills_what_is_null(tmp_path: Path) -> None:
    filled = model(tmp_path, "model.preset=ViT-H-14")
    assert (filled.patch_size, filled.embed_dim) == (14, 1024)
    assert filled.vision == Vision(1280, 32, 16) and filled.text == Text(1024, 24, 16)
    assert filled.vocab_size is None


def test_what_a_recipe_says_wins_over_its_preset(tmp_path: Path) -> None:
    filled = model(tmp_path, "model.preset=ViT-B-16", "model.vision.layers=2", "model.embed_dim=64")
    assert (filled.vision, filled.embed_dim) == (Vision(768, 2, 12), 64)


def test_a_preset_fills_what_differs_from_the_default_but_not_what_the_recipe_says(tmp_path: Path) -> None:
    assert model(tmp_path, "model.preset=ViT-g-14").vision.mlp_ratio == 4.3637
    assert model(tmp_path, "model.preset=ViT-g-14", "model.vision.mlp_ratio=4.0").vision.mlp_ratio == 4.0
    assert model(tmp_path, "model.preset=ViT-M-16-alt").vision.layer_scale_init == 1e-4
    assert model(tmp_path, "model.preset=ViT-M-16-alt", "model.vision.layer_scale_init=null").vision == Vision(
        512, 12, 8
    )


def test_without_a_preset_nothing_is_filled(tmp_path: Path) -> None:
    assert model(tmp_path) == Model()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_complete_and_its_heads_divide_its_widths(tmp_path: Path, name: str) -> None:
    filled = model(tmp_path, f"model.preset={name}")
    assert filled.patch_size and filled.embed_dim
    for tower in (filled.vision, filled.text):
        assert tower.width and tower.layers and tower.heads and tower.width % tower.heads == 0
