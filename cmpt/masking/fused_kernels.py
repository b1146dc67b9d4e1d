"""The kernels of masking/fused.py. Parameters in capitals are compile-time constants.

Pixels are centred to v = u - 128, which fits int8, so that Σv, Σv² and the products Σvw with the anchors are exact
integers (int8 tensor cores, int32 sums) and deviations come out without cancellation: a patch that is flat but for
one grey level is compared as exactly as any other. The CLIP-normalised value is x = s v + h per channel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cmpt.masking.cluster import ALWAYS_HIDDEN, PLACE_BITS
from cmpt.ops.random import Purpose

# A key is (word << PLACE_BITS | place): no two are equal, and words decide before places do.
_PLACE_BITS = tl.constexpr(PLACE_BITS)
_LAST_PLACE = tl.constexpr((1 << PLACE_BITS) - 1)
_ANCHOR_KEY_TOP = tl.constexpr(1 << (31 + PLACE_BITS))
_DROP_KEY_TOP = tl.constexpr(1 << (32 + PLACE_BITS))
_WORDS_RANGE = tl.constexpr(1 << 32)
_ANCHORS = tl.constexpr(int(Purpose.ANCHORS))
_EXTRA_DROPS = tl.constexpr(int(Purpose.EXTRA_DROPS))
_ALWAYS_HIDDEN = tl.constexpr(ALWAYS_HIDDEN)


@triton.jit
def _words(seed: tl.tensor, ordinal: tl.tensor, PURPOSE: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """uint32 [BLOCK]: the words of cmpt.ops.random, four from each counter."""
    index = tl.arange(0, BLOCK // 4)
    zero = (index * 0).to(tl.uint32)
    low, high = (ordinal & 0xFFFFFFFF).to(tl.uint32), ((ordinal >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, index.to(tl.uint32), zero + PURPOSE, zero + low, zero + high)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def _nth_largest(key_L: tl.tensor, count: tl.tensor, TOP: tl.constexpr) -> tl.tensor:
    """The `count`-th largest of distinct keys, bit by bit from TOP; above every key if count is 0."""
    found = tl.full((), 0, tl.int64)
    bit = tl.full((), TOP, tl.int64)
    while bit > 0:
        trial = found | bit
        found = tl.where(tl.sum((key_L >= trial).to(tl.int32), axis=0) >= count, trial, found)
        bit = bit >> 1
    return found


@triton.jit(do_not_specialize=["seed"])
def words_kernel(
    ordinal_B: tl.tensor,
    words_BL: tl.tensor,
    seed: tl.tensor,
    PATCHES: tl.constexpr,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program writes the words of one image. Nothing but tests launches it."""
    b = tl.program_id(0)
    patch_L = tl.arange(0, BLOCK)
    words_L = _words(seed, tl.load(ordinal_B + b), PURPOSE, BLOCK)
    tl.store(words_BL + b * PATCHES + patch_L, words_L.to(tl.int64), mask=patch_L < PATCHES)


