"""Cluster masking, readable: the truth that faster versions are compared with.

Source: Wei, Pan, Owens, "Efficient Vision-Language Pre-training by Cluster Masking", CVPR 2024, arXiv 2405.08815,
section 3. Per image: draw a few anchor patches, hide every patch that looks like one of them, top up with random
drops to a least share β. Only K x L similarities are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmpt.recipe.schema import Masking

DEVIATION_EPS = 1e-6
ALWAYS_HIDDEN = 2.0  # above any cosine: an anchor is hidden at every threshold
# A patch's place in the image, which tells random words of 32 bits apart: 4,096 patches (recipe/check_masking.py).
PLACE_BITS = 12


def unit_patches(patches_BLP: Tensor, centred: bool = True) -> Tensor:
    """Each patch less its own scalar mean, divided by its own norm: float32 [B, L, P], unit length.

    The inner product of two such rows is their Pearson correlation: brightness is removed, chroma offsets are kept.
    Not `centred`, the mean stays in and the inner product is the cosine (the ablation of section 4.4). A patch that has
    nothing left, the constant patch, becomes the zero vector.
    """
    values_BLP = patches_BLP.float()
    if centred:
        values_BLP = values_BLP - values_BLP.mean(dim=-1, keepdim=True)
    norm_BL1 = values_BLP.norm(dim=-1, keepdim=True)
    floor = DEVIATION_EPS * patches_BLP.shape[-1] ** 0.5
    return torch.where(norm_BL1 > floor, values_BLP / norm_BL1.clamp_min(floor), 0.0)


def anchor_count(masking: Masking, patches: int) -> int:
    """K of an image with so many patches: `masking.anchors`, or max(1, int(anchor_ratio * L)); never all of them."""
    wanted = masking.anchors if masking.anchors is not None else max(1, int(masking.anchor_ratio * patches + 1e-9))
    return min(wanted, max(1, patches - 1))


def draw_anchors(words_BL: Tensor, anchors: int) -> Tensor:
    """So many patches per image, uniform without replacement, in ascending order: int64 [B, K].

    `words_BL` are independent random 32-bit words per patch; the K largest are the anchors. Of equal words the later
    patch is the larger.
    """
    patches = words_BL.shape[1]
    assert patches <= 1 << PLACE_BITS
    places_L = torch.arange(patches, device=words_BL.device)
    return (words_BL << PLACE_BITS | places_L).topk(anchors, dim=1).indices.sort(dim=1).values


def anchor_similarities(
    patches_BLP: Tensor, anchors_BK: Tensor, centred: bool = True, constant_alike: bool = True
) -> Tensor:
    """Similarity of every patch to every anchor of its image: float32 [B, L, K] in [-1, 1].

    The patches' values may be CLIP-normalised pixels, or embeddings. Constant patches have no direction to compare:
    with `constant_alike` they count as identical to each other (1), and in any case as unlike anything else (0).
    """
    unit_BLP = unit_patches(patches_BLP, centred)
    anchors_BKP = unit_BLP.gather(1, anchors_BK[:, :, None].expand(-1, -1, unit_BLP.shape[-1]))
    similarity_BLK = unit_BLP @ anchors_BKP.transpose(1, 2)
    if constant_alike:
        constant_BL = ~unit_BLP.any(dim=-1)
        both_BLK = constant_BL[:, :, None] & constant_BL.gather(1, anchors_BK)[:, None, :]
        similarity_BLK = similarity_BLK.masked_fill(both_BLK, 1.0)
    return similarity_BLK


def nearest_anchor_similarity(similarity_BLK: Tensor, anchors_BK: Tensor) -> Tensor:
    """Similarity to the anchor most like it, float32 [B, L] in [-1, 1]; anchors themselves get ALWAYS_HIDDEN."""
    return similarity_BLK.amax(dim=-1).clamp(-1, 1).scatter(1, anchors_BK, ALWAYS_HIDDEN)


def hidden_counts(similarity_BL: Tensor, threshold: float, min_ratio: float) -> Tensor:
    """How many patches each image loses at a threshold, after the top-up to β and the one that always stays: [B]."""
    patches = similarity_BL.shape[1]
    return (similarity_BL > threshold).sum(dim=1).clamp(least_hidden(patches, min_ratio), patches - 1)


def least_hidden(patches: int, min_ratio: float) -> int:
    """The smallest number of patches that is at least β of them, but never all; immune to rounding such as
    0.3 * 10 = 3.0000001."""
    return min(int(-(-min_ratio * patches * (1 - 1e-9) // 1)), patches - 1)


def keep_by_similarity(similarity_BL: Tensor, words_BL: Tensor, threshold: float, min_ratio: float) -> Tensor:
    """The keep mask, bool [B, L]: hide what exceeds the threshold, then uniformly random visible patches up to β.

    If everything would be hidden, the patch least like any anchor stays. `words_BL` (random, independent of the
    anchors' words) decide the extra drops, so every visible patch is equally likely to be one.
    """
    patches = similarity_BL.shape[1]
    hidden_BL = similarity_BL > threshold
    # Hidden patches first, then visible ones in random order: the first `count` of them go.
    words_range = 1 << 32
    priority_BL = torch.where(hidden_BL, words_range, words_BL)
    everything_B1 = hidden_BL.sum(dim=1, keepdim=True) == patches
    least_similar_B1 = similarity_BL.argmin(dim=1, keepdim=True)
    priority_BL = torch.where(everything_B1, priority_BL.scatter(1, least_similar_B1, -1), priority_BL)
    # Of equal ones the first in the image goes first; so no two keys are equal, and one sort is enough.
    key_BL = (priority_BL << PLACE_BITS) - torch.arange(patches, device=words_BL.device)
    count_B1 = hidden_counts(similarity_BL, threshold, min_ratio)[:, None]
    last_dropped_B1 = key_BL.sort(dim=1, descending=True).values.gather(1, (count_B1 - 1).clamp_min(0))
    return (key_BL < last_dropped_B1) | (count_B1 == 0)
