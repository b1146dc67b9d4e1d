"""Cluster masking, readable: the truth that faster versions are compared with.

Source: Wei, Pan, Owens, "Efficient Vision-Language Pre-training by Cluster Masking", CVPR 2024, arXiv 2405.08815,
section 3. Per image: draw a few anchor patches, hide every patch that looks like one of them, top up with random
drops to a least share β. Only K x L similarities are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEVIATION_EPS = 1e-6
ALWAYS_HIDDEN = 2.0  # above any cosine: an anchor is hidden at every threshold


def normalise_patches(patches_BLP: Tensor) -> Tensor:
    """Each patch less its own scalar mean, divided by its own norm: float32 [B, L, P], unit length.

    The inner product of two such rows is their Pearson correlation: brightness is removed, chroma offsets are kept.
    A patch of one constant value becomes the zero vector, similar to nothing (see `nearest_anchor_similarity`).
    """
    centred_BLP = patches_BLP.float() - patches_BLP.float().mean(dim=-1, keepdim=True)
    norm_BL1 = centred_BLP.norm(dim=-1, keepdim=True)
    floor = DEVIATION_EPS * patches_BLP.shape[-1] ** 0.5
    return torch.where(norm_BL1 > floor, centred_BLP / norm_BL1.clamp_min(floor), 0.0)


def draw_anchors(words_BL: Tensor, anchor_ratio: float) -> Tensor:
    """K = max(1, int(anchor_ratio * L)) patches per image, uniform without replacement: int64 [B, K].

    `words_BL` are independent random words per patch; the K largest are the anchors.
    """
    patches = words_BL.shape[1]
    return words_BL.topk(max(1, int(anchor_ratio * patches)), dim=1).indices


def nearest_anchor_similarity(patches_BLP: Tensor, anchors_BK: Tensor) -> Tensor:
    """Similarity of every patch to the anchor most like it: float32 [B, L] in [-1, 1]; anchors get ALWAYS_HIDDEN.

    Constant patches (plain background) have no direction to compare: they count as identical to each other
    (similarity 1) and as unlike anything else (0).
    """
    unit_BLP = normalise_patches(patches_BLP)
    anchors_BKP = unit_BLP.gather(1, anchors_BK[:, :, None].expand(-1, -1, unit_BLP.shape[-1]))
    similarity_BL = (unit_BLP @ anchors_BKP.transpose(1, 2)).amax(dim=-1)
    constant_BL = ~unit_BLP.any(dim=-1)
    constant_anchor_B1 = constant_BL.gather(1, anchors_BK).any(dim=1, keepdim=True)
    similarity_BL = similarity_BL.masked_fill(constant_BL & constant_anchor_B1, 1.0)
    return similarity_BL.scatter(1, anchors_BK, ALWAYS_HIDDEN)


def hidden_counts(similarity_BL: Tensor, threshold: float, min_ratio: float) -> Tensor:
    """How many patches each image loses at a threshold, after the top-up to β and the one that always stays: [B]."""
    patches = similarity_BL.shape[1]
    least = min(least_hidden(patches, min_ratio), patches - 1)
    return (similarity_BL > threshold).sum(dim=1).clamp(least, patches - 1)


def least_hidden(patches: int, min_ratio: float) -> int:
    """The smallest number of patches that is at least β of them; immune to rounding such as 0.3 * 10 = 3.0000001."""
    return int(-(-min_ratio * patches * (1 - 1e-9) // 1))


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
    rank_BL = priority_BL.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank_BL >= hidden_counts(similarity_BL, threshold, min_ratio)[:, None]
