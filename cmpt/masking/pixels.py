"""The pixel similarity of cluster.py on a CPU, fast: a few images at a time, in place, without normalised copies.

It works on pixel values, not on normalised ones: within a channel normalising is x = s u + h, so the covariance of two
patches is the sum of s² times the channels' own covariances, plus that of the channels' means. Nothing is subtracted
that is large against what is left, so flat patches keep their precision. Tests hold it against cluster.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmpt.masking.cluster import ALWAYS_HIDDEN, DEVIATION_EPS

# Of float32 pixels at a time. Smaller parts are no faster, and where other work keeps the cores busy every operation
# that is shared out over threads can wait a time slice for the last of them.
_PART_BYTES = 32 << 20


def pixel_similarity(
    patches_BLP: Tensor,
    anchors_BK: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    centred: bool = True,
    constant_alike: bool = True,
) -> Tensor:
    """`nearest_anchor_similarity` of `anchor_similarities` of standardised pixels: float32 [B, L].

    `patches_BLP`: uint8, P channel-major. `mean`, `std`: per channel, of values in 0 … 1.
    """
    batch, patches, values = patches_BLP.shape
    similarity_BL = torch.empty(batch, patches)
    scale_C = 1 / (255 * torch.tensor(std, dtype=torch.float32))
    shift_C = -torch.tensor(mean, dtype=torch.float32) / torch.tensor(std, dtype=torch.float32)
    per_channel = values // len(scale_C)
    weight_P = scale_C.square().repeat_interleave(per_channel)
    images = max(1, _PART_BYTES // (4 * patches * values))
    pixels_BLP = torch.empty(min(images, batch), patches, values)
    for first in range(0, batch, images):
        part = slice(first, min(first + images, batch))
        anchors_bK = anchors_BK[part]
        pixels_bLP = pixels_BLP[: len(anchors_bK)].copy_(patches_BLP[part])
        pixels_bLCn = pixels_bLP.view(len(anchors_bK), patches, -1, per_channel)
        mean_bLC = pixels_bLCn.mean(dim=-1)
        pixels_bLCn.sub_(mean_bLC[..., None])
        mean_bLC = mean_bLC.mul_(scale_C).add_(shift_C)
        if centred:
            mean_bLC -= mean_bLC.mean(dim=-1, keepdim=True)
        mean_bLC *= per_channel**0.5  # its products then sum over all values of a patch
        squares_bL = torch.linalg.vector_norm(pixels_bLCn, dim=-1).mul_(scale_C).square_().sum(dim=-1)
        norm_bL = squares_bL.add_(mean_bLC.square().sum(dim=-1)).sqrt_()

        anchors_bKP = pixels_bLP.gather(1, anchors_bK[:, :, None].expand(-1, -1, values)).mul_(weight_P)
        means_bKC = mean_bLC.gather(1, anchors_bK[:, :, None].expand(-1, -1, mean_bLC.shape[-1]))
        product_bLK = torch.baddbmm(mean_bLC @ means_bKC.transpose(1, 2), pixels_bLP, anchors_bKP.transpose(1, 2))
        constant_bL = norm_bL <= DEVIATION_EPS * values**0.5
        norm_bL.masked_fill_(constant_bL, torch.inf)  # similarity 0 to everything
        product_bLK /= norm_bL.gather(1, anchors_bK)[:, None, :]
        part_bL = (product_bLK / norm_bL[:, :, None]).amax(dim=-1)
        if constant_alike:
            constant_anchor_b1 = constant_bL.gather(1, anchors_bK).any(dim=1, keepdim=True)
            part_bL.masked_fill_(constant_bL & constant_anchor_b1, 1.0)
        similarity_BL[part] = part_bL.scatter_(1, anchors_bK, ALWAYS_HIDDEN)
    return similarity_BL
