"""What makes a sample unusable, and the cheap checks that find out before its place in the order is fixed.

The causes are a public vocabulary: they stand in events.jsonl and in the counts of every report.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass
from enum import StrEnum

import PIL.Image


class DataError(ValueError):
    """The data as a whole cannot be used: a broken shard, or a stream in which every sample is rejected."""


class Cause(StrEnum):
    """Why a sample, or what of a shard, was not used; the next sample of the stream takes the place of one left out."""

    MISSING_IMAGE = "missing_image"  # no member with one of data.image_extensions
    MISSING_CAPTION = "missing_caption"  # no member with data.caption_extension
    LINKED_MEMBER = "linked_member"  # the image or the caption is a link in the tar, which holds no bytes of it
    DUPLICATE_KEY = "duplicate_key"  # an earlier sample of the shard has the same key
    EMPTY_IMAGE = "empty_image"  # a member of 0 bytes
    TOO_MANY_BYTES = "too_many_bytes"  # an image of more than data.max_image_bytes, a JSON of more than 16 MiB
    HTML_PAGE = "html_page"  # an error page under the name of an image
    UNKNOWN_SIGNATURE = "unknown_signature"  # the first bytes are no image format that cmpt reads
    TRUNCATED_IMAGE = "truncated_image"  # the format's end mark is not there
    BROKEN_HEADER = "broken_header"  # the right signature, but no readable size
    ZERO_PIXELS = "zero_pixels"  # the header states a width or height of 0
    TOO_SMALL = "too_small"  # a side below data.min_image_side
    TOO_MANY_PIXELS = "too_many_pixels"  # more than data.max_image_pixels
    CAPTION_NOT_UTF8 = "caption_not_utf8"  # bytes that are not UTF-8, or JSON escapes that name no character
    CAPTION_BROKEN_JSON = "caption_broken_json"
    CAPTION_MISSING_FIELD = "caption_missing_field"  # no data.caption_field in the JSON object
    CAPTION_WRONG_TYPE = "caption_wrong_type"  # the field is neither a string nor a list of strings
    EMPTY_CAPTION = "empty_caption"  # nothing but white space, or an empty list
    CAPTION_WITHOUT_WORDS = "caption_without_words"  # neither a letter nor a digit of any script: emoji, punctuation
    CAPTION_TOO_LONG = "caption_too_long"  # more than data.max_caption_characters
    DECODE_FAILED = "decode_failed"  # passed all checks, refused by the decoder: a hole, the slot stays
    EMPTY_SHARD = "empty_shard"  # a shard of no bytes or no samples; this and the next two are counted once a run
    TRUNCATED_SHARD = "truncated_shard"  # cut short: what comes before the cut is used
    DAMAGED_SHARD = "damaged_shard"  # no tar, or a damaged header: what comes before it is used
    UNREACHABLE_SHARD = "unreachable_shard"  # cannot be read or fetched: counts every sample that is left out


class UnusableError(Exception):
    """This one sample cannot be used."""

    def __init__(self, cause: Cause, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else str(cause))
        self.cause = cause
        self.detail = detail


@dataclass(frozen=True)
class ImageHeader:
    """What the first bytes promise; height and width are those of the stored pixels, before EXIF rotation."""

    format: str  # Pillow's name: "JPEG", "PNG", ...
    height: int
    width: int
    orientation: int = 1  # EXIF orientation 1 … 8, read here for JPEG only


_START_OF_IMAGE, _END_OF_IMAGE = b"\xff\xd8", b"\xff\xd9"
_START_OF_SCAN, _APP1 = 0xDA, 0xE1
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # these three are tables, not frames
_WITHOUT_LENGTH = frozenset(range(0xD0, 0xD8)) | {0x01}
_EXIF_ORIENTATION_TAG = 0x0112
_PILLOW_FORMATS = ("PNG", "WEBP", "GIF", "BMP", "TIFF")
_PAGE_STARTS = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")
_MAX_DETAIL_CHARACTERS = 200

# Pillow warns about odd metadata of single files, each in new words: in a crawl that is a line every few seconds. What
# cannot be used is counted by cause, what is too large is data.max_image_pixels' to say.
warnings.filterwarnings("ignore", module=r"PIL\.")


def examine_image(data: bytes, max_pixels: int, min_side: int = 1) -> ImageHeader:
    """Checks the bytes without decoding them; costs microseconds for JPEG.

    Raises `UnusableError` with the cause.
    """
    if not data:
        raise UnusableError(Cause.EMPTY_IMAGE)
    header = _examine_jpeg(data) if data.startswith(_START_OF_IMAGE) else _examine_other(data)
    if header.height == 0 or header.width == 0:
        raise UnusableError(Cause.ZERO_PIXELS, f"{header.width} x {header.height}")
    if min(header.height, header.width) < min_side:
        raise UnusableError(
            Cause.TOO_SMALL, f"{header.width} x {header.height}, a side below data.min_image_side {min_side}"
        )
    if header.height * header.width > max_pixels:
        raise UnusableError(
            Cause.TOO_MANY_PIXELS, f"{header.width} x {header.height} exceeds data.max_image_pixels {max_pixels}"
        )
    return header


def _examine_jpeg(data: bytes) -> ImageHeader:
    """Walks the marker segments up to the first scan (ITU-T T.81, annex B)."""
    position, size, orientation = 2, None, 1
    while True:
        position = data.find(b"\xff", position)
        if position < 0 or position + 4 > len(data):
            raise UnusableError(Cause.TRUNCATED_IMAGE, "ends before the first scan")
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker in _WITHOUT_LENGTH:
            position += 2
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if length < 2:
            raise UnusableError(Cause.BROKEN_HEADER, f"segment {marker:#x} of length {length}")
        body = position + 4
        if marker in _START_OF_FRAME:
            if length < 8 or body + 5 > len(data):
                raise UnusableError(Cause.BROKEN_HEADER, "frame header too short")
            size = struct.unpack_from(">HH", data, body + 1)
        elif marker == _APP1 and data.startswith(b"Exif\0\0", body):
            orientation = exif_orientation(data[body + 6 : position + 2 + length])
        elif marker == _START_OF_SCAN:
            break
        position += 2 + length
    if size is None:
        raise UnusableError(Cause.BROKEN_HEADER, "a scan without a frame header")
    # An end mark before the scan belongs to an embedded thumbnail; inside a scan the two bytes cannot occur.
    if data.rfind(_END_OF_IMAGE) < position:
        raise UnusableError(Cause.TRUNCATED_IMAGE, "no end-of-image marker")
    return ImageHeader("JPEG", height=size[0], width=size[1], orientation=orientation)


def exif_orientation(tiff: bytes) -> int:
    """The orientation tag of the first directory of an EXIF block; 1 (upright) where absent or malformed."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(entries):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * entry)
            if tag == _EXIF_ORIENTATION_TAG:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


