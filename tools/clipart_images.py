"""Pictures of the embedded clip art data set: squares on white, near-duplicates, JPEG in a byte budget.

Part of `prepare_clipart.py`; nothing here knows of captions or of the library's folders.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

IMAGE_SIZE_PIXELS = 128
MARGIN_PIXELS = 2
"""White border on each side of the drawing's longer axis."""
MIN_DRAWING_PIXELS = 24
"""Drawings whose longer side is smaller than this in the PNG are blank renderings or dots."""
MIN_INK_FRACTION = 0.004
"""Share of pixels that differ from white, below which a drawing counts as blank."""
MAX_ASPECT_RATIO = 10
FINGERPRINT_PIXELS = 32
QUANTIZER_STEPS = (6, 8, 11, 14, 18, 22, 27, 33, 40, 48, 58, 70, 84)
"""JPEG qualities, best first. One step for all frequencies instead of the standard's tables, which
suit photographs: on these drawings that gave 1.2 dB more at the same size."""
TAR_BLOCK_BYTES = 512

Pixels = np.ndarray
"""uint8 [height, width, 3], RGB."""


def on_white(picture: Image.Image) -> Image.Image:
    """The picture as RGB over white, reduced to about a thousand pixels if it is larger."""
    if picture.mode not in ("RGB", "RGBA", "L"):
        picture = picture.convert("RGBA")
    factor = max(picture.size) // 1024
    if factor > 1:
        picture = picture.reduce(factor)
    if picture.mode == "RGBA":
        background = Image.new("RGBA", picture.size, "white")
        background.alpha_composite(picture)
        picture = background
    return picture.convert("RGB")


def square_picture(picture: Image.Image) -> Pixels | None:
    """The drawing without its empty border, fitted into a white square.

    uint8 [128, 128, 3]; None for blank, tiny and very elongated drawings.
    """
    picture = on_white(picture)
    ink = np.asarray(picture).min(axis=2) < 245
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if len(rows) == 0:
        return None
    height, width = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
    long_side = max(width, height)
    if long_side < MIN_DRAWING_PIXELS or long_side > MAX_ASPECT_RATIO * min(width, height):
        return None
    left, top = int(columns[0]), int(rows[0])
    drawing = picture.crop((left, top, left + width, top + height))
    scale = (IMAGE_SIZE_PIXELS - 2 * MARGIN_PIXELS) / long_side
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    drawing = drawing.resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (IMAGE_SIZE_PIXELS, IMAGE_SIZE_PIXELS), "white")
    square.paste(drawing, ((IMAGE_SIZE_PIXELS - size[0]) // 2, (IMAGE_SIZE_PIXELS - size[1]) // 2))
    pixels = np.asarray(square)
    return pixels if (pixels.min(axis=2) < 245).mean() >= MIN_INK_FRACTION else None


def fingerprints(pictures: Sequence[Pixels]) -> np.ndarray:
    """float64 [pictures, 32 * 32 * 3]: ink (255 minus the value) summed over cells of 4 x 4 pixels.

    The values are whole numbers so small that dot products in float64 are exact, whatever the
    order in which a machine adds them up.
    """
    cell = IMAGE_SIZE_PIXELS // FINGERPRINT_PIXELS
    shape = (len(pictures), FINGERPRINT_PIXELS, cell, FINGERPRINT_PIXELS, cell, 3)
    sums = (255 - np.stack(pictures)).reshape(shape).sum(axis=(2, 4), dtype=np.int32)
    return sums.reshape(len(pictures), -1).astype(np.float64)


def distances(rows_RF: np.ndarray, columns_CF: np.ndarray) -> np.ndarray:
    """Distance of each pair of fingerprints, relative to the greater ink of the two: [R, C].

    0 for equal pictures. Dividing by the ink is what lets thin drawings, of which most of the
    square is white, differ as much as full ones do.
    """
    row_energy = (rows_RF * rows_RF).sum(axis=1)[:, None]
    column_energy = (columns_CF * columns_CF).sum(axis=1)[None, :]
    squared = row_energy + column_energy - 2 * (rows_RF @ columns_CF.T)
    return np.sqrt(squared / np.maximum(np.maximum(row_energy, column_energy), 1))


def near_duplicates(prints_NF: np.ndarray, groups: Sequence[str], limit: float, group_limit: float) -> list[bool]:
    """For each picture whether it repeats an earlier one that stays.

    Two pictures repeat each other up to the distance `limit`, two of the same group (the same
    caption, say) up to `group_limit`.
    """
    repeated = [False] * len(prints_NF)
    for start in range(0, len(prints_NF), 512):
        block = distances(prints_NF[start : start + 512], prints_NF)
        for row, index in enumerate(range(start, start + len(block))):
            repeated[index] = any(
                not repeated[other] and block[row, other] <= (group_limit if groups[index] == groups[other] else limit)
                for other in np.flatnonzero(block[row, :index] <= max(limit, group_limit)).tolist()
            )
    return repeated


def encode_candidates(pixels: Pixels) -> list[tuple[int, bytes]]:
    """(summed squared error, baseline JPEG) for each step, 4:2:0, with its own Huffman tables."""
    candidates = []
    for step in QUANTIZER_STEPS:
        buffer = io.BytesIO()
        tables = [[step] * 64, [step] * 64]
        Image.fromarray(pixels).save(buffer, "JPEG", qtables=tables, subsampling=2, optimize=True, progressive=False)
        with Image.open(buffer) as decoded:
            error = np.asarray(decoded.convert("RGB"), dtype=np.int64) - pixels
        candidates.append((int((error * error).sum()), buffer.getvalue()))
    return candidates


def tar_blocks(length_bytes: int) -> int:
    """How many blocks of 512 bytes a tar archive spends on so many bytes of data."""
    return -(-length_bytes // TAR_BLOCK_BYTES)


def choose_jpegs(candidates: list[list[tuple[int, bytes]]], limit_bytes: int) -> list[bytes]:
    """One JPEG per picture: least total error for at most `limit_bytes` in tar blocks of 512.

    A fixed price per block, found by bisection, decides between a picture's qualities (Lagrangian
    rate-distortion), so simple drawings stay crisp and busy ones take the loss. Raises ValueError
    if even the lowest quality does not fit.
    """

    def at_price(price: float) -> list[bytes]:
        return [
            min(options, key=lambda option: option[0] + price * tar_blocks(len(option[1])))[1] for options in candidates
        ]

    def size(chosen: list[bytes]) -> int:
        return sum(tar_blocks(len(jpeg)) for jpeg in chosen) * TAR_BLOCK_BYTES

    low, high = 0.0, 1e9
    if size(at_price(high)) > limit_bytes:
        raise ValueError(f"JPEGs: {size(at_price(high))} bytes at least, limit {limit_bytes}")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if size(at_price(middle)) <= limit_bytes else (middle, high)
    return at_price(high)
