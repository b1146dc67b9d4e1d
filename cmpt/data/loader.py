"""Joins order, reading, checking, decoding and tokenizing; keeps finished batches ahead of the step.

One producer thread per iteration reads the streams of batch n+1 while a pool of threads decodes batch n. Order and
contents depend on the state alone, never on threads or on how far ahead the producer is.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from cmpt.batch import ImageTextBatch, Rejection
from cmpt.data.cache import longest_fetch_s
from cmpt.data.decode import Encoded, crop_draws
from cmpt.data.decoders import Decoder, open_decoder
from cmpt.data.places import Places, Stall
from cmpt.data.reader import ShardReader
from cmpt.data.rows import DIGEST_BYTES, MOST_SHARDS_LOST_IN_A_ROW, StreamFiller, StreamRows
from cmpt.data.shards import Shard
from cmpt.data.streams import LoaderState, SourceOrder, draw_sources, owned_streams
from cmpt.data.text_masking import TextMask
from cmpt.data.tokenizer import Tokenizer, pack_captions
from cmpt.data.validate import DataError
from cmpt.ops.random import Purpose, uniform
from cmpt.recipe import schema
from cmpt.recipe.paths import is_local

_PATIENCE_S = 300.0  # storage may hang for a while; ending the run would not bring it back sooner
_CAPTION_CHUNK = 64  # rows per task

Item = tuple[ImageTextBatch, LoaderState]


def longest_wait_s(data: schema.Data) -> float:
    """How long the next batch may take while nothing is wrong but the storage, in seconds.

    Five minutes, and with shards behind URLs as long as a stream takes to lose as many in a row as end the run.
    """
    remote = data.cache == "always" or any(not is_local(url) for source in data.train for url in source.urls)
    return _PATIENCE_S + (MOST_SHARDS_LOST_IN_A_ROW * longest_fetch_s(data) if remote else 0.0)


def batch_digest(stream_digests: Iterable[bytes]) -> str:
    """One digest of a global batch from those of all streams, in stream order."""
    return hashlib.blake2b(b"".join(stream_digests), digest_size=DIGEST_BYTES).hexdigest()


class Loader:
    """The training data of one rank.

    `samples_per_epoch` is the number of samples of all sources together: an epoch is as many slots. With one source,
    or weights in proportion to the sources' sizes, that is every sample once; with other weights, a source is seen
    weight share x samples_per_epoch / its own size times. `data_fingerprint` changes when shards are added, removed,
    reordered or change their number of samples, for a state then no longer means the same order; and with the table of
    words that masks captions.
    """

    def __init__(
        self,
        data: schema.Data,
        image: schema.Image,
        *,
        shards: Sequence[Sequence[Shard]],
        tokenizer: Tokenizer,
        context_length: int,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        text_masking: schema.TextMasking | None = None,
        decode: schema.Decode | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`shards`: per source of data.train, from `open_shards`. `batch_size`: global, in samples.
        `context_length` must be the tokenizer's. `text_masking`: null for none. `decode`, and the `device` that the
        batches are for: null for the CPU.

        Raises ValueError where sizes do not divide, DataError for a table of words that cannot be used and for a source
        of fewer samples than streams.
        """
        if not data.train:
            raise ValueError("data.train must name at least one source, got none")
        assert len(shards) == len(data.train)
        if batch_size % data.streams:
            raise ValueError(f"engine.batch_size must be divisible by data.streams {data.streams}, got {batch_size}")
        if tokenizer.context_length != context_length:
            raise ValueError(f"model.context_length is {context_length}, the tokenizer's is {tokenizer.context_length}")
        self._data, self._image, self._tokenizer, self._seed = data, image, tokenizer, seed
        self.shards = shards
        self._batch_size = batch_size
        self._streams = owned_streams(data.streams, rank, world_size)
        self._rows_per_stream = batch_size // data.streams
        self._weights = [source.weight for source in data.train]
        self._orders = [
            SourceOrder(seed, number, [shard.count for shard in source], data.streams)
            for number, source in enumerate(shards)
        ]
        for number, order in enumerate(self._orders):
            if order.samples < data.streams:
                raise DataError(
                    f"data.train.{number} ({data.train[number].urls[0]}): holds {order.samples} samples, fewer than "
                    f"data.streams = {data.streams}"
                )
        self.shard_faults = [
            Rejection(shard.fault.cause, shard.name, shard.fault.detail, number)
            for number, source in enumerate(shards)
            for shard in source
            if shard.fault
        ]
        """What was found wrong with shards as a whole; not part of any batch."""
        self._decode, self._device = decode or schema.Decode("cpu"), device or torch.device("cpu")
        self._places = Places()
        self._text_masks: dict[tuple[object, ...], TextMask] = {}
        self._text_masking = text_masking or schema.TextMasking()
        self.text_mask(self._text_masking)
        self.samples_per_epoch = sum(order.samples for order in self._orders)

    def initial_state(self) -> LoaderState:
        """The beginning of the run, for this rank's streams."""
        return LoaderState.initial(self._streams, len(self._orders))

    @property
    def data_fingerprint(self) -> str:
        lines = [f"{n} {shard.name} {shard.count}" for n, source in enumerate(self.shards) for shard in source]
        lines += sorted({mask.table_digest for mask in self._text_masks.values()} - {""})
        return hashlib.blake2b("\n".join(lines).encode(), digest_size=DIGEST_BYTES).hexdigest()

    def text_mask(self, settings: schema.TextMasking) -> TextMask:
        """The text masking of these settings, built once. Raises DataError for a table that cannot be used."""
        key = astuple(settings)
        if key not in self._text_masks:
            self._text_masks[key] = TextMask(settings, self._tokenizer, self._seed)
        return self._text_masks[key]

    def batches(
        self,
        state: LoaderState,
        image: schema.Image | None = None,
        text_masking: schema.TextMasking | None = None,
        stalled: Callable[[Stall], None] = lambda stall: None,
    ) -> Generator[Item, None, None]:
        """Yields (batch, state behind it) for ever, from `state` on; `image` and `text_masking` where a phase changes
        them. `stalled` is told when a batch has been waited for longer than data.stall_s, and again after twice that.

        Closing the iterator, or an error on either side, ends all threads. What a worker raises is raised here.
        """
        missing = [stream for stream in self._streams if stream not in state.cursors]
        if missing:
            raise ValueError(f"the loader state has no streams {missing}; merge the states of all ranks first")
        if max(state.cursors) >= self._data.streams:
            raise ValueError(f"data.streams is {self._data.streams}, the loader state has stream {max(state.cursors)}")
        sources = {len(cursor) for cursor in state.cursors.values()}
        if sources != {len(self._orders)}:
            raise ValueError(f"data.train has {len(self._orders)} sources, the loader state is of {max(sources)}")
        text_mask = self.text_mask(text_masking or self._text_masking)
        return self._consume(state, image or self._image, text_mask, stalled)

    def _consume(
        self, state: LoaderState, image: schema.Image, text_mask: TextMask, stalled: Callable[[Stall], None]
    ) -> Generator[Item, None, None]:
        finished: queue.Queue[Item | BaseException] = queue.Queue(maxsize=max(1, self._data.prefetch_batches))
        stop = threading.Event()
        # A stream is in one shard of each source at a time.
        reader = ShardReader(len(self._streams) * len(self.shards) + 2, self._data)
        # A daemon, so that an error which leaves the iterator unclosed cannot keep the process from ending.
        producer = threading.Thread(
            target=self._produce,
            args=(state, image, text_mask, reader, finished, stop),
            name="cmpt-producer",
            daemon=True,
        )
        producer.start()
        try:
            while True:
                item = self._next(finished, stalled)
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            reader.close()
            while not finished.empty():  # makes room for the one `put` in which the producer may wait
                finished.get_nowait()
            producer.join()

    def _next(
        self, finished: queue.Queue[Item | BaseException], stalled: Callable[[Stall], None]
    ) -> Item | BaseException:
        waited, patience = 0.0, self._data.stall_s
        while True:
            try:
                return finished.get(timeout=patience)
            except queue.Empty:
                waited += patience
                patience = waited
                stalled(self._places.stall(waited))

    def _produce(
        self,
        state: LoaderState,
        image: schema.Image,
        text_mask: TextMask,
        reader: ShardReader,
        finished: queue.Queue[Item | BaseException],
        stop: threading.Event,
    ) -> None:
        try:
            decoder = open_decoder(
                self._decode,
                image,
                batch_size=self._rows_per_stream * len(self._streams),
                workers=self._data.workers,
                device=self._device,
                places=self._places,
            )
            pool = ThreadPoolExecutor(self._data.workers, thread_name_prefix="cmpt-data")
            try:
                shared = (self._orders, self.shards, reader, self._data, self._places)
                fillers = [StreamFiller(stream, state.cursors[stream], *shared) for stream in self._streams]
                self._produce_with(pool, fillers, decoder, state, text_mask, finished, stop)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
                decoder.close()
        except BaseException as error:
            finished.put(error)

    def _produce_with(
        self,
        pool: ThreadPoolExecutor,
        fillers: list[StreamFiller],
        decoder: Decoder,
        state: LoaderState,
        text_mask: TextMask,
        finished: queue.Queue[Item | BaseException],
        stop: threading.Event,
    ) -> None:
        decode = partial(_Decoding, pool, decoder, self._places, text_mask, self._seed)
        decoding: _Decoding | None = None
        while not stop.is_set():
            ordinal_B, streams = self._read(pool, state.step, fillers)
            state = LoaderState(
                state.step + 1, dict(zip(self._streams, (part.positions for part in streams), strict=True))
            )
            upcoming = decode(streams, ordinal_B, state)
            if decoding is not None:
                finished.put(decoding.finish(self._device.type == "cuda"))
            decoding = upcoming

    def _read(
        self, pool: ThreadPoolExecutor, step: int, fillers: list[StreamFiller]
    ) -> tuple[NDArray[np.int64], list[StreamRows]]:
        """Fills every slot of this rank: within a stream one after the other, the streams in parallel."""
        count = self._rows_per_stream
        first = step * self._batch_size + self._streams.start * count
        ordinal_B = np.arange(first, first + len(fillers) * count, dtype=np.int64)
        source_B = draw_sources(self._seed, ordinal_B, self._weights)
        caption_draw_B = uniform(self._seed, ordinal_B, Purpose.CAPTION, 1)[:, 0]
        per_stream = (array.reshape(len(fillers), count).tolist() for array in (source_B, caption_draw_B))
        tasks = [pool.submit(filler.fill, *slots) for filler, *slots in zip(fillers, *per_stream, strict=True)]
        return ordinal_B, [task.result() for task in tasks]


