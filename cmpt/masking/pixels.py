"""The pixel similarity of cluster.py on a CPU, fast: three passes over the pixels, from exact integer sums.

With v = u - 128, the sums of v, v² and of products vw are whole numbers that float32 holds exactly up to 2**24. Within
a channel the CLIP-normalised value is x = s v + h, so covariances are those of v times s², plus those of the channels'
means; nothing is lost in flat patches. masking/fused.py does the same, and tests hold both against cluster.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmpt.masking.cluster import ALWAYS_HIDDEN, DEVIATION_EPS

_MIDDLE = 128
_PART_BYTES = 10 << 20  # of float32 pixels
_EXACT = 256  # pixels: 128² * 256 = 2**22, whose root float32 holds well enough to find the whole number again


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
    scale_C = 1 / (255 * torch.tensor(std, dtype=torch.float64, device=patches_BLP.device))
    shift_C = (_MIDDLE / 255 - torch.tensor(mean, dtype=torch.float64, device=patches_BLP.device)) * 255 * scale_C
    channels = len(scale_C)
    pixels = values // channels
    run = max(n for n in range(1, min(pixels, _EXACT) + 1) if pixels % n == 0)

    # A few images at a time: fresh memory for all of them would cost more than the arithmetic.
    images = min(batch, max(1, _PART_BYTES // (4 * patches * values)))
    kept_BLCR = torch.empty(images, patches, channels, pixels, device=patches_BLP.device)
    found = []
    for first in range(0, batch, images):
        part = slice(first, min(first + images, batch))
        v_BLCR = kept_BLCR[: part.stop - first]
        v_BLCR.view(-1, patches, values).copy_((patches_BLP[part] ^ _MIDDLE).view(torch.int8))
        found.append(_whole_sums(v_BLCR, anchors_BK[part], run))
    sums_BLCK, squares_BLC = (torch.cat(parts) for parts in zip(*found, strict=True))

    plain_BLC = sums_BLCK[..., -1]
    mean_BLC = (plain_BLC / pixels) * scale_C + shift_C
    if centred:
        mean_BLC -= mean_BLC.mean(dim=-1, keepdim=True)
    anchors_BKC = anchors_BK[:, :, None].expand(-1, -1, channels)
    plain_BKC, mean_BKC = plain_BLC.gather(1, anchors_BKC), mean_BLC.gather(1, anchors_BKC)
    weight_C = scale_C.square()
    covariance_BLK = torch.einsum("blck,c->blk", sums_BLCK[..., :-1], weight_C)
    covariance_BLK -= (plain_BLC * (weight_C / pixels)) @ plain_BKC.transpose(1, 2)
    covariance_BLK += (mean_BLC * pixels) @ mean_BKC.transpose(1, 2)
    variance_BL = ((squares_BLC - plain_BLC.square() / pixels) * weight_C + mean_BLC.square() * pixels).sum(dim=-1)

    constant_BL = variance_BL <= DEVIATION_EPS**2 * values
    inverse_BL = variance_BL.rsqrt_().masked_fill_(constant_BL, 0.0)  # similarity 0 to everything
    covariance_BLK *= inverse_BL.gather(1, anchors_BK)[:, None, :]
    similarity_BL = (covariance_BLK.amax(dim=-1) * inverse_BL).clamp_(-1, 1).float()
    if constant_alike:
        constant_anchor_B1 = constant_BL.gather(1, anchors_BK).any(dim=1, keepdim=True)
        similarity_BL.masked_fill_(constant_BL & constant_anchor_B1, 1.0)
    return similarity_BL.scatter_(1, anchors_BK, ALWAYS_HIDDEN)


def _whole_sums(v_BLCR: Tensor, anchors_BK: Tensor, run: int) -> tuple[Tensor, Tensor]:
    """Over the R pixels of a channel, exact, in float64: Σvw with every anchor and last Σv, [B, L, C, K + 1]; Σv².

    A channel of 32 x 32 pixels gives sums of at most 128² * 1024 = 2**24; roots are taken of `run` pixels at a time.
    """
    w_BKCR = v_BLCR.gather(1, anchors_BK[:, :, None, None].expand(-1, -1, *v_BLCR.shape[2:]))
    columns_BCRK = torch.nn.functional.pad(w_BKCR.permute(0, 2, 3, 1), (0, 1), value=1.0)  # of ones for Σv
    sums = [v_BLR @ columns_BRK for v_BLR, columns_BRK in zip(v_BLCR.unbind(2), columns_BCRK.unbind(1), strict=True)]
    norm_BLCr = torch.linalg.vector_norm(v_BLCR.unflatten(3, (-1, run)), dim=-1)
    return torch.stack(sums, dim=2).double(), norm_BLCr.double().square_().round_().sum(dim=-1)
