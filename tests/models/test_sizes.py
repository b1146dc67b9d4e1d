"""Every shipped recipe's model, built on the meta device, has the size that its name promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cmpt.models.clip import CLIP
from cmpt.models.flops import forward_flops, training_flops
from cmpt.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
CLIP_VOCABULARY = 49408

PARAMETERS = {
    "base": 149_620_737,
    "vitb16_cc12m": 149_620_737,
    "vitb16_cc12m_flip": 149_620_737,
    "vitb16_cc12m_clip": 149_620_737,
    "vitl14_laion": 427_616_513,
    "quickstart": None,
}


def build(name: str, *overrides: str) -> CLIP:
    recipe = load_recipe(str(RECIPES / f"{name}.yaml"), overrides).recipe
    recipe.model.vocab_size = recipe.model.vocab_size or CLIP_VOCABULARY
    with torch.device("meta"):
        return CLIP(recipe.model, recipe.image.size)


def test_every_recipe_is_listed() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_every_recipe(name: str) -> None:
    clip = build(name)
    parameters = sum(parameter.numel() for parameter in clip.parameters())
    expected = PARAMETERS[name]
    if expected is None:
        assert parameters == 12_326_017  # with CLIP's vocabulary; 3,527,809 with its own
    else:
        assert parameters == expected


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("ViT-B-32", 151_277_313), ("ViT-B-16", 149_620_737), ("ViT-L-14", 427_616_513), ("ViT-H-14", 986_109_441)],
)
def test_presets_have_open_clips_parameter_counts(preset: str, parameters: int) -> None:
    assert sum(p.numel() for p in build("base", f"model.preset={preset}").parameters()) == parameters


@pytest.mark.parametrize(
    ("preset", "image", "text"), [("ViT-B-16", 35.13, 5.96), ("ViT-L-14", 162.03, 13.3), ("ViT-H-14", 334.59, 47.09)]
)
def test_flops_at_full_length_are_open_clips_published_ones(preset: str, image: float, text: float) -> None:
    """Source: open_clip's model profile, GFLOPs per image at 224 pixels and per text of 77 tokens."""
    recipe = load_recipe(str(RECIPES / "base.yaml"), [f"model.preset={preset}"]).recipe
    patches = (recipe.image.size // (recipe.model.patch_size or 1)) ** 2
    both = forward_flops(recipe.model, [patches], [77]) / 1e9
    assert both == pytest.approx(image + text, rel=0.02)


def test_training_flops_are_three_times_forward_and_the_loss() -> None:
    recipe = load_recipe(str(RECIPES / "base.yaml")).recipe
    forward = forward_flops(recipe.model, [98, 90], [12, 9])
    loss = 6 * 2 * 2 * 2048 * 512
    assert training_flops(recipe.model, [98, 90], [12, 9], 2048) == pytest.approx(3 * forward + loss)
