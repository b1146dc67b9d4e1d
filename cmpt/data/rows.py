"""Fills the slots of one stream: which samples come, what is left out on the way, and what is fetched ahead."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cmpt.batch import Rejection
from cmpt.data.cache import FetchError
from cmpt.data.captions import choose_caption
from cmpt.data.places import Places
from cmpt.data.reader import ShardReader
from cmpt.data.samples import Sample, read_sample, sample_key
from cmpt.data.shards import Shard
from cmpt.data.streams import Candidate, Position, SourceOrder
from cmpt.data.validate import Cause, DataError, UnusableError
from cmpt.recipe import schema

DIGEST_BYTES = 16
_MOST_REJECTED_IN_A_ROW = 10_000
MOST_SHARDS_LOST_IN_A_ROW = 8  # then the network is gone, not a shard: a run must not walk over all data so


def row_identity(source: int, key: str) -> bytes:
    """What a row is in the digest of its batch: source, shard and key."""
    return f"{source}/{key}".encode()


def stream_digest(identities: Sequence[bytes]) -> bytes:
    """One digest of what a stream gives to a batch, in order."""
    return hashlib.blake2b(b"\0".join(identities), digest_size=DIGEST_BYTES).digest()


@dataclass(frozen=True)
class Row:
    """A slot filled: the sample that has it and the caption it visits with."""

    source: int
    sample: Sample
    caption: str


@dataclass(frozen=True)
class StreamRows:
    """What one stream gives to one batch."""

    rows: list[Row]
    positions: tuple[Position, ...]  # per source, behind the last row
    rejections: list[Rejection]

    def digest(self) -> bytes:
        return stream_digest([row_identity(row.source, row.sample.key) for row in self.rows])


class StreamFiller:
    """One stream on its way. Used by one thread at a time."""

    def __init__(
        self,
        stream: int,
        positions: Sequence[Position],
        orders: Sequence[SourceOrder],
        shards: Sequence[Sequence[Shard]],
        reader: ShardReader,
        data: schema.Data,
        places: Places,
    ) -> None:
        """`positions`, `orders` and `shards` are per source."""
        self._stream, self._orders, self._shards = stream, orders, shards
        self._reader, self._data, self._places = reader, data, places
        self._positions = list(positions)
        self._candidates = [order.candidates(stream, at) for order, at in zip(orders, positions, strict=True)]
        self._unit: list[int | None] = [None] * len(orders)
        for source, position in enumerate(positions):
            self._fetch_ahead(source, orders[source].stretch(stream, position).unit)

    def fill(self, sources: Sequence[int], caption_draws: Sequence[float]) -> StreamRows:
        """The rows of the next batch: for every slot its source, and the draw that picks its caption.

        Raises DataError where a source has nothing that can be used.
        """
        rejections: list[Rejection] = []
        rows = [self._row(source, draw, rejections) for source, draw in zip(sources, caption_draws, strict=True)]
        return StreamRows(rows, tuple(self._positions), rejections)

    def _row(self, source: int, caption_draw: float, rejections: list[Rejection]) -> Row:
        before = len(rejections)
        while True:
            candidate = next(self._candidates[source])
            self._positions[source] = candidate.after
            shard = self._shards[source][candidate.unit]
            if candidate.unit != self._unit[source]:
                self._enter(source, candidate)
            try:
                with self._places.at("reading" if self._reader.is_open(shard) else "fetching", shard.name):
                    members = self._reader.members(shard, candidate.member)
                    sample = read_sample(self._reader, shard, members, self._data)
            except UnusableError as error:
                rejections.append(Rejection(error.cause, sample_key(shard, members), error.detail, source))
            except FetchError as error:
                if self._data.broken_shards == "stop":
                    raise
                rejections.append(self._leave(source, candidate, error))
            else:
                return Row(source, sample, choose_caption(sample.captions, caption_draw))
            self._check_hope(source, rejections[before:])

    def _enter(self, source: int, candidate: Candidate) -> None:
        """The stream begins a shard: it lets go of the one before, and the one after will be needed next."""
        last, self._unit[source] = self._unit[source], candidate.unit
        if last is not None:
            self._reader.release(self._shards[source][last])
        epoch, offset = candidate.after
        order = self._orders[source]
        here = order.stretch(self._stream, (epoch, offset - 1))
        self._fetch_ahead(source, order.stretch(self._stream, here.behind).unit)

    def _fetch_ahead(self, source: int, unit: int) -> None:
        self._reader.ahead(self._shards[source][unit])

    def _leave(self, source: int, candidate: Candidate, error: FetchError) -> Rejection:
        """The rest of the shard is left out, as far as it is this stream's."""
        epoch, offset = candidate.after
        rest = self._orders[source].stretch(self._stream, (epoch, offset - 1))
        self._positions[source] = rest.behind
        self._candidates[source] = self._orders[source].candidates(self._stream, rest.behind)
        name = self._shards[source][candidate.unit].name
        return Rejection(Cause.UNREACHABLE_SHARD, name, str(error), source, rest.size, self._stream)

    def _check_hope(self, source: int, in_a_row: list[Rejection]) -> None:
        """Raises DataError where it would go on like this."""
        lost_shards = sum(rejection.cause == Cause.UNREACHABLE_SHARD for rejection in in_a_row)
        samples = sum(rejection.samples for rejection in in_a_row)
        if (
            samples < self._orders[source].samples
            and len(in_a_row) < _MOST_REJECTED_IN_A_ROW
            and lost_shards < MOST_SHARDS_LOST_IN_A_ROW
        ):
            return
        counts = ", ".join(f"{cause} {count}" for cause, count in Counter(r.cause for r in in_a_row).most_common())
        examples = "; ".join(f"{r.key}: {r.cause} {r.detail}".rstrip() for r in in_a_row[:3])
        what = f"{lost_shards} shards" if lost_shards else f"{samples} samples"
        raise DataError(
            f"data.train.{source} ({self._data.train[source].urls[0]}): {what} in a row cannot be used ({counts}). "
            f"For example {examples}"
        )
