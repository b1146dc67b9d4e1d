"""Shards: from URL lists to an index of where every member of every sample lies, and reads by offset.

Remote shards will be fetched whole into a local cache; `fetch` is the seam. All random access is on the local file.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from cmpt.data.tar import walk_members
from cmpt.data.validate import DataError
from cmpt.recipe import schema
from cmpt.recipe.paths import is_local, resolve_path

_INDEX_FORMAT = 1  # part of every cached index's name: raise it when the arrays change
_INDEX_THREADS = 16  # walking a tar waits for the disk or the network, not for the processor


@dataclass(frozen=True)
class Members:
    """One sample of a shard: its key and where its members lie."""

    key: str
    extents: dict[str, tuple[int, int]]  # extension -> (offset, size) in bytes


@dataclass(frozen=True)
class ShardIndex:
    """Samples of one shard in tar order, as arrays: N samples with M members in all, 85 bytes a sample of 3 members."""

    key_bytes: NDArray[np.uint8]  # all keys, one after the other
    key_end_N: NDArray[np.int64]
    extensions: tuple[str, ...]  # the distinct ones
    member_end_N: NDArray[np.int64]  # members of sample i are member_end_N[i-1] … member_end_N[i]-1
    extension_M: NDArray[np.int32]
    offset_M: NDArray[np.int64]
    size_M: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.key_end_N)

    def sample(self, place: int) -> Members:
        """The sample at a place 0 … N-1 in tar order."""
        key_start, first = (int(self.key_end_N[place - 1]), int(self.member_end_N[place - 1])) if place else (0, 0)
        key = self.key_bytes[key_start : self.key_end_N[place]].tobytes().decode()
        span = slice(first, int(self.member_end_N[place]))
        rows = zip(
            self.extension_M[span].tolist(), self.offset_M[span].tolist(), self.size_M[span].tolist(), strict=True
        )
        return Members(key, {self.extensions[extension]: (offset, size) for extension, offset, size in rows})


@dataclass(frozen=True)
class Shard:
    """A shard whose index has been made: what the order of samples needs (count) and where the bytes are."""

    url: str
    path: Path
    count: int  # samples
    index_path: Path

    @property
    def name(self) -> str:
        return self.path.name


def fetch(url: str) -> Path:
    """The local path of a shard. Raises DataError for remote ones."""
    if not is_local(url):
        raise DataError(f"remote shards are not supported yet: {url}")
    return Path(url).absolute()


def expand_urls(urls: Iterable[str]) -> list[str]:
    """Brace expansion and `pkg:` paths; a shard named twice is a fault, since an epoch would visit it twice."""
    expanded = [resolve_path(url) for pattern in urls for url in braceexpand(pattern)]
    twice = [url for url, times in Counter(expanded).items() if times > 1]
    if twice:
        raise DataError(f"shards listed twice in one source (to see data more often, give weights): {_some(twice)}")
    return expanded


def open_shards(urls: Iterable[str], data: schema.Data, fetch: Callable[[str], Path] = fetch) -> list[Shard]:
    """Expands the URLs and indexes every shard; indexes are cached under data.cache_folder.

    Raises `DataError` for shards that do not exist, and one that names every shard which is broken or empty.
    """
    expanded = expand_urls(urls)
    paths = [fetch(url) for url in expanded]
    missing = [url for url, path in zip(expanded, paths, strict=True) if not path.is_file()]
    if missing:
        raise DataError(f"{len(missing)} of {len(expanded)} shards do not exist: {_some(missing)}")
    folder = Path(data.cache_folder).expanduser() / "index"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.cache_folder cannot be made: {error}") from error

    shards: dict[int, Shard] = {}
    faults: list[str] = []

    def index(place: int) -> None:
        try:
            shards[place] = _index_shard(expanded[place], paths[place], folder)
        except DataError as error:
            faults.append(str(error))

    # Processes of one host begin at different shards, and each looks for a cached index first: they share the work.
    start = os.getpid() * 7919 % max(len(expanded), 1)
    with ThreadPoolExecutor(_INDEX_THREADS, thread_name_prefix="cmpt-index") as pool:
        for _ in pool.map(index, [*range(start, len(expanded)), *range(start)]):
            pass
    if faults:
        raise DataError(f"{len(faults)} of {len(expanded)} shards cannot be used: {_some(sorted(faults))}")
    return [shards[place] for place in range(len(expanded))]


def _index_shard(url: str, path: Path, folder: Path) -> Shard:
    status = path.stat()
    identity = f"{_INDEX_FORMAT}\0{path}\0{status.st_size}\0{status.st_mtime_ns}"
    index_path = folder / f"{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}.npz"
    index = _load_index(index_path)
    if index is None:
        index = build_index(path, url)
        _save_index(index, index_path)
    return Shard(url, path, len(index), index_path)


def build_index(path: Path, url: str) -> ShardIndex:
    """Walks the tar once, headers only.

    A sample is a run of members with the same key: the path up to the first dot of the base name; the extension is
    the rest in lower case, as webdataset defines both. An extension that comes a second time begins a new sample, so
    that nothing is dropped unseen. Raises `DataError`.
    """
    keys: list[bytes] = []
    member_end: list[int] = []
    extension_ids: dict[str, int] = {}
    extensions: list[int] = []
    offsets: list[int] = []
    sizes: list[int] = []
    current: str | None = None
    seen: set[str] = set()
    for name, offset, size in walk_members(path, url):
        folder, slash, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or not stem:  # webdataset skips these too
            continue
        key, extension = folder + slash + stem, extension.lower()
        if key != current or extension in seen:
            keys.append(key.encode())
            member_end.append(len(offsets))
            current, seen = key, set()
        seen.add(extension)
        extensions.append(extension_ids.setdefault(extension, len(extension_ids)))
        offsets.append(offset)
        sizes.append(size)
        member_end[-1] = len(offsets)
    if not keys:
        raise DataError(f"{url}: holds no samples")
    return ShardIndex(
        key_bytes=np.frombuffer(b"".join(keys), dtype=np.uint8),
        key_end_N=np.cumsum([len(key) for key in keys], dtype=np.int64),
        extensions=tuple(extension_ids),
        member_end_N=np.array(member_end, dtype=np.int64),
        extension_M=np.array(extensions, dtype=np.int32),
        offset_M=np.array(offsets, dtype=np.int64),
        size_M=np.array(sizes, dtype=np.int64),
    )


_ARRAYS = ("key_bytes", "key_end_N", "member_end_N", "extension_M", "offset_M", "size_M")


def _save_index(index: ShardIndex, path: Path) -> None:
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    extensions = np.frombuffer("\0".join(index.extensions).encode(), dtype=np.uint8)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, extensions=extensions, **arrays)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _load_index(path: Path) -> ShardIndex | None:
    """The cached index; None where there is none, or where a crash left a broken one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            extensions = file["extensions"].tobytes().decode().split("\0")
            return ShardIndex(extensions=tuple(extensions), **{name: file[name] for name in _ARRAYS})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


