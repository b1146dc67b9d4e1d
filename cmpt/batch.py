"""The frozen records that travel between parts, and the shape legend of the whole project.

Shape suffixes (a trailing capital per axis):

    B  samples on this rank             G  samples of the global batch (all ranks)
    L  patches per image                T  kept patches of all images of this rank
    U  text tokens of all captions      P  values per patch (patch * patch * 3, channel-major)
    C  colour channels, H W  pixels     D  width of a tower, N heads, E width of the joint embedding
    K  anchors per image                S  streams

`image_BE` is therefore one joint embedding per sample of this rank, `patches_TP` the kept patches of all
images on this rank, one after the other, with no padding between them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rejection:
    """What could not be used, a sample or the rest of a shard: why, and which."""

    cause: str  # a fixed vocabulary, see data/validate.py: "missing_image", "broken_image", "empty_caption", ...
    key: str  # "shard.tar/sample-key", or "shard.tar"
    detail: str = ""  # what the decoder or the check said
    source: int = 0  # of data.train
    samples: int = 1  # that are lost by it
    stream: int | None = None  # of which it is the rest of a shard


def _every_nth(lengths: list[int], first: int, step: int) -> Tensor:
    """Token indices of sequences first, first + step, … of some packed sequences; host int64."""
    ends = list(accumulate(lengths))
    parts = [torch.arange(ends[i] - lengths[i], ends[i]) for i in range(first, len(lengths), step)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class PackedText:
    """Captions of this rank, one after the other, no padding.

    `lengths` is a host list, so that making an attention mask never reads from the device.
    """

    ids_U: Tensor  # int64; every caption ends with the end-of-text token
    position_U: Tensor  # int64; 0 … length-1 within its own caption
    lengths: list[int]  # tokens of the i-th packed caption, longest first
    order_B: Tensor  # int64; the i-th packed caption belongs to batch row order_B[i]

    def to(self, device: torch.device) -> PackedText:
        ids, position, order = (t.to(device, non_blocking=True) for t in (self.ids_U, self.position_U, self.order_B))
        return PackedText(ids, position, self.lengths, order)

    def part(self, first: int, step: int) -> PackedText:
        """Captions first, first + step, …: as these go by length, all parts have about as many tokens."""
        index = _every_nth(self.lengths, first, step).to(self.ids_U.device, non_blocking=True)
        lengths, order = self.lengths[first::step], self.order_B[first::step]
        return PackedText(self.ids_U[index], self.position_U[index], lengths, order)


@dataclass(frozen=True)
class PackedPatches:
    """Kept patches of this rank, one image after the other, no padding; dropped patches are not here."""

    patches_TP: Tensor  # float32 (or bf16), CLIP-normalised pixel values, channel-major within a patch
    position_T: Tensor  # int64; raster position of the patch in its image, 0 … L-1
    lengths: list[int]  # kept patches of the i-th packed image, longest first; sums to T
    order_B: Tensor  # int64; the i-th packed image belongs to batch row order_B[i]
    grid: tuple[int, int]  # patches per column, patches per row (height, width); L = product

    def part(self, first: int, step: int) -> PackedPatches:
        """Images first, first + step, …: as these go by length, all parts have about as many patches."""
        index = _every_nth(self.lengths, first, step).to(self.patches_TP.device, non_blocking=True)
        lengths, order = self.lengths[first::step], self.order_B[first::step]
        return PackedPatches(self.patches_TP[index], self.position_T[index], lengths, order, self.grid)


@dataclass(frozen=True)
class ImageTextBatch:
    """What the loader yields: the local rows of one global batch, decoded and tokenised.

    Row b of this rank is slot `ordinal_B[b]` of the run: step * G + position in the global batch. All randomness
    of a sample is keyed by that number, so it does not depend on the world size.
    """

    images_BCHW: Tensor  # uint8
    text: PackedText
    ordinal_B: Tensor  # int64
    valid_B: Tensor  # bool; False is a hole: validated bytes that the decoder refused afterwards
    keys: list[str]  # "shard.tar/sample-key" of every row
    stream_digests: list[bytes]  # 16 bytes per stream of this rank, over its sample ids in order
    rejections: list[Rejection] = field(default_factory=list)  # met on the way to this batch, this rank's streams

    def to(self, device: torch.device) -> ImageTextBatch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            images_BCHW=self.images_BCHW.to(device, non_blocking=True),
            text=self.text.to(device),
            ordinal_B=self.ordinal_B.to(device, non_blocking=True),
            valid_B=self.valid_B.to(device, non_blocking=True),
        )

    def pinned(self) -> ImageTextBatch:
        """The same batch in page-locked host memory, from which `to` copies beside the step; what is there already, or
        on a device, stays."""
        text = replace(
            self.text,
            ids_U=self.text.ids_U.pin_memory(),
            position_U=self.text.position_U.pin_memory(),
            order_B=self.text.order_B.pin_memory(),
        )
        images = self.images_BCHW if self.images_BCHW.device.type != "cpu" else self.images_BCHW.pin_memory()
        return replace(
            self,
            images_BCHW=images,
            text=text,
            ordinal_B=self.ordinal_B.pin_memory(),
            valid_B=self.valid_B.pin_memory(),
        )