class _Decoding:
    """A batch whose order is fixed and whose rows are being decoded and tokenized in the pool."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        decoder: Decoder,
        places: Places,
        text_mask: TextMask,
        seed: int,
        streams: list[StreamRows],
        ordinal_B: NDArray[np.int64],
        state: LoaderState,
    ) -> None:
        self._streams, self._ordinal_B, self._state = streams, ordinal_B, state
        self._rows = [row for stream in streams for row in stream.rows]
        self._text_mask, self._places = text_mask, places
        self._text_draws_BK = text_mask.draws(ordinal_B)
        self._ids: list[list[int]] = [[]] * len(self._rows)
        self._captions: list[Future[None]] = [
            pool.submit(self._tokenize, range(start, min(start + _CAPTION_CHUNK, len(self._rows))))
            for start in range(0, len(self._rows), _CAPTION_CHUNK)
        ]
        samples = [row.sample for row in self._rows]
        draws_BK = crop_draws(seed, ordinal_B)
        encoded = [Encoded(sample.image, sample.header, draws) for sample, draws in zip(samples, draws_BK, strict=True)]
        self._decoded = decoder.begin(encoded, pool)

    def _tokenize(self, rows: range) -> None:
        with self._places.at("tokenizing"):
            for b in rows:
                self._ids[b] = self._text_mask(self._rows[b].caption, int(self._ordinal_B[b]), self._text_draws_BK[b])

    def finish(self, pinned: bool) -> Item:
        """Waits for the pool. What a worker raised is raised here. `pinned`: texts in page-locked memory."""
        for task in self._captions:
            task.result()
        with self._places.at("decoding"):
            decoded = self._decoded()
        valid_B = torch.ones(len(self._rows), dtype=torch.bool)
        valid_B[list(decoded.refused)] = False
        holes = [
            Rejection(error.cause, self._rows[b].sample.key, error.detail, self._rows[b].source)
            for b, error in sorted(decoded.refused.items())
        ]
        batch = ImageTextBatch(
            images_BCHW=decoded.images_BCHW,
            text=pack_captions(self._ids),
            ordinal_B=torch.from_numpy(self._ordinal_B),
            valid_B=valid_B,
            keys=[row.sample.key for row in self._rows],
            stream_digests=[stream.digest() for stream in self._streams],
            rejections=[rejection for stream in self._streams for rejection in stream.rejections] + holes,
        )
        return batch.pinned() if pinned else batch, self._state
