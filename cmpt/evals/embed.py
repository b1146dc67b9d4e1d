"""Embeddings of a held-out set, computed on all ranks, unmasked, and gathered in the set's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmpt.data.heldout import HeldoutSet
from cmpt.data.tokenizer import Tokenizer, pack_captions
from cmpt.dist.process_group import gather_objects
from cmpt.masking.strategies import MaskStage
from cmpt.models.clip import CLIP
from cmpt.recipe.schema import Image, Masking


@dataclass(frozen=True)
class HeldoutEmbeddings:
    """N held-out pairs, in the order of the set: the same on every rank."""

    image_NE: Tensor  # fp32 unit rows on the host
    text_NE: Tensor  # of each pair's first caption
    categories: list[str | None]
    captions: list[str]
    indices_N: Tensor  # int64, place in the set
    broken: int  # samples that the decoder refused


@torch.no_grad()
def embed_heldout(
    clip: CLIP,
    heldout: HeldoutSet,
    tokenizer: Tokenizer,
    image: Image,
    patch_size: int,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> HeldoutEmbeddings:
    """Every pair once, split over the ranks; every rank calls it and gets all of it."""
    everything = MaskStage(Masking(strategy="none"), image, patch_size, seed=0)
    rows: list[tuple[Tensor, Tensor, list[str | None], list[str], Tensor, int]] = []
    for batch in heldout.batches(rank, world_size, batch_size):
        size = len(batch.captions)
        masked = everything(batch.images_BCHW.to(device), batch.indices_B.to(device))
        image_BE = clip.encode_image(masked.patches, size).cpu()
        text_BE = embed_texts(clip, tokenizer, batch.captions, device)
        rows.append((image_BE, text_BE, batch.categories, batch.captions, batch.indices_B, len(batch.rejections)))
    gathered = [row for part in gather_objects(rows) for row in part]
    order = torch.cat([row[4] for row in gathered]).argsort()
    categories = [category for row in gathered for category in row[2]]
    captions = [caption for row in gathered for caption in row[3]]
    return HeldoutEmbeddings(
        image_NE=torch.cat([row[0] for row in gathered])[order],
        text_NE=torch.cat([row[1] for row in gathered])[order],
        categories=[categories[i] for i in order.tolist()],
        captions=[captions[i] for i in order.tolist()],
        indices_N=torch.cat([row[4] for row in gathered])[order],
        broken=sum(row[5] for row in gathered),
    )


@torch.no_grad()
def embed_texts(clip: CLIP, tokenizer: Tokenizer, texts: Sequence[str], device: torch.device) -> Tensor:
    """One fp32 unit row per text [N, E], on the host."""
    packed = pack_captions([tokenizer.encode(text) for text in texts])
    return clip.encode_text(packed.to(device), len(texts)).cpu()
