"""Cluster masking against an independent float64 implementation written from the paper's definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cmpt.masking.cluster import (
    ALWAYS_HIDDEN,
    draw_anchors,
    keep_by_similarity,
    least_hidden,
    nearest_anchor_similarity,
)
from cmpt.masking.patches import patchify, standardise
from cmpt.ops.random import Purpose, random_words_tensor
from cmpt.recipe.schema import Image

Array = NDArray[np.float64]


def reference_similarity(patches_LP: Array, anchors: list[int]) -> Array:
    """Pearson correlation with the nearest anchor, one pair at a time."""
    similarity = np.full(len(patches_LP), -np.inf)
    for i, patch in enumerate(patches_LP):
        for a in anchors:
            x, y = patch - patch.mean(), patches_LP[a] - patches_LP[a].mean()
            similarity[i] = max(similarity[i], (x @ y) / math.sqrt((x @ x) * (y @ y)))
    return similarity


def photographs(size: int = 96) -> torch.Tensor:
    data = pytest.importorskip("skimage.data")
    crops = [image[40 : 40 + size, 60 : 60 + size, :3] for image in (data.astronaut(), data.chelsea(), data.coffee())]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


def patches_of(images_BCHW: torch.Tensor, patch_size: int) -> torch.Tensor:
    image = Image()
    return standardise(patchify(images_BCHW, patch_size), image.mean, image.std)


@pytest.mark.parametrize("patch_size", [8, 16, 32])
def test_similarity_is_the_correlation_with_the_nearest_anchor(patch_size: int) -> None:
    noise = torch.randint(0, 256, (2, 3, 96, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for images in (photographs(), noise):
        patches_BLP = patches_of(images, patch_size)
        anchors_BK = draw_anchors(torch.rand(patches_BLP.shape[:2]), 0.2)
        found = nearest_anchor_similarity(patches_BLP, anchors_BK)
        for b in range(len(images)):
            expected = reference_similarity(patches_BLP[b].double().numpy(), anchors_BK[b].tolist())
            expected[anchors_BK[b].numpy()] = ALWAYS_HIDDEN
            np.testing.assert_allclose(found[b].numpy(), expected, atol=2e-6)


def test_the_division_by_the_deviation_cannot_change_the_measure() -> None:
    patches = patches_of(photographs(), 8)
    anchors = draw_anchors(torch.rand(patches.shape[:2]), 0.03)
    brighter = patches * 3.0 + 0.5
    torch.testing.assert_close(
        nearest_anchor_similarity(brighter, anchors), nearest_anchor_similarity(patches, anchors), atol=2e-6, rtol=0
    )


def test_constant_patches_are_alike_and_unlike_anything_else() -> None:
    patches = torch.randn(1, 6, 12, generator=torch.Generator().manual_seed(1))
    patches[0, 0] = 1.0
    patches[0, 1] = -3.0
    at_constant = nearest_anchor_similarity(patches, torch.tensor([[0]]))[0]
    assert at_constant[1] == 1.0
    assert (at_constant[2:] == 0.0).all()
    at_texture = nearest_anchor_similarity(patches, torch.tensor([[2]]))[0]
    assert (at_texture[:2] == 0.0).all()
    assert torch.isfinite(at_texture).all()


@pytest.mark.parametrize(("patches", "ratio", "expected"), [(196, 0.03, 5), (144, 0.03, 4), (4, 0.03, 1)])
def test_number_of_anchors(patches: int, ratio: float, expected: int) -> None:
    anchors = draw_anchors(torch.rand(7, patches), ratio)
    assert anchors.shape == (7, expected)
    assert all(len(set(row)) == expected for row in anchors.tolist())


def test_what_exceeds_the_threshold_is_hidden_and_the_rest_fills_up_to_beta() -> None:
    generator = torch.Generator().manual_seed(2)
    similarity = torch.rand(64, 100, generator=generator)
    words = torch.randint(0, 2**32, (64, 100), generator=generator)
    for threshold, min_ratio in [(0.8, 0.3), (0.5, 0.3), (0.95, 0.0), (0.9, 0.25)]:
        keep = keep_by_similarity(similarity, words, threshold, min_ratio)
        similar = similarity > threshold
        assert not (keep & similar).any()
        expected = torch.maximum(similar.sum(1), torch.tensor(math.ceil(min_ratio * 100 - 1e-9)))
        assert torch.equal((~keep).sum(1), expected)


def test_at_least_one_patch_is_kept_and_it_is_the_least_similar() -> None:
    similarity = torch.full((1, 9), 0.9)
    similarity[0, 4] = 0.8
    keep = keep_by_similarity(similarity, torch.arange(9)[None], threshold=0.1, min_ratio=0.3)
    assert keep[0].tolist() == [i == 4 for i in range(9)]


@pytest.mark.parametrize(("patches", "ratio", "expected"), [(10, 0.3, 3), (144, 0.3, 44), (196, 0.5, 98), (9, 0.0, 0)])
def test_beta_is_not_moved_by_rounding(patches: int, ratio: float, expected: int) -> None:
    assert least_hidden(patches, ratio) == expected


def test_extra_drops_are_uniform_over_visible_positions() -> None:
    """Chi-square over 4,000 images of 50 patches, 20 of them visible and 15 of these to be dropped."""
    images, patches, visible = 4000, 50, 20
    similarity = torch.zeros(images, patches)
    similarity[:, visible:] = 1.0
    words = random_words_tensor(3, torch.arange(images), Purpose.EXTRA_DROPS, patches)
    keep = keep_by_similarity(similarity, words, threshold=0.5, min_ratio=0.9)
    assert (keep.sum(1) == 5).all()
    kept = keep[:, :visible].sum(0).double()
    expected = images * 5 / visible
    # 19 degrees of freedom: 43.8 is passed once in a thousand; the seed is fixed.
    assert float(((kept - expected) ** 2 / expected).sum()) * visible / (visible - 5) < 43.8