def _examine_other(data: bytes) -> ImageHeader:
    """PNG, WebP, GIF, BMP and TIFF: Pillow reads the header, lazily."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise UnusableError(Cause.TRUNCATED_IMAGE, "shorter than its RIFF header states")
    try:
        with PIL.Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            name, (width, height) = image.format or "", image.size
    except PIL.UnidentifiedImageError as error:
        if _has_known_signature(data):
            raise UnusableError(Cause.BROKEN_HEADER, "the right signature, but no image behind it") from error
        cause = Cause.HTML_PAGE if data[:512].lstrip().lower().startswith(_PAGE_STARTS) else Cause.UNKNOWN_SIGNATURE
        raise UnusableError(cause, f"first bytes {data[:12]!r}") from error
    except PIL.Image.DecompressionBombError as error:
        raise UnusableError(Cause.TOO_MANY_PIXELS, one_line(error)) from error
    except Exception as error:  # Pillow's plugins raise whatever a malformed field leads to
        raise UnusableError(Cause.BROKEN_HEADER, one_line(error)) from error
    if name == "PNG" and data.rfind(b"IEND") < 0:
        raise UnusableError(Cause.TRUNCATED_IMAGE, "no IEND chunk")
    return ImageHeader(name, height=height, width=width)


def _has_known_signature(data: bytes) -> bool:
    starts = (b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*")
    return data.startswith(starts) or (data.startswith(b"RIFF") and data[8:12] == b"WEBP")


def one_line(error: Exception) -> str:
    """An exception as one short line for a `Rejection`."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_DETAIL_CHARACTERS]
