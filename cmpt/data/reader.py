"""Reads members of shards by offset; shards behind URLs from their copies in the cache."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from cmpt.data.cache import FetchError, HeldShard, ShardCache
from cmpt.data.index import Members, ShardIndex, build_index, load_index, save_index
from cmpt.data.shards import Shard
from cmpt.recipe import schema

_LOST_S = 600.0  # a shard that could not be read is not tried again for so long


class _OpenShard:
    """A descriptor and an index; closed when the last user lets go, so eviction cannot cut off a read."""

    def __init__(self, shard: Shard, cache: ShardCache | None) -> None:
        index = load_index(shard.index_path)
        path = Path(shard.url)
        self._held: HeldShard | None = None
        if cache is not None:
            self._held = cache.hold(shard.url, *_stated(index))
            path = self._held.path
        if index is None:  # made on another host, or gone
            index = build_index(path, shard.url)
            with suppress(OSError):  # then it is made again the next time
                save_index(index, shard.index_path)
        if len(index) != shard.count:
            raise FetchError(f"{shard.url}: changed while in use, {shard.count} samples before, {len(index)} now")
        self.index = index
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ReaderClosedError(RuntimeError):
    """The reader was closed while, or before, a shard was fetched."""


class ShardReader:
    """Reads members by offset; keeps the last used shards open. Safe to share between threads.

    A shard that cannot be opened is remembered: for ten minutes every use raises the same `FetchError`.
    """

    def __init__(self, capacity: int, data: schema.Data | None = None) -> None:
        """`capacity`: shards that stay open. `data`: how shards that are read from the cache are fetched."""
        self._capacity, self._data = capacity, data or schema.Data()
        self._open: OrderedDict[str, _OpenShard] = OrderedDict()
        self._lost: dict[str, tuple[float, FetchError]] = {}
        self._opening: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self._cache: ShardCache | None = None
        self._closed = False

    def members(self, shard: Shard, place: int) -> Members:
        """Raises FetchError, as all of this class, where the shard cannot be had."""
        return self._opened(shard).index.sample(place)

    def read(self, shard: Shard, extent: tuple[int, int]) -> bytes:
        """The bytes of one member: one positioned read."""
        offset, size = extent
        opened = self._opened(shard)
        try:
            data = os.pread(opened.descriptor, size, offset)
        except OSError as error:
            raise self._lose(shard, FetchError(f"{shard.url}: cannot be read at byte {offset}: {error}")) from error
        if len(data) != size:
            fault = FetchError(f"{shard.url}: changed while in use, got {len(data)} of {size} bytes at {offset}")
            raise self._lose(shard, fault)
        return data

    def ahead(self, shard: Shard) -> None:
        """Has the cache fetch a shard that will be needed; returns at once."""
        if shard.cached and shard.url not in self._open:
            self._its_cache().ahead(shard.url, *_stated(load_index(shard.index_path)))

    def release(self, shard: Shard) -> None:
        """Closes a shard that is not needed any more, so that its copy in the cache may go."""
        with self._lock:
            self._open.pop(shard.url, None)

    def is_open(self, shard: Shard) -> bool:
        """Whether a read needs no fetching and no opening."""
        return shard.url in self._open

    def close(self) -> None:
        """Ends what is being fetched; whoever waits for it, or wants more, gets a `ReaderClosedError`."""
        with self._lock:
            self._closed = True
            cache = self._cache
        if cache is not None:
            cache.close()

    def _its_cache(self) -> ShardCache:
        with self._lock:
            if self._closed:
                raise ReaderClosedError
            if self._cache is None:
                self._cache = ShardCache.of(self._data)
            return self._cache

    def _opened(self, shard: Shard) -> _OpenShard:
        with self._lock:
            found = self._open.get(shard.url)
            if found is not None:
                self._open.move_to_end(shard.url)
                return found
            opening = self._opening.setdefault(shard.url, threading.Lock())
        cache = self._its_cache() if shard.cached else None
        with opening:  # one thread opens a shard, which may mean fetching it; the other shards stay usable
            with self._lock:
                found = self._open.get(shard.url)
                since, fault = self._lost.get(shard.url, (0.0, None))
            if found is not None:
                return found
            if fault is not None and time.monotonic() - since < _LOST_S:
                raise FetchError(str(fault))  # a new one: raising one again would make its traceback grow
            try:
                opened = _OpenShard(shard, cache)
            except FetchError as error:
                if self._closed:
                    raise ReaderClosedError from None  # that says nothing about the shard
                raise self._lose(shard, error) from None
            except OSError as error:
                raise self._lose(shard, FetchError(f"{shard.url}: cannot be opened: {error}")) from error
            with self._lock:
                self._open[shard.url] = opened
                if len(self._open) > self._capacity:
                    self._open.popitem(last=False)
                self._opening.pop(shard.url, None)
            return opened

    def _lose(self, shard: Shard, error: FetchError) -> FetchError:
        with self._lock:
            self._open.pop(shard.url, None)
            self._opening.pop(shard.url, None)
            self._lost[shard.url] = (time.monotonic(), error)
        return error


def _stated(index: ShardIndex | None) -> tuple[int | None, str | None]:
    """Size and digest that a copy of the shard must have."""
    return (index.shard_bytes, index.digest) if index is not None else (None, None)
