"""The index of one shard: where every member of every sample lies, made in one walk over the tar's headers."""

from __future__ import annotations

import os
import tempfile
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cmpt.data.tar import TarError, walk_members
from cmpt.data.validate import Cause

INDEX_FORMAT = 2  # part of every index's name: raise it when the arrays change
BESIDE = f".index{INDEX_FORMAT}.npz"  # what an index beside its shard is called: the shard's name and this


class ShardFault(NamedTuple):
    """What is wrong with a shard as a whole."""

    cause: Cause
    detail: str


@dataclass(frozen=True)
class Members:
    """One sample of a shard: its key and where its members lie."""

    key: str
    extents: dict[str, tuple[int, int]]  # extension -> (offset, size) in bytes; size tar.LINK for a link
    repeated: bool = False  # an earlier sample of the shard has the same key


@dataclass(frozen=True)
class ShardIndex:
    """Samples of one shard in tar order, as arrays: N samples with M members in all, 85 bytes a sample of 3 members."""

    key_bytes: NDArray[np.uint8]  # all keys, one after the other
    key_end_N: NDArray[np.int64]
    repeated_R: NDArray[np.int64]  # places of samples whose key came before
    extensions: tuple[str, ...]  # the distinct ones
    member_end_N: NDArray[np.int64]  # members of sample i are member_end_N[i-1] … member_end_N[i]-1
    extension_M: NDArray[np.int32]
    offset_M: NDArray[np.int64]
    size_M: NDArray[np.int64]
    shard_bytes: int
    fault: ShardFault | None = None
    digest: str | None = None  # of the whole shard (cache.file_digest), where it was read whole for another reason

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
        extents = {self.extensions[extension]: (offset, size) for extension, offset, size in rows}
        return Members(key, extents, bool(len(self.repeated_R)) and place in self.repeated_R)


def build_index(path: Path, url: str) -> ShardIndex:
    """Walks the tar once, headers only.

    A sample is a run of members with the same key: the path up to the first dot of the base name; the extension is
    the rest in lower case, as webdataset defines both. An extension that comes a second time begins a new sample, so
    that nothing is dropped unseen. A shard that is cut short or damaged gives the samples before the damage, and the
    fault. Raises OSError where the file cannot be read.
    """
    keys: list[bytes] = []
    known: set[bytes] = set()
    repeated: list[int] = []
    member_end: list[int] = []
    extension_ids: dict[str, int] = {}
    extensions: list[int] = []
    offsets: list[int] = []
    sizes: list[int] = []
    current: str | None = None
    seen: set[str] = set()
    fault = None
    try:
        for name, offset, size in walk_members(path, url):
            folder, slash, base = name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if not dot or not stem:  # webdataset skips these too
                continue
            key, extension = folder + slash + stem, extension.lower()
            if key != current or extension in seen:
                encoded = key.encode()
                if encoded in known:
                    repeated.append(len(keys))
                known.add(encoded)
                keys.append(encoded)
                member_end.append(len(offsets))
                current, seen = key, set()
            seen.add(extension)
            extensions.append(extension_ids.setdefault(extension, len(extension_ids)))
            offsets.append(offset)
            sizes.append(size)
            member_end[-1] = len(offsets)
    except TarError as error:
        fault = ShardFault(error.cause, error.detail)
    if not keys and fault is None:
        fault = ShardFault(Cause.EMPTY_SHARD, "holds no samples")
    return ShardIndex(
        key_bytes=np.frombuffer(b"".join(keys), dtype=np.uint8),
        key_end_N=np.cumsum([len(key) for key in keys], dtype=np.int64),
        repeated_R=np.array(repeated, dtype=np.int64),
        extensions=tuple(extension_ids),
        member_end_N=np.array(member_end, dtype=np.int64),
        extension_M=np.array(extensions, dtype=np.int32),
        offset_M=np.array(offsets, dtype=np.int64),
        size_M=np.array(sizes, dtype=np.int64),
        shard_bytes=os.stat(path).st_size,
        fault=fault,
    )


_ARRAYS = ("key_bytes", "key_end_N", "repeated_R", "member_end_N", "extension_M", "offset_M", "size_M")
_TEXTS = ("extensions", "fault", "digest")
# NumPy parses the header of every array with `ast`; with several threads at it CPython 3.11 raises a SystemError now
# and then (python/cpython issue 106905; seen once with 3.11.7).
_PARSING = threading.Lock()


def save_index(index: ShardIndex, path: Path) -> None:
    """Writes it whole or not at all. Raises OSError."""
    texts = {"extensions": index.extensions, "fault": index.fault or (), "digest": (index.digest or "",)}
    arrays = {name: getattr(index, name) for name in _ARRAYS} | {"shard_bytes": np.int64(index.shard_bytes)}
    arrays |= {name: np.frombuffer("\0".join(texts[name]).encode(), dtype=np.uint8) for name in _TEXTS}
    path.parent.mkdir(exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, **arrays)
        os.chmod(temporary, 0o644)  # mkstemp's files are their owner's alone; others may share the folder
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_index(path: Path) -> ShardIndex | None:
    """The index in a file; None where there is none, or where a crash left a broken one."""
    try:
        with _PARSING, np.load(path, allow_pickle=False) as file:
            texts = {name: file[name].tobytes().decode().split("\0") for name in _TEXTS}
            return ShardIndex(
                extensions=tuple(texts["extensions"]) if len(file["member_end_N"]) else (),
                fault=ShardFault(Cause(texts["fault"][0]), texts["fault"][1]) if len(texts["fault"]) > 1 else None,
                digest=texts["digest"][0] or None,
                shard_bytes=int(file["shard_bytes"]),
                **{name: file[name] for name in _ARRAYS},
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
