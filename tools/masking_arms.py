"""What tools/compare_masking.py compares: its arms as recipe overrides, and what each hides of a white background."""

from __future__ import annotations

import itertools
from contextlib import closing
from dataclasses import dataclass

import torch

from cmpt.data.tokenizer import open_tokenizer, with_vocabulary
from cmpt.masking.patches import Pixels
from cmpt.masking.strategies import MaskStage
from cmpt.recipe import load_recipe, phases
from cmpt.recipe.schema import Recipe
from cmpt.train import build_loader

FREQUENT = "text_masking={strategy: frequency, tokens: 6, frequencies: pkg:data/clipart/word_counts.json}"
ARMS = {
    "none": ["masking.strategy=none"],
    "cluster": [],  # the recipe's own
    "cluster by embeddings": ["masking.embedding_share_end=1.0"],
    "random": ["masking.strategy=random"],
    "centred": ["masking.strategy=centred"],
    "block": ["masking.strategy=block"],
    "grid": ["masking.strategy=grid", "masking.ratio=0.75"],
    "small images": ["masking.strategy=none"],
    "cluster, rare words": [FREQUENT],
    "random, rare words": ["masking.strategy=random", FREQUENT],
}
WHITE_LEVEL = 247  # a patch all of whose values are at least this is background
ALREADY = 4  # batches that settle the threshold before hidden patches are counted


@dataclass(frozen=True)
class Background:
    """Shares of patches that are white background."""

    of_all: float
    of_hidden: float | None  # None where nothing is hidden


def overrides_of(arm: str, more: dict[str, list[str]], steps: int, recipe: Recipe) -> list[str]:
    """The recipe overrides of an arm; `more`: arms of the command line. Raises KeyError for an unknown one."""
    if arm == "small images":
        settings = f"{{name: small, duration: {steps} steps, set: {{image.size: {half_the_patches(recipe)}}}}}"
        return [*ARMS[arm], "run.duration=null", f"phases=[{settings}]"]
    return [*({**ARMS, **more}[arm]), f"run.duration={steps} steps"]


def half_the_patches(recipe: Recipe) -> int:
    """The image size whose patches come nearest to half as many: the side goes by the square root."""
    patch = recipe.model.patch_size
    assert patch
    whole = (recipe.image.size // patch) ** 2
    return min(range(patch, recipe.image.size, patch), key=lambda size: abs((size // patch) ** 2 - whole / 2))


def background_share(recipe_path: str, overrides: list[str], images: int) -> Background:
    """Over so many training images with the recipe's crops, at the threshold that the first batches settle."""
    recipe = load_recipe(recipe_path, overrides).recipe
    tokenizer = open_tokenizer(recipe.tokenizer, recipe.model.context_length)
    recipe = with_vocabulary(recipe, tokenizer)
    (phase,) = phases(recipe)
    assert recipe.model.patch_size
    mask = MaskStage(phase.masking, phase.image, recipe.model.patch_size, recipe.run.seed)
    loader = build_loader(recipe, tokenizer, 0, 1)
    batches = ALREADY - (-images // recipe.engine.batch_size)
    white = hidden = white_and_hidden = patches = 0
    with closing(loader.batches(loader.initial_state(), phase.image, phase.text_masking)) as stream:
        for number, (batch, _) in enumerate(itertools.islice(stream, batches)):
            keep_BL = mask(batch.images_BCHW, batch.ordinal_B, batch.valid_B).keep_BL[batch.valid_B]
            mask.advance(1 - float(keep_BL.double().mean()))
            if number >= ALREADY:
                white_BL = is_background(batch.images_BCHW[batch.valid_B], recipe.model.patch_size)
                white, hidden = white + int(white_BL.sum()), hidden + int((~keep_BL).sum())
                white_and_hidden += int((white_BL & ~keep_BL).sum())
                patches += keep_BL.numel()
    return Background(white / patches, white_and_hidden / hidden if hidden else None)


def is_background(images_BCHW: torch.Tensor, patch_size: int) -> torch.Tensor:
    """bool [B, L]: patches that are white throughout."""
    return Pixels(images_BCHW, patch_size).patches_BLP.amin(dim=-1) >= WHITE_LEVEL