@triton.jit(do_not_specialize=["seed", "anchors"])
def anchors_kernel(
    ordinal_B: tl.tensor,
    anchors_BK: tl.tensor,
    seed: tl.tensor,
    anchors: tl.tensor,
    PATCHES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program draws the anchors of one image: the largest keys, stored in the order of their patches."""
    b = tl.program_id(0)
    patch_L = tl.arange(0, BLOCK)
    words_L = _words(seed, tl.load(ordinal_B + b), _ANCHORS, BLOCK)
    key_L = (words_L.to(tl.int64) << _PLACE_BITS) | patch_L
    key_L = tl.where(patch_L < PATCHES, key_L, -1)
    drawn_L = key_L >= _nth_largest(key_L, anchors, _ANCHOR_KEY_TOP)
    place_L = tl.cumsum(drawn_L.to(tl.int32), axis=0) - 1
    tl.store(anchors_BK + b * anchors + place_L, patch_L, mask=drawn_L)


@triton.jit
def _load_pixels(
    plane: tl.tensor,
    corner_N: tl.tensor,
    inside_N: tl.tensor,
    first_row: tl.tensor,
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """int8 [N, ROWS * PADDED]: u - 128 of ROWS rows of N patches; 0, which adds nothing to any sum, outside them."""
    pixel_Q = tl.arange(0, ROWS * PADDED)
    y_Q, x_Q = first_row + pixel_Q // PADDED, pixel_Q % PADDED
    inside_NQ = inside_N[:, None]
    if PATCH != PADDED or PATCH % ROWS != 0:
        inside_NQ = inside_NQ & ((y_Q < PATCH) & (x_Q < PATCH))[None, :]
    pixels_NQ = tl.load(plane + (corner_N[:, None] + (y_Q * WIDTH + x_Q)[None, :]), mask=inside_NQ, other=128)
    return (pixels_NQ ^ 128).to(tl.int8, bitcast=True)


@triton.jit
def _cross(product: tl.tensor, sum_a: tl.tensor, sum_b: tl.tensor, PIXELS: tl.constexpr) -> tl.tensor:
    """float64 n Σvw - Σv Σw, exact: an integer below 2**40."""
    return (product.to(tl.int64) * PIXELS - sum_a.to(tl.int64) * sum_b.to(tl.int64)).to(tl.float64)


@triton.jit
def _sums(
    plane: tl.tensor,
    corner_L: tl.tensor,
    inside_L: tl.tensor,
    corner_K: tl.tensor,
    inside_K: tl.tensor,
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tuple:
    """One channel's exact sums, int32, ROWS rows of pixels at a time: Σvw [L, K], Σv [L] and [K], Σv² [L] and [K]."""
    product_LK = tl.zeros((corner_L.shape[0], corner_K.shape[0]), tl.int32)
    sum_L, square_L = tl.zeros((corner_L.shape[0],), tl.int32), tl.zeros((corner_L.shape[0],), tl.int32)
    sum_K, square_K = tl.zeros((corner_K.shape[0],), tl.int32), tl.zeros((corner_K.shape[0],), tl.int32)
    for first_row in range(0, PATCH, ROWS):
        v_LQ = _load_pixels(plane, corner_L, inside_L, first_row, WIDTH, PATCH, PADDED, ROWS)
        w_KQ = _load_pixels(plane, corner_K, inside_K, first_row, WIDTH, PATCH, PADDED, ROWS)
        product_LK = tl.dot(v_LQ, tl.trans(w_KQ), product_LK, out_dtype=tl.int32)
        v32_LQ, w32_KQ = v_LQ.to(tl.int32), w_KQ.to(tl.int32)
        sum_L += tl.sum(v32_LQ, axis=1)
        sum_K += tl.sum(w32_KQ, axis=1)
        square_L += tl.sum(v32_LQ * v32_LQ, axis=1)
        square_K += tl.sum(w32_KQ * w32_KQ, axis=1)
    return product_LK, sum_L, sum_K, square_L, square_K


@triton.jit
def _of_channel(c: tl.tensor, FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr) -> tl.tensor:
    """One of three numbers, float64."""
    later = tl.where(c == 1, tl.full((), SECOND, tl.float64), tl.full((), THIRD, tl.float64))
    return tl.where(c == 0, tl.full((), FIRST, tl.float64), later)


@triton.jit(do_not_specialize=["anchors"])
def similarity_kernel(
    images_BCHW: tl.tensor,
    anchors_BK: tl.tensor,
    similarity_BL: tl.tensor,
    anchors: tl.tensor,
    SCALE0: tl.constexpr,
    SCALE1: tl.constexpr,
    SCALE2: tl.constexpr,
    SHIFT0: tl.constexpr,
    SHIFT1: tl.constexpr,
    SHIFT2: tl.constexpr,
    FLOOR: tl.constexpr,
    CENTRED: tl.constexpr,
    CONSTANT_ALIKE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One program compares BLOCK_L neighbouring patches of one image with all its anchors.

    It reads its own pixels once from memory. The anchors' pixels come again for every program, but from L2: for
    B/16 at 224 that is 4 x 5 patches next to 196, less than what a kernel of their own would write and read.
    """
    COLUMNS: tl.constexpr = WIDTH // PATCH
    PATCHES: tl.constexpr = (HEIGHT // PATCH) * COLUMNS
    PROGRAMS: tl.constexpr = (PATCHES + BLOCK_L - 1) // BLOCK_L
    b = tl.program_id(0) // PROGRAMS
    patch_L = (tl.program_id(0) % PROGRAMS) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside_L = patch_L < PATCHES
    place_K = tl.arange(0, BLOCK_K)
    inside_K = place_K < anchors
    anchor_K = tl.load(anchors_BK + b * anchors + place_K, mask=inside_K, other=-1)
    corner_L = (patch_L // COLUMNS) * (PATCH * WIDTH) + (patch_L % COLUMNS) * PATCH
    corner_K = (anchor_K // COLUMNS) * (PATCH * WIDTH) + (anchor_K % COLUMNS) * PATCH

    # n² times covariances and variances, n = PATCH² pixels. Within a channel they come from exact integers; to them
    # comes the product of the channels' means, less that of the patches' means (`total` / 3). That difference is of
    # at most 2e7 with 1e-16 of it as error, where one pixel off by one grey level contributes 0.2: float64 it must be.
    PIXELS: tl.constexpr = PATCH * PATCH
    covariance_LK = tl.zeros((BLOCK_L, BLOCK_K), tl.float64)
    variance_L, total_L = tl.zeros((BLOCK_L,), tl.float64), tl.zeros((BLOCK_L,), tl.float64)
    variance_K, total_K = tl.zeros((BLOCK_K,), tl.float64), tl.zeros((BLOCK_K,), tl.float64)
    for c in range(3):
        plane = images_BCHW + (b.to(tl.int64) * 3 + c) * (HEIGHT * WIDTH)
        product_LK, sum_L, sum_K, square_L, square_K = _sums(
            plane, corner_L, inside_L, corner_K, inside_K, WIDTH, PATCH, PADDED, ROWS
        )
        scale, shift = _of_channel(c, SCALE0, SCALE1, SCALE2), _of_channel(c, SHIFT0, SHIFT1, SHIFT2)
        mean_L = sum_L.to(tl.float64) * scale + PIXELS * shift
        mean_K = sum_K.to(tl.float64) * scale + PIXELS * shift
        within_LK = _cross(product_LK, sum_L[:, None], sum_K[None, :], PIXELS)
        covariance_LK += within_LK * (scale * scale) + mean_L[:, None] * mean_K[None, :]
        variance_L += _cross(square_L, sum_L, sum_L, PIXELS) * (scale * scale) + mean_L * mean_L
        variance_K += _cross(square_K, sum_K, sum_K, PIXELS) * (scale * scale) + mean_K * mean_K
        total_L += mean_L
        total_K += mean_K
    if CENTRED:
        covariance_LK -= total_L[:, None] * (total_K / 3)[None, :]
        variance_L -= total_L * total_L / 3
        variance_K -= total_K * total_K / 3

    constant_L, constant_K = variance_L <= FLOOR, (variance_K <= FLOOR) & inside_K
    inverse_L = tl.where(constant_L, 0.0, 1 / tl.sqrt(tl.maximum(variance_L, FLOOR))).to(tl.float32)
    inverse_K = tl.where(constant_K, 0.0, 1 / tl.sqrt(tl.maximum(variance_K, FLOOR))).to(tl.float32)
    cosine_LK = covariance_LK.to(tl.float32) * inverse_L[:, None] * inverse_K[None, :]
    cosine_LK = tl.minimum(tl.maximum(cosine_LK, -1.0), 1.0)
    if CONSTANT_ALIKE:
        cosine_LK = tl.where(constant_L[:, None] & constant_K[None, :], 1.0, cosine_LK)
    similarity_L = tl.max(tl.where(inside_K[None, :], cosine_LK, -1.0), axis=1)
    anchor_L = tl.max((patch_L[:, None] == anchor_K[None, :]).to(tl.int32), axis=1) > 0
    similarity_L = tl.where(anchor_L, _ALWAYS_HIDDEN, similarity_L)
    tl.store(similarity_BL + b * PATCHES + patch_L, similarity_L, mask=inside_L)


@triton.jit(do_not_specialize=["seed", "least"])
def keep_kernel(
    similarity_BL: tl.tensor,
    ordinal_B: tl.tensor,
    valid_B: tl.tensor,
    threshold_1: tl.tensor,
    keep_BL: tl.tensor,
    kept_B: tl.tensor,
    seed: tl.tensor,
    least: tl.tensor,
    HAS_HOLES: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program decides one image: it counts what exceeds the threshold, then drops the `count` largest keys.

    Keys order the patches for dropping: hidden ones first, then visible ones by falling word, and last the patch
    least like any anchor if everything is hidden. Of equal ones the lower index goes first, as in a stable sort.
    """
    b = tl.program_id(0)
    patch_L = tl.arange(0, BLOCK)
    inside_L = patch_L < PATCHES
    similarity_L = tl.load(similarity_BL + b * PATCHES + patch_L, mask=inside_L, other=_ALWAYS_HIDDEN)
    hidden_L = (similarity_L > tl.load(threshold_1)) & inside_L
    exceeding = tl.sum(hidden_L.to(tl.int32), axis=0)
    count = tl.minimum(tl.maximum(exceeding, least), PATCHES - 1)
    words_L = _words(seed, tl.load(ordinal_B + b), _EXTRA_DROPS, BLOCK)
    priority_L = tl.where(hidden_L, _WORDS_RANGE, words_L.to(tl.int64))
    last_L = (exceeding == PATCHES) & (patch_L == tl.argmin(similarity_L, axis=0))
    priority_L = tl.where(last_L, -1, priority_L)
    key_L = ((priority_L + 1) << _PLACE_BITS) + (_LAST_PLACE - patch_L)
    key_L = tl.where(inside_L, key_L, -1)
    keep_L = key_L < _nth_largest(key_L, count, _DROP_KEY_TOP)
    kept = PATCHES - count
    if HAS_HOLES:
        valid = tl.load(valid_B + b) != 0
        keep_L = keep_L & valid
        kept = tl.where(valid, kept, 0)
    tl.store(keep_BL + b * PATCHES + patch_L, keep_L, mask=inside_L)
    tl.store(kept_B + b, kept)


@triton.jit(do_not_specialize=["capacity"])
def places_kernel(
    keep_BL: tl.tensor,
    order_B: tl.tensor,
    end_B: tl.tensor,
    source_T: tl.tensor,
    position_T: tl.tensor,
    capacity: tl.tensor,
    PATCHES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program lists the kept patches of one image, at the rows of the sequence that end at its `end_B`."""
    i = tl.program_id(0)
    b = tl.load(order_B + i)
    patch_L = tl.arange(0, BLOCK)
    keep_L = tl.load(keep_BL + b * PATCHES + patch_L, mask=patch_L < PATCHES, other=0) != 0
    rank_L = tl.cumsum(keep_L.to(tl.int32), axis=0)
    row_L = tl.load(end_B + i) - tl.sum(keep_L.to(tl.int32), axis=0) + rank_L - 1
    written_L = keep_L & (row_L < capacity)
    tl.store(source_T + row_L, b * PATCHES + patch_L, mask=written_L)
    tl.store(position_T + row_L, patch_L.to(tl.int64), mask=written_L)


@triton.jit(do_not_specialize=["capacity"])
def gather_kernel(
    images_BCHW: tl.tensor,
    source_T: tl.tensor,
    total_1: tl.tensor,
    patches_TP: tl.tensor,
    capacity: tl.tensor,
    SCALE0: tl.constexpr,
    SCALE1: tl.constexpr,
    SCALE2: tl.constexpr,
    SHIFT0: tl.constexpr,
    SHIFT1: tl.constexpr,
    SHIFT2: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
) -> None:
    """One program copies and standardises BLOCK_T rows of the sequence; behind the last row it ends at once."""
    COLUMNS: tl.constexpr = WIDTH // PATCH
    PATCHES: tl.constexpr = (HEIGHT // PATCH) * COLUMNS
    PIXELS: tl.constexpr = PATCH * PATCH
    row_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    total = tl.minimum(tl.load(total_1), capacity)
    if tl.program_id(0) * BLOCK_T < total:
        inside_T = row_T < total
        place_T = tl.load(source_T + row_T, mask=inside_T, other=0)
        b_T, patch_T = place_T // PATCHES, place_T % PATCHES
        corner_T = (patch_T // COLUMNS) * (PATCH * WIDTH) + (patch_T % COLUMNS) * PATCH
        from_T = images_BCHW + b_T * (3 * HEIGHT * WIDTH) + corner_T
        to_T = patches_TP + row_T.to(tl.int64) * (3 * PIXELS)
        for c in range(3):
            scale = _of_channel(c, SCALE0, SCALE1, SCALE2).to(tl.float32)
            shift = _of_channel(c, SHIFT0, SHIFT1, SHIFT2).to(tl.float32)
            for first in range(0, PIXELS, BLOCK_Q):
                q_Q = first + tl.arange(0, BLOCK_Q)
                inside_TQ = inside_T[:, None] & (q_Q < PIXELS)[None, :]
                offset_Q = c * (HEIGHT * WIDTH) + (q_Q // PATCH) * WIDTH + q_Q % PATCH
                pixels_TQ = tl.load(from_T[:, None] + offset_Q[None, :], mask=inside_TQ, other=0)
                values_TQ = pixels_TQ.to(tl.float32) * scale + shift
                values_TQ = values_TQ.to(patches_TP.dtype.element_ty)
                tl.store(to_T[:, None] + (c * PIXELS + q_Q)[None, :], values_TQ, mask=inside_TQ)
