"""Retrieval: how high does each image rank its own captions among all, and each caption its image.

Recall at k as CLIP's and its successors' tables have it: the share of images that have one of their captions among the
k nearest, and the share of captions that have their image there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cmpt.dist.process_group import sum_over_ranks
from cmpt.evals.accuracy import share

RECALL_AT = (1, 5, 10)
TILE = (1024, 2048)
"""Images and captions whose scores are in memory at a time: what fits into a processor's cache is counted quickly."""


def match_ranks(
    image_NE: Tensor, text_ME: Tensor, image_M: Tensor, rank: int, world_size: int
) -> tuple[Tensor, Tensor]:
    """Ranks from 0, by inner product: of each image's best caption among the captions of other images [N], and of each
    caption's image among all images [M].

    `image_M`: the place of each caption's image, ascending, every image at least once. A tie counts against the match,
    so equal embeddings cannot look good. Every score is computed in one tile and used for both directions; the tiles
    are the same for any number of ranks, which share the rows and all get all.
    """
    images, captions = len(image_NE), len(text_ME)
    end_N = torch.bincount(image_M, minlength=images).cumsum(0).tolist()

    # The scores of the matches, from the very tiles in which they are compared later: so they equal themselves.
    own_M = torch.empty(captions)
    for a, b in _parts(images, TILE[0]):
        first, last = end_N[a - 1] if a else 0, end_N[b - 1]
        for c, d in _parts(captions, TILE[1]):
            if c < last and first < d:
                at = torch.arange(max(c, first), min(d, last))
                own_M[at] = _scores(image_NE[a:b], text_ME[c:d])[image_M[at] - a, at - c]
    best_N = torch.full((images,), -torch.inf).scatter_reduce(0, image_M, own_M, "amax")

    above_N, above_M = torch.zeros(images, dtype=torch.int64), torch.zeros(captions, dtype=torch.int64)
    for a, b in list(_parts(images, TILE[0]))[rank::world_size]:
        for c, d in _parts(captions, TILE[1]):
            score = _scores(image_NE[a:b], text_ME[c:d])
            # Ones in fp32 are summed several times as fast as booleans, and exactly up to 2**24.
            is_above = torch.empty_like(score)
            above_N[a:b] += torch.ge(score, best_N[a:b, None], out=is_above).sum(dim=1).long()
            above_M[c:d] += torch.ge(score, own_M[c:d], out=is_above).sum(dim=0).long()
    above_N, above_M = sum_over_ranks(above_N), sum_over_ranks(above_M)
    own_at_best_N = torch.bincount(image_M[own_M >= best_N[image_M]], minlength=images)
    return above_N - own_at_best_N, above_M - 1


def _scores(image_BE: Tensor, text_BE: Tensor) -> Tensor:
    """The inner products of a tile. One smaller than TILE is filled up first: the last bit of a matrix product depends
    on its shape, and at ragged edges on the place, which would tell equal embeddings apart."""
    images, captions = len(image_BE), len(text_BE)
    if (images, captions) != TILE:
        image_BE = F.pad(image_BE, (0, 0, 0, TILE[0] - images))
        text_BE = F.pad(text_BE, (0, 0, 0, TILE[1] - captions))
    return (image_BE @ text_BE.T)[:images, :captions]


def _parts(count: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, size):
        yield start, min(start + size, count)


def recalls(
    image_NE: Tensor, text_ME: Tensor, captions_of: Sequence[int], rank: int, world_size: int
) -> dict[str, float]:
    """R@1/5/10 in both directions for N unit rows of images and M of captions, image after image.

    `captions_of`: the number of captions of each image, at least 1. All ranks call it and share the work.
    """
    image_M = torch.repeat_interleave(torch.tensor(captions_of))
    results = _recalls(*match_ranks(image_NE, text_ME, image_M, rank, world_size))
    return results | {"images": len(image_NE), "texts": len(text_ME)}


def retrieval_of_pairs(image_NE: Tensor, text_NE: Tensor, rank: int, world_size: int) -> dict[str, float]:
    """R@1/5/10 and median rank (from 1) in both directions, for N unit rows of images and their captions.

    All ranks call it and share the work.
    """
    ranks = match_ranks(image_NE, text_NE, torch.arange(len(image_NE)), rank, world_size)
    results = _recalls(*ranks)
    for name, rank_N in zip(("image_to_text", "text_to_image"), ranks, strict=True):
        results[f"{name}_median_rank"] = rank_N.double().quantile(0.5).item() + 1
    return results | {"pairs": len(image_NE), "chance_r10": min(1.0, 10 / len(image_NE))}


def _recalls(image_to_text_N: Tensor, text_to_image_M: Tensor) -> dict[str, float]:
    ways = {"image_to_text": image_to_text_N, "text_to_image": text_to_image_M}
    return {f"{name}_r{k}": share(ranks < k) for name, ranks in ways.items() for k in RECALL_AT}
