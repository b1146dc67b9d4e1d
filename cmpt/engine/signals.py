"""SIGTERM and SIGINT end a run at the next step boundary, with a checkpoint."""

from __future__ import annotations

import signal
import time
from types import FrameType

_LAUNCHER_REPEATS_S = 10.0


class StopSignals:
    """Use as a context manager. `received` is the first signal's number, or None.

    A SIGINT that comes ten seconds or more after the first signal ends the process at once. Earlier ones, and every
    further SIGTERM, change nothing: launchers and schedulers repeat a signal to processes that have it already.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._first_time = 0.0

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._first_time = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._first_time >= _LAUNCHER_REPEATS_S:
            raise KeyboardInterrupt
