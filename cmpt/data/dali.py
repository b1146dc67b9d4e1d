"""The decode contract of decode.py with NVIDIA DALI: on the GPU, or in DALI's CPU mode, which runs the same graph.

The graph: encoded bytes -> whole picture -> crop window -> cubic resize with antialiasing -> mirrored -> [3, S, S].
Order and randomness are ours: the bytes and the windows (`crop_window`) come in with every batch.

Why the picture is decoded whole, not by DALI's region-of-interest decoder (`fn.decoders.image_slice`): on nvImageCodec
0.9, which DALI 2.4 needs, that one is reported to refuse ordinary JPEG on A100 and to end the process with SIGSEGV on
H100 and B200 (github.com/NVIDIA/nvImageCodec/issues/55); and the crops of pre-training keep most of a picture anyway.

EXIF orientations are undone here, from `ImageHeader.orientation`, so that both backends read them alike and nothing
depends on which of DALI's decoders takes a picture: the window is turned into the stored picture, and the crop is
mirrored (and, for 5 … 8, its rows and columns exchanged) after resizing.

The CPU path (`train_pixels`) decodes, and its rows are copied into the batch:
- what is not JPEG: DALI has no GPU decoder for it, drops transparency (here it is white), reads no GIF, and rounds 16
  bits where the CPU path cuts them;
- JPEG with four components (CMYK differs by 1 in every pixel), stored as RGB, of 12 bits, lossless or arithmetically
  coded: rare kinds of which it is not known what each GPU decoder makes of them;
- JPEG with stray bytes between its segments (`_for_dali` says why);
- JPEG of more than 33 million pixels, which would take 100 MB and more of GPU memory each;
- what DALI refuses. One such picture fails its whole batch and invalidates the pipeline: the pipeline is built anew,
  the culprits are found by decoding the rows one at a time, and everything that was begun is fed again.

Streams: DALI works on streams of its own. Ending a batch waits for it on the host, in the thread that ends it (the
loader's producer, without the GIL; the step never waits), copies it on a stream of this object and waits for that. So
a returned batch is complete and may be read on any stream; its memory is kept from reuse until what the device's
default stream has queued is done. A consumer on another stream calls `record_stream`, as for any tensor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmpt.data.decode import DecodedBatch, Encoded, Window, crop_window, train_pixels
from cmpt.data.validate import DataError, ImageHeader, UnusableError, one_line
from cmpt.recipe import schema

_MAX_PIXELS = 1 << 25
_MAX_SAID_CHARACTERS = 200


def dali_installed() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


class _Feed(NamedTuple):
    """What the graph gets for one row."""

    data: NDArray[np.uint8]  # the encoded bytes
    window: Window  # in the stored picture, whose rows and columns are as the file has them; `flip` is not used
    mirror: tuple[int, int]  # left to right, top to bottom; after cropping
    transpose: bool  # exchange rows and columns, after mirroring: outside the graph


# Stands in for a row that the CPU path decodes, so that a batch of DALI's has a row for every row.
_BLANK = _Feed(
    np.frombuffer(simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8)), np.uint8),
    Window(0, 0, 8, 8, flip=False),
    mirror=(0, 0),
    transpose=False,
)


class DaliDecoder:
    """Decodes batches; up to `in_flight` of them are begun and not ended. To be used by one thread.

    `rebuilds` counts the pipelines that a refused picture has cost.
    """

    def __init__(
        self, image: schema.Image, batch_size: int, decode: schema.Decode, device: torch.device, in_flight: int = 2
    ) -> None:
        """`batch_size`: most rows of a batch. `device`: a GPU, where the pixels stay, or the CPU.

        Raises DataError where DALI cannot be used.
        """
        if not dali_installed():
            raise DataError("decode.backend = dali: needs nvidia-dali-cuda130, which is not installed")
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise DataError(f"decode.backend = dali: nvidia.dali cannot be imported: {one_line(error)}") from error
        self._image, self._batch_size, self._decode, self._in_flight = image, batch_size, decode, in_flight
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            self._stream = torch.cuda.Stream(self._device)
        self._begun: deque[_Batch] = deque()
        self.rebuilds = 0
        self._pipeline: Any = self._build(batch_size, in_flight)

    def begin(self, encoded: Sequence[Encoded], fallback: Executor) -> Callable[[], DecodedBatch]:
        """Starts on a batch; the returned call waits for its pixels. Batches are ended in the order they were begun.

        `fallback`: threads for the rows that the CPU path decodes. The returned call raises RuntimeError where DALI
        fails and no row is at fault: no memory, a GPU that is lost.
        """
        assert len(encoded) <= self._batch_size and len(self._begun) < self._in_flight
        batch = _Batch(encoded, self._image, fallback)
        self._begun.append(batch)
        self._start(self._pipeline, batch.feeds)
        return partial(self._end, batch)

    def close(self) -> None:
        """Ends DALI's threads; batches that were begun are dropped."""
        self._begun.clear()
        self._pipeline = None

    def _build(self, batch_size: int, depth: int, threads: int | None = None) -> Any:
        """A pipeline that holds `depth` batches."""
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self._stream is not None
        pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=threads or self._decode.threads,
            device_id=self._device.index if on_gpu else None,
            prefetch_queue_depth=depth,
        )
        with pipeline:
            data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
            start, shape, mirror = (
                fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("start", "shape", "mirror")
            )
            whole = fn.decoders.image(
                data,
                device="mixed" if on_gpu else "cpu",
                adjust_orientation=False,
                hw_decoder_load=self._decode.hardware_share,
                jpeg_fancy_upsampling=True,  # chroma as libjpeg-turbo, the CPU's decoder, interpolates it
                affine=False,  # the processes of a host would pin their threads to the same cores
            )
            crop = fn.slice(whole, start=start, shape=shape, axes=[0, 1])
            size = [self._image.size, self._image.size]
            resized = fn.resize(crop, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
            mirrored = fn.flip(resized, horizontal=mirror[0], vertical=mirror[1])
            pipeline.set_outputs(fn.transpose(mirrored, perm=[2, 0, 1]))
        pipeline.build()
        for _ in range(depth):
            self._feed(pipeline, [_BLANK])
        pipeline.schedule_run()  # the first call runs as many batches as the queue holds, every later one a single one
        for _ in range(depth):
            pipeline.share_outputs()
            pipeline.release_outputs()
        return pipeline

    @staticmethod
    def _feed(pipeline: Any, feeds: Sequence[_Feed]) -> None:
        windows = [feed.window for feed in feeds]
        pipeline.feed_input("data", [feed.data for feed in feeds])
        pipeline.feed_input("start", np.array([(window.top, window.left) for window in windows], np.int32))
        pipeline.feed_input("shape", np.array([(window.height, window.width) for window in windows], np.int32))
        pipeline.feed_input("mirror", np.array([feed.mirror for feed in feeds], np.int32))

    def _start(self, pipeline: Any, feeds: Sequence[_Feed]) -> None:
        if any(feed is not _BLANK for feed in feeds):
            self._feed(pipeline, feeds)
            pipeline.schedule_run()

    def _end(self, batch: _Batch) -> DecodedBatch:
        assert batch is self._begun[0], "batches are ended in the order they were begun"
        with self._on_stream():
            images_BCHW = self._dali_pixels(batch)
            self._begun.popleft()
            turned = [b for b, feed in enumerate(batch.feeds) if feed.transpose]
            if turned:
                images_BCHW[turned] = images_BCHW[turned].transpose(2, 3)
            refused: dict[int, UnusableError] = {}
            found: list[NDArray[np.uint8]] = []
            for b, task in batch.by_cpu.items():
                try:
                    found.append(task.result())
                except UnusableError as error:
                    refused[b] = batch.refusal(b, error)
                    found.append(np.zeros(images_BCHW.shape[1:], np.uint8))
            if found:
                images_BCHW[list(batch.by_cpu)] = torch.from_numpy(np.stack(found)).to(self._device)
        if self._stream is not None:
            self._stream.synchronize()
            images_BCHW.record_stream(torch.cuda.default_stream(self._device))
        return DecodedBatch(images_BCHW, refused)

    def _on_stream(self) -> AbstractContextManager[None]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def _dali_pixels(self, batch: _Batch) -> Tensor:
        """The batch as DALI decodes it: uint8 [B, 3, S, S]; rows of the CPU path are left for others to fill."""
        searched = False
        while not batch.is_blank:
            try:
                return self._wait(self._pipeline)
            except RuntimeError:
                if searched:  # every row for itself is taken, the batch is not: that is no fault of the data
                    raise
            # Not in the handler: while the error lives, its traceback keeps the pipeline and its memory.
            searched = True
            self.rebuilds += 1
            self._pipeline = None
            for b, said in self._refused_alone(batch).items():
                batch.give_to_cpu(b, said)
            self._pipeline = self._build(self._batch_size, self._in_flight)
            for begun in self._begun:
                self._start(self._pipeline, begun.feeds)
        size = self._image.size
        return torch.empty((len(batch.feeds), 3, size, size), dtype=torch.uint8, device=self._device)

    def _wait(self, pipeline: Any) -> Tensor:
        """The oldest batch that `pipeline` works on, copied out of DALI's memory: uint8 [B, 3, S, S].

        Raises RuntimeError for a row that DALI refuses.
        """
        from nvidia.dali.plugin.pytorch import feed_ndarray

        (pixels,) = pipeline.share_outputs()  # without a stream of ours: complete when it returns
        dense = pixels.as_tensor()
        images_BCHW = torch.empty(tuple(dense.shape()), dtype=torch.uint8, device=self._device)
        feed_ndarray(dense, images_BCHW, cuda_stream=self._stream)
        if self._stream is not None:
            self._stream.synchronize()
        pipeline.release_outputs()
        return images_BCHW

    def _refused_alone(self, batch: _Batch) -> dict[int, str]:
        """The rows that DALI refuses when each comes alone, and what it says; costs a pipeline each."""
        said: dict[int, str] = {}
        pipeline: Any = None
        for b, feed in enumerate(batch.feeds):
            if feed is _BLANK:
                continue
            pipeline = pipeline or self._build(1, 1, threads=1)
            try:
                self._start(pipeline, [feed])
                self._wait(pipeline)
            except RuntimeError as error:
                said[b], pipeline = _said(error), None
        return said


class _Batch:
    """A batch that was begun: which rows go to DALI, how, and which to the CPU path."""

    def __init__(self, encoded: Sequence[Encoded], image: schema.Image, fallback: Executor) -> None:
        self._encoded, self._image, self._fallback = encoded, image, fallback
        self._said: dict[int, str] = {}
        self.by_cpu: dict[int, Future[NDArray[np.uint8]]] = {}
        self.feeds = [_feed_of(item, image) for item in encoded]
        for b, feed in enumerate(self.feeds):
            if feed is _BLANK:
                self.give_to_cpu(b)

    @property
    def is_blank(self) -> bool:
        """Whether nothing is left for DALI."""
        return all(feed is _BLANK for feed in self.feeds)

    def give_to_cpu(self, b: int, said: str = "") -> None:
        """`said`: what DALI had to say about the row."""
        self.feeds[b] = _BLANK
        if said:
            self._said[b] = said
        self.by_cpu[b] = self._fallback.submit(train_pixels, *self._encoded[b], self._image)

    def refusal(self, b: int, error: UnusableError) -> UnusableError:
        """The CPU path's refusal of a row, with DALI's words where it had the row before."""
        if b not in self._said:
            return error
        return UnusableError(error.cause, f"{error.detail}; DALI: {self._said[b]}")


def _feed_of(encoded: Encoded, image: schema.Image) -> _Feed:
    """The window of the upright picture as one of the stored picture, and what turns the crop upright: the reverse of
    `turn_upright`, which exchanges, then turns rows and columns backwards. `_BLANK` for a row of the CPU path.
    """
    header = encoded.header
    jpeg = _for_dali(encoded.data, header)
    if jpeg is None:
        return _BLANK
    data = np.frombuffer(jpeg, np.uint8)
    height, width, exchanged = header.height, header.width, header.orientation >= 5
    if exchanged:
        height, width = width, height
    window = crop_window(encoded.draws, height, width, image)
    top, left, crop_height, crop_width, flip = window
    rows_backwards, columns_backwards = header.orientation in (3, 4, 7, 8), header.orientation in (2, 3, 6, 7)
    if rows_backwards:
        top = height - top - crop_height
    if columns_backwards:
        left = width - left - crop_width
    columns_backwards ^= flip
    if exchanged:
        stored = Window(left, top, crop_width, crop_height, flip=False)
        return _Feed(data, stored, (int(rows_backwards), int(columns_backwards)), transpose=True)
    stored = Window(top, left, crop_height, crop_width, flip=False)
    return _Feed(data, stored, (int(columns_backwards), int(rows_backwards)), transpose=False)


_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_START_OF_SCAN, _APP1, _APP14 = 0xDA, 0xE1, 0xEE
# Huffman and quantisation tables, restart interval, application data, comment.
_OTHER_SEGMENTS = frozenset((0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)))


