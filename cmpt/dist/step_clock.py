"""Where the time of a step goes on this rank: by place of the step, and in collectives by their kind. Off by default.

A place lasts until the next one; what collectives held up in it is taken out of it and counted by kind. So places and
kinds add up to the step. On a host a stamp is the time; on CUDA it is an event on the stream that works at that moment,
so that places last as long as the device takes for them and nothing waits for the device: a step's sums are handed out
when the device has passed its end, some steps later.

Of an asynchronous collective only the wait for it counts. One on a stream of its own (DeepSpeed's reduction beside the
backward pass, its gathers ahead of the forward pass) counts from where the main stream has no more work to where it may
go on: what it waits in `wait_stream`, and where it runs dry while the host waits in `synchronize` of a stream, of the
device, or of an event, with which DeepSpeed at stage 3 bounds what is under way. Not seen: `wait_event`, as at stages 1
and 2 with an offloaded optimizer. What a stream does behind its collective counts as it until all of it was waited for.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class Stamps(Protocol):
    """A source of points in time."""

    def now(self) -> Any:
        """On the main stream, where there are streams."""
        ...

    def beside(self) -> Hashable | None:
        """Which stream works now, if it is not the main one."""
        ...

    def passed(self, stamp: Any) -> bool: ...
    def seconds(self, begin: Any, end: Any) -> float: ...


class HostStamps:
    def now(self) -> float:
        return time.perf_counter()

    def beside(self) -> None:
        return None

    def passed(self, stamp: float) -> bool:
        return True

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class DeviceStamps:
    """CUDA events."""

    def __init__(self, main: torch.cuda.Stream) -> None:
        self._main = main

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._main)
        return event

    def beside(self) -> int | None:
        stream = torch.cuda.current_stream(self._main.device)
        return None if stream == self._main else stream.cuda_stream

    def passed(self, stamp: torch.cuda.Event) -> bool:
        return stamp.query()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1000


@dataclass
class _Place:
    name: str
    begin: Any
    waits: list[tuple[str, Any, Any]] = field(default_factory=list)
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
        self._held = False
        self._beside: dict[Hashable, str] = {}  # streams whose collectives were not waited for yet -> kind of the last
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
        stream = self._stamps.beside()
        if stream is not None:
            self._beside[stream] = kind
            yield
            return
        with self._held_up(kind):
            yield

    @contextmanager
    def joining(self, stream: Hashable | None = None, partly: bool = False) -> Iterator[None]:
        """Within, the main stream or the host waits for another stream; None: for all of them. `partly`: for some of
        its work, more of which is under way."""
        streams = list(self._beside) if stream is None else [stream]
        kinds = [self._beside[each] for each in streams if each in self._beside]
        if not partly:
            for each in streams:
                self._beside.pop(each, None)
        with self._held_up(kinds[-1]) if kinds else nullcontext():
            yield

    @contextmanager
    def _held_up(self, kind: str) -> Iterator[None]:
        if self._held:  # a wait within a wait is part of it
            yield
            return
        place = self._places[-1] if self._places else None
        begin, self._held = self._stamps.now(), True
        try:
            yield
        finally:
            self._held = False
            if place is not None:
                place.waits.append((kind, begin, self._stamps.now()))

    def take(self) -> list[Spent]:
        """The steps that are over, on the device too, and were not taken before."""
        taken = []
        while self._past and self._stamps.passed(self._past[0][1][-1].end):
            taken.append(self._sum(*self._past.popleft()))
        return taken

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
            own[place.name] += left
        return Spent(step, dict(own), {n: dict(w) for n, w in waits.items()}, {n: dict(c) for n, c in calls.items()})


def see_waits(clock: StepClock, main: torch.cuda.Stream) -> Callable[[], None]:
    """Tell the clock from now on when `main`, or the host, waits for another CUDA stream. Returns what ends that."""
    stream_class, event_class, of_device = torch.cuda.Stream, torch.cuda.Event, torch.cuda.synchronize
    wait_stream, of_stream = stream_class.wait_stream, stream_class.synchronize
    record, of_event = event_class.record, event_class.synchronize

    def seen_wait(self: torch.cuda.Stream, stream: torch.cuda.Stream) -> None:
        with clock.joining(_number(stream)) if self == main else nullcontext():
            wait_stream(self, stream)

    def seen_of_stream(self: torch.cuda.Stream) -> None:
        with clock.joining(self.cuda_stream):
            of_stream(self)

    def seen_of_device(device: Any = None) -> None:
        with clock.joining():
            of_device(device)

    def seen_record(self: Any, stream: torch.cuda.Stream | None = None) -> None:
        stream = torch.cuda.current_stream() if stream is None else stream
        self.recorded_on = _number(stream)
        record(self, stream)

    def seen_of_event(self: Any) -> None:
        with clock.joining(getattr(self, "recorded_on", "not recorded"), partly=True):
            of_event(self)

    seen: list[tuple[Any, str, Any]] = [
        (stream_class, "wait_stream", seen_wait),
        (stream_class, "synchronize", seen_of_stream),
        (torch.cuda, "synchronize", seen_of_device),
        (event_class, "record", seen_record),
        (event_class, "synchronize", seen_of_event),
    ]
    own = [(owner, name, getattr(owner, name)) for owner, name, _ in seen]

    def put(calls: Sequence[tuple[Any, str, Any]]) -> None:
        for owner, name, call in calls:
            setattr(owner, name, call)

    put(seen)
    return lambda: put(own)


def _number(stream: Any) -> Hashable:
    return getattr(stream, "cuda_stream", "not of CUDA")


_clock: StepClock | None = None
_unsee: Callable[[], None] | None = None


def start(device: torch.device | None) -> None:
    """Measure from now on; None: no more."""
    global _clock, _unsee
    if _unsee is not None:
        _unsee()
    _clock = _unsee = None
    if device is None:
        return
    if device.type != "cuda":
        _clock = StepClock(HostStamps())
        return
    main = torch.cuda.current_stream(device)
    _clock = StepClock(DeviceStamps(main))
    _unsee = see_waits(_clock, main)


def clock() -> StepClock | None:
    """The one that is running, or None."""
    return _clock
