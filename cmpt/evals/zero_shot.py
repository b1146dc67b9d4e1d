"""Zero-shot classification: the class whose prompts lie nearest to the image (arXiv 2103.00020, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def class_embeddings(prompt_CTE: Tensor) -> Tensor:
    """Mean of each class's unit prompt embeddings, made unit again: [classes, templates, E] -> [classes, E]."""
    return F.normalize(prompt_CTE.mean(dim=1), dim=-1)


def zero_shot(image_NE: Tensor, class_CE: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Top-1 and top-5 accuracy, and the mean over classes of top-1, for N images with class indices `labels`."""
    label_N = torch.tensor(labels)
    top = (image_NE @ class_CE.T).topk(min(5, len(class_CE)), dim=1).indices
    hit = top == label_N[:, None]
    per_class = [hit[label_N == c, 0].double().mean().item() for c in label_N.unique().tolist()]
    return {
        "zero_shot_top1": hit[:, 0].double().mean().item(),
        "zero_shot_top5": hit.any(dim=1).double().mean().item(),
        "zero_shot_mean_per_class": sum(per_class) / len(per_class),
        "classes": len(class_CE),
    }
