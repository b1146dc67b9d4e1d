"""Shards: from URL lists to how many samples each holds.

Every shard is indexed once (index.py); the index is looked for in data.cache_folder, then beside the shard. Shards
behind URLs are read from whole copies in the cache (cache.py): random access is always on a local file.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cmpt.data.cache import FetchError, ShardCache, file_digest
from cmpt.data.index import BESIDE, INDEX_FORMAT, ShardFault, ShardIndex, build_index, load_index, save_index
from cmpt.data.validate import Cause, DataError
from cmpt.recipe import schema
from cmpt.recipe.paths import expand_shards, is_local

_INDEX_THREADS = 16  # walking a tar waits for the disk or the network, not for the processor
_INDEXED_TOGETHER = 64  # by a rank, between two exchanges
_MOST_LOST_AT_FIRST = 8
_UNREACHABLE = Cause.UNREACHABLE_SHARD


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

    @property
    def out_of_reach(self) -> bool:
        """Whether it could not be had when it was to be indexed."""
        return self.fault is not None and self.fault.cause == _UNREACHABLE


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
    data: schema.Data,
    ranks: Ranks,
    progress: Callable[[str, int, int], None] | None = None,
    left_out: Collection[str] = (),
) -> list[list[Shard]]:
    """The shards of each source of data.train; `progress(source, done, all)`, the rest as of `open_shards`."""
    return [
        open_shards(source.urls, data, name, ranks, progress and partial(progress, name), left_out)
        for name, source in ((f"data.train.{number}", source) for number, source in enumerate(data.train))
    ]


def open_shards(
    urls: Iterable[str],
    data: schema.Data,
    source: str = "data.train",
    ranks: Ranks = Ranks(),  # noqa: B008
    progress: Callable[[int, int], None] | None = None,
    left_out: Collection[str] = (),
) -> list[Shard]:
    """Expands the URLs and counts every shard's samples; what has no index yet is indexed, each shard by one rank.

    `source` names the field in errors; every rank of `ranks` must call with the same URLs. `progress(done, all)` is
    told of the shards that had to be indexed. Shards behind URLs are fetched for that. `left_out`: URLs that stay out,
    without a try; those that could not be had when the run began.

    Raises `DataError`, on every rank alike: for paths that do not exist, where no sample is left, and where
    data.broken_shards is "stop" for the first broken shards; else those come back with their `fault`.
    """
    opener = _Opener(expand_urls(urls, source), data, source, left_out)
    opened = ranks.gather((opener.problem, opener.unindexed))
    for problem, _ in opened:
        if problem:
            raise DataError(problem)
    known = dict(opener.known)
    needed = sorted(set().union(*(unindexed for _, unindexed in opened)))
    lacking = [set(unindexed) for _, unindexed in opened]
    providers = {place: next((r for r, lacks in enumerate(lacking) if place not in lacks), None) for place in needed}
    if needed:
        own = {place: opener.known[place] for place, provider in providers.items() if provider == ranks.rank}
        for part in ranks.gather(own):
            known |= part
    needed = [place for place in needed if place not in known]  # which no rank knows
    together = opener.indexed_together * ranks.world_size
    for start in range(0, len(needed), together):  # in rounds, so that no rank waits long for another
        mine = needed[start : start + together][ranks.rank :: ranks.world_size]
        for part, problem in ranks.gather(opener.index(mine)):
            if problem:
                raise DataError(problem)
            known |= part
        if progress is not None:
            progress(min(start + together, len(needed)), len(needed))
        _check_hope(opener, known, source)
    opener.close()
    shards = opener.shards(known)
    broken = [f"{shard.url}: {shard.fault.detail}" for shard in shards if shard.fault]
    if broken and (data.broken_shards == "stop" or not any(shard.count for shard in shards)):
        raise DataError(f"{source}: {len(broken)} of {len(shards)} shards cannot be used: {_some(sorted(broken))}")
    return shards


def _check_hope(opener: _Opener, known: dict[int, _Known], source: str) -> None:
    """Raises DataError where it would go on like this: a wrong host or bucket is told early, not after all shards."""
    faults = [entry.fault.detail for entry in known.values() if entry.fault and entry.fault.cause == _UNREACHABLE]
    stops = opener.stops and faults
    if stops or (len(faults) >= _MOST_LOST_AT_FIRST and len(faults) == len(known)):
        raise DataError(f"{source}: {len(faults)} of the first {len(known)} shards cannot be had: {_some(faults)}")


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

    def __init__(self, urls: list[str], data: schema.Data, source: str, left_out: Collection[str] = ()) -> None:
        self._urls, self._data, self._source, self._left_out = urls, data, source, frozenset(left_out)
        fetched = any(map(self._cached, urls))
        self.indexed_together = 2 * data.fetch_workers if fetched else _INDEXED_TOGETHER
        self._threads = data.fetch_workers if fetched else _INDEX_THREADS
        self.stops = data.broken_shards == "stop"
        self._folder = Path(data.cache_folder).expanduser() / "index"
        self.problem: str | None = None
        self.known: dict[int, _Known] = {}
        self._identities: list[str] = []
        self._cache: ShardCache | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._look()
            if fetched:
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
        wanted = {}
        for place, (url, identity) in enumerate(zip(self._urls, self._identities, strict=True)):
            if url in self._left_out:
                self.known[place] = _Known(0, ShardFault(_UNREACHABLE, "could not be had when the run began"))
            else:
                wanted[identity] = place
        # Count and state are part of the name: a listing of 256 folders instead of a look into each of many files.
        for folder in sorted({_subfolder(self._folder, identity) for identity in wanted}):
            for name in os.listdir(folder) if folder.is_dir() else []:
                identity, _, rest = name.partition(".")
                found = wanted.get(identity)
                if found is None or name.endswith(".tmp"):
                    continue
                count, state, _ = rest.split(".")
                if state == "whole":
                    self.known[found] = _Known(int(count), None)
                elif (index := load_index(folder / name)) is not None:
                    self.known[found] = _Known(len(index), index.fault)

    def index(self, places: Sequence[int]) -> tuple[dict[int, _Known], str | None]:
        """Indexes the shards at these places, several at a time; what is known of them then, or why none can be."""
        try:
            with ThreadPoolExecutor(self._threads, thread_name_prefix="cmpt-index") as pool:
                return dict(zip(places, pool.map(self.entry, places), strict=True)), None
        except DataError as error:
            return {}, str(error)

    def entry(self, place: int) -> _Known:
        """What is known of the shard at a place, which is indexed where that is nothing.

        Raises `DataError` for what is wrong with this host rather than with the shard.
        """
        if place in self.known:
            return self.known[place]
        url = self._urls[place]
        try:
            index = _index_beside(url) if is_local(url) else None
            if index is None:
                index = self._made(url)
        except (FetchError, OSError) as error:
            return _Known(0, ShardFault(_UNREACHABLE, str(error)))
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
    """Of each URL its last parts, as few as tell all of them apart; no signature of an http: URL."""
    parts = [_lasting(url).split("/") for url in urls]
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


def _lasting(url: str) -> str:
    """What stays of a URL when it is signed anew."""
    return re.split("[?#]", url)[0] if url.lower().startswith(("http:", "https:")) else url


def _subfolder(folder: Path, identity: str) -> Path:
    return folder / identity[:2]


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _some(texts: list[str], most: int = 5) -> str:
    return "; ".join(texts[:most]) + (f"; and {len(texts) - most} more" if len(texts) > most else "")
