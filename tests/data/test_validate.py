"""Cheap checks of image bytes: each cause, and nothing good refused."""

from __future__ import annotations

import io
import zlib

import numpy as np
import PIL.Image
import pytest
import simplejpeg
from data.making import jpeg, picture

from cmpt.data.validate import Cause, ImageHeader, UnusableError, examine_image, exif_orientation

LIMIT = 10_000
pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL")


def encoded(image_format: str, height: int = 24, width: int = 32, **options: object) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(picture(1, height, width)).save(file, image_format, **options)
    return file.getvalue()


def jpeg_with_size(height: int, width: int) -> bytes:
    data = bytearray(jpeg(1))
    frame = data.index(b"\xff\xc0") + 5
    data[frame : frame + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


def with_thumbnail(data: bytes) -> bytes:
    """An APP1 segment that holds another whole JPEG, end marker included."""
    body = b"Exif\0\0" + jpeg(2)
    return data[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + data[2:]


@pytest.mark.parametrize(
    ("data", "image_format"),
    [
        (jpeg(1), "JPEG"),
        (encoded("JPEG", progressive=True), "JPEG"),
        (with_thumbnail(jpeg(1)), "JPEG"),
        (jpeg(1) + b"trailing bytes", "JPEG"),
        (jpeg(1)[:2] + b"\xff\xff\xff" + jpeg(1)[2:], "JPEG"),  # fill bytes before a marker
        (encoded("PNG"), "PNG"),
        (encoded("WEBP"), "WEBP"),
        (encoded("WEBP", lossless=True), "WEBP"),
        (encoded("GIF"), "GIF"),
        (encoded("BMP"), "BMP"),
        (encoded("TIFF"), "TIFF"),
    ],
)
def test_good_images_pass_with_their_size(data, image_format) -> None:
    assert examine_image(data, LIMIT) == ImageHeader(image_format, height=24, width=32)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", Cause.EMPTY_IMAGE),
        (b"<!DOCTYPE html>", Cause.HTML_PAGE),
        (bytes(1000), Cause.UNKNOWN_SIGNATURE),
        (b"\xff\xd8", Cause.TRUNCATED_IMAGE),
        (jpeg(1)[:30], Cause.TRUNCATED_IMAGE),
        (jpeg(1)[:-2], Cause.TRUNCATED_IMAGE),
        (jpeg(1)[: len(jpeg(1)) * 2 // 3], Cause.TRUNCATED_IMAGE),
        (with_thumbnail(jpeg(1))[:-2], Cause.TRUNCATED_IMAGE),  # the thumbnail's end marker is not the image's
        (b"\xff\xd8\xff\xe0\0\1" + jpeg(1)[2:], Cause.BROKEN_HEADER),
        (b"\xff\xd8\xff\xda\0\2\xff\xd9", Cause.BROKEN_HEADER),  # a scan without a frame
        (jpeg_with_size(0, 32), Cause.ZERO_PIXELS),
        (jpeg_with_size(24, 0), Cause.ZERO_PIXELS),
        (jpeg_with_size(101, 100), Cause.TOO_MANY_PIXELS),
        (encoded("PNG", 101, 100), Cause.TOO_MANY_PIXELS),
        (encoded("PNG")[:-12], Cause.TRUNCATED_IMAGE),
        (encoded("PNG")[:20], Cause.BROKEN_HEADER),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 60, Cause.BROKEN_HEADER),
        (encoded("WEBP")[:-5], Cause.TRUNCATED_IMAGE),
        (b"RIFF\x20\0\0\0WEBPVP8 " + b"\xff" * 24, Cause.BROKEN_HEADER),
        (b"GIF89a", Cause.BROKEN_HEADER),
    ],
)
def test_bad_images_are_refused_with_their_cause(data, cause) -> None:
    with pytest.raises(UnusableError) as caught:
        examine_image(data, LIMIT)
    assert caught.value.cause is cause
    assert "\n" not in caught.value.detail and len(caught.value.detail) <= 200


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    bomb = bytearray(encoded("PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(UnusableError) as caught:
        examine_image(bytes(bomb), 10**8)
    assert caught.value.cause is Cause.TOO_MANY_PIXELS


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_what_pillow_wrote(orientation, byte_order) -> None:
    exif = PIL.Image.Exif()
    exif.endian = byte_order
    exif[0x010F] = "a camera"
    exif[0x0112] = orientation
    assert examine_image(encoded("JPEG", exif=exif), LIMIT).orientation == orientation


@pytest.mark.parametrize("tiff", [b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", b"garbage" * 9])
def test_malformed_exif_means_upright(tiff) -> None:
    assert exif_orientation(tiff) == 1


def test_random_damage_never_raises_anything_else() -> None:
    """Whatever the bytes, the answer is a header or a cause."""
    generator = np.random.default_rng(0)
    originals = [jpeg(1), encoded("PNG"), encoded("WEBP"), encoded("GIF"), encoded("TIFF"), encoded("BMP")]
    for trial in range(1200):
        data = bytearray(originals[trial % len(originals)])
        for place in generator.integers(0, min(len(data), 120), size=generator.integers(1, 9)):
            data[place] = generator.integers(256)
        try:
            assert isinstance(examine_image(bytes(data[: generator.integers(1, len(data) + 1)]), LIMIT), ImageHeader)
        except UnusableError as error:
            assert error.cause in Cause


def test_checking_a_jpeg_reads_no_pixels() -> None:
    """A header may promise far more than memory holds: only the limit decides."""
    assert examine_image(jpeg_with_size(65_000, 65_000), 2**33).height == 65_000
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(jpeg_with_size(0, 32))
