"""Invariant 5 on the embedded pictures, many of which are mostly white."""

from __future__ import annotations

import itertools
from contextlib import closing

import pytest

from cmpt.data.loader import Loader
from cmpt.data.shards import open_shards
from cmpt.data.tokenizer import open_tokenizer
from cmpt.masking.strategies import MaskStage
from cmpt.recipe import load_recipe

STEPS, SETTLED, WINDOW = 160, 20, 100


@pytest.mark.parametrize("target", [0.5, 0.7])
def test_any_hundred_steps_after_the_twentieth_are_within_a_hundredth(target: float, tmp_path_factory) -> None:
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
    with closing(loader.batches(loader.initial_state())) as batches:
        for batch, _ in itertools.islice(batches, STEPS):
            masked = stage(batch.images_BCHW, batch.ordinal_B)
            ratios.append(1 - float(masked.keep_BL.double().mean()))
            stage.advance(ratios[-1])
    means = [sum(ratios[first : first + WINDOW]) / WINDOW for first in (0, *range(SETTLED, STEPS - WINDOW + 1))]
    assert max(abs(mean - target) for mean in means) < 0.01
