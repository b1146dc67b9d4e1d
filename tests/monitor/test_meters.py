"""The rates of a metrics row."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from cmpt.monitor import meters as meters_module
from cmpt.monitor.meters import Meters, proc_bytes


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Step:
    kept_patches, patches, text_tokens, flops = 50, 100, 20, 1000


def test_the_wait_for_data_is_counted_to_the_microsecond(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(meters_module, "time", clock)
    waits = [0.250_001, 0.0, 0.000_003, 1.5]

    def batches() -> Iterator[float]:
        for wait in waits:
            clock.now += wait
            yield wait

    meters = Meters(global_batch=8, peak_flops=None, began=clock.now)
    for _ in meters.waiting(batches()):
        clock.now += 0.75  # the step
        meters.add(Step(), {})
        if meters.steps == 2:
            with meters.pause():
                clock.now += 30.0  # an evaluation
        if meters.steps == 4:
            break
    row = meters.row()
    assert row["step_s"] == pytest.approx((sum(waits) + 4 * 0.75) / 4, abs=1e-9)
    assert row["data_wait_fraction"] == pytest.approx(sum(waits) / (sum(waits) + 4 * 0.75), abs=1e-9)
    clock.now += 1.0
    assert meters.wait_s == 0.0, "the next window begins anew"


def test_the_memory_of_a_process_is_not_that_of_the_one_that_started_it() -> None:
    """As a launcher starts it; what a process gave back is part of its peak."""
    child = "from cmpt.monitor.meters import *; len(b'x' * 300 * 2**20); "
    child += "print(peak_resident_bytes(), proc_bytes('self/status', 'VmRSS'))"
    own = 4 * proc_bytes("self/status", "VmRSS")
    held = torch.ones(own // 4)
    printed = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout
    del held
    peak, resident = map(int, printed.split())
    assert resident + 290 * 2**20 < peak < own


def test_a_row_that_the_kernel_does_not_have_is_named() -> None:
    with pytest.raises(OSError, match="/proc/self/status has no row VmNone"):
        proc_bytes("self/status", "VmNone")
