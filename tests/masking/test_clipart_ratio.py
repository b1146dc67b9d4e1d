"""Invariant 5 on the embedded pictures, many of which are mostly white."""

from __future__ import annotations

import pytest

from cmpt.data import Loader, open_shards, open_tokenizer
from cmpt.masking.strategies import MaskStage
from cmpt.recipe import load_recipe

STEPS = 100


@pytest.mark.parametrize("target", [0.5, 0.7])
def test_mean_mask_ratio_over_a_hundred_steps_is_within_a_hundredth(target: float, tmp_path_factory) -> None:
    recipe = load_recipe("recipes/quickstart.yaml", [f"masking.ratio={target}", "engine.batch_size=64"]).recipe
    recipe.data.cache_folder = str(tmp_path_factory.mktemp("cache"))
    loader = Loader(
        recipe.data,
        recipe.image,
        shards=[open_shards(source.urls, recipe.data) for source in recipe.data.train],
        tokenizer=open_tokenizer(recipe.tokenizer, recipe.model.context_length),
        context_length=recipe.model.context_length,
        seed=0,
        batch_size=64,
        rank=0,
        world_size=1,
    )
    stage = MaskStage(recipe.masking, recipe.image, 8, seed=0)
    ratios = []
    batches = loader.batches(loader.initial_state())
    for _ in range(STEPS):
        batch, _ = next(batches)
        masked = stage(batch.images_BCHW, batch.ordinal_B)
        ratios.append(1 - float(masked.keep_BL.double().mean()))
        stage.advance(ratios[-1])
    batches.close()
    assert abs(sum(ratios) / STEPS - target) < 0.01
