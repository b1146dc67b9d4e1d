"""Whole shards from URLs and slow paths in one bounded folder, which all processes of a host share.

Here: who fetches a shard, the tries and what they must bring. The folder is cache_folder.py, one try opener.py.
"""

from __future__ import annotations

import hashlib
import os
import queue
import random
import threading
import weakref
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from cmpt.data.cache_folder import CacheFolder, HeldShard, NoRoom, Part, Wanted
from cmpt.data.opener import AttemptError, FetchError, HostError, receive, refuse_pipe
from cmpt.data.validate import DataError
from cmpt.recipe import schema

__all__ = ["FetchError", "HeldShard", "ShardCache", "default_backoff", "file_digest", "longest_fetch_s"]

_TAR_END = bytes(1024)
_GROWTH_BYTES = 2**24  # room taken at once for a shard of unknown size, where there is plenty
_LOOK_S = 0.05  # how often a shard that someone else fetches is looked for
_MOST_WAIT_S, _MOST_JITTER = 60, 1.25
_JOIN_S = 10.0  # a worker ends in a tenth of a second, unless its child hangs in the kernel

_jitter = random.Random()  # apart from the process's generator, whose draws may mean something


def default_backoff(attempt: int) -> float:
    """Seconds to wait after failed attempt 1, 2, ...: 1, 2, 4, ... up to a minute, and up to a quarter more."""
    return _least_wait_s(attempt) * _jitter.uniform(1, _MOST_JITTER)


def _least_wait_s(attempt: int) -> float:
    return min(_MOST_WAIT_S, 2 ** min(attempt - 1, 6))


def longest_fetch_s(data: schema.Data) -> float:
    """How long all attempts at one shard may take, in seconds: each brings no byte until its time is up."""
    waits = _MOST_JITTER * sum(map(_least_wait_s, range(1, data.fetch_attempts)))
    return data.fetch_attempts * data.fetch_timeout_s + waits


