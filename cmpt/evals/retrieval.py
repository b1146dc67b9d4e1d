"""Retrieval on pairs: how high does each image rank its own caption, and the reverse."""

from __future__ import annotations

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)


def ranks_of_matches(query_NE: Tensor, key_NE: Tensor, block_rows: int = 1024) -> Tensor:
    """Rank, from 0, of key n among all keys for query n: int64 [N], by inner product.

    A tie counts against the match (as many keys as score at least as high), so equal embeddings cannot look good.
    Computed in blocks of rows: memory O(block_rows * N).
    """
    ranks = []
    for start in range(0, len(query_NE), block_rows):
        score = query_NE[start : start + block_rows] @ key_NE.T
        rows = torch.arange(len(score), device=score.device)
        own = score[rows, rows + start]
        ranks.append((score >= own[:, None]).sum(dim=1) - 1)
    return torch.cat(ranks)


def retrieval(image_NE: Tensor, text_NE: Tensor) -> dict[str, float]:
    """R@1/5/10 and median rank (from 1) in both directions, for N unit rows of images and their captions."""
    results: dict[str, float] = {}
    for name, ranks in (
        ("image_to_text", ranks_of_matches(image_NE, text_NE)),
        ("text_to_image", ranks_of_matches(text_NE, image_NE)),
    ):
        for k in RECALL_AT:
            results[f"{name}_r{k}"] = (ranks < k).double().mean().item()
        results[f"{name}_median_rank"] = ranks.double().quantile(0.5).item() + 1
    results["pairs"] = len(image_NE)
    results["chance_r10"] = min(1.0, 10 / len(image_NE))
    return results
