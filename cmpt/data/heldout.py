"""Held-out pairs for the evaluation during a run: every usable one exactly once over the ranks."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmpt.batch import Rejection
from cmpt.data.decode import heldout_pixels
from cmpt.data.reader import ShardReader
from cmpt.data.samples import Sample, read_sample, sample_key
from cmpt.data.shards import Ranks, open_shards
from cmpt.data.validate import DataError, UnusableError
from cmpt.recipe import schema

_OPEN_SHARDS = 16


@dataclass(frozen=True)
class HeldoutBatch:
    """Some held-out pairs; B may differ from batch to batch."""

    images_BCHW: Tensor  # uint8
    captions: list[str]  # the first caption of every image
    all_captions: list[list[str]]
    categories: list[str | None]  # None where data.category_field is null or the sample has none
    indices_B: Tensor  # int64; place in the set, 0 … len(set)-1
    rejections: list[Rejection] = field(default_factory=list)  # refused by the decoder, left out of this batch


@dataclass(frozen=True)
class _View:
    """One pair decoded, or refused by the decoder."""

    index: int
    sample: Sample
    pixels_CHW: NDArray[np.uint8] | None
    rejection: Rejection | None


class HeldoutSet:
    """All held-out pairs that pass the checks.

    Reads and checks every sample once at the start, on every rank alike, so `len` and `rejections` agree everywhere.
    """

    def __init__(self, urls: Sequence[str], data: schema.Data, image: schema.Image, ranks: Ranks | None = None) -> None:
        """`ranks`: the processes that make the same set at the same time.

        Raises `DataError` where no sample can be used, FetchError where a shard that was indexed cannot be had.
        """
        self._data, self._image = data, image
        self._shards = shards = open_shards(urls, data, "data.heldout", ranks or Ranks())
        self._reader = ShardReader(_OPEN_SHARDS, data)
        places = [(unit, member) for unit, shard in enumerate(shards) for member in range(shard.count)]
        with ThreadPoolExecutor(data.workers, thread_name_prefix="cmpt-heldout") as pool:
            faults = list(pool.map(self._fault, places))
        broken = [Rejection(shard.fault.cause, shard.name, shard.fault.detail) for shard in shards if shard.fault]
        self.rejections = broken + [fault for fault in faults if fault is not None]
        """Samples left out because a check failed, and shards of which something could not be read."""
        self._places = [place for place, fault in zip(places, faults, strict=True) if fault is None]
        if not self._places:
            raise DataError(f"data.heldout: none of {len(places)} samples can be used, first: {self.rejections[:3]}")

    def __len__(self) -> int:
        return len(self._places)

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """One image as the evaluation sees it: uint8 [3, size, size]. Raises UnusableError if the decoder refuses."""
        sample = self._read(self._places[index])
        return heldout_pixels(sample.image, sample.header, self._image.size)

    def image_file(self, index: int) -> io.BytesIO:
        """The bytes of one image as they are stored."""
        return io.BytesIO(self._read(self._places[index]).image)

    def batches(self, rank: int, world_size: int, batch_size: int) -> Iterator[HeldoutBatch]:
        """This rank's share in batches of at most `batch_size`, decoded one batch ahead.

        Every rank yields the same number of batches, and their sizes differ by one at most, so forward passes that
        communicate stay in step. A batch is empty only if there are fewer pairs than ranks, if `batch_size` is 1 and
        the ranks do not divide the pairs, or if the decoder refuses all of it.
        """
        rounds = -(-len(self) // (world_size * batch_size))
        parts = rounds * world_size
        pool = ThreadPoolExecutor(self._data.workers, thread_name_prefix="cmpt-heldout")
        try:
            decoding: list[Future[_View]] | None = None
            for part in range(rank, parts, world_size):
                indices = range(part * len(self) // parts, (part + 1) * len(self) // parts)
                upcoming = [pool.submit(self._view, index) for index in indices]
                if decoding is not None:
                    yield self._assemble(decoding)
                decoding = upcoming
            if decoding is not None:
                yield self._assemble(decoding)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, place: tuple[int, int]) -> Sample:
        shard = self._shards[place[0]]
        members = self._reader.members(shard, place[1])
        return read_sample(self._reader, shard, members, self._data, with_category=True)

    def _fault(self, place: tuple[int, int]) -> Rejection | None:
        try:
            self._read(place)
        except UnusableError as error:
            shard = self._shards[place[0]]
            return Rejection(error.cause, sample_key(shard, self._reader.members(shard, place[1])), error.detail)
        return None

    def _view(self, index: int) -> _View:
        sample = self._read(self._places[index])
        try:
            return _View(index, sample, heldout_pixels(sample.image, sample.header, self._image.size), None)
        except UnusableError as error:
            return _View(index, sample, None, Rejection(error.cause, sample.key, error.detail))

    def _assemble(self, decoding: list[Future[_View]]) -> HeldoutBatch:
        views = [task.result() for task in decoding]
        good = [view for view in views if view.rejection is None]
        images_BCHW = np.empty((len(good), 3, self._image.size, self._image.size), dtype=np.uint8)
        for b, view in enumerate(good):
            assert view.pixels_CHW is not None
            images_BCHW[b] = view.pixels_CHW
        return HeldoutBatch(
            images_BCHW=torch.from_numpy(images_BCHW),
            captions=[view.sample.captions[0] for view in good],
            all_captions=[view.sample.captions for view in good],
            categories=[view.sample.category for view in good],
            indices_B=torch.tensor([view.index for view in good], dtype=torch.int64),
            rejections=[view.rejection for view in views if view.rejection is not None],
        )
