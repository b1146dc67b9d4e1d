"""A small model, and global batches of which any rank can have its rows; for the scripts that run under torchrun."""

from __future__ import annotations

from dataclasses import replace

import torch

from cmpt.batch import PackedPatches, PackedText
from cmpt.masking.strategies import MaskStage
from cmpt.recipe.schema import Image, Masking, Model, Text, Vision

BATCH = 12
IMAGE_SIZE = 32
MODEL = Model(
    patch_size=8,
    embed_dim=20,
    vision=Vision(width=36, layers=2, heads=2),
    text=Text(width=28, layers=2, heads=2),
    context_length=8,
    vocab_size=61,
)


def model_of(loss: str) -> Model:
    return replace(MODEL, logit_bias_init=-3.0 if loss == "sigmoid" else None)


def own_rows(rank: int, world: int) -> list[int]:
    return list(range(rank * BATCH // world, (rank + 1) * BATCH // world))


def rows_of(rows: list[int], holes: list[int], step: int = 0) -> tuple[PackedPatches, PackedText, torch.Tensor]:
    """Some rows of a step's global batch: images of unequal lengths, captions of unequal lengths, what is valid."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (BATCH, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, generator=generator)
    ids = torch.randint(0, 61, (BATCH, 8), generator=generator)
    valid = torch.tensor([row not in holes for row in rows])
    masking = Masking(strategy="cluster", threshold=0.1, min_ratio=0.3)
    stage = MaskStage(masking, Image(size=IMAGE_SIZE), 8, seed=0)
    patches = stage(images[rows], torch.tensor(rows) + step * BATCH, valid).patches
    order = sorted(range(len(rows)), key=lambda k: -(2 + rows[k] % 5))
    lengths = [2 + rows[k] % 5 for k in order]
    text = PackedText(
        torch.cat([ids[rows[k], :length] for k, length in zip(order, lengths, strict=True)]),
        torch.cat([torch.arange(length) for length in lengths]),
        lengths,
        torch.tensor(order),
    )
    return patches, text, valid
