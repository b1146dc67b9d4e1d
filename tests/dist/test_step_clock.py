"""Where the time of a step goes: places and collectives, on a clock that the test moves by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cmpt.dist import step_clock, traffic
from cmpt.dist.step_clock import StepClock


class Hands:
    """Stamps of a clock that stands still until it is moved; `stream` names the stream that works."""

    def __init__(self) -> None:
        self.time, self.device_at, self.stream = 0.0, float("inf"), "main"

    def now(self) -> float:
        return self.time

    def beside(self) -> str | None:
        return None if self.stream == "main" else self.stream

    def passed(self, stamp: float) -> bool:
        return stamp <= self.device_at

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


@pytest.fixture
def hands() -> Hands:
    return Hands()


def collective(clock: StepClock, hands: Hands, kind: str, seconds: float) -> None:
    clock.count(kind)
    with clock.waiting(kind):
        hands.time += seconds


def test_places_and_collectives_add_up_to_the_step(hands: Hands) -> None:
    clock = StepClock(hands)
    clock.at("data", 0)
    hands.time += 1.0
    clock.at("gradient", 0)
    hands.time += 2.0
    collective(clock, hands, "features", 0.25)
    collective(clock, hands, "gradients", 0.5)
    collective(clock, hands, "gradients", 0.5)
    clock.at("optimizer", 0)
    collective(clock, hands, "parameters", 0.125)
    assert clock.take() == [], "the step is not over"
    clock.at("data", 1)
    (spent,) = clock.take()
    assert spent.step == 0
    assert spent.places == {"data": 1.0, "gradient": 2.0, "optimizer": 0.0}
    assert spent.waits == {
        "data": {},
        "gradient": {"features": 0.25, "gradients": 1.0},
        "optimizer": {"parameters": 0.125},
    }
    assert spent.calls == {"gradient": {"features": 1, "gradients": 2}, "optimizer": {"parameters": 1}}
    assert clock.take() == [], "handed out once"


def test_a_place_that_is_left_and_entered_again_is_one_place(hands: Hands) -> None:
    clock = StepClock(hands)
    for place, seconds in (("data", 1.0), ("mask", 2.0), ("data", 4.0)):
        clock.at(place, 3)
        hands.time += seconds
    clock.at("data", 2)  # a rewind goes back
    assert clock.take()[0].places == {"data": 5.0, "mask": 2.0}


def test_nothing_is_read_before_the_device_has_passed_the_step_s_end(hands: Hands) -> None:
    clock = StepClock(hands)
    for step in range(3):
        clock.at("gradient", step)
        hands.time += 1.0
    hands.device_at = 1.5
    assert [spent.step for spent in clock.take()] == [0]
    hands.device_at = 2.5
    assert [spent.step for spent in clock.take()] == [1]


def begin_beside(clock: StepClock, hands: Hands, stream: str, kind: str) -> None:
    """A collective on another stream; `hands.time`, the main stream's, does not move."""
    hands.stream = stream
    clock.count(kind)
    with clock.waiting(kind):
        pass
    hands.stream = "main"


def test_of_collectives_beside_the_main_stream_every_wait_for_them_counts_and_nothing_else(hands: Hands) -> None:
    """As ZeRO 3 waits at every module and ZeRO 2 for the bucket before; the third is there when it is wanted."""
    clock = StepClock(hands)
    clock.at("gradient", 0)
    for computed, waited in ((1.0, 0.5), (1.0, 0.25), (2.0, 0.0)):
        begin_beside(clock, hands, "gathers", "parameters")
        hands.time += computed
        with clock.joining("gathers"):
            hands.time += waited
    clock.at("optimizer", 0)
    clock.at("data", 1)
    (spent,) = clock.take()
    assert spent.waits["gradient"] == {"parameters": 0.75}
    assert spent.places["gradient"] == 4.0
    assert spent.calls == {"gradient": {"parameters": 3}}


