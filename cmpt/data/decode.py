"""Encoded bytes + crop window -> uint8 pixels, on the CPU.

simplejpeg for JPEG; Pillow for what it refuses (CMYK, slight damage) and for other formats; then torch's uint8
bicubic interpolation with antialiasing, on the window only. Nothing here starts torch's own threads: arrays are
cropped and copied with numpy, because a torch copy of this size opens an OpenMP team in every worker. And there are few
calls: after each decode the caches hold pixels, and the smallest call of torch costs 10 µs.
"""

from __future__ import annotations

import io
import math
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmpt.data.validate import Cause, ImageHeader, UnusableError, one_line
from cmpt.ops.random import Purpose, uniform
from cmpt.recipe import schema

_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
_FLIP, _TOP, _LEFT, _FIRST_ATTEMPT = 0, 1, 2, 3
_DRAWS = _FIRST_ATTEMPT + 2 * _ATTEMPTS
_WHITE = (255, 255, 255)
# What torch.nn.functional.interpolate calls, for an output that is there already.
_bicubic = torch.ops.aten._upsample_bicubic2d_aa.out


class Window(NamedTuple):
    """A crop of an upright image, in pixels."""

    top: int
    left: int
    height: int
    width: int
    flip: bool  # mirror left to right after cropping


class Encoded(NamedTuple):
    """One image of a batch, before it is decoded."""

    data: bytes
    header: ImageHeader
    draws: NDArray[np.float64]  # its row of `crop_draws`


class DecodedBatch(NamedTuple):
    """What a decoder makes of a batch."""

    images_BCHW: Tensor  # uint8; on the CPU, or on the GPU that decoded it
    refused: dict[int, UnusableError]  # rows that no decoder took; their pixels are 0


def crop_draws(seed: int, ordinal_B: NDArray[np.int64]) -> NDArray[np.float64]:
    """All uniform draws that the crops of a batch may need, in one call: [B, 23]."""
    return uniform(seed, ordinal_B, Purpose.CROP, _DRAWS)


def crop_window(draws: NDArray[np.float64], height: int, width: int, image: schema.Image) -> Window:
    """torchvision's RandomResizedCrop as a pure function of one row of `crop_draws`.

    Ten attempts at an area share and a log-uniform aspect ratio; if none fits, the largest central crop whose
    aspect ratio is allowed. Unused draws cost nothing: which ones are used never shifts those of another sample.
    """
    values = draws.tolist()
    flip = image.flip and values[_FLIP] < 0.5
    (low_scale, high_scale), (low_ratio, high_ratio) = image.crop_scale, image.crop_ratio
    log_low, log_high = math.log(low_ratio), math.log(high_ratio)
    too_high, too_wide = (height + 1) ** 2, (width + 1) ** 2
    for attempt in range(_FIRST_ATTEMPT, _DRAWS, 2):
        area = height * width * (low_scale + values[attempt] * (high_scale - low_scale))
        ratio = math.exp(log_low + values[attempt + 1] * (log_high - log_low))
        if area * ratio > too_wide or area > too_high * ratio:  # most attempts, where the scale is near 1
            continue
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(values[_TOP] * (height - crop_height + 1))
            left = int(values[_LEFT] * (width - crop_width + 1))
            return Window(top, left, crop_height, crop_width, flip)
    crop_height, crop_width = height, width
    if width / height < low_ratio:
        crop_height = max(1, min(height, round(width / low_ratio)))
    elif width / height > high_ratio:
        crop_width = max(1, min(width, round(height * high_ratio)))
    return Window((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width, flip)


def train_pixels(
    data: bytes,
    header: ImageHeader,
    draws: NDArray[np.float64],
    image: schema.Image,
    out_CHW: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """A training view: uint8 [C, H, W], written to `out_CHW` where that is given, which saves a copy.

    Raises `UnusableError` (decode_failed).
    """
    pixels_HWC = decode_upright(data, header)
    top, left, height, width, flip = crop_window(draws, pixels_HWC.shape[0], pixels_HWC.shape[1], image)
    crop_HWC = pixels_HWC[top : top + height, left : left + width]
    if not flip:
        return resize(crop_HWC, image.size, image.size, out_CHW)
    mirrored_CHW = resize(crop_HWC, image.size, image.size)[:, :, ::-1]
    if out_CHW is None:
        return mirrored_CHW
    out_CHW[:] = mirrored_CHW
    return out_CHW


def heldout_pixels(data: bytes, header: ImageHeader, size: int) -> NDArray[np.uint8]:
    """The view for evaluation, as open_clip's: shorter side to `size`, then the centre: uint8 [C, H, W].

    Raises `UnusableError` (decode_failed).
    """
    pixels_HWC = decode_upright(data, header)
    height, width, _ = pixels_HWC.shape
    shorter = min(height, width)
    resized_CHW = resize(pixels_HWC, int(size * height / shorter), int(size * width / shorter))
    top, left = (round((side - size) / 2) for side in resized_CHW.shape[1:])
    return resized_CHW[:, top : top + size, left : left + size]


def resize(
    pixels_HWC: NDArray[np.uint8], height: int, width: int, out_CHW: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Bicubic with antialiasing, in integers: uint8 [C, height, width], in `out_CHW` (contiguous) where given."""
    if out_CHW is None:
        out_CHW = np.empty((3, height, width), dtype=np.uint8)
    if pixels_HWC.shape[:2] == (height, width):
        out_CHW[:] = pixels_HWC.transpose(2, 0, 1)
    else:
        pixels_1CHW = torch.from_numpy(np.ascontiguousarray(pixels_HWC).transpose(2, 0, 1)[None])
        _bicubic(pixels_1CHW, (height, width), False, out=torch.from_numpy(out_CHW[None]))
    return out_CHW


def decode_upright(data: bytes, header: ImageHeader) -> NDArray[np.uint8]:
    """RGB pixels, turned upright as EXIF says, transparent parts on white: uint8 [H, W, C].

    Raises `UnusableError` (decode_failed) whatever the decoders raise.
    """
    try:
        if header.format != "JPEG":
            return _decode_with_pillow(data, header.format)
        try:
            pixels_HWC = simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError:
            pixels_HWC = _decode_with_pillow(data, header.format)
        return turn_upright(pixels_HWC, header.orientation)
    except Exception as error:  # decoders raise whatever malformed bytes lead to; none of it may stop a run
        raise UnusableError(Cause.DECODE_FAILED, one_line(error)) from error


def turn_upright(pixels_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undoes an EXIF orientation (2 … 8; 1 is upright)."""
    if orientation >= 5:  # rows and columns are exchanged
        pixels_HWC = pixels_HWC.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels_HWC = pixels_HWC[::-1]
    if orientation in (2, 3, 6, 7):
        pixels_HWC = pixels_HWC[:, ::-1]
    return pixels_HWC


def _decode_with_pillow(data: bytes, image_format: str) -> NDArray[np.uint8]:
    with PIL.Image.open(io.BytesIO(data), formats=(image_format,)) as image:
        image.load()
        upright = image if image_format == "JPEG" else PIL.ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips instead of scaling
            grey_HW = (np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            return np.repeat(grey_HW[:, :, None], 3, axis=2)
        if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
            coloured = upright.convert("RGBA")
            canvas = PIL.Image.new("RGB", coloured.size, _WHITE)
            canvas.paste(coloured, mask=coloured.getchannel("A"))
            return np.array(canvas)
        return np.array(upright.convert("RGB"))  # np.asarray would be read-only
