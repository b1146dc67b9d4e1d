"""Samples and shards, made in the test that reads them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg

from cmpt.batch import ImageTextBatch
from cmpt.data.loader import Loader
from cmpt.data.streams import LoaderState

Sample = tuple[str, dict[str, bytes]]


def picture(number: int, height: int = 24, width: int = 32) -> np.ndarray:
    """A smooth picture that differs from number to number: uint8 [H, W, C]."""
    rows, columns = np.mgrid[:height, :width]
    red = 127 + 120 * np.sin(rows / 9 + number)
    green = 127 + 120 * np.cos(columns / 7 - 2 * number)
    blue = np.broadcast_to(37 * number % 251, (height, width))
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def jpeg(number: int, height: int = 24, width: int = 32) -> bytes:
    return simplejpeg.encode_jpeg(picture(number, height, width), quality=92)


def undecodable_jpeg(number: int) -> bytes:
    """Passes every check of the bytes; both decoders refuse its Huffman tables."""
    data = bytearray(jpeg(number))
    table = data.index(b"\xff\xc4") + 5
    data[table : table + 16] = b"\xff" * 16
    return bytes(data)


def text_sample(number: int, key: str | None = None) -> Sample:
    return key or f"{number:06d}", {"jpg": jpeg(number), "txt": f"picture number {number}".encode()}


def write_tar(path: Path, samples: Sequence[Sample], archive_format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=archive_format) as archive:
        for key, members in samples:
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def json_sample(number: int, captions: object, **fields: object) -> Sample:
    content = json.dumps({"captions": captions, **fields}).encode()
    return f"{number:06d}", {"jpg": jpeg(number), "json": content}


def take(loader: Loader, count: int, state: LoaderState | None = None) -> list[tuple[ImageTextBatch, LoaderState]]:
    """The next `count` (batch, state) pairs; the loader's threads have ended when this returns."""
    batches = loader.batches(state or loader.initial_state())
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()
