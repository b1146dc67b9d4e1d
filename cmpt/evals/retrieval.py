"""Retrieval: how high does each image rank its own captions among all, and each caption its image.

Recall at k as CLIP's and its successors' tables have it: the share of images that have one of their captions among the
k nearest, and the share of captions that have their image there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cmpt.dist.process_group import gather_objects
from cmpt.evals.accuracy import share

RECALL_AT = (1, 5, 10)
_BLOCK_BYTES = 200e6  # of the scores that are in memory at a time


def image_to_text_ranks(image_NE: Tensor, text_ME: Tensor, image_M: Tensor, blocks: slice | None = None) -> Tensor:
    """Rank, from 0, of each image's best caption among the captions of other images: int64 [N], by inner product.

    `image_M`: the place of each caption's image, ascending. A tie counts against the match, so equal embeddings cannot
    look good. `blocks` picks blocks of rows, all by default; memory does not grow with the product of N and M.
    """
    count_N = torch.bincount(image_M, minlength=len(image_NE))
    ends_N = count_N.cumsum(0)

    def ranks(start: int, end: int) -> Tensor:
        score = image_NE[start:end] @ text_ME.T
        first, last = int(ends_N[start] - count_N[start]), int(ends_N[end - 1])
        foreign = image_M[first:last] != torch.arange(start, end)[:, None]
        own = score[:, first:last].masked_fill(foreign, -torch.inf)
        best = own.amax(dim=1, keepdim=True)
        return (score >= best).sum(dim=1) - (own >= best).sum(dim=1)

    return _in_blocks(ranks, len(image_NE), len(text_ME), blocks)


def text_to_image_ranks(image_NE: Tensor, text_ME: Tensor, image_M: Tensor, blocks: slice | None = None) -> Tensor:
    """Rank, from 0, of each caption's image among all images: int64 [M]; else as `image_to_text_ranks`."""

    def ranks(start: int, end: int) -> Tensor:
        score = text_ME[start:end] @ image_NE.T
        return (score >= score.gather(1, image_M[start:end, None])).sum(dim=1) - 1

    return _in_blocks(ranks, len(text_ME), len(image_NE), blocks)


def _in_blocks(ranks: Callable[[int, int], Tensor], rows: int, columns: int, blocks: slice | None) -> Tensor:
    size = max(1, int(_BLOCK_BYTES // (4 * columns)))
    starts = range(0, rows, size)[blocks or slice(None)]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *(ranks(start, min(start + size, rows)) for start in starts)])


def recalls(
    image_NE: Tensor, text_ME: Tensor, captions_of: Sequence[int], rank: int = 0, world_size: int = 1
) -> dict[str, float]:
    """R@1/5/10 in both directions for N unit rows of images and M of captions, image after image.

    `captions_of`: the number of captions of each image, at least 1. Blocks of rows are dealt to the ranks, which all
    call it; the result does not depend on their number.
    """
    image_M = torch.repeat_interleave(torch.tensor(captions_of))
    results: dict[str, float] = {}
    own = slice(rank, None, world_size)
    for name, ranks_of in (("image_to_text", image_to_text_ranks), ("text_to_image", text_to_image_ranks)):
        ranks = torch.cat(gather_objects(ranks_of(image_NE, text_ME, image_M, own)))
        results |= {f"{name}_r{k}": share(ranks < k) for k in RECALL_AT}
    return results | {"images": len(image_NE), "texts": len(text_ME)}


def retrieval_of_pairs(image_NE: Tensor, text_NE: Tensor) -> dict[str, float]:
    """R@1/5/10 and median rank (from 1) in both directions, for N unit rows of images and their captions."""
    results: dict[str, float] = {}
    own_N = torch.arange(len(image_NE))
    for name, ranks_of in (("image_to_text", image_to_text_ranks), ("text_to_image", text_to_image_ranks)):
        ranks = ranks_of(image_NE, text_NE, own_N)
        results |= {f"{name}_r{k}": share(ranks < k) for k in RECALL_AT}
        results[f"{name}_median_rank"] = ranks.double().quantile(0.5).item() + 1
    results["pairs"] = len(image_NE)
    results["chance_r10"] = min(1.0, 10 / len(image_NE))
    return results
