"""What tools/compare_masking.py compares: its arms as recipe overrides, and what each hides of a white background."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from cmpt.data.tokenizer import open_tokenizer, with_vocabulary
from cmpt.masking.patches import Pixels
from cmpt.masking.strategies import MaskStage
from cmpt.recipe import phases
from cmpt.recipe.phases import ResolvedPhase
from cmpt.recipe.schema import Recipe
from cmpt.train import build_loader
from mask_views import is_background

CLUSTER = [
    "masking.strategy=cluster",
    "masking.ratio=0.5",
    "masking.anchor_ratio=0.03",
    "masking.min_ratio=0.3",
    "masking.embedding_share_end=null",
]
RANDOM = ["masking.strategy=random", "masking.ratio=0.5"]
FREQUENCY = ["text_masking={strategy: frequency, tokens: TEXT_TOKENS, frequencies: WORD_COUNTS}"]
RESIZE = "resize"  # its overrides depend on the recipe's patches: `overrides_of`
ARMS = {
    "none": ["masking.strategy=none"],
    "cluster": CLUSTER,
    "cluster-embedding": [*CLUSTER[:-1], "masking.embedding_share_end=1.0"],
    "random": RANDOM,
    "centred": ["masking.strategy=centred", "masking.ratio=0.5"],
    "block": ["masking.strategy=block", "masking.ratio=0.5"],
    "grid": ["masking.strategy=grid", "masking.ratio=0.75"],
    RESIZE: ["masking.strategy=none"],
    "cluster+frequency": [*CLUSTER, *FREQUENCY],
    "random+frequency": [*RANDOM, *FREQUENCY],
}
WORD_COUNTS = "pkg:data/clipart/word_counts.json"


@dataclass(frozen=True)
class Background:
    """Shares of patches that are white background."""

    of_all: float
    of_hidden: float | None  # None where nothing is hidden, or without weights nobody knows what
    needs_weights: bool = False


def overrides_of(arm: Sequence[str], name: str, steps: int, text_tokens: int, recipe: Recipe) -> list[str]:
    """The overrides of an arm for a run of so many steps; they replace the phases of the recipe."""
    words = recipe.text_masking.frequencies or WORD_COUNTS
    filled = [setting.replace("TEXT_TOKENS", str(text_tokens)).replace("WORD_COUNTS", words) for setting in arm]
    if name != RESIZE:
        return [*filled, "phases=[]", f"run.duration={steps} steps"]
    # In a phase, because the recipe's own image.size is also the size of the evaluation, which stays.
    phase = f"{{name: {RESIZE}, duration: {steps} steps, set: {{image.size: {half_the_patches(recipe)}}}}}"
    return [*filled, f"phases=[{phase}]", "run.duration=null"]


def half_the_patches(recipe: Recipe) -> int:
    """The image size whose patches come nearest to half as many: the side goes by the square root."""
    patch = recipe.model.patch_size
    assert patch
    whole = (recipe.image.size // patch) ** 2
    return min(range(patch, recipe.image.size, patch), key=lambda size: abs((size // patch) ** 2 - whole / 2))


def background_shares(recipes: Mapping[str, Recipe], count: int) -> dict[str, Background]:
    """By arm, over the first `count` training images with the recipe's crops; cluster masks at the threshold that
    holds their mean ratio over these images."""
    read: dict[str, tuple[Tensor, Tensor]] = {}
    shares = {}
    for arm, recipe in recipes.items():
        (phase,) = phases(recipe)
        which = repr((recipe.data, phase.image, recipe.run.seed, recipe.engine.batch_size))
        if which not in read:
            read[which] = first_images(recipe, phase, count)
        shares[arm] = background_of(*read[which], recipe, phase)
    return shares


def first_images(recipe: Recipe, phase: ResolvedPhase, count: int) -> tuple[Tensor, Tensor]:
    """images_NCHW and ordinal_N of the run's first samples, as its first epoch crops them."""
    tokenizer = open_tokenizer(recipe.tokenizer, recipe.model.context_length)
    loader = build_loader(with_vocabulary(recipe, tokenizer), tokenizer, 0, 1)
    images, ordinals, found = [], [], 0
    with closing(loader.batches(loader.initial_state(), phase.image, phase.text_masking)) as stream:
        for batch, _ in stream:
            images.append(batch.images_BCHW[batch.valid_B])
            ordinals.append(batch.ordinal_B[batch.valid_B])
            found += len(images[-1])
            if found >= count:
                return torch.cat(images)[:count], torch.cat(ordinals)[:count]
    raise AssertionError("a loader goes on for ever")


def background_of(images_BCHW: Tensor, ordinal_B: Tensor, recipe: Recipe, phase: ResolvedPhase) -> Background:
    assert recipe.model.patch_size
    white_BL = is_background(Pixels(images_BCHW, recipe.model.patch_size))
    masking, of_all = phase.masking, float(white_BL.double().mean())
    if masking.strategy == "cluster" and (masking.embedding_share or masking.embedding_share_end):
        return Background(of_all, None, needs_weights=True)
    stage = MaskStage(masking, phase.image, recipe.model.patch_size, recipe.run.seed)
    hidden_BL = ~stage(images_BCHW, ordinal_B).keep_BL
    return Background(of_all, float(white_BL[hidden_BL].double().mean()) if hidden_BL.any() else None)