def file_digest(path: str | os.PathLike[str]) -> str:
    """blake2b of the whole file, 16 bytes in hex. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, _hasher).hexdigest()


class ShardCache:
    """Fetches shards into a bounded folder, keeps them while there is room, and retries what fails.

    Safe to share between threads; a process that is forked makes its own.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        *,
        workers: int,
        attempts: int,
        timeout_s: float,
        allow_pipe: bool,
        waits: Callable[[int], float] = default_backoff,
    ) -> None:
        """`workers`: shards that are fetched ahead at a time. `waits`: seconds after failed attempt 1, 2, ...

        `timeout_s`: a try that brings no byte for so long has failed. Raises `DataError` where the folder cannot be
        made or does not take locks.
        """
        self._folder = CacheFolder(folder, limit_bytes)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"data.cache_folder cannot be made: {error}") from error
        try:
            self._folder.check()
        except OSError as error:
            raise DataError(f"data.cache_folder cannot be written to and locked: {error}") from error
        self._workers, self._attempts, self._timeout_s = workers, attempts, timeout_s
        self._allow_pipe, self._waits = allow_pipe, waits
        self._lock = threading.Lock()
        self._asked: set[str] = set()
        self._errors: dict[str, FetchError] = {}  # the last of each shard, for those who waited for its fetch
        self._queue: queue.SimpleQueue[Wanted | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()
        self._end = weakref.finalize(self, _end, self._ended, self._queue, self._threads)  # also when Python exits

    @staticmethod
    def of(data: schema.Data) -> ShardCache:
        """The cache that a recipe asks for. Errors as of the constructor."""
        return ShardCache(
            Path(data.cache_folder).expanduser() / "shards",
            int(data.cache_limit_bytes),
            workers=data.fetch_workers,
            attempts=data.fetch_attempts,
            timeout_s=data.fetch_timeout_s,
            allow_pipe=data.allow_pipe,
        )

    def hold(self, url: str, size: int | None = None, digest: str | None = None) -> HeldShard:
        """The shard at a URL or path, fetched now if it is not there, waited for if someone else is at it.

        `size` (bytes) and `digest` (`file_digest`) are what a fetch must bring; a finished file must have the size.
        Without either a shard must end as a tar does, or be cut at the same byte twice in a row: then that is how it
        lies at its source. Raises `FetchError`; `HostError` where this host could have no shard at all; `DataError` for
        a pipe that is not allowed.
        """
        refuse_pipe(url, self._allow_pipe)
        wanted = Wanted(url, size, digest)
        known_error = self._errors.get(url)
        try:
            while (found := self._folder.claim(wanted)) is None:
                if self._ended.wait(_LOOK_S):
                    raise _closed(url)
            if isinstance(found, HeldShard):
                return found
            error = self._errors.get(url)
            if error is not known_error:  # a thread of this process made all attempts meanwhile
                self._folder.drop(found)
                raise FetchError(str(error))
            return self._fetch(found, wanted, waited_for=True)
        except NoRoom as error:
            raise HostError(f"{url}: {error}") from None
        except OSError as error:
            raise HostError(f"{url}: cannot be kept in data.cache_folder: {error}") from error

    def ahead(self, url: str, size: int | None = None, digest: str | None = None) -> None:
        """Has a background worker fetch a shard; returns at once. `size` and `digest` as of `hold`.

        Errors are left for `hold` to meet. A cache in which all is in use is no error: the worker leaves the shard.
        """
        with self._lock:
            if self._ended.is_set() or url in self._asked:
                return
            self._asked.add(url)
            if len(self._threads) < self._workers:
                thread = threading.Thread(target=self._work, daemon=True, name="cmpt-fetch")
                self._threads.append(thread)
                thread.start()
        self._queue.put(Wanted(url, size, digest))

    def close(self) -> None:
        """Ends the workers and all fetches; whoever is in `hold` gets a `FetchError` within about a tenth of a second.

        What is held stays held, and what is in the cache can still be had.
        """
        self._end()

    def _work(self) -> None:
        while (wanted := self._queue.get()) is not None and not self._ended.is_set():
            with suppress(DataError, OSError, NoRoom):  # hold() of the same shard meets them again
                refuse_pipe(wanted.url, self._allow_pipe)
                found = self._folder.claim(wanted)
                if isinstance(found, Part):
                    found = self._fetch(found, wanted, waited_for=False)
                if found is not None:
                    found.close()
            with self._lock:
                self._asked.discard(wanted.url)

    def _fetch(self, part: Part, wanted: Wanted, waited_for: bool) -> HeldShard:
        """All attempts. `waited_for`: also where all of the cache is in use, which may end."""
        try:
            return self._make_attempts(part, wanted, waited_for)
        except FetchError as error:
            if not self._ended.is_set():
                self._errors[wanted.url] = FetchError(str(error))  # without the frames of this one
            raise
        finally:
            self._folder.drop(part)

    def _make_attempts(self, part: Part, wanted: Wanted, waited_for: bool) -> HeldShard:
        cause, cut_at = "", None
        for attempt in range(1, self._attempts + 1):
            if attempt > 1:
                os.ftruncate(part.descriptor, 0)  # while this one waits, others may have the room
                self._ended.wait(self._waits(attempt - 1))
            if self._ended.is_set():
                raise _closed(wanted.url)
            try:
                received, digest = self._receive(part, wanted)
            except AttemptError as error:
                cause, cut_at = str(error), None
            except NoRoom as error:
                if not (waited_for and error.may_change) or attempt == self._attempts:
                    raise
                cause, cut_at = str(error), None
            else:
                cause = _mismatch(part, wanted, received, digest)
                if not cause or received == cut_at:
                    return self._folder.finish(part, received)
                cut_at = received if wanted.size is None and wanted.digest is None else None
        if self._ended.is_set():
            raise _closed(wanted.url)
        raise FetchError(f"{wanted.url}: cannot be fetched, attempts: {self._attempts}, the last one: {cause}")

    def _receive(self, part: Part, wanted: Wanted) -> tuple[int, str | None]:
        """One attempt: the number of bytes that it brought into the part, and their digest where one is stated."""
        received, room = 0, 0
        hasher = _hasher() if wanted.digest is not None else None
        if wanted.size is not None:
            room = self._folder.reserve(part, wanted.size, wanted.size)
        chunks = receive(wanted.url, timeout_s=self._timeout_s, allow_pipe=self._allow_pipe, ended=self._ended)
        with closing(chunks):
            for chunk in chunks:
                end = received + len(chunk)
                if wanted.size is not None and end > wanted.size:
                    raise AttemptError(_another(f"more than {wanted.size} bytes", f"{wanted.size} bytes"))
                if end > room:
                    room = self._folder.reserve(part, end, end + _GROWTH_BYTES)
                _write(part.descriptor, chunk, received)
                if hasher is not None:
                    hasher.update(chunk)
                received = end
        return received, hasher.hexdigest() if hasher is not None else None


def _mismatch(part: Part, wanted: Wanted, received: int, digest: str | None) -> str:
    """What is wrong with the bytes of an attempt; empty if nothing is."""
    if wanted.size is not None and received != wanted.size:
        return _another(f"{received} bytes", f"{wanted.size} bytes")
    if digest != wanted.digest:
        return _another(f"{received} bytes with digest {digest}", f"digest {wanted.digest}")
    if wanted.size is None and wanted.digest is None:
        end = os.pread(part.descriptor, len(_TAR_END), max(0, received - len(_TAR_END)))
        if received % 512 or end != _TAR_END:
            return f"{received} bytes without the end mark of a tar"
    return ""


def _another(received: str, stated: str) -> str:
    return f"the shard there is another one than was indexed: {received}, the index says {stated}"


def _closed(url: str) -> FetchError:
    return FetchError(f"{url}: the fetch was ended")


def _hasher() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


def _write(descriptor: int, chunk: bytes, offset: int) -> None:
    written = 0
    while written < len(chunk):
        written += os.pwrite(descriptor, memoryview(chunk)[written:], offset + written)


def _end(ended: threading.Event, wanted: queue.SimpleQueue[Wanted | None], threads: list[threading.Thread]) -> None:
    ended.set()
    for _ in threads:
        wanted.put(None)
    for thread in threads:
        thread.join(_JOIN_S)
