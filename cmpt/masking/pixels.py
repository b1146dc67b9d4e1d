"""The pixel similarity of cluster.py on a CPU, fast: a few images at a time, in place, without normalised copies.

Within a channel normalising is x = s u + h, so the covariance of two patches is that of the s u around their channels'
own means, plus that of the means. Means are taken from whole pixel values, so flat patches keep their precision. Tests
hold it against cluster.py.
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
    channels, per_channel = len(scale_C), values // len(scale_C)
    images = min(batch, max(1, _PART_BYTES // (4 * patches * values)))
    rows_BLQ = torch.empty(images, patches, values + channels)  # of every patch its values, then its channels' means
    for first in range(0, batch, images):
        part = slice(first, min(first + images, batch))
        anchors_bK, rows_bLQ = anchors_BK[part], rows_BLQ[: min(images, batch - first)]
        pixels_bLCn = rows_bLQ[..., :values].copy_(patches_BLP[part]).unflatten(2, (channels, per_channel))
        mean_bLC = pixels_bLCn.mean(dim=-1)
        pixels_bLCn.sub_(mean_bLC[..., None]).mul_(scale_C[:, None])
        mean_bLC.mul_(scale_C).add_(shift_C)
        if centred:
            mean_bLC -= mean_bLC.mean(dim=-1, keepdim=True)
        rows_bLQ[..., values:] = mean_bLC * per_channel**0.5  # their products count for all values of a channel

        norm_bL = torch.linalg.vector_norm(rows_bLQ, dim=-1)
        constant_bL = norm_bL <= DEVIATION_EPS * values**0.5
        inverse_bL = norm_bL.reciprocal_().masked_fill_(constant_bL, 0.0)  # similarity 0 to everything
        chosen_bKQ = rows_bLQ.gather(1, anchors_bK[:, :, None].expand(-1, -1, rows_bLQ.shape[-1]))
        chosen_bKQ *= inverse_bL.gather(1, anchors_bK)[..., None]
        part_bL = (rows_bLQ @ chosen_bKQ.transpose(1, 2)).amax(dim=-1)
        part_bL.mul_(inverse_bL).clamp_(-1, 1)
        if constant_alike:
            constant_anchor_b1 = constant_bL.gather(1, anchors_bK).any(dim=1, keepdim=True)
            part_bL.masked_fill_(constant_bL & constant_anchor_b1, 1.0)
        similarity_BL[part] = part_bL.scatter_(1, anchors_bK, ALWAYS_HIDDEN)
    return similarity_BL
