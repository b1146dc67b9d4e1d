"""Where the time of a step goes on this rank: by place of the step, and in collectives by their kind. Off by default.

A place lasts until the next one; what collectives held up in it is taken out of it and counted by kind. So places and
kinds add up to the step. On a host a stamp is the time; on CUDA it is an event on the stream that works at that moment,
so that places last as long as the device takes for them and nothing waits for the device: a step's sums are handed out
when the device has passed its end, some steps later.

Of an asynchronous collective only the wait for it counts. Of those on a stream of their own (DeepSpeed's reduction
beside the backward pass) the last one of a place counts, from where the main stream stood when it was begun: whatever
lies before is hidden by compute.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class Stamps(Protocol):
    """A source of points in time."""

    def now(self) -> Any: ...
    def on_main(self) -> Any:
        """A stamp on the main stream, if what works now is another one; else None."""
        ...

    def passed(self, stamp: Any) -> bool: ...
    def seconds(self, begin: Any, end: Any) -> float: ...


class HostStamps:
    def now(self) -> float:
        return time.perf_counter()

    def on_main(self) -> None:
        return None

    def passed(self, stamp: float) -> bool:
        return True

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class DeviceStamps:
    """CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self._main = torch.cuda.current_stream(device)

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def on_main(self) -> torch.cuda.Event | None:
        if torch.cuda.current_stream(self._main.device) == self._main:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._main)
        return event

    def passed(self, stamp: torch.cuda.Event) -> bool:
        return stamp.query()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1000


@dataclass
class _Place:
    name: str
    begin: Any
    waits: list[tuple[str, Any, Any]] = field(default_factory=list)
    beside: tuple[str, Any, Any] | None = None
    """The last collective on another stream: kind, the main stream's stamp at its begin, its end."""
    end: Any = None


@dataclass(frozen=True)
class Spent:
    """Seconds of one step on one rank."""

    step: int
    """Steps done before it."""
    places: dict[str, float]
    """By place, without what collectives held up."""
    waits: dict[str, dict[str, float]]
    """By place, then by kind: seconds in collectives."""
    calls: dict[str, dict[str, int]]
    """By place, then by kind: collectives."""


class StepClock:
    def __init__(self, stamps: Stamps) -> None:
        self._stamps = stamps
        self._step = -1
        self._calls: dict[str, Counter[str]] = {}
        self._places: list[_Place] = []
        self._past: deque[tuple[int, list[_Place], dict[str, Counter[str]]]] = deque()

    def at(self, place: str, step: int) -> None:
        """From now on the rank is at `place` of the step that follows `step` steps. Going back to an earlier step, as
        a rewind does, is a new step too."""
        now = self._stamps.now()
        if self._places:
            self._places[-1].end = now
        if step != self._step:
            if self._places:
                self._past.append((self._step, self._places, self._calls))
            self._step, self._places, self._calls = step, [], {}
        self._places.append(_Place(place, now))

    def count(self, kind: str) -> None:
        """A collective of this kind begins."""
        if self._places:
            self._calls.setdefault(self._places[-1].name, Counter())[kind] += 1

    @contextmanager
    def waiting(self, kind: str) -> Iterator[None]:
        """What happens within is a collective, or the wait for one that was started before."""
        place = self._places[-1] if self._places else None
        on_main, begin = self._stamps.on_main(), self._stamps.now()
        try:
            yield
        finally:
            if place is not None and on_main is None:
                place.waits.append((kind, begin, self._stamps.now()))
            elif place is not None:
                place.beside = (kind, on_main, self._stamps.now())

    def take(self) -> list[Spent]:
        """The steps that are over, on the device too, and were not taken before."""
        taken = []
        while self._past and self._over(self._past[0][1]):
            taken.append(self._sum(*self._past.popleft()))
        return taken

    def _over(self, places: list[_Place]) -> bool:
        """On the device, on other streams too."""
        ends = [places[-1].end, *(place.beside[2] for place in places if place.beside is not None)]
        return all(self._stamps.passed(end) for end in ends)

    def _sum(self, step: int, places: list[_Place], calls: dict[str, Counter[str]]) -> Spent:
        own: dict[str, float] = defaultdict(float)
        waits: dict[str, dict[str, float]] = {}
        seconds = self._stamps.seconds
        for place in places:
            held = waits.setdefault(place.name, defaultdict(float))
            left = seconds(place.begin, place.end)
            for kind, begin, end in place.waits:
                held[kind] += seconds(begin, end)
                left -= seconds(begin, end)
            if place.beside is not None:
                kind, begin, end = place.beside
                exposed = min(max(0.0, seconds(begin, end)), max(0.0, left))
                held[kind] += exposed
                left -= exposed
            own[place.name] += left
        return Spent(step, dict(own), {n: dict(w) for n, w in waits.items()}, {n: dict(c) for n, c in calls.items()})


_clock: StepClock | None = None


def start(device: torch.device | None) -> None:
    """Measure from now on; None: no more."""
    global _clock
    stamps = None if device is None else DeviceStamps(device) if device.type == "cuda" else HostStamps()
    _clock = None if stamps is None else StepClock(stamps)


def clock() -> StepClock | None:
    """The one that is running, or None."""
    return _clock
