"""Shards: from URL lists to how many samples each holds, and reads by offset.

Every shard is indexed once (index.py); the index is looked for in data.cache_folder, then beside the shard. Shards
behind URLs are read from whole copies in the cache (cache.py): random access is always on a local file.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cmpt.data.cache import FetchError, HeldShard, ShardCache, file_digest
from cmpt.data.index import BESIDE, INDEX_FORMAT, Members, ShardFault, ShardIndex, build_index, load_index, save_index
from cmpt.data.validate import Cause, DataError
from cmpt.recipe import schema
from cmpt.recipe.paths import expand_shards, is_local

_INDEX_THREADS = 16  # walking a tar waits for the disk or the network, not for the processor
_INDEXED_TOGETHER = 64  # by a rank, between two exchanges
_LOST_S = 600.0  # a shard that could not be read is not tried again for so long


class Ranks(NamedTuple):
    """The processes that open the same shards at the same time and share the work."""

    rank: int = 0
    world_size: int = 1
    gather: Callable[[Any], list[Any]] = lambda own: [own]  # every rank's object, in rank order


@dataclass(frozen=True)
class Shard:
    """A shard whose samples are counted: what the order of samples needs, and where the bytes are."""

    url: str
    name: str  # in keys of samples: the base name, with as many folders before it as tell it from the others
    count: int  # samples
    index_path: Path
    cached: bool = False  # read from a copy in the cache
    fault: ShardFault | None = None


class _Known(NamedTuple):
    """What an index says of a shard as a whole."""

    samples: int
    fault: ShardFault | None


def expand_urls(urls: Iterable[str], source: str = "data.train") -> list[str]:
    """Braces, wildcards and `pkg:` paths; a shard named twice is a fault, since an epoch would visit it twice."""
    expanded: list[str] = []
    for pattern in urls:
        shards = expand_shards(pattern)
        if not shards:
            raise DataError(f"{source}: {pattern} matches no file")
        expanded += shards
    twice = [url for url, times in Counter(expanded).items() if times > 1]
    if twice:
        raise DataError(f"shards listed twice in one source (to see data more often, give weights): {_some(twice)}")
    return expanded


def open_sources(
    data: schema.Data, ranks: Ranks, progress: Callable[[str, int, int], None] | None = None
) -> list[list[Shard]]:
    """The shards of each source of data.train; `progress(source, done, all)` and errors as of `open_shards`."""
    return [
        open_shards(source.urls, data, name, ranks, progress and partial(progress, name))
        for name, source in ((f"data.train.{number}", source) for number, source in enumerate(data.train))
    ]


def open_shards(
    urls: Iterable[str],
    data: schema.Data,
    source: str = "data.train",
    ranks: Ranks = Ranks(),  # noqa: B008
    progress: Callable[[int, int], None] | None = None,
) -> list[Shard]:
    """Expands the URLs and counts every shard's samples; what has no index yet is indexed, each shard by one rank.

    `source` names the field in errors; every rank of `ranks` must call with the same URLs. `progress(done, all)` is
    told of the shards that had to be indexed. Shards behind URLs are fetched for that.

    Raises `DataError`, on every rank alike: for paths that do not exist, where no sample is left, and where
    data.broken_shards is "stop" for the first broken shards; else those come back with their `fault`.
    """
    opener = _Opener(expand_urls(urls, source), data, source)
    problems, unindexed = zip(*ranks.gather((opener.problem, opener.unindexed)), strict=True)
    for problem in problems:
        if problem:
            raise DataError(problem)
    needed = sorted(set().union(*unindexed))
    known = dict(opener.known)
    together = _INDEXED_TOGETHER * ranks.world_size
    for start in range(0, len(needed), together):  # in rounds, so that no rank waits long for another
        own = needed[start : start + together][ranks.rank :: ranks.world_size]
        for part in ranks.gather(opener.index(own)):
            known |= part
        if progress is not None:
            progress(min(start + together, len(needed)), len(needed))
    opener.close()
    shards = opener.shards(known)
    broken = [f"{shard.url}: {shard.fault.detail}" for shard in shards if shard.fault]
    if broken and (data.broken_shards == "stop" or not any(shard.count for shard in shards)):
        raise DataError(f"{source}: {len(broken)} of {len(shards)} shards cannot be used: {_some(sorted(broken))}")
    return shards


def index_shard(url: str, data: schema.Data) -> Shard:
    """One shard, of a URL without braces, whatever is wrong with it. Raises DataError for a path that is not there."""
    opener = _Opener([url], data, url)
    if opener.problem:
        raise DataError(opener.problem)
    try:
        # In this thread, not in one of `index`: an interrupt then ends a fetch, instead of waiting for it.
        return opener.shards({0: opener.entry(0)})[0]
    finally:
        opener.close()


class _Opener:
    """Finds and makes the indexes of one source, for one rank."""

    def __init__(self, urls: list[str], data: schema.Data, source: str) -> None:
        self._urls, self._data, self._source = urls, data, source
        self._folder = Path(data.cache_folder).expanduser() / "index"
        self.problem: str | None = None
        self.known: dict[int, _Known] = {}
        self._identities: list[str] = []
        self._cache: ShardCache | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._look()
            if any(map(self._cached, urls)):
                self._cache = ShardCache.of(data)
        except OSError as error:
            self.problem = f"data.cache_folder cannot be made: {error}"
        except DataError as error:
            self.problem = str(error)
        self.unindexed = [place for place in range(len(urls)) if place not in self.known]

    def _look(self) -> None:
        missing = []
        for url in self._urls:
            identity = url
            if is_local(url):
                try:
                    status = os.stat(url)
                    identity = f"{os.path.abspath(url)}\0{status.st_size}\0{status.st_mtime_ns}"
                except OSError:
                    missing.append(url)
            self._identities.append(_hash(f"{INDEX_FORMAT}\0{identity}"))
        if missing:
            raise DataError(
                f"{self._source}: {len(missing)} of {len(self._urls)} shards do not exist: {_some(missing)}"
            )
        wanted = {identity: place for place, identity in enumerate(self._identities)}
        # Count and state are part of the name: a listing of 256 folders instead of a look into each of many files.
        for folder in sorted({_subfolder(self._folder, identity) for identity in wanted}):
            for name in os.listdir(folder) if folder.is_dir() else []:
                identity, _, rest = name.partition(".")
                place = wanted.get(identity)
                if place is None or name.endswith(".tmp"):
                    continue
                count, state, _ = rest.split(".")
                if state == "whole":
                    self.known[place] = _Known(int(count), None)
                elif (index := load_index(folder / name)) is not None:
                    self.known[place] = _Known(len(index), index.fault)

    def index(self, places: Sequence[int]) -> dict[int, _Known]:
        """What is known of the shards at these places; those of which nothing is are indexed, several at a time."""
        fetched = any(self._cached(self._urls[place]) for place in places)
        threads = self._data.fetch_workers if fetched else _INDEX_THREADS
        with ThreadPoolExecutor(threads, thread_name_prefix="cmpt-index") as pool:
            return dict(zip(places, pool.map(self.entry, places), strict=True))

    def entry(self, place: int) -> _Known:
        """What is known of the shard at a place, which is indexed where that is nothing."""
        if place in self.known:
            return self.known[place]
        url = self._urls[place]
        try:
            index = _index_beside(url) if is_local(url) else None
            if index is None:
                index = self._made(url)
        except (FetchError, OSError) as error:
            return _Known(0, ShardFault(Cause.UNREACHABLE_SHARD, str(error)))
        known = _Known(len(index), index.fault)
        try:
            save_index(index, self._index_path(place, known))
        except OSError as error:
            raise DataError(f"data.cache_folder cannot be written to: {error}") from error
        return known

    def _made(self, url: str) -> ShardIndex:
        if not self._cached(url):
            return build_index(Path(url), url)
        assert self._cache is not None
        with self._cache.hold(url, os.stat(url).st_size if is_local(url) else None) as held:
            return replace(build_index(held.path, url), digest=file_digest(held.path))  # what a later copy must have

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()

    def _cached(self, url: str) -> bool:
        return not is_local(url) or self._data.cache == "always"

    def _index_path(self, place: int, known: _Known) -> Path:
        identity, state = self._identities[place], "broken" if known.fault else "whole"
        return _subfolder(self._folder, identity) / f"{identity}.{known.samples}.{state}.npz"

    def shards(self, known: dict[int, _Known]) -> list[Shard]:
        names = short_names(self._urls)
        return [
            Shard(url, names[place], known[place].samples, self._index_path(place, known[place]), self._cached(url),
                  known[place].fault)
            for place, url in enumerate(self._urls)
        ]  # fmt: skip


def short_names(urls: Sequence[str]) -> list[str]:
    """Of each URL its last parts, as few as tell all of them apart."""
    parts = [url.split("/") for url in urls]
    for length in range(1, max((len(part) for part in parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(urls)


def _index_beside(url: str) -> ShardIndex | None:
    """The index file beside a local shard, where it is one of this very file: of its size, and not older."""
    path = Path(url + BESIDE)
    try:
        status, its = os.stat(url), os.stat(path)
    except OSError:
        return None
    index = load_index(path) if its.st_mtime_ns >= status.st_mtime_ns else None
    return index if index is not None and index.shard_bytes == status.st_size else None


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
            raise DataError(f"{shard.url}: changed while in use, {shard.count} samples before, {len(index)} now")
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
            raise DataError(f"{shard.url}: changed while in use, got {len(data)} of {size} bytes at {offset}")
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
                raise fault
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
            self._lost[shard.url] = (time.monotonic(), error)
        return error


def _subfolder(folder: Path, identity: str) -> Path:
    return folder / identity[:2]


def _stated(index: ShardIndex | None) -> tuple[int | None, str | None]:
    """Size and digest that a copy of the shard must have."""
    return (index.shard_bytes, index.digest) if index is not None else (None, None)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _some(texts: list[str], most: int = 5) -> str:
    return "; ".join(texts[:most]) + (f"; and {len(texts) - most} more" if len(texts) > most else "")
