"""Where the images of an evaluation set lie, in tars or in folders, and the small text files beside them."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from cmpt.data.index import Members, ShardIndex, build_index
from cmpt.data.tar import LINK
from cmpt.data.validate import DataError

IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")
"""Of members of a tar; the first that a sample has counts, as in CLIP_benchmark's reader."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Of files in an image folder."""
_NSHARDS, _SIZES = "nshards.txt", "sizes.json"


class Store(Protocol):
    """N images in a fixed order, read one by one; safe from several threads."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> bytes:
        """The bytes of one image. Raises OSError."""
        ...


@dataclass(frozen=True)
class Shard:
    """One tar of a split."""

    path: Path
    index: ShardIndex

    def samples(self) -> Iterator[Members]:
        return (self.index.sample(place) for place in range(len(self.index)))

    def member(self, sample: Members, extensions: Sequence[str]) -> str | None:
        """The first of the extensions that a sample has.

        Raises DataError where the member is a link, whose bytes lie elsewhere.
        """
        for extension in extensions:
            if extension in sample.extents:
                if sample.extents[extension][1] == LINK:
                    raise DataError(f"{self.path}/{sample.key}.{extension}: is a link, it holds no bytes")
                return extension
        return None


class TarImages:
    """The images of all samples of some tars, which lie below `folder`."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        """Raises DataError where a sample has no image."""
        self._folder, self._shards = folder, shards
        self._ends = list(accumulate(len(shard.index) for shard in shards))
        for shard in shards:
            for sample in shard.samples():
                if shard.member(sample, IMAGE_EXTENSIONS) is None:
                    formats = ", ".join(f".{name}" for name in IMAGE_EXTENSIONS)
                    raise DataError(f"{shard.path}/{sample.key}: has no image, expected one of {formats}")

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        shard, sample, extension = self._find(index)
        return f"{shard.path.relative_to(self._folder)}/{sample.key}.{extension}"

    def read(self, index: int) -> bytes:
        shard, sample, extension = self._find(index)
        offset, size = sample.extents[extension]
        descriptor = os.open(shard.path, os.O_RDONLY)
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def _find(self, index: int) -> tuple[Shard, Members, str]:
        number = bisect_right(self._ends, index)
        shard = self._shards[number]
        sample = shard.index.sample(index - (self._ends[number - 1] if number else 0))
        extension = shard.member(sample, IMAGE_EXTENSIONS)
        assert extension is not None
        return shard, sample, extension


@dataclass(frozen=True)
class FileImages:
    """Images that are files."""

    paths: list[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def read(self, index: int) -> bytes:
        return self.paths[index].read_bytes()


def open_split(folder: Path) -> list[Shard]:
    """The tars of one split of a webdataset folder: 0.tar, 1.tar, ..., as many as its nshards.txt says.

    Where there is a sizes.json (shard -> samples, as open_clip reads it), the numbers must agree. Raises DataError.
    """
    counts = folder / _NSHARDS
    text = read_text(counts).strip()
    if not text.isdecimal() or int(text) == 0:
        raise DataError(f"{counts}: {text[:50]!r} is not a number of shards")
    expected = {f"{number}.tar" for number in range(int(text))}
    there = {path.name for path in folder.glob("*.tar")}
    if expected - there:
        raise DataError(f"{folder / _first(expected - there)}: is missing, {counts} says {text} shards")
    if there - expected:
        raise DataError(f"{counts}: says {text} shards, but there is also {_first(there - expected)}")
    shards = []
    for number in range(int(text)):
        path = folder / f"{number}.tar"
        try:
            index = build_index(path, str(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        if index.fault:
            raise DataError(f"{path}: {index.fault.detail}")
        if len(index.repeated_R):
            raise DataError(f"{path}: two samples are called {index.sample(int(index.repeated_R[0])).key}")
        shards.append(Shard(path, index))
    if (folder / _SIZES).exists():
        sizes = read_json(folder / _SIZES)
        for shard in shards:
            if sizes.get(shard.path.name) != len(shard.index):
                stated = f"says {sizes.get(shard.path.name)} samples of {shard.path.name}"
                raise DataError(f"{folder / _SIZES}: {stated}, which holds {len(shard.index)}")
    return shards


def read_members(shard: Shard, extension: str) -> list[str]:
    """That member of every sample of a shard, as text.

    Raises DataError where a sample has none, or bytes that are no UTF-8.
    """
    texts = []
    with shard.path.open("rb") as file:
        for sample in shard.samples():
            if shard.member(sample, [extension]) is None:
                raise DataError(f"{shard.path}/{sample.key}: has no .{extension} member")
            offset, size = sample.extents[extension]
            try:
                texts.append(os.pread(file.fileno(), size, offset).decode())
            except UnicodeDecodeError as error:
                raise DataError(f"{shard.path}/{sample.key}.{extension}: is not UTF-8 text") from error
    return texts


def read_text(path: Path) -> str:
    """A small text file. Raises DataError."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{path}: is missing") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, stripped; empty ones may only stand at the end. Raises DataError."""
    lines = [line.strip() for line in read_text(path).rstrip().split("\n")]
    if "" in lines:
        raise DataError(f"{path}: line {lines.index('') + 1} is empty")
    return lines


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises DataError."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object")
    return value


def _first(names: set[str]) -> str:
    """The least, shorter ones first: 2.tar before 10.tar."""
    return min(names, key=lambda name: (len(name), name))
