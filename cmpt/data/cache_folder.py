"""The folder of the cache: its files, their locks, and the limit on their bytes.

Locks, all of them flock (per open file: threads exclude each other as processes do; the kernel drops those of a process
that was killed):

- the folder's, on the file `lock`, held for moments: names appear and vanish and files grow only under it. So no file
  is evicted between its opening and its locking, and the sum of all sizes is known whenever something grows;
- of a file that is being fetched, exclusive: one fetch per shard on a host. A part that nobody has locked was left
  behind by a process that died;
- of a finished file, shared, by everyone who holds it: what can be locked exclusively is not in use and may be evicted.

Only files with a name of the cache's own are counted and evicted. Nothing is synced to the disk: a killed process loses
no byte that was written, and a part gets its final name only when it is whole. After a power cut a file may be shorter
than it was, which `claim` finds where the size is stated.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cmpt.data.opener import FetchError
from cmpt.recipe.paths import is_local, resolve_path

_OWN_NAME = re.compile(r"[0-9a-f]{32}(-.*|\.part)")


class Wanted(NamedTuple):
    """A shard that is wanted, and what is known of it."""

    url: str
    size: int | None  # in bytes
    digest: str | None


class HeldShard:
    """A shard in the cache that nobody evicts while it is held: until `close`, or until nothing refers to this."""

    def __init__(self, path: Path, size: int, descriptor: int) -> None:
        """Takes over `descriptor`, whose shared lock is the hold. `size` in bytes."""
        self.path, self.size = path, size
        self._release = weakref.finalize(self, os.close, descriptor)
        self._release.atexit = False

    def close(self) -> None:
        """Lets go of the shard; a second time does nothing."""
        self._release()

    def __enter__(self) -> HeldShard:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class Part:
    """A file that is being fetched; whoever has one has its exclusive lock."""

    path: Path
    final: Path
    descriptor: int


class NoRoom(Exception):  # noqa: N818
    """The limit leaves no room for more bytes; `may_change`: when others let go of what they hold or fetch."""

    def __init__(self, message: str, may_change: bool) -> None:
        super().__init__(message)
        self.may_change = may_change


class CacheFolder:
    """Every method may raise OSError, where the folder cannot be written to."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes

    def check(self) -> None:
        """Raises OSError where the folder cannot be made or takes no locks."""
        with self._locked():
            pass

    def claim(self, wanted: Wanted) -> HeldShard | Part | None:
        """The shard if it is there, else the right and duty to fetch it, or None while someone else has that.

        Raises `FetchError` where a shard of another size than the stated one is in use.
        """
        name = _name(wanted.url)
        final, part = self._folder / name, self._folder / f"{name[:32]}.part"
        with self._locked():
            held = _hold(final)
            if held is not None:
                if wanted.size in (None, held.size):
                    _touch(final)
                    return held
                held.close()
                if not _is_free(final):
                    raise FetchError(
                        f"{wanted.url}: another shard than was indexed is in use under this URL: {held.size} bytes, "
                        f"the index says {wanted.size}"
                    )
                os.unlink(final)
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
            if not _lock(descriptor, fcntl.LOCK_EX):
                os.close(descriptor)
                return None
            os.ftruncate(descriptor, 0)  # of someone who died
            return Part(part, final, descriptor)

    def reserve(self, part: Part, needed: int, wished: int) -> int:
        """Lets a part grow to `needed` bytes, evicting what must go, or up to `wished` where there is plenty of room.

        Returns its new size. Raises `NoRoom`, and evicts nothing, where all that is unused would not suffice.
        """
        with self._locked():
            others = [file for file in self._files() if file[0] != part.path]
            over = sum(status.st_size for _, status in others) + needed - self._limit_bytes
            if over > 0:
                over = self._evict(others, over, needed)
            growth = min(wished - needed, -over, self._limit_bytes // 256)
            os.ftruncate(part.descriptor, needed + growth)
        return needed + growth

    def _evict(self, others: list[tuple[Path, os.stat_result]], over: int, needed: int) -> int:
        """Makes `over` bytes of room; returns minus the bytes that were freed beyond that."""
        leaving: list[Path] = []
        used: list[int] = []
        fetching: list[int] = []
        # What is left of dead fetches goes first, then what was used longest ago.
        for path, status in sorted(others, key=lambda file: (file[0].suffix != ".part", file[1].st_mtime_ns)):
            if over <= 0:
                break
            if _is_free(path):  # and as nobody locks without the folder's lock, it stays free
                leaving.append(path)
                over -= status.st_size
            else:
                (fetching if path.suffix == ".part" else used).append(status.st_size)
        if over > 0:
            raise NoRoom(
                f"data.cache_limit_bytes = {self._limit_bytes} is too small: this shard needs {needed} bytes, "
                f"{len(used)} shards in use have {sum(used)}, {len(fetching)} others being fetched {sum(fetching)}",
                may_change=needed <= self._limit_bytes,
            )
        for path in leaving:
            os.unlink(path)
        return over

    def finish(self, part: Part, size: int) -> HeldShard:
        """Gives a part of `size` bytes its final name; the caller drops the part all the same."""
        with self._locked():
            os.ftruncate(part.descriptor, size)
            os.rename(part.path, part.final)
            _touch(part.final)
            # A change of the kind of a lock may let others in between: here none, they need the folder's lock.
            fcntl.flock(part.descriptor, fcntl.LOCK_SH)
            return HeldShard(part.final, size, os.dup(part.descriptor))

    def drop(self, part: Part) -> None:
        """Removes a part, unless it has its final name now, and closes its descriptor."""
        try:
            with self._locked():
                if _is_at(part.path, part.descriptor):
                    os.unlink(part.path)
        finally:
            os.close(part.descriptor)

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                # Whatever else lies here is somebody's, and its bytes are not the cache's.
                if _OWN_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    found.append((Path(entry.path), entry.stat(follow_symlinks=False)))
        return found

    @contextmanager
    def _locked(self) -> Iterator[None]:
        path = self._folder / "lock"
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # the first time, or somebody removed the cache by hand
                self._folder.mkdir(parents=True, exist_ok=True)
                continue
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(path, descriptor):
                break
            os.close(descriptor)
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # not by closing alone: a process forked meanwhile has it open too
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the path still names the file that is open."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _name(url: str) -> str:
    """Which shard it is, as a digest, and its base name for who looks into the folder; no signature of the URL."""
    base = re.split("[?#]", url)[0].rstrip("/").rpartition("/")[2]
    which = url
    if is_local(url):  # a file that was written anew is another shard, also with the same size
        with suppress(OSError):
            which += f"\0{os.stat(resolve_path(url)).st_mtime_ns}"
    return (
        f"{hashlib.blake2b(which.encode(), digest_size=16).hexdigest()}-{re.sub(r'[^A-Za-z0-9._-]', '_', base)[-100:]}"
    )


def _touch(path: Path) -> None:
    """Used now: evicted late."""
    now = time.time_ns()  # the kernel's own time of a file is as coarse as its ticks
    os.utime(path, ns=(now, now))


def _lock(descriptor: int, kind: int) -> bool:
    """Takes a lock if nobody has one against it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _hold(path: Path) -> HeldShard | None:
    """The finished file there, if there is one; only under the folder's lock, where nobody locks it exclusively."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    held = HeldShard(path, os.fstat(descriptor).st_size, descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return held


def _is_free(path: Path) -> bool:
    """Whether nobody holds or fetches the file there; only under the folder's lock."""
    descriptor = os.open(path, os.O_RDWR)  # over NFS an exclusive lock needs a file that is open for writing
    try:
        return _lock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)
