"""Cluster masking on a GPU: uint8 images in, keep mask and packed bf16 patches out. The twin of masking/cluster.py.

The pixels are read twice, once for the statistics and similarities and once, kept patches only, for the packed
sequence, which is written once; standardised patches of the whole batch never exist. No function here waits for the
device. What a schedule moves (anchors, least share, threshold) is an argument of the kernels, so that it does not
compile them anew, but for the anchors where their number passes a power of two; image size, patch size, mean and std
are constants.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from cmpt.masking.cluster import DEVIATION_EPS, PLACE_BITS, least_hidden
from cmpt.masking.fused_kernels import (
    anchors_kernel,
    gather_kernel,
    keep_kernel,
    places_kernel,
    similarity_kernel,
    words_kernel,
)
from cmpt.masking.patches import patch_grid
from cmpt.ops.random import Purpose

# Launch parameters: reasoned, and free of register spills for sm_90 up to 64 anchors, but not measured.
# One warp holds an image's keys (8 per lane at L = 256) and counts with shuffles alone; more warps would meet at a
# barrier 44 times. From 1,024 patches on, the registers of one warp no longer do.
_PATCHES_PER_WARP = 512
# 64 rows are the least that one Hopper warp group (4 warps) multiplies at once; three or four programs per
# multiprocessor, with 8 KiB of pixels each, keep as many bytes in flight as the latency of HBM3 needs, so the loop has
# one stage. More than 32 anchors, or patches of a side that is no power of two (loaded two bytes at a time, with
# masks), take twice the warps for their registers, and the latter half the pixels.
_SIMILARITY_PATCHES = 64
_SIMILARITY_PIXELS = 128
_SIMILARITY_WARPS = 4
# 16 patches x 256 values: 32 values per thread, loaded 16 bytes at a time where the patch size allows.
_GATHER_PATCHES = 16
_GATHER_VALUES = 256

_SEED_MASK = (1 << 64) - 1


def _block(patches: int) -> int:
    return max(16, triton.next_power_of_2(patches))


def _warps(block: int) -> int:
    return min(max(1, block // _PATCHES_PER_WARP), 8)


def _scales_and_shifts(mean: Sequence[float], std: Sequence[float], offset: int) -> dict[str, float]:
    """s and h of x = s (u - offset) + h for every channel, by the names of the kernels' parameters."""
    assert len(mean) == len(std) == 3
    scales = {f"SCALE{c}": 1 / (255 * s) for c, s in enumerate(std)}
    return scales | {f"SHIFT{c}": (offset / 255 - mean[c]) / std[c] for c in range(3)}


def _check(images_BCHW: Tensor, patch_size: int) -> tuple[int, int, int]:
    """B, H and W."""
    batch, channels, height, width = images_BCHW.shape
    assert images_BCHW.dtype == torch.uint8 and channels == 3 and images_BCHW.is_contiguous()
    patch_grid(height, width, patch_size)
    return batch, height, width


def random_words(seed: int, ordinal_B: Tensor, patches: int) -> Tensor:
    """The words that `draw_anchors` compares, int64 [B, patches] in 0 … 2**32 - 1; for the tests."""
    words_BL = torch.empty(len(ordinal_B), patches, dtype=torch.int64, device=ordinal_B.device)
    block = _block(patches)
    words_kernel[(len(ordinal_B),)](
        ordinal_B, words_BL, seed & _SEED_MASK, patches, int(Purpose.ANCHORS), block, num_warps=1
    )
    return words_BL


def draw_anchors(ordinal_B: Tensor, seed: int, patches: int, anchors: int) -> Tensor:
    """So many patches per image, uniform without replacement, in ascending order: int32 [B, K].

    Those with the largest words of `Purpose.ANCHORS`; of equal words the later patch is the larger, as in cluster.py.
    `ordinal_B`: int64. At most 4,096 patches.
    """
    assert 1 <= anchors <= patches <= 1 << PLACE_BITS
    anchors_BK = torch.empty(len(ordinal_B), anchors, dtype=torch.int32, device=ordinal_B.device)
    block = _block(patches)
    anchors_kernel[(len(ordinal_B),)](
        ordinal_B, anchors_BK, seed & _SEED_MASK, anchors, patches, block, num_warps=_warps(block)
    )
    return anchors_BK


