"""Composition as SugarCrepe asks for it (arXiv 2306.14610): is an image nearer to its caption than to a false one?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmpt.evals.accuracy import share
from cmpt.evals.scores import on_grid


def composition(
    image_NE: Tensor, caption_NE: Tensor, negative_NE: Tensor, categories: Sequence[str]
) -> dict[str, float]:
    """Accuracy of each category and their mean, for N questions of unit rows. Equal scores count as wrong."""
    image_NE, caption_NE, negative_NE = (on_grid(rows) for rows in (image_NE, caption_NE, negative_NE))
    right_N = (image_NE * caption_NE).sum(dim=1) > (image_NE * negative_NE).sum(dim=1)
    names = list(dict.fromkeys(categories))
    found = {name: share(right_N[torch.tensor([own == name for own in categories])]) for name in names}
    return {"accuracy": sum(found.values()) / len(found), **found, "samples": len(image_NE)}
