"""Which decoder a run uses, and the CPU's: batches of encoded images to uint8 pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Protocol

import torch

from cmpt.data.dali import DaliDecoder, dali_installed
from cmpt.data.decode import DecodedBatch, Encoded, train_pixels
from cmpt.data.places import Places
from cmpt.data.validate import UnusableError
from cmpt.recipe import schema

_CHUNK = 8  # rows per task at most: a task costs about 30 µs, a small image 200 µs


class Decoder(Protocol):
    """Training views of whole batches; the same crop windows whatever the backend."""

    def begin(self, encoded: Sequence[Encoded], pool: Executor) -> Callable[[], DecodedBatch]:
        """Starts on a batch, with the pool's threads where it wants some; the returned call waits for the pixels."""
        ...

    def close(self) -> None: ...


class CpuDecoder:
    """simplejpeg or Pillow, and torch's resize, in the threads of the pool (decode.py)."""

    def __init__(self, image: schema.Image, workers: int, pinned: bool, places: Places) -> None:
        """`pinned`: into page-locked memory, from which CUDA copies beside the step."""
        self._image, self._workers, self._pinned, self._places = image, workers, pinned, places

    def begin(self, encoded: Sequence[Encoded], pool: Executor) -> Callable[[], DecodedBatch]:
        count, size = len(encoded), self._image.size
        images_BCHW = torch.empty((count, 3, size, size), dtype=torch.uint8, pin_memory=self._pinned)
        pixels_BCHW = images_BCHW.numpy()
        refused: dict[int, UnusableError] = {}

        def decode(rows: range) -> None:
            with self._places.at("decoding"):
                for b in rows:
                    data, header, draws = encoded[b]
                    try:
                        train_pixels(data, header, draws, self._image, pixels_BCHW[b])
                    except UnusableError as error:
                        pixels_BCHW[b] = 0
                        refused[b] = error

        chunk = max(1, min(_CHUNK, count // (2 * self._workers)))
        chunks = [range(start, min(start + chunk, count)) for start in range(0, count, chunk)]
        tasks = [pool.submit(decode, rows) for rows in chunks]

        def finish() -> DecodedBatch:
            for task in tasks:
                task.result()
            return DecodedBatch(images_BCHW, refused)

        return finish

    def close(self) -> None:
        """Nothing is held."""


def open_decoder(
    decode: schema.Decode,
    image: schema.Image,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    places: Places,
) -> Decoder:
    """The decoder that `decode.backend` means on this device. Raises DataError where it is not installed."""
    dali = decode.backend == "dali" or (decode.backend == "auto" and device.type == "cuda" and dali_installed())
    if dali:
        return DaliDecoder(image, batch_size, decode, device)
    return CpuDecoder(image, workers, device.type == "cuda", places)