def anchor_similarity(
    images_BCHW: Tensor,
    anchors_BK: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    centred: bool = True,
    constant_alike: bool = True,
) -> Tensor:
    """Similarity of every patch to the anchor most like it, float32 [B, L]; anchors themselves get ALWAYS_HIDDEN.

    That of cluster.py on CLIP-normalised pixels: `centred` the Pearson correlation, else the cosine; constant patches
    are alike (1) or not (0) and unlike anything else (0). `images_BCHW`: uint8, contiguous; `mean`, `std`: per channel,
    of values in 0 … 1. Raises ValueError if a side is not a multiple of the patch size.
    """
    batch, height, width = _check(images_BCHW, patch_size)
    patches, anchors = (height // patch_size) * (width // patch_size), anchors_BK.shape[1]
    similarity_BL = torch.empty(batch, patches, device=images_BCHW.device)
    padded = triton.next_power_of_2(patch_size)
    pixels = _SIMILARITY_PIXELS if padded == patch_size else _SIMILARITY_PIXELS // 2
    similarity_kernel[(batch * triton.cdiv(patches, _SIMILARITY_PATCHES),)](
        images_BCHW,
        anchors_BK.to(torch.int32),
        similarity_BL,
        anchors,
        **_scales_and_shifts(mean, std, offset=128),
        # The norm's floor of cluster.py, squared, times the pixels of a channel, as the kernel's variances are.
        FLOOR=3 * patch_size**4 * DEVIATION_EPS**2,
        CENTRED=centred,
        CONSTANT_ALIKE=constant_alike,
        HEIGHT=height,
        WIDTH=width,
        PATCH=patch_size,
        PADDED=padded,
        ROWS=max(32 // padded, min(padded, max(1, pixels // padded))),  # a product of int8 needs 32 values
        BLOCK_L=_SIMILARITY_PATCHES,
        BLOCK_K=max(16, triton.next_power_of_2(anchors)),
        num_warps=_SIMILARITY_WARPS * (2 if anchors > 32 or padded != patch_size else 1),
        num_stages=1,
    )
    return similarity_BL


def keep_patches(
    similarity_BL: Tensor,
    ordinal_B: Tensor,
    seed: int,
    threshold_1: Tensor | float,
    min_ratio: float,
    valid_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`keep_by_similarity` with the words of `Purpose.EXTRA_DROPS`: (keep_BL bool, kept_B int32).

    `threshold_1`: a number, or a tensor of one element on the device. Rows that are not valid keep nothing.
    """
    batch, patches = similarity_BL.shape
    assert patches <= 1 << PLACE_BITS
    device = similarity_BL.device
    if not isinstance(threshold_1, Tensor):
        threshold_1 = torch.full((1,), threshold_1, dtype=torch.float32, device=device)
    keep_BL = torch.empty(batch, patches, dtype=torch.bool, device=device)
    kept_B = torch.empty(batch, dtype=torch.int32, device=device)
    least, block = least_hidden(patches, min_ratio), _block(patches)
    keep_kernel[(batch,)](
        similarity_BL,
        ordinal_B,
        keep_BL if valid_B is None else valid_B,  # without holes it is not read
        threshold_1.to(torch.float32),
        keep_BL,
        kept_B,
        seed & _SEED_MASK,
        least,
        HAS_HOLES=valid_B is not None,
        PATCHES=patches,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return keep_BL, kept_B


def gather_patches(
    images_BCHW: Tensor,
    keep_BL: Tensor,
    kept_B: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    capacity: int,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kept patches of all images in one sequence, longest image first: (patches_TP, position_T, order_B).

    `patches_TP`: [capacity, P] of `dtype`, standardised in float32, channel-major; `position_T`: int64, raster position
    in the image. Rows behind the kept patches hold anything: the caller narrows to kept_B.sum() once it knows it.
    `order_B`: int64, all images; those that keep nothing stand last. Kept patches beyond `capacity` are left out.
    """
    batch, height, width = _check(images_BCHW, patch_size)
    patches, device = keep_BL.shape[1], images_BCHW.device
    order_B = kept_B.argsort(descending=True, stable=True)
    end_B = kept_B[order_B].cumsum(0)
    source_T, position_T = torch.empty(2, capacity, dtype=torch.int64, device=device)
    patches_TP = torch.empty(capacity, 3 * patch_size**2, dtype=dtype, device=device)
    if batch == 0 or capacity == 0:
        return patches_TP, position_T, order_B
    block = _block(patches)
    places_kernel[(batch,)](
        keep_BL, order_B, end_B, source_T, position_T, capacity, patches, block, num_warps=_warps(block)
    )
    gather_kernel[(triton.cdiv(capacity, _GATHER_PATCHES),)](
        images_BCHW,
        source_T,
        end_B[-1:],
        patches_TP,
        capacity,
        **_scales_and_shifts(mean, std, offset=0),
        HEIGHT=height,
        WIDTH=width,
        PATCH=patch_size,
        BLOCK_T=_GATHER_PATCHES,
        BLOCK_Q=min(_GATHER_VALUES, triton.next_power_of_2(patch_size**2)),
        num_warps=4,
    )
    return patches_TP, position_T, order_B
