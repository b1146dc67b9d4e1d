from __future__ import annotations

import json
import math
import random

import pytest

from cmpt.monitor.guard import LossGuard
from cmpt.recipe.schema import Guard

NAN, INF = math.nan, math.inf


def guard_of(losses: list[float], **settings: object) -> LossGuard:
    """A guard of a window of 8 losses, that let `losses` pass."""
    guard = LossGuard(Guard(**{"window": 8, **settings}), {})  # type: ignore[arg-type]
    assert [guard.judge(loss, 1.0) for loss in losses] == [None] * len(losses)
    return guard


@pytest.mark.parametrize(
    ("loss", "norm", "expected"),
    [
        (NAN, NAN, "the loss is nan"),
        (INF, 1.0, "the loss is inf"),
        (-INF, 1.0, "the loss is -inf"),
        (3.0, NAN, "the norm of the gradient is nan"),
        (3.0, INF, "the norm of the gradient is inf"),
    ],
)
def test_what_is_not_finite_is_refused_from_the_first_step_on(loss: float, norm: float, expected: str) -> None:
    for guard in (guard_of([]), guard_of([3.0] * 8), guard_of([], spike=None)):
        assert guard.judge(loss, norm) == expected
        assert guard.refused == 1


def test_a_spike_lies_so_many_robust_deviations_above_the_median() -> None:
    """By hand: the median of 3.0, 3.1, 2.9, 3.2 is 3.05, their distances from it 0.05, 0.05, 0.15, 0.15, whose median
    is 0.1; ten deviations of 1.4826 x 0.1 above 3.05 is 4.5326."""
    past = [3.0, 3.1, 2.9, 3.2]
    assert guard_of(past).judge(4.532, 1.0) is None
    fault = guard_of(past).judge(4.534, 1.0)
    assert fault == "the loss 4.534 is 10.0 deviations above 3.05, the median of the last steps"
    assert guard_of(past, spike=20.0).judge(4.534, 1.0) is None
    assert guard_of(past, spike=None).judge(1e30, 1.0) is None


def test_no_loss_is_a_spike_before_half_of_the_window_is_there() -> None:
    assert guard_of([3.0, 3.1, 2.9]).judge(1000.0, 1.0) is None
    assert guard_of([3.0, 3.1, 2.9, 3.2]).judge(1000.0, 1.0) is not None


def test_refused_losses_do_not_enter_the_estimate() -> None:
    """A hundred spikes in a row are all refused, and the next ordinary loss passes."""
    guard = guard_of([3.0, 3.1, 2.9, 3.2], limit=1000)
    before = guard.state()["losses"]
    assert all(guard.judge(50.0 + n, 1.0) for n in range(100)) and guard.judge(NAN, 1.0)
    assert guard.state()["losses"] == before and guard.refused == 101
    assert guard.judge(3.05, 1.0) is None


def test_spikes_that_got_through_hardly_move_the_estimate() -> None:
    """Two of eight losses are 100 times the others: a mean and a standard deviation would let the third one pass."""
    guard = guard_of([300.0, 300.0, 3.0, 3.1, 2.9, 3.2, 3.0, 3.1])
    assert guard.judge(300.0, 1.0) is not None


def test_losses_that_hardly_differ_make_no_spike_of_rounding() -> None:
    guard = guard_of([3.0] * 8)
    assert guard.judge(3.0 * 1.009, 1.0) is None, "0.9 % above a constant loss"
    assert guard.judge(3.0 * 1.011, 1.0) is not None, "1.1 % above a constant loss"
    assert guard_of([0.0] * 8).judge(0.0, 1.0) is None
    assert guard_of([0.0] * 8).judge(1e-6, 1.0) is not None


def test_falling_losses_at_the_start_of_a_run_are_no_spikes() -> None:
    """From ln(32768) down to 2 in 300 steps, with noise: nothing is refused at any window."""
    noise = random.Random(0)
    losses = [2 + (math.log(32768) - 2) * math.exp(-step / 60) + noise.gauss(0, 0.05) for step in range(300)]
    for window in (8, 32, 128):
        guard_of(losses, window=window)


def test_a_loss_far_below_the_median_is_no_spike() -> None:
    assert guard_of([3.0, 3.1, 2.9, 3.2]).judge(-100.0, 1.0) is None


def test_only_the_last_losses_count() -> None:
    guard = guard_of([9.0, 9.1, 8.9, 9.2, *[3.0, 3.1, 2.9, 3.2] * 2])
    assert guard.state()["losses"] == [3.0, 3.1, 2.9, 3.2] * 2
    assert guard.judge(9.0, 1.0) is not None


def test_a_guard_that_goes_on_from_its_state_decides_the_same() -> None:
    """Through JSON, as in a checkpoint, at any step of a run with spikes."""
    draw = random.Random(1)
    losses = [3 + draw.gauss(0, 0.1) + (20 if draw.random() < 0.1 else 0) for _ in range(60)]
    whole = LossGuard(Guard(window=8), {})
    decisions, states = [], []
    for loss in losses:
        states.append(json.dumps(whole.state()))
        decisions.append(whole.judge(loss, 1.0))
    assert sum(fault is not None for fault in decisions) > 3
    for step, state in enumerate(states):
        resumed = LossGuard(Guard(window=8), json.loads(state))
        assert [resumed.judge(loss, 1.0) for loss in losses[step:]] == decisions[step:]
        assert resumed.state() == whole.state()


def test_a_shorter_window_at_a_second_start_keeps_the_newest_losses() -> None:
    state = guard_of([float(n) for n in range(16)], window=16, spike=None).state()
    assert LossGuard(Guard(window=8), state).state()["losses"] == [float(n) for n in range(8, 16)]


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_so_many_batches_may_be_refused_and_no_more(limit: int) -> None:
    guard = guard_of([3.0] * 4, limit=limit)
    exhausted = []
    for _ in range(limit + 1):
        guard.judge(NAN, 1.0)
        exhausted.append(guard.exhausted)
    assert exhausted == [False] * limit + [True]


def test_after_a_rewind_losses_are_compared_with_those_before_the_checkpoint() -> None:
    """The loss has fallen from 9 to 3 since: without this, all that follows the rewind would look like a spike."""
    guard = guard_of([9.0, 9.1, 8.9, 9.2])
    checkpoint = json.loads(json.dumps(guard.state()))
    for loss in (7.0, 5.0, 4.0, 3.0, 3.1, 2.9, 3.2, 3.0):
        assert guard.judge(loss, 1.0) is None
    assert guard.judge(9.0, 1.0) is not None
    guard.rewind(checkpoint)
    assert guard.judge(9.0, 1.0) is None and guard.refused == 1


def test_a_phase_begins_with_an_estimate_of_its_own() -> None:
    guard = guard_of([3.0] * 8)
    guard.judge(NAN, 1.0)
    guard.begin("another phase")
    assert guard.judge(9.0, 1.0) is None and guard.refused == 1
