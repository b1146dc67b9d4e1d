from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cmpt.masking.patches import pack, patchify, standardise
from cmpt.recipe.schema import Image


@pytest.mark.parametrize(("patch_size", "height", "width"), [(8, 48, 48), (14, 28, 56), (16, 32, 48)])
def test_patch_embedding_of_patches_is_the_convolution(patch_size: int, height: int, width: int) -> None:
    images = torch.randn(2, 3, height, width)
    weight = torch.randn(5, 3, patch_size, patch_size)
    convolved = F.conv2d(images, weight, stride=patch_size).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patchify(images, patch_size) @ weight.flatten(1).T, convolved, atol=1e-4, rtol=1e-4)


def test_standardise_is_clip_normalisation() -> None:
    images, image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), Image()
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (image.mean, image.std))
    expected = patchify((images / 255 - mean) / std, 8)
    torch.testing.assert_close(standardise(patchify(images, 8), image.mean, image.std), expected)


def test_a_size_that_patches_do_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match=r"image size 20x16: each side must be a multiple of model.patch_size=8"):
        patchify(torch.zeros(1, 3, 20, 16), 8)


def test_packing_holds_every_kept_patch_once_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(9, 12, 6, generator=generator)
    keep = torch.rand(9, 12, generator=generator) < torch.linspace(0.1, 1.0, 9)[:, None]
    keep[4] = False  # a hole
    packed = pack(patches, keep, (3, 4))
    assert len(packed.patches_TP) == len(packed.position_T) == sum(packed.lengths) == int(keep.sum())
    assert packed.lengths == sorted(packed.lengths, reverse=True)
    start = 0
    for row, length in zip(packed.order_B.tolist(), packed.lengths, strict=True):
        positions = packed.position_T[start : start + length]
        assert torch.equal(positions, keep[row].nonzero()[:, 0])
        assert torch.equal(packed.patches_TP[start : start + length], patches[row, positions])
        start += length
