"""Where the time of a step goes: places and collectives, on a clock that the test moves by hand."""

from __future__ import annotations

import pytest
import torch

from cmpt.dist import step_clock, traffic
from cmpt.dist.step_clock import StepClock


class Hands:
    """Stamps of a clock that stands still until it is moved; `stream` names the stream that works."""

    def __init__(self) -> None:
        self.time, self.main, self.device_at, self.stream = 0.0, 0.0, float("inf"), "main"

    def now(self) -> float:
        return self.time

    def on_main(self) -> float | None:
        return None if self.stream == "main" else self.main

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


def test_a_step_waits_for_its_collectives_on_other_streams_and_is_not_lost(hands: Hands) -> None:
    clock = StepClock(hands)
    clock.at("gradient", 0)
    hands.stream, hands.main = "reduction", 1.0
    with clock.waiting("gradients"):
        hands.time = 5.0
    hands.stream, hands.time = "main", 2.0  # the main stream has passed the step while the other still works
    clock.at("data", 1)
    hands.device_at = 3.0
    assert clock.take() == []
    hands.device_at = 5.0
    assert [spent.step for spent in clock.take()] == [0]


def test_of_collectives_beside_the_main_stream_only_what_is_left_after_its_work_counts(hands: Hands) -> None:
    """Two reductions beside the backward pass; the second began where the main stream had no more work, at 3.0."""
    clock = StepClock(hands)
    clock.at("gradient", 0)
    hands.stream = "reduction"
    for main, end in ((1.0, 2.5), (3.0, 3.75)):
        hands.main = main
        clock.count("gradients")
        with clock.waiting("gradients"):
            hands.time = end
    hands.stream, hands.time = "main", 4.0
    clock.at("optimizer", 0)
    clock.at("data", 1)
    (spent,) = clock.take()
    assert spent.waits["gradient"] == {"gradients": 0.75}
    assert spent.places["gradient"] == 4.0 - 0.75


def test_a_hidden_collective_takes_nothing_from_its_place(hands: Hands) -> None:
    """It ended before the main stream came to where it stood when the collective began."""
    clock = StepClock(hands)
    clock.at("gradient", 0)
    hands.stream, hands.main = "reduction", 2.0
    with clock.waiting("gradients"):
        hands.time = 1.0
    hands.stream, hands.time = "main", 3.0
    clock.at("data", 1)
    (spent,) = clock.take()
    assert spent.waits["gradient"] == {"gradients": 0.0} and spent.places["gradient"] == 3.0


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