class _OpenShard:
    """A descriptor and an index; closed when the last user lets go, so eviction cannot cut off a read."""

    def __init__(self, shard: Shard) -> None:
        index = _load_index(shard.index_path)
        self.index = index if index is not None else build_index(shard.path, shard.url)
        if len(self.index) != shard.count:
            raise DataError(f"{shard.url}: changed while in use, {shard.count} samples before, {len(self.index)} now")
        self.descriptor = os.open(shard.path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ShardReader:
    """Reads members by offset; keeps the last used shards open. Safe to share between threads."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._open: OrderedDict[Path, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def members(self, shard: Shard, place: int) -> Members:
        return self._opened(shard).index.sample(place)

    def read(self, shard: Shard, extent: tuple[int, int]) -> bytes:
        """The bytes of one member: one positioned read."""
        offset, size = extent
        data = os.pread(self._opened(shard).descriptor, size, offset)
        if len(data) != size:
            raise DataError(f"{shard.url}: changed while in use, got {len(data)} of {size} bytes at {offset}")
        return data

    def _opened(self, shard: Shard) -> _OpenShard:
        with self._lock:
            found = self._open.get(shard.path)
            if found is None:
                found = self._open[shard.path] = _OpenShard(shard)
                if len(self._open) > self._capacity:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(shard.path)
            return found


def _some(texts: list[str], most: int = 5) -> str:
    return "; ".join(texts[:most]) + (f"; and {len(texts) - most} more" if len(texts) > most else "")