def test_a_wait_for_a_stream_without_collectives_is_compute(hands: Hands) -> None:
    clock = StepClock(hands)
    clock.at("gradient", 0)
    begin_beside(clock, hands, "reduction", "gradients")
    for stream, waited in (("copies", 0.5), ("reduction", 0.25), ("reduction", 0.125)):
        with clock.joining(stream):
            hands.time += waited
    clock.at("data", 1)
    (spent,) = clock.take()
    assert spent.waits["gradient"] == {"gradients": 0.25}, "the second time there was nothing to wait for"
    assert spent.places["gradient"] == 0.625


def test_after_a_wait_for_some_of_a_stream_the_rest_is_waited_for_too(hands: Hands) -> None:
    """As the host bounds the gathers under way at ZeRO 3, before the main stream waits for the last one."""
    clock = StepClock(hands)
    clock.at("gradient", 0)
    for _ in range(2):
        begin_beside(clock, hands, "gathers", "parameters")
    with clock.joining("gathers", partly=True):
        hands.time += 0.5
    with clock.joining("gathers"):
        hands.time += 0.25
    clock.at("data", 1)
    (spent,) = clock.take()
    assert spent.waits["gradient"] == {"parameters": 0.75} and spent.places["gradient"] == 0.0


def test_a_wait_within_a_wait_counts_once(hands: Hands) -> None:
    clock = StepClock(hands)
    clock.at("gradient", 0)
    begin_beside(clock, hands, "gathers", "parameters")
    with clock.waiting("features"), clock.joining("gathers"):
        hands.time += 1.0
    collective(clock, hands, "gradients", 0.5)
    clock.at("data", 1)
    (spent,) = clock.take()
    assert spent.waits["gradient"] == {"features": 1.0, "gradients": 0.5} and spent.places["gradient"] == 0.0


def test_a_wait_for_the_whole_device_is_a_wait_for_every_stream(hands: Hands) -> None:
    clock = StepClock(hands)
    clock.at("gradient", 0)
    begin_beside(clock, hands, "gathers", "parameters")
    begin_beside(clock, hands, "reduction", "gradients")
    with clock.joining():
        hands.time += 0.5
    with clock.joining("gathers"):
        hands.time += 1.0
    clock.at("data", 1)
    (spent,) = clock.take()
    assert spent.waits["gradient"] == {"gradients": 0.5} and spent.places["gradient"] == 1.0


class Stream:
    """What torch.cuda.Stream's own `wait_stream` and `synchronize` call, on a clock that is moved by hand."""

    def __init__(self, number: int, hands: Hands) -> None:
        self.cuda_stream, self._hands = number, hands

    def record_event(self) -> float:
        return 0.5

    def wait_event(self, event: float) -> None:
        self._hands.time += event


def test_waits_in_torch_s_own_calls_are_seen_until_it_ends(hands: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait_for_all(device: object = None) -> None:
        hands.time += 2.0

    monkeypatch.setattr(torch.cuda, "synchronize", wait_for_all)
    monkeypatch.setattr(torch.cuda.Stream, "synchronize", lambda self: wait_for_all())
    monkeypatch.setattr(torch.cuda.Event, "record", lambda self, stream: None)
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda self: wait_for_all())

    def calls() -> list[object]:
        owners = (torch.cuda, torch.cuda.Stream, torch.cuda.Event)
        return [
            getattr(owner, name)
            for owner in owners
            for name in ("synchronize", "wait_stream", "record")
            if hasattr(owner, name)
        ]

    before = calls()
    clock, main, side = StepClock(hands), Stream(0, hands), Stream(7, hands)
    monkeypatch.setattr(hands, "beside", lambda: 7 if hands.stream == "side" else None)
    clock.at("gradient", 0)
    end = step_clock.see_waits(clock, main)  # type: ignore[arg-type]
    for wait in (
        lambda: torch.cuda.Stream.wait_stream(main, side),  # type: ignore[arg-type]
        lambda: torch.cuda.Stream.synchronize(side),  # type: ignore[arg-type]
        lambda: torch.cuda.synchronize(),
    ):
        begin_beside(clock, hands, "side", "gradients")
        wait()
    begin_beside(clock, hands, "side", "gradients")
    torch.cuda.Stream.wait_stream(side, main)  # type: ignore[arg-type]  # the main stream goes on
    of_main, of_side, not_recorded = SimpleNamespace(), SimpleNamespace(), SimpleNamespace()
    torch.cuda.Event.record(of_main, main)  # type: ignore[arg-type]
    torch.cuda.Event.record(of_side, side)  # type: ignore[arg-type]
    for event in (of_main, of_side, not_recorded):
        torch.cuda.Event.synchronize(event)  # type: ignore[arg-type]
    assert calls() != before
    end()
    assert calls() == before
    clock.at("data", 1)
    (spent,) = clock.take()
    assert spent.waits["gradient"] == {"gradients": 4.5 + 2.0} and spent.places["gradient"] == 0.5 + 4.0