def _for_dali(data: bytes, header: ImageHeader) -> bytes | None:
    """An everyday JPEG without its APP1 segments; null for what the CPU path decodes.

    Everyday: Huffman-coded, 8 bits, grey or YCbCr, not huge, and segments that follow each other without a gap up to
    the scan. Where nvImageCodec's parser, unlike a decoder, refuses one picture of a batch, DALI 2.4 was seen to end
    the process with SIGSEGV (its source gives up the batch's tables while other threads still fill them). APP1 (EXIF,
    XMP) is parsed there too, and of no use, as the orientation is known.
    """
    if header.format != "JPEG" or header.height * header.width > _MAX_PIXELS:
        return None
    kept: list[bytes] = []
    position, ids, kept_to = 2, b"", 0
    while len(start := data[position : position + 4]) == 4 and start[0] == 0xFF:
        marker, length, body = start[1], int.from_bytes(start[2:]), position + 4
        if marker == _START_OF_SCAN:
            everyday = len(ids) == 1 or (len(ids) == 3 and ids != b"RGB")
            return b"".join([*kept, data[kept_to:]]) if everyday else None
        if marker in _HUFFMAN_FRAMES and not ids and data[body : body + 1] == b"\x08":
            ids = data[body + 6 : body + 6 + 3 * int.from_bytes(data[body + 5 : body + 6]) : 3]
        elif marker not in _OTHER_SEGMENTS or length < 2:
            return None
        elif marker == _APP14 and data.startswith(b"Adobe", body) and data[body + 11 : body + 12] == b"\0":
            return None  # stored as RGB or CMYK
        elif marker == _APP1:
            kept.append(data[kept_to:position])
            kept_to = position + 2 + length
        position += 2 + length
    return None


def _said(error: Exception) -> str:
    """DALI's own words, without the traceback of the graph that it puts around them."""
    words = str(error).rpartition("encountered:")[2].partition("Current pipeline object")[0].partition("C++ context")[0]
    return " ".join(words.split()).rstrip(" :")[:_MAX_SAID_CHARACTERS]
