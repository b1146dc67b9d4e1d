"""The vision tower's patch embeddings as features for cluster masking (arXiv 2405.08815, section 3.3)."""

from __future__ import annotations

import deepspeed
import torch
from torch import Tensor

from cmpt.engine.build import Trained
from cmpt.masking.strategies import Embed


def patch_embedder(trained: Trained, positions: bool) -> Embed:
    """Embeds with the weights as they are now, detached; with `positions`, the position embedding added.

    At ZeRO stage 3 the weights are gathered for it: collective there.
    """
    visual, dtype = trained.clip.visual, trained.clip.compute_dtype
    weights = [visual.patch_embedding.weight, *([visual.positional_embedding] if positions else [])]

    @torch.no_grad()
    def embed(patches_BLP: Tensor, grid: tuple[int, int]) -> Tensor:
        with deepspeed.zero.GatheredParameters(weights, enabled=trained.engine.zero_optimization_stage() == 3):
            return visual.patch_embeddings(patches_BLP, grid, dtype, positions)

    return embed
