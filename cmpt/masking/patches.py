"""From uint8 images to patches, and from a keep mask to one packed sequence without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cmpt.batch import PackedPatches

_WIDE = (torch.complex128, torch.int64, torch.int32, torch.int16, torch.uint8)  # only moved, never read as numbers


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, L, P], raster order of patches, P = C * p * p channel-major; any dtype, values unchanged.

    The order within a patch is that of a convolution's weight [D, C, p, p], so a patch embedding exports as one.
    Raises ValueError if a side is not a multiple of the patch size.
    """
    batch, channels, height, width = images_BCHW.shape
    rows, columns = patch_grid(height, width, patch_size)
    values = images_BCHW
    if values.dtype == torch.uint8:  # up to 16 pixels move as one number: a tenth of the time on a CPU
        values = values.contiguous().view(next(wide for wide in _WIDE if patch_size % wide.itemsize == 0))
    grid = values.reshape(batch, channels, rows, patch_size, columns, -1)
    patches_BLP = grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
    return patches_BLP.contiguous().view(images_BCHW.dtype)


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches. Raises ValueError if a side is not a multiple of the patch size."""
    if height % patch_size or width % patch_size:
        raise ValueError(f"image size {height}x{width}: each side must be a multiple of model.patch_size={patch_size}")
    return height // patch_size, width // patch_size


@dataclass(frozen=True)
class Pixels:
    """Images as a strategy may look at them."""

    images_BCHW: Tensor  # uint8
    patch_size: int

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return patch_grid(self.images_BCHW.shape[2], self.images_BCHW.shape[3], self.patch_size)

    @property
    def patches(self) -> int:
        """L, patches per image."""
        return self.grid[0] * self.grid[1]

    @cached_property
    def patches_BLP(self) -> Tensor:
        """uint8."""
        return patchify(self.images_BCHW, self.patch_size)


def standardise(patches_BLP: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 pixel values -> float32, (value / 255 - mean) / std per channel; same shape, channel-major last axis."""
    channels = len(mean)
    per_channel = patches_BLP.shape[-1] // channels
    device = patches_BLP.device
    scale_P = (1 / (255 * torch.tensor(std, dtype=torch.float32))).repeat_interleave(per_channel).to(device)
    shift_P = (-torch.tensor(mean) / torch.tensor(std)).float().repeat_interleave(per_channel).to(device)
    values_BLP = patches_BLP.to(torch.float32, copy=True)
    return torch.addcmul(shift_P, values_BLP, scale_P, out=values_BLP)


def pack(patches_BLP: Tensor, keep_BL: Tensor, grid: tuple[int, int]) -> PackedPatches:
    """Kept patches of all images in one sequence, longest image first, no padding.

    Longest first puts images of equal length side by side, which packed attention on a CPU handles in one call, and
    balances the tail on a GPU. Rows that keep nothing (holes) do not appear: `order_B` then has fewer rows than B.
    """
    kept_B = keep_BL.sum(dim=1)
    order_B = kept_B.argsort(descending=True, stable=True)
    order_B = order_B[: int((kept_B > 0).sum())]
    sequences, columns = keep_BL[order_B].nonzero(as_tuple=True)
    rows = order_B[sequences]
    return PackedPatches(
        patches_TP=patches_BLP.flatten(0, 1).index_select(0, rows * patches_BLP.shape[1] + columns),
        position_T=columns,
        lengths=kept_B[order_B].tolist(),
        order_B=order_B,
        grid=grid,
    )
