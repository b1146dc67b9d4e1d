"""Natural images for the tests of masking, out of scikit-image, and what their masks are compared with."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cmpt.recipe.schema import Image

Array = NDArray[np.float64]


def photographs(height: int, width: int) -> torch.Tensor:
    """uint8 [3, 3, height, width]."""
    data = pytest.importorskip("skimage.data")
    corners = ((data.astronaut(), 0, 60), (data.chelsea(), 20, 60), (data.coffee(), 40, 60))
    crops = [image[top : top + height, left : left + width, :3] for image, top, left in corners]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def noise(height: int, width: int) -> torch.Tensor:
    """uint8 [2, 3, height, width]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)


def flat_and_nearly(height: int, width: int) -> torch.Tensor:
    """White; one colour; a half of noise of one grey level; a gradient: uint8 [4, 3, height, width]."""
    images = torch.full((4, 3, height, width), 255, dtype=torch.uint8)
    images[1] = torch.tensor([200, 30, 60], dtype=torch.uint8)[:, None, None]
    generator = torch.Generator().manual_seed(1)
    speckles = torch.randint(0, 2, (3, height, width // 2), dtype=torch.uint8, generator=generator)
    images[2, :, :, : width // 2] -= speckles
    images[3] = torch.arange(width, dtype=torch.uint8)
    return images


def reference_patches(image_CHW: Array, patch: int, image: Image) -> list[Array]:
    """Step 1 of the method: CLIP-normalised, split in raster order, each patch flat; one patch at a time."""
    mean, std = (np.array(values)[:, None, None] for values in (image.mean, image.std))
    normalised = (image_CHW / 255 - mean) / std
    rows, columns = normalised.shape[1] // patch, normalised.shape[2] // patch
    return [
        normalised[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].ravel()
        for r in range(rows)
        for c in range(columns)
    ]


def reference_similarity(patches: list[Array], anchors: list[int], centred: bool, alike: bool) -> Array:
    """Step 2 and 4: the largest cosine with any anchor, one pair at a time; 2 for anchors themselves."""

    def direction(patch: Array) -> Array | None:
        rest = patch - patch.mean() if centred else patch
        length = math.sqrt(float(rest @ rest))
        return rest / length if length > 1e-6 * math.sqrt(len(patch)) else None

    directions = [direction(patch) for patch in patches]

    def similarity(a: Array | None, b: Array | None) -> float:
        if a is None or b is None:
            return 1.0 if alike and a is None and b is None else 0.0
        return float(a @ b)

    return np.array(
        [
            2.0 if i in anchors else max(similarity(own, directions[a]) for a in anchors)
            for i, own in enumerate(directions)
        ]
    )


def reference_keep(similarity: Array, words: list[int], threshold: float, min_ratio: float) -> list[bool]:
    """Step 4 and 5: hide what exceeds the threshold; then the visible patch of the largest word, until β is hidden."""
    patches = len(similarity)
    hidden = {i for i in range(patches) if similarity[i] > threshold}
    visible = sorted((i for i in range(patches) if i not in hidden), key=lambda i: words[i])
    while len(hidden) < min_ratio * patches - 1e-9 and len(hidden) < patches - 1:
        hidden.add(visible.pop())
    if len(hidden) == patches:
        hidden.remove(min(range(patches), key=lambda i: similarity[i]))
    return [i not in hidden for i in range(patches)]
