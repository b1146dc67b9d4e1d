"""SIGTERM, SIGINT and the file RUN/stop end a run at the next step boundary, with a checkpoint."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

_LAUNCHER_REPEATS_S = 10.0


class StopSignals:
    """Use as a context manager. `received` is the first signal's number, or None.

    A file that appears at `stop_file` counts as SIGTERM: over several hosts no launcher hands on a signal cleanly. One
    that is there at the start is old and removed. Give it to one rank only; all ranks stop with it.

    A SIGINT that comes ten seconds or more after the first signal ends the process at once. Earlier ones, and every
    further SIGTERM, change nothing: launchers and schedulers repeat a signal to processes that have it already.
    """

    def __init__(self, stop_file: Path | None = None) -> None:
        self._stop_file = stop_file
        self._received: int | None = None
        self._first_time = 0.0

    @property
    def received(self) -> int | None:
        if self._received is None and self._stop_file is not None and self._stop_file.exists():
            self._received = signal.SIGTERM
        return self._received

    def __enter__(self) -> StopSignals:
        if self._stop_file is not None:
            self._stop_file.unlink(missing_ok=True)
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received, self._first_time = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._first_time >= _LAUNCHER_REPEATS_S:
            raise KeyboardInterrupt