def test_a_collective_counts_its_bytes_with_and_without_a_clock() -> None:
    traffic.take()
    with traffic.collective("features", 100):
        pass
    step_clock.start(torch.device("cpu"))
    try:
        running = step_clock.clock()
        assert running is not None
        running.at("gradient", 0)
        with traffic.collective("features", 11):
            pass
        running.at("data", 1)
        (spent,) = running.take()
    finally:
        step_clock.start(None)
    assert traffic.take()["features"] == 111
    assert spent.calls == {"gradient": {"features": 1}} and spent.waits["gradient"]["features"] >= 0
    assert step_clock.clock() is None


@pytest.mark.gpu
def test_on_a_gpu_a_place_lasts_as_long_as_the_device_works_for_it() -> None:
    device = torch.device("cuda", 0)
    step_clock.start(device)
    try:
        running = step_clock.clock()
        assert running is not None
        x = torch.randn(4096, 4096, device=device)
        for _ in range(2):
            x @ x  # what a first product costs is not to be measured
        torch.cuda.synchronize()
        running.at("gradient", 0)
        for _ in range(20):
            x @ x
        running.at("optimizer", 0)
        running.at("data", 1)
        torch.cuda.synchronize()
        (spent,) = running.take()
    finally:
        step_clock.start(None)
    least_s = 20 * 2 * 4096**3 / 2e15  # no device is faster
    assert spent.places["gradient"] > least_s > spent.places["optimizer"]


@pytest.mark.gpu
@pytest.mark.parametrize("waits", ["stream", "host for an event"])
def test_on_a_gpu_only_what_the_main_stream_waits_for_another_one_counts(waits: str) -> None:
    device = torch.device("cuda", 0)
    x, side = torch.randn(4096, 4096, device=device), torch.cuda.Stream(device)

    def wait() -> None:
        if waits == "stream":
            torch.cuda.current_stream().wait_stream(side)
        else:
            side.record_event().synchronize()

    step_clock.start(device)
    try:
        running = step_clock.clock()
        assert running is not None
        for _ in range(2):
            x @ x
        torch.cuda.synchronize()
        for place, on_main, on_side in (("gradient", 1, 40), ("optimizer", 40, 1)):
            running.at(place, 0)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), running.waiting("gradients"):
                for _ in range(on_side):
                    x @ x
            for _ in range(on_main):
                x @ x
            wait()
        running.at("data", 1)
        torch.cuda.synchronize()
        (spent,) = running.take()
    finally:
        step_clock.start(None)
    exposed = {place: waits.get("gradients", 0.0) for place, waits in spent.waits.items()}
    assert exposed["gradient"] > spent.places["gradient"], "the main stream had little to do and waited"
    assert exposed["optimizer"] < spent.places["optimizer"] / 4, "it had more to do than the other one"
