"""Joins order, reading, checking, decoding and tokenizing; keeps finished batches ahead of the step.

One producer thread per iteration reads the streams of batch n+1 while a pool of threads decodes batch n. Order and
contents depend on the state alone, never on threads or on how far ahead the producer is.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from cmpt.batch import ImageTextBatch, Rejection
from cmpt.data.captions import choose_caption
from cmpt.data.decode import crop_draws, train_pixels
from cmpt.data.samples import Sample, read_sample, sample_key
from cmpt.data.shards import Shard, ShardReader
from cmpt.data.streams import Candidate, LoaderState, Position, SourceOrder, draw_sources, owned_streams
from cmpt.data.text_masking import TextMask
from cmpt.data.tokenizer import Tokenizer, pack_captions
from cmpt.data.validate import DataError, UnusableError
from cmpt.ops.random import Purpose, uniform
from cmpt.recipe import schema

_MOST_REJECTED_IN_A_ROW = 10_000
_DECODE_CHUNK = 8  # rows per task at most: a task costs about 30 µs, a small image 200 µs
_DIGEST_BYTES = 16

Item = tuple[ImageTextBatch, LoaderState]


def batch_digest(stream_digests: Iterable[bytes]) -> str:
    """One digest of a global batch from those of all streams, in stream order."""
    return hashlib.blake2b(b"".join(stream_digests), digest_size=_DIGEST_BYTES).hexdigest()


@dataclass(frozen=True)
class _Row:
    """A slot filled: the sample that has it and the caption it visits with."""

    sample: Sample
    caption: str
    identity: bytes  # source, shard and key


@dataclass(frozen=True)
class _StreamRows:
    """What one stream gives to one batch."""

    rows: list[_Row]
    positions: tuple[Position, ...]  # per source, behind the last row
    rejections: list[Rejection]

    def digest(self) -> bytes:
        return hashlib.blake2b(b"\0".join(row.identity for row in self.rows), digest_size=_DIGEST_BYTES).digest()


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
    ) -> None:
        """`shards`: per source of data.train, from `open_shards`. `batch_size`: global, in samples.
        `context_length` must be the tokenizer's. `text_masking`: null for none.

        Raises ValueError where sizes do not divide, DataError for a table of words that cannot be used.
        """
        if not data.train:
            raise ValueError("data.train must name at least one source, got none")
        assert len(shards) == len(data.train)
        if batch_size % data.streams:
            raise ValueError(f"engine.batch_size must be divisible by data.streams {data.streams}, got {batch_size}")
        if tokenizer.context_length != context_length:
            raise ValueError(f"model.context_length is {context_length}, the tokenizer's is {tokenizer.context_length}")
        self._data, self._image, self._tokenizer, self._seed = data, image, tokenizer, seed
        self._shards = shards
        self._batch_size = batch_size
        self._streams = owned_streams(data.streams, rank, world_size)
        self._rows_per_stream = batch_size // data.streams
        self._weights = [source.weight for source in data.train]
        self._orders = [
            SourceOrder(seed, number, [shard.count for shard in source], data.streams)
            for number, source in enumerate(shards)
        ]
        self._text_masks: dict[tuple[object, ...], TextMask] = {}
        self._text_masking = text_masking or schema.TextMasking()
        self.text_mask(self._text_masking)
        # A stream is in one shard of each source at a time.
        self._reader = ShardReader(capacity=len(self._streams) * len(shards) + 2)
        self.samples_per_epoch = sum(order.samples for order in self._orders)

    def initial_state(self) -> LoaderState:
        """The beginning of the run, for this rank's streams."""
        return LoaderState.initial(self._streams, len(self._orders))

    @property
    def data_fingerprint(self) -> str:
        lines = [f"{n} {shard.name} {shard.count}" for n, source in enumerate(self._shards) for shard in source]
        lines += sorted({mask.table_digest for mask in self._text_masks.values()} - {""})
        return hashlib.blake2b("\n".join(lines).encode(), digest_size=_DIGEST_BYTES).hexdigest()

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
    ) -> Generator[Item, None, None]:
        """Yields (batch, state behind it) for ever, from `state` on; `image` and `text_masking` where a phase changes
        them.

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
        return self._consume(state, image or self._image, self.text_mask(text_masking or self._text_masking))

    def _consume(self, state: LoaderState, image: schema.Image, text_mask: TextMask) -> Generator[Item, None, None]:
        finished: queue.Queue[Item | BaseException] = queue.Queue(maxsize=max(1, self._data.prefetch_batches))
        stop = threading.Event()
        # A daemon, so that an error which leaves the iterator unclosed cannot keep the process from ending.
        producer = threading.Thread(
            target=self._produce, args=(state, image, text_mask, finished, stop), name="cmpt-producer", daemon=True
        )
        producer.start()
        try:
            while True:
                item = finished.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            while not finished.empty():  # makes room for the one `put` in which the producer may wait
                finished.get_nowait()
            producer.join()

    def _produce(
        self,
        state: LoaderState,
        image: schema.Image,
        text_mask: TextMask,
        finished: queue.Queue[Item | BaseException],
        stop: threading.Event,
    ) -> None:
        try:
            pool = ThreadPoolExecutor(self._data.workers, thread_name_prefix="cmpt-data")
            try:
                candidates = {
                    stream: [
                        order.candidates(stream, position)
                        for order, position in zip(self._orders, state.cursors[stream], strict=True)
                    ]
                    for stream in self._streams
                }
                decode = partial(_Decoding, pool, self._data.workers, image, text_mask, self._seed)
                decoding: _Decoding | None = None
                while not stop.is_set():
                    ordinal_B, streams = self._read(pool, state, candidates)
                    state = LoaderState(
                        state.step + 1, dict(zip(self._streams, (part.positions for part in streams), strict=True))
                    )
                    upcoming = decode(streams, ordinal_B, state)
                    if decoding is not None:
                        finished.put(decoding.finish())
                    decoding = upcoming
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        except BaseException as error:
            finished.put(error)

    def _read(
        self, pool: ThreadPoolExecutor, state: LoaderState, candidates: dict[int, list[Iterator[Candidate]]]
    ) -> tuple[NDArray[np.int64], list[_StreamRows]]:
        """Fills every slot of this rank: within a stream one after the other, the streams in parallel."""
        count = self._rows_per_stream
        first = state.step * self._batch_size + self._streams.start * count
        ordinal_B = np.arange(first, first + len(self._streams) * count, dtype=np.int64)
        source_B = draw_sources(self._seed, ordinal_B, self._weights)
        caption_draw_B = uniform(self._seed, ordinal_B, Purpose.CAPTION, 1)[:, 0]
        tasks = [
            pool.submit(
                self._fill,
                candidates[stream],
                state.cursors[stream],
                source_B[nth * count : (nth + 1) * count].tolist(),
                caption_draw_B[nth * count : (nth + 1) * count].tolist(),
            )
            for nth, stream in enumerate(self._streams)
        ]
        return ordinal_B, [task.result() for task in tasks]

    def _fill(
        self,
        candidates: list[Iterator[Candidate]],
        cursor: tuple[Position, ...],
        sources: list[int],
        caption_draws: list[float],
    ) -> _StreamRows:
        positions = list(cursor)
        rows: list[_Row] = []
        rejections: list[Rejection] = []
        for source, caption_draw in zip(sources, caption_draws, strict=True):
            before = len(rejections)
            while True:
                candidate = next(candidates[source])
                positions[source] = candidate.after
                shard = self._shards[source][candidate.unit]
                members = self._reader.members(shard, candidate.member)
                try:
                    sample = read_sample(self._reader, shard, members, self._data)
                except UnusableError as error:
                    rejections.append(Rejection(error.cause, sample_key(shard, members), error.detail))
                    if len(rejections) - before >= min(self._orders[source].samples, _MOST_REJECTED_IN_A_ROW):
                        raise _hopeless(source, rejections[before:]) from error
                else:
                    identity = f"{source}/{sample.key}".encode()
                    rows.append(_Row(sample, choose_caption(sample.captions, caption_draw), identity))
                    break
        return _StreamRows(rows, tuple(positions), rejections)


def _hopeless(source: int, in_a_row: list[Rejection]) -> DataError:
    counts = ", ".join(f"{cause} {count}" for cause, count in Counter(r.cause for r in in_a_row).most_common())
    examples = "; ".join(f"{r.key}: {r.cause} {r.detail}".rstrip() for r in in_a_row[:3])
    return DataError(
        f"data.train source {source}: {len(in_a_row)} samples in a row cannot be used ({counts}). "
        f"For example {examples}"
    )


class _Decoding:
    """A batch whose order is fixed and whose rows are being decoded and tokenized in the pool."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        workers: int,
        image: schema.Image,
        text_mask: TextMask,
        seed: int,
        streams: list[_StreamRows],
        ordinal_B: NDArray[np.int64],
        state: LoaderState,
    ) -> None:
        self._streams, self._ordinal_B, self._state = streams, ordinal_B, state
        self._rows = [row for stream in streams for row in stream.rows]
        self._image, self._text_mask = image, text_mask
        self._draws_BK = crop_draws(seed, ordinal_B)
        self._text_draws_BK = text_mask.draws(ordinal_B)
        batch_size = len(self._rows)
        self._pixels_BCHW = np.empty((batch_size, 3, image.size, image.size), dtype=np.uint8)
        self._ids: list[list[int]] = [[]] * batch_size
        self._holes: dict[int, Rejection] = {}
        chunk = max(1, min(_DECODE_CHUNK, batch_size // (2 * workers)))
        self._tasks: list[Future[None]] = [
            pool.submit(self._decode, range(start, min(start + chunk, batch_size)))
            for start in range(0, batch_size, chunk)
        ]

    def _decode(self, rows: range) -> None:
        for b in rows:
            sample = self._rows[b].sample
            self._ids[b] = self._text_mask(self._rows[b].caption, int(self._ordinal_B[b]), self._text_draws_BK[b])
            try:
                self._pixels_BCHW[b] = train_pixels(sample.image, sample.header, self._draws_BK[b], self._image)
            except UnusableError as error:
                self._pixels_BCHW[b] = 0
                self._holes[b] = Rejection(error.cause, sample.key, error.detail)

    def finish(self) -> Item:
        """Waits for the pool. What a worker raised is raised here."""
        for task in self._tasks:
            task.result()
        valid_B = torch.ones(len(self._rows), dtype=torch.bool)
        valid_B[list(self._holes)] = False
        rejections = [rejection for stream in self._streams for rejection in stream.rejections]
        batch = ImageTextBatch(
            images_BCHW=torch.from_numpy(self._pixels_BCHW),
            text=pack_captions(self._ids),
            ordinal_B=torch.from_numpy(self._ordinal_B),
            valid_B=valid_B,
            keys=[row.sample.key for row in self._rows],
            stream_digests=[stream.digest() for stream in self._streams],
            rejections=rejections + [self._holes[b] for b in sorted(self._holes)],
        )
        return batch, self._state
