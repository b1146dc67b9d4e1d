"""The matrix of test_curves.py: the first 50 steps of the quickstart recipe, again and again."""

from __future__ import annotations

import itertools
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cmpt.data.loader import batch_digest
from cmpt.data.tokenizer import open_tokenizer, with_vocabulary
from cmpt.dist.process_group import gather_objects, sum_over_ranks
from cmpt.engine.build import build
from cmpt.engine.counts import count_step
from cmpt.engine.plan import Plan
from cmpt.engine.step import find_gradient, take_step
from cmpt.masking.strategies import MaskStage
from cmpt.models.clip import CLIP
from cmpt.recipe import load_recipe
from cmpt.train import build_loader

STEPS, BATCH = 50, 16
RECIPE = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
OVERRIDES = ["engine.precision=fp32", f"engine.batch_size={BATCH}", "data.workers=1", "data.heldout=[]"]
LOSSES = {
    "infonce": [],
    "sigmoid": ["loss.kind=sigmoid", "model.logit_bias_init=-10", "model.temperature_init=0.1"],
}


def matrix() -> dict[str, Any]:
    """Losses and digests by case: every ZeRO stage, with and without gradient caching, both losses.

    The recipe is as it is but for fp32 and an eighth of its batch.
    """
    rank, world, found = dist.get_rank(), dist.get_world_size(), {}
    for loss, stage, cached in itertools.product(LOSSES, range(4), (False, True)):
        # A section of its own keeps the stage with one process, too.
        more = [f"engine.zero_stage={stage}", "engine.deepspeed={zero_optimization: {}}", *LOSSES[loss]]
        micro = max(1, BATCH // world // 3) if cached else None
        recipe = load_recipe(RECIPE, [*OVERRIDES, *more]).recipe
        tokenizer = open_tokenizer(recipe.tokenizer, recipe.model.context_length)
        recipe = with_vocabulary(recipe, tokenizer)
        loader = build_loader(recipe, tokenizer, rank, world)
        (planned,) = Plan(recipe, loader.samples_per_epoch).phases
        clip = CLIP(recipe.model, recipe.image.size, recipe.run.seed)
        trained = build(clip, recipe.engine, recipe.optimizer, world, torch.device("cpu"))
        assert recipe.model.patch_size
        mask = MaskStage(recipe.masking, recipe.image, recipe.model.patch_size, recipe.run.seed, sum_over_ranks)
        losses, digests = [], []
        with closing(loader.batches(loader.initial_state())) as batches:
            for step, (batch, _) in enumerate(itertools.islice(batches, STEPS)):
                masked = mask(batch.images_BCHW, batch.ordinal_B, batch.valid_B)
                mask.advance(count_step(recipe.model, masked, batch, recipe.engine, None).mask_ratio)
                result = find_gradient(trained, masked.patches, batch.text, None, recipe.loss, micro)
                take_step(trained, result, planned.learning_rate(step + 1), recipe.optimizer.clip_norm)
                losses.append(result.loss)
                digests.append(batch_digest(d for part in gather_objects(batch.stream_digests) for d in part))
        found[f"{loss} stage={stage} cached={cached}"] = {"losses": losses, "digests": digests}
    return found
