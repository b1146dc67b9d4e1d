"""Zero-shot classification: the class whose prompts lie nearest to the image (arXiv 2103.00020, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cmpt.evals.accuracy import mean_per_class, share
from cmpt.evals.embed import Encoder
from cmpt.evals.scores import on_grid

_MOST_PROMPTS = 16_384  # whose embeddings are in memory at a time
_BLOCK_ROWS = 1024


def class_embeddings(encoder: Encoder, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
    """The unit mean of each class's unit prompt embeddings [classes, E]; all ranks call it.

    A prompt is a template with the class name in the place of {c}; other braces are text.
    """
    at_a_time = max(1, _MOST_PROMPTS // len(templates))
    chunks = []
    for start in range(0, len(classnames), at_a_time):
        names = classnames[start : start + at_a_time]
        prompts = [template.replace("{c}", name) for name in names for template in templates]
        chunks.append(mean_of_prompts(encoder.texts(prompts).view(len(names), len(templates), -1)))
    return torch.cat(chunks)


def mean_of_prompts(prompt_CTE: Tensor) -> Tensor:
    """Mean over the prompts of each class, made unit again: [classes, templates, E] -> [classes, E]."""
    return F.normalize(prompt_CTE.mean(dim=1), dim=-1)


def zero_shot(image_NE: Tensor, class_CE: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Top-1 and top-5 accuracy, and the mean over classes of top-1, for N images with class indices `labels`.

    A tie counts against the model: the true class must be nearer than any other. Classes without images have no part
    in the mean.
    """
    label_N, class_CE = torch.tensor(labels), on_grid(class_CE)
    ranks = []
    for start in range(0, len(image_NE), _BLOCK_ROWS):
        score = on_grid(image_NE[start : start + _BLOCK_ROWS]) @ class_CE.T
        own = score.gather(1, label_N[start : start + _BLOCK_ROWS, None])
        ranks.append((score >= own).sum(dim=1) - 1)
    rank_N = torch.cat(ranks)
    return {
        "top1": share(rank_N < 1),
        "top5": share(rank_N < 5),
        "mean_per_class": mean_per_class(rank_N < 1, label_N),
        "samples": len(image_NE),
        "classes": len(class_CE),
    }
