"""What one shard holds and what of it training cannot use, for check_shards.py."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cmpt.data.cache import FetchError
from cmpt.data.index import BESIDE, Members, ShardFault, ShardIndex, load_index, save_index
from cmpt.data.reader import ShardReader
from cmpt.data.samples import Sample, image_extension, read_sample
from cmpt.data.shards import Shard, index_shard
from cmpt.data.tar import LINK
from cmpt.data.validate import Cause, DataError, UnusableError
from cmpt.recipe.paths import is_local
from cmpt.recipe.schema import Data

HEADERS, SAMPLES, PIXELS = "headers", "samples", "pixels"  # how deep is looked, each deeper than the one before
_TOLD_TOGETHER = 64  # samples between two calls of `advance`

Advance = Callable[[int, int], None]  # samples checked since the last call, and those of them that cannot be used


class Task(NamedTuple):
    """A shard to be checked."""

    url: str
    name: str  # in keys of samples, as a run has them
    heldout: bool = False  # read as held-out pairs are, with their category


@dataclass(frozen=True)
class Checks:
    """What is done with every shard."""

    data: Data
    depth: str = SAMPLES
    beside: bool = False  # whether the index is written beside local shards too


class Finding(NamedTuple):
    """A sample that cannot be used."""

    place: int  # in tar order
    key: str
    cause: str
    detail: str


@dataclass
class Sizes:
    """Sizes of many things, that can be added up. All is exact but the median, which has three digits."""

    count: int = 0
    total: int = 0
    least: int | None = None
    most: int = 0
    rounded: Counter[int] = field(default_factory=Counter)

    def note(self, size: int) -> None:
        self.count += 1
        self.total += size
        self.least = size if self.least is None else min(self.least, size)
        self.most = max(self.most, size)
        self.rounded[size if size < 1000 else round(size, 3 - len(str(size)))] += 1

    def add(self, other: Sizes) -> None:
        self.count += other.count
        self.total += other.total
        if other.least is not None:
            self.least = other.least if self.least is None else min(self.least, other.least)
        self.most = max(self.most, other.most)
        self.rounded.update(other.rounded)

    def median(self) -> int:
        """Of an even number the lower one of the two; 0 of none."""
        passed = 0
        for size in sorted(self.rounded):
            passed += self.rounded[size]
            if 2 * passed >= self.count:
                return max(self.least or 0, min(size, self.most))
        return 0

    def to_json(self) -> dict[str, int]:
        return {"min": self.least or 0, "median": self.median(), "max": self.most, "total": self.total}


SIZES = ("image_bytes", "shorter_side", "longer_side", "caption_characters")


@dataclass
class Contents:
    """What was found in one shard."""

    task: Task
    index_path: Path
    samples: int = 0
    bytes: int = 0
    fault: ShardFault | None = None
    extensions: Counter[str] = field(default_factory=Counter)
    unusable: list[Finding] = field(default_factory=list)
    undecodable: list[Finding] = field(default_factory=list)
    sizes: dict[str, Sizes] = field(default_factory=lambda: {name: Sizes() for name in SIZES})
    key_hash_N: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, dtype=np.uint64))

    def causes(self) -> Counter[str]:
        return Counter(finding.cause for finding in self.unusable)

    def to_json(self) -> dict[str, Any]:
        fault = self.fault and {"cause": str(self.fault.cause), "detail": self.fault.detail}
        return {
            "url": self.task.url,
            "name": self.task.name,
            "samples": self.samples,
            "bytes": self.bytes,
            "fault": fault,
            "extensions": dict(self.extensions),
            "causes": dict(self.causes()),
            "sizes": sizes_to_json(self.sizes),
            "unusable": [finding._asdict() for finding in self.unusable],
            "undecodable": [finding._asdict() for finding in self.undecodable],
        }


def sizes_to_json(sizes: Mapping[str, Sizes]) -> dict[str, dict[str, int]]:
    """Without those of which there are none, as of pixels where only headers are read."""
    return {name: of.to_json() for name, of in sizes.items() if of.count}


def check_shard(checks: Checks, task: Task, advance: Advance = lambda samples, unusable: None) -> Contents:
    """Indexes a shard and checks its samples in the order of the tar.

    Raises DataError where the shard's path or data.cache_folder is gone, OSError where an index cannot be written.
    """
    data, reader = checks.data, ShardReader(1, checks.data)
    shard = replace(index_shard(task.url, data), name=task.name)
    contents = Contents(task, shard.index_path, shard.count, fault=shard.fault)
    place = 0
    try:
        index = _index_of(shard, reader)
        if index is None:
            with suppress(OSError):
                contents.bytes = os.stat(task.url).st_size if is_local(task.url) else 0
            return contents
        if checks.beside and is_local(task.url):
            _save_beside(index, task.url)
        _count_members(index, contents)
        told, told_unusable = 0, 0
        for place in range(len(index)):
            _check_sample(checks, shard, reader, index.sample(place), place, contents)
            if place + 1 - told == _TOLD_TOGETHER or place + 1 == len(index):
                unusable = len(contents.unusable) + len(contents.undecodable)
                advance(place + 1 - told, unusable - told_unusable)
                told, told_unusable = place + 1, unusable
    except DataError as error:  # it was indexed, but can no longer be read, or is another file by now
        cause = Cause.UNREACHABLE_SHARD if isinstance(error, FetchError) else Cause.DAMAGED_SHARD
        contents.fault = ShardFault(cause, f"{error} (after {place} of {shard.count} samples)")
    return contents


def _index_of(shard: Shard, reader: ShardReader) -> ShardIndex | None:
    """None for a shard that could not be read at all."""
    index = load_index(shard.index_path)
    if index is None and shard.count:  # a crash left a broken file: a reader makes it anew, as in a run
        reader.members(shard, 0)
        index = load_index(shard.index_path)
    return index


def _save_beside(index: ShardIndex, url: str) -> None:
    path = Path(url + BESIDE)
    try:
        save_index(index, path)
    except OSError as error:
        raise OSError(f"--beside: {path} cannot be written: {error.strerror or error}") from error


def _count_members(index: ShardIndex, contents: Contents) -> None:
    """What the index alone tells of a shard: its size, members and keys."""
    contents.bytes = index.shard_bytes
    counts = np.bincount(index.extension_M, minlength=len(index.extensions)).tolist()
    contents.extensions.update({name: count for name, count in zip(index.extensions, counts, strict=True) if count})
    keys, ends = index.key_bytes.tobytes(), index.key_end_N.tolist()
    hashes = b"".join(
        hashlib.blake2b(keys[start:end], digest_size=8).digest()
        for start, end in zip([0, *ends[:-1]], ends, strict=False)
    )
    contents.key_hash_N = np.frombuffer(hashes, dtype=np.uint64)


def _check_sample(
    checks: Checks, shard: Shard, reader: ShardReader, members: Members, place: int, contents: Contents
) -> None:
    sizes = contents.sizes
    try:
        if checks.depth == HEADERS:
            sizes["image_bytes"].note(_image_bytes(members, checks.data))
            return
        sample = read_sample(reader, shard, members, checks.data, with_category=contents.task.heldout)
    except UnusableError as error:
        contents.unusable.append(Finding(place, members.key, str(error.cause), error.detail))
        return
    if checks.depth == PIXELS and (refused := _refused(sample)):
        contents.undecodable.append(Finding(place, members.key, str(refused.cause), refused.detail))
    sizes["image_bytes"].note(len(sample.image))
    shorter, longer = sorted((sample.header.height, sample.header.width))
    sizes["shorter_side"].note(shorter)
    sizes["longer_side"].note(longer)
    for caption in sample.captions:
        sizes["caption_characters"].note(len(caption))


def _image_bytes(members: Members, data: Data) -> int:
    """Those checks of `read_sample` that read no byte. Raises `UnusableError`."""
    if members.repeated:
        raise UnusableError(Cause.DUPLICATE_KEY)
    image = image_extension(members, data)
    if data.caption_extension not in members.extents:
        raise UnusableError(Cause.MISSING_CAPTION, f"members: {', '.join(members.extents)}")
    for extension in (data.caption_extension, image):
        if members.extents[extension][1] == LINK:
            raise UnusableError(Cause.LINKED_MEMBER, f"{members.key}.{extension}")
    size = members.extents[image][1]
    if size > data.max_image_bytes:
        raise UnusableError(Cause.TOO_MANY_BYTES, f"{size} bytes, more than {data.max_image_bytes}")
    if size == 0:
        raise UnusableError(Cause.EMPTY_IMAGE)
    return size


def _refused(sample: Sample) -> UnusableError | None:
    from cmpt.data.decode import decode_upright  # with torch, which takes every process seconds to import

    try:
        decode_upright(sample.image, sample.header)
    except UnusableError as error:
        return error
    return None


class SharedKey(NamedTuple):
    """A key that comes in several shards, the first two of them."""

    key: str
    shards: tuple[int, int]  # numbers of shards, as `SharedKeys.add` was given them


_BUCKETS_LOG2 = 6
_KEY = np.dtype([("hash", np.uint64), ("shard", np.int32), ("place", np.int32)])


class SharedKeys:
    """Finds keys that come in several shards.

    16 bytes a sample in files without a name, in buckets by the keys' hashes: of 10**8 samples about 100 MB are in
    memory at a time. Different keys of one hash, which would count as shared, come once in 3,700 sets of that size.
    """

    def __init__(self, folder: Path) -> None:
        """`folder`: where the files are. Raises OSError."""
        self._files = [tempfile.TemporaryFile(dir=folder) for _ in range(1 << _BUCKETS_LOG2)]  # noqa: SIM115
        self._index_paths: dict[int, Path] = {}

    def add(self, shard: int, contents: Contents) -> None:
        if not len(contents.key_hash_N):
            return
        self._index_paths[shard] = contents.index_path
        hash_N, place_N = np.unique(contents.key_hash_N, return_index=True)  # repetitions within a shard are no matter
        rows = np.empty(len(hash_N), dtype=_KEY)
        rows["hash"], rows["shard"], rows["place"] = hash_N, shard, place_N
        buckets = np.arange(1, len(self._files), dtype=np.uint64) << np.uint64(64 - _BUCKETS_LOG2)
        for file, part in zip(self._files, np.split(rows, np.searchsorted(hash_N, buckets)), strict=True):
            file.write(part.tobytes())

    def find(self, most: int = 3) -> tuple[int, list[SharedKey]]:
        """How many keys are in several shards, and the first of them. The files are gone after that."""
        count, found = 0, list[tuple[int, int, int]]()
        for file in self._files:
            with file:
                file.seek(0)
                rows = np.frombuffer(file.read(), dtype=_KEY)
            rows = rows[np.lexsort((rows["shard"], rows["hash"]))]
            same = rows["hash"][1:] == rows["hash"][:-1]
            begin_K = np.flatnonzero(same & ~np.concatenate([[False], same])[:-1])
            count += len(begin_K)
            begin_K = begin_K[np.lexsort((rows["place"][begin_K], rows["shard"][begin_K]))[:most]]
            at_K, place_K, other_K = rows["shard"][begin_K], rows["place"][begin_K], rows["shard"][begin_K + 1]
            pairs = zip(at_K.tolist(), place_K.tolist(), other_K.tolist(), strict=True)
            found = sorted([*found, *pairs])[:most]
        return count, [SharedKey(self._key(at, place), (at, other)) for at, place, other in found]

    def _key(self, shard: int, place: int) -> str:
        index = load_index(self._index_paths[shard])
        return index.sample(place).key if index is not None else f"sample {place}"
