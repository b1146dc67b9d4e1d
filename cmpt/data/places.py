"""Where the threads of a loader are, so that a stall can name its place."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Stall(NamedTuple):
    """A batch that has been waited for a long time."""

    waited_s: float
    place: str  # "fetching", "reading", "decoding", "tokenizing", or "nowhere" where no thread is at work
    detail: str  # the shard, where the place has one
    place_s: float  # how long the thread that is longest at one thing has been at it

    def __str__(self) -> str:
        where = f"{self.place} {self.detail}".strip()
        return f"has waited {self.waited_s:.0f} s for data; longest at one thing: {where}, {self.place_s:.0f} s"


class Places:
    """What every thread is doing now, and since when. Costs about a microsecond for each thing done."""

    def __init__(self) -> None:
        self._now: dict[int, tuple[float, str, str]] = {}

    @contextmanager
    def at(self, place: str, detail: str = "") -> Iterator[None]:
        thread = threading.get_ident()
        self._now[thread] = (time.perf_counter(), place, detail)
        try:
            yield
        finally:
            self._now.pop(thread, None)

    def stall(self, waited_s: float) -> Stall:
        """What has been going on longest of all that is going on now."""
        began, place, detail = min(list(self._now.values()), default=(time.perf_counter(), "nowhere", ""))
        return Stall(waited_s, place, detail, time.perf_counter() - began)
