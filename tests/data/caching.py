"""What the tests of the cache of shards share: shards, a server, caches that are closed, looks at the outside."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.flaky_server import FlakyServer
from data.making import write_tar

from cmpt.data.cache import ShardCache

ATTEMPTS = 4
CacheMaker = Callable[..., ShardCache]


def make_shard(path: Path, number: int, size: int = 30_000) -> bytes:
    path.parent.mkdir(exist_ok=True)
    return write_tar(path, [("000000", {"jpg": random.Random(number).randbytes(size)})]).read_bytes()


def serve(folder: Path) -> Iterator[FlakyServer]:
    folder.mkdir()
    server = FlakyServer(folder)
    yield server
    server.close()


def make_caches(folder: Path) -> Iterator[CacheMaker]:
    """A function that makes caches in one folder, which are closed afterwards."""
    made = []

    def make(limit_bytes: int = 10_000_000, timeout_s: float = 5, allow_pipe: bool = False, **more: Any) -> ShardCache:
        settings = {"workers": 2, "attempts": ATTEMPTS, "waits": lambda attempt: 0.01, **more}
        made.append(ShardCache(folder, limit_bytes, timeout_s=timeout_s, allow_pipe=allow_pipe, **settings))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def own_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != "lock")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def command_lines() -> list[str]:
    lines = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                lines.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
            except OSError:
                continue
    return lines


def children() -> int:
    own = str(os.getpid())
    count = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                count += (entry / "stat").read_text().rpartition(")")[2].split()[1] == own
            except OSError:
                continue
    return count
