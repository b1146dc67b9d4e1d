"""Which sample comes next: pure order, no input or output. As a program (ledger.py) it lists the samples of a step.

Every global batch takes the same number of samples from each of S streams, in stream order, and a rank owns a
contiguous range of streams; so the global batch does not depend on the world size. Per source and epoch, the units
(shards) are permuted and laid end to end as one line of N samples, the members of each unit permuted too, and each
stream owns one of S contiguous parts of that line. A position is (epoch, candidates consumed of the part): resuming
seeks straight to it, and every sample comes exactly once per epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cmpt.ops.random import Purpose, permutation, uniform

Position = tuple[int, int]  # (epoch, candidates of the stream's part of that epoch already consumed)

_EPOCH_BITS, _SOURCE_BITS, _UNIT_BITS = 23, 8, 32  # a permutation key holds all three


@dataclass(frozen=True)
class LoaderState:
    """Where the streams stand before step `step`: one position per source for every stream it knows.

    A rank's state knows the rank's own streams; `merge` joins the parts of all ranks into the state that any world
    size can start from.
    """

    step: int
    cursors: dict[int, tuple[Position, ...]]

    @staticmethod
    def initial(streams: Iterable[int], sources: int) -> LoaderState:
        return LoaderState(0, {stream: ((0, 0),) * sources for stream in streams})

    @staticmethod
    def merge(states: Sequence[LoaderState]) -> LoaderState:
        """Joins the ranks' parts. Raises ValueError where they are of different steps or share a stream."""
        steps = {state.step for state in states}
        if len(steps) != 1:
            raise ValueError(f"loader states of one step can be merged, got those of steps {sorted(steps)}")
        cursors = {stream: cursor for state in states for stream, cursor in state.cursors.items()}
        if len(cursors) != sum(len(state.cursors) for state in states):
            raise ValueError("loader states of disjoint streams can be merged, got a stream twice")
        return LoaderState(steps.pop(), dict(sorted(cursors.items())))

    def to_json(self) -> dict[str, Any]:
        cursors = {str(stream): [list(position) for position in cursor] for stream, cursor in self.cursors.items()}
        return {"step": self.step, "cursors": cursors}

    @staticmethod
    def from_json(content: dict[str, Any]) -> LoaderState:
        cursors = {
            int(stream): tuple((int(epoch), int(offset)) for epoch, offset in cursor)
            for stream, cursor in content["cursors"].items()
        }
        return LoaderState(int(content["step"]), cursors)


class Candidate(NamedTuple):
    """One sample of the order, and the position behind it."""

    unit: int
    member: int  # place in tar order
    after: Position


class Stretch(NamedTuple):
    """What is left of the unit in which a stream stands."""

    unit: int
    epoch: int
    offset: int  # candidates of the stream's part that come before it
    within: int  # samples of the unit that come before it
    size: int  # samples; at least 1

    @property
    def behind(self) -> Position:
        return self.epoch, self.offset + self.size


class _Line(NamedTuple):
    """The units of one epoch in order, and where each ends on the line of samples."""

    units: NDArray[np.int64]
    ends: NDArray[np.int64]


class SourceOrder:
    """The order of one source for all of its streams. Safe to share between threads."""

    def __init__(self, seed: int, source: int, unit_sizes: Sequence[int], streams: int) -> None:
        if source >= 1 << _SOURCE_BITS:
            raise ValueError(f"data.train: at most {1 << _SOURCE_BITS} sources, got source number {source}")
        self._sizes = np.asarray(unit_sizes, dtype=np.int64)
        if self._sizes.sum() < 1:
            raise ValueError(f"data.train: source number {source} holds no samples")
        self.samples = int(self._sizes.sum())
        self._seed, self._source, self._streams = seed, source, streams
        self._line = lru_cache(maxsize=4)(self._make_line)  # streams are mostly in the same epoch
        self._members = lru_cache(maxsize=4)(self._make_members)

    def part(self, stream: int, epoch: int) -> tuple[int, int]:
        """The part of an epoch's line that a stream owns: [start, end).

        The parts differ by one sample at most. They rotate with the epoch: with fewer samples than streams some
        parts are empty, and no stream may own an empty part for ever.
        """
        part = (stream + epoch) % self._streams
        return part * self.samples // self._streams, (part + 1) * self.samples // self._streams

    def part_size(self, stream: int, epoch: int) -> int:
        """Samples of a stream's part of an epoch."""
        start, end = self.part(stream, epoch)
        return end - start

    def candidates(self, stream: int, position: Position) -> Iterator[Candidate]:
        """Everything that comes after `position`, for ever."""
        while True:
            stretch = self.stretch(stream, position)
            for nth, member in enumerate(self.members(stretch), stretch.offset + 1):
                yield Candidate(stretch.unit, member, (stretch.epoch, nth))
            position = stretch.behind

    def stretch(self, stream: int, position: Position) -> Stretch:
        """The rest of the unit that comes after `position`."""
        epoch, offset = position
        start, end = self.part(stream, epoch)
        while start + offset >= end:
            epoch, offset = epoch + 1, 0
            start, end = self.part(stream, epoch)
        line, place = self._line(epoch), start + offset
        nth = int(np.searchsorted(line.ends, place, side="right"))
        unit, unit_end = int(line.units[nth]), int(line.ends[nth])
        within = place - (unit_end - int(self._sizes[unit]))
        return Stretch(unit, epoch, offset, within, min(unit_end, end) - place)

    def members(self, stretch: Stretch) -> list[int]:
        """The samples of a stretch, as places in tar order, in the order of their visit."""
        order = self._members(stretch.epoch, stretch.unit)
        return order[stretch.within : stretch.within + stretch.size].tolist()

    def _make_members(self, epoch: int, unit: int) -> NDArray[np.int64]:
        return permutation(self._seed, self._key(epoch, unit), Purpose.MEMBER_ORDER, int(self._sizes[unit]))

    def _make_line(self, epoch: int) -> _Line:
        units = permutation(self._seed, self._key(epoch), Purpose.UNIT_ORDER, len(self._sizes))
        return _Line(units, np.cumsum(self._sizes[units]))

    def _key(self, epoch: int, unit: int = 0) -> int:
        assert epoch < 1 << _EPOCH_BITS and unit < 1 << _UNIT_BITS
        return (epoch << _SOURCE_BITS | self._source) << _UNIT_BITS | unit


def draw_sources(seed: int, ordinal_B: NDArray[np.int64], weights: Sequence[float]) -> NDArray[np.int64]:
    """Which source fills each slot, in proportion to the weights: a draw keyed by the slot's ordinal."""
    if len(weights) == 1:
        return np.zeros(len(ordinal_B), dtype=np.int64)
    bounds = np.cumsum(np.asarray(weights, dtype=np.float64) / np.sum(weights))[:-1]
    return np.searchsorted(bounds, uniform(seed, ordinal_B, Purpose.SOURCE, 1)[:, 0], side="right")


def owned_streams(streams: int, rank: int, world_size: int) -> range:
    """The streams of a rank: a contiguous range. Raises ValueError where the world size does not divide them."""
    if streams % world_size:
        raise ValueError(f"data.streams must be divisible by the world size {world_size}, got {streams}")
    return range(rank * streams // world_size, (rank + 1) * streams // world_size)


if __name__ == "__main__":
    from cmpt.data.ledger import main

    sys.exit(main())
