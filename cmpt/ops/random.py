"""Counter-based random numbers: Philox 4x32-10, the same bits in numpy, torch and Triton.

Every random decision about a sample is a pure function of (seed, sample ordinal in the run, purpose, index). There is
no generator state to save, and a decision is the same at any world size, in any pass, and after a resume.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Triton's `tl.philox` is the same
function: key = seed (64 bits), counter = (index, purpose, ordinal low, ordinal high).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85
_LOW32 = 0xFFFFFFFF
_ROUNDS = 10


class Purpose(IntEnum):
    """What a draw is for. The numbers are part of every run's identity: append, never renumber."""

    CROP = 1
    CAPTION = 2
    ANCHORS = 3
    EXTRA_DROPS = 4
    KEEP = 5  # the random strategies' own keep scores
    SOURCE = 6  # which data source fills a slot
    UNIT_ORDER = 7  # permutation of shards, keyed by epoch instead of ordinal
    MEMBER_ORDER = 8  # permutation of a shard's members, keyed by (epoch, unit)
    TEXT_MASK = 9


def _philox_rounds(c0: Any, c1: Any, c2: Any, c3: Any, key0: int, key1: int) -> tuple[Any, Any, Any, Any]:
    """Ten rounds on four counters held in 64-bit integers (values < 2**32); numpy uint64 or torch int64.

    A signed 64-bit product wraps modulo 2**64, so shifting and masking still gives the true high and low words.
    """
    for _ in range(_ROUNDS):
        product_a = c0 * _MULTIPLIER_A
        product_b = c2 * _MULTIPLIER_B
        high_a, low_a = (product_a >> 32) & _LOW32, product_a & _LOW32
        high_b, low_b = (product_b >> 32) & _LOW32, product_b & _LOW32
        c0, c1, c2, c3 = high_b ^ c1 ^ key0, low_b, high_a ^ c3 ^ key1, low_a
        key0, key1 = (key0 + _WEYL_A) & _LOW32, (key1 + _WEYL_B) & _LOW32
    return c0, c1, c2, c3


def random_words(seed: int, ordinal: int | NDArray[np.int64], purpose: int, count: int) -> NDArray[np.uint32]:
    """`count` random 32-bit words for each ordinal, on the host.

    Returns uint32 of shape `np.shape(ordinal) + (count,)`. Word j of ordinal n is output j % 4 of counter index j // 4.
    """
    ordinals = np.asarray(ordinal, dtype=np.int64).astype(np.uint64)[..., None]
    index = np.arange((count + 3) // 4, dtype=np.uint64)
    shape = np.broadcast_shapes(ordinals.shape, index.shape)
    low, high = np.uint64(_LOW32), np.uint64(32)
    c0 = np.broadcast_to(index, shape)
    c1 = np.full(shape, purpose, dtype=np.uint64)
    c2 = np.broadcast_to(ordinals & low, shape)
    c3 = np.broadcast_to(ordinals >> high, shape)
    words = _philox_rounds(c0, c1, c2, c3, seed & _LOW32, (seed >> 32) & _LOW32)
    return np.stack(words, axis=-1).reshape(*shape[:-1], -1)[..., :count].astype(np.uint32)


def random_words_tensor(seed: int, ordinal_B: Tensor, purpose: int, count: int) -> Tensor:
    """The same words as `random_words`, on the device of `ordinal_B` (int64): int64 [B, count], values < 2**32."""
    if ordinal_B.device.type == "cpu":  # many small operations, which cost numpy a quarter of what they cost torch
        return torch.from_numpy(random_words(seed, ordinal_B.numpy(), purpose, count).astype(np.int64))
    index = torch.arange((count + 3) // 4, device=ordinal_B.device, dtype=torch.int64)
    shape = (ordinal_B.shape[0], index.shape[0])
    c0 = index.expand(shape)
    c1 = torch.full(shape, purpose, device=ordinal_B.device, dtype=torch.int64)
    c2 = (ordinal_B & _LOW32)[:, None].expand(shape)
    c3 = ((ordinal_B >> 32) & _LOW32)[:, None].expand(shape)
    words = _philox_rounds(c0, c1, c2, c3, seed & _LOW32, (seed >> 32) & _LOW32)
    return torch.stack(words, dim=-1).reshape(shape[0], -1)[:, :count]


def uniform(seed: int, ordinal: int | NDArray[np.int64], purpose: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 32 random bits each; shape as `random_words`."""
    return random_words(seed, ordinal, purpose, count).astype(np.float64) * 2.0**-32


def permutation(seed: int, key: int, purpose: int, count: int) -> NDArray[np.int64]:
    """A uniform permutation of 0 … count-1 as a pure function of its arguments (int64).

    Sorts 64-bit random keys; the stable sort settles the (one in 2**64 per pair) ties.
    """
    words = random_words(seed, key, purpose, 2 * count).astype(np.uint64)
    return np.argsort(words[0::2] << np.uint64(32) | words[1::2], kind="stable")
