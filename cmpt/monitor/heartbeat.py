"""What joins a rank and its guardian: a page of memory with a heartbeat and the newest mark of the main thread.

Writing to it is a few stores into memory, without system call or lock: it costs nothing in a step, and a rank that is
stopped in the middle of it leaves a page that can still be read. Standard library only, for the guardian's sake.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import struct
import time
from pathlib import Path
from typing import Any, NamedTuple

PAGE_BYTES = 4096
STACK_S = 2.0
"""How long a rank may take to dump its stack."""
_STACK_LINES = 200
_PLACE_BYTES = 64
# Native sizes, so that a counter is stored in one piece: beats, then the number of the newest mark.
_COUNTER = struct.Struct("@Q")
_BEATS_AT, _NUMBER_AT = 0, 8
# Number, step, marks in the step, limit, patient, length of the place, place.
_MARK = struct.Struct(f"@Qqqd?B{_PLACE_BYTES}s")
# Marks go to the two slots in turn, and only then into the number: the slot that the number names is always whole.
_SLOTS_AT = (64, 256)


class Mark(NamedTuple):
    """Where the main thread is. Ranks are compared by (step, within): the smallest is the one the others wait for."""

    number: int
    """Marks since the start, this one included."""
    step: int
    within: int
    """Marks in this step, this one included."""
    limit_s: float
    """Seconds until the next mark must come."""
    patient: bool
    """This place may take long, also with every thread held up."""
    place: str


class Page:
    """`fd` is a file of at least PAGE_BYTES; it may be closed afterwards. One writer process, one reader process."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, PAGE_BYTES)
        self._beats = 0
        self._last_read = Mark(0, 0, 0, 0.0, True, "start")

    def beat(self) -> None:
        self._beats += 1
        _COUNTER.pack_into(self._map, _BEATS_AT, self._beats)

    def write(self, mark: Mark) -> None:
        number, step, within, limit_s, patient, place = mark
        text = place.encode()[:_PLACE_BYTES]
        slot = _SLOTS_AT[number % 2]
        _MARK.pack_into(self._map, slot, number, step, within, limit_s, patient, len(text), text)
        _COUNTER.pack_into(self._map, _NUMBER_AT, number)

    def beats(self) -> int:
        return int(_COUNTER.unpack_from(self._map, _BEATS_AT)[0])

    def read(self) -> Mark:
        """The newest mark; where the writer is two marks ahead before it is read, the one that was read last."""
        (expected,) = _COUNTER.unpack_from(self._map, _NUMBER_AT)
        number, step, within, limit_s, patient, length, text = _MARK.unpack_from(self._map, _SLOTS_AT[expected % 2])
        (after,) = _COUNTER.unpack_from(self._map, _NUMBER_AT)
        if number == expected == after and number:
            place = text[:length].decode(errors="ignore")
            self._last_read = Mark(number, step, within, limit_s, patient, place)
        return self._last_read

    def close(self) -> None:
        self._map.close()


class WatchedRank:
    """The process that is watched: the parent of this one."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.pid: int = settings["pid"]
        self._page, self._stack_fd = Page(settings["page_fd"]), settings["stack_fd"]
        self._who = {"rank": settings["rank"], "host": socket.gethostname(), "address": "", "pid": self.pid}

    def reached_from(self, address: str) -> None:
        """Names alone do not tell containers of one machine apart."""
        self._who["address"] = address

    def gone(self) -> bool:
        return os.getppid() != self.pid

    def report(self) -> dict[str, Any]:
        return self._who | {"state": self._state(), "beats": self._page.beats(), **self._page.read()._asdict()}

    def _state(self) -> str:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has just ended, or this is no Linux
            return "?"

    def stack(self) -> list[str]:
        """What faulthandler writes on SIGUSR2, the main thread first; a line that says so if it does not."""
        if self.gone():
            return []
        start, stopped = os.fstat(self._stack_fd).st_size, self._state() in "Tt"
        _signal_main_thread(self.pid, signal.SIGUSR2)
        if stopped:
            self.signal(signal.SIGCONT)
        size, limit = start, time.monotonic() + STACK_S
        while time.monotonic() < limit:
            time.sleep(0.05)
            before, size = size, os.fstat(self._stack_fd).st_size
            if start < before == size:
                break
        if stopped:
            self.signal(signal.SIGSTOP)  # it must not go on before its end
        if size == start:
            return [f"no stack within {STACK_S:.0f} s"]
        return _main_thread_first(os.pread(self._stack_fd, size - start, start).decode(errors="replace"))

    def signal(self, number: int) -> None:
        if not self.gone():
            os.kill(self.pid, number)

    def kill(self) -> bool:
        """True when it is gone. The kernel may hold it for long; and process 1 of a container cannot be killed."""
        self.signal(signal.SIGKILL)
        limit = time.monotonic() + 5
        while not self.gone() and time.monotonic() < limit:
            time.sleep(0.05)
        return self.gone()


def _main_thread_first(dump: str) -> list[str]:
    """The lines of a faulthandler dump, in which the thread that took the signal is called "Current thread"."""
    threads = [thread.splitlines() for thread in dump.strip().split("\n\n")]
    threads.sort(key=lambda lines: not lines[0].startswith("Current thread"))
    return [line for lines in threads for line in lines][:_STACK_LINES]


def _signal_main_thread(pid: int, number: int) -> None:
    """So that a stopped process handles it before its main thread goes on; any thread could take it otherwise."""
    try:
        import ctypes

        ctypes.CDLL(None).tgkill(pid, pid, number)
    except (ImportError, AttributeError):  # not glibc 2.30
        os.kill(pid, number)
