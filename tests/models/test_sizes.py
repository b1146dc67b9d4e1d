"""Every shipped recipe's model, built on the meta device, has the size that its name promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cmpt.batch import PackedPatches, PackedText
from cmpt.losses.contrastive import info_nce
from cmpt.models.clip import CLIP
from cmpt.models.flops import forward_flops, training_flops
from cmpt.recipe import load_recipe
from cmpt.recipe.schema import Model, Text, Vision

RECIPES = Path(__file__).parents[2] / "recipes"
CLIP_VOCABULARY = 49408

PARAMETERS = {
    "base": 149_620_737,
    "vitb16_cc12m": 149_620_737,
    "vitb16_cc12m_flip": 149_620_737,
    "vitb16_cc12m_clip": 149_620_737,
    "vitb16_cc12m_clipf": 149_620_737,
    "vitb16_cc12m_embedding": 149_620_737,
    "vitb16_cc12m_reclip": 149_620_737,
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
    ("preset", "image", "text"), [("ViT-B-16", 35.13, 5.96), ("ViT-L-14", 162.03, 13.3), ("ViT-H-14", 334.59, 47.09)]
)
def test_flops_at_full_length_are_open_clips_published_ones(preset: str, image: float, text: float) -> None:
    """Source: open_clip's model profile, GFLOPs per image at 224 pixels and per text of 77 tokens."""
    recipe = load_recipe(str(RECIPES / "base.yaml"), [f"model.preset={preset}"]).recipe
    patches = (recipe.image.size // (recipe.model.patch_size or 1)) ** 2
    assert forward_flops(recipe.model, [patches], []) / 1e9 == pytest.approx(image, rel=0.02)
    assert forward_flops(recipe.model, [], [77]) / 1e9 == pytest.approx(text, rel=0.02)


def test_training_flops_are_three_times_forward_and_the_loss() -> None:
    recipe = load_recipe(str(RECIPES / "base.yaml")).recipe
    forward = forward_flops(recipe.model, [98, 90], [12, 9])
    loss = 6 * 2 * 2 * 2048 * 512
    assert training_flops(recipe.model, [98, 90], [12, 9], 2048) == pytest.approx(3 * forward + loss, rel=1e-9)


def test_the_sigmoid_loss_counts_one_direction() -> None:
    model = load_recipe(str(RECIPES / "base.yaml"), ["model.logit_bias_init=-10.0"]).recipe.model
    forward = forward_flops(model, [98, 90], [12, 9])
    # Without the towers, so that a loss counted twice cannot hide below the tolerance of the whole.
    loss = training_flops(model, [98, 90], [12, 9], 2048) - 3 * forward
    assert loss == pytest.approx(3 * 2 * 2 * 2048 * 512)


SMALL = Model(
    patch_size=8,
    embed_dim=24,
    vision=Vision(width=32, layers=3, heads=2, mlp_ratio=2.5),
    text=Text(width=48, layers=2, heads=3),
    context_length=16,
    vocab_size=50,
)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize(("pooling", "scale_init"), [("class_token", None), ("average", 0.1)])
def test_flops_are_those_that_torch_counts_in_a_real_step(
    recomputes: bool, pooling: str, scale_init: float | None
) -> None:
    """Every matrix product of forward, backward, recomputed blocks and loss, from unequal lengths (invariant 8)."""
    vision = replace(SMALL.vision, pooling=pooling, layer_scale_init=scale_init)
    model = replace(SMALL, vision=vision, activation_checkpointing=recomputes)
    clip = CLIP(model, 32)
    image_lengths, text_lengths = [16, 9, 9, 2], [16, 5, 4, 1]
    patches, tokens, order = sum(image_lengths), sum(text_lengths), torch.arange(4)
    images = PackedPatches(torch.randn(patches, 192), torch.arange(patches) % 16, image_lengths, order, (4, 4))
    places = torch.cat([torch.arange(length) for length in text_lengths])
    text = PackedText(torch.arange(tokens) % 50, places, text_lengths, order)
    with FlopCounterMode(display=False) as counter:
        image, words, scale, _ = clip(images, text, 4)
        forward = counter.get_total_flops()
        info_nce(image, words, image, words, scale).backward()
    assert forward == pytest.approx(forward_flops(model, image_lengths, text_lengths), rel=0.01)
    # Pixels need no gradient, so the patch embedding has one product less in its backward.
    unneeded = 2 * patches * 192 * 32
    expected = training_flops(model, image_lengths, text_lengths, 4) - unneeded
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
