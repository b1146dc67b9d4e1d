"""Run by test_watchdog.py, one process for each rank: a small loop under the watchdog, in which one rank misbehaves.

    RANK=… WORLD_SIZE=… MASTER_ADDR=… MASTER_PORT=… python tests/monitor/watched_rank.py FOLDER SILENCE_S WHAT RANK

Writes FOLDER/pid_<rank> once it is watched, and FOLDER/step_<rank> in each step.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist

from cmpt.dist import process_group
from cmpt.monitor.watchdog import Watchdog

STEPS, BAD_STEP = 10, 6


def oversleep() -> None:
    time.sleep(1000)


def stop_here() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1000)


def hold_the_gil() -> None:
    ctypes.PyDLL(None).sleep(1000)


def fail() -> None:
    raise ValueError("a rank of its own kind\nwith more lines")


def fail_alone() -> None:
    """The others are asleep, not in a collective that fails with this rank."""
    fail()


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave_a_child() -> None:
    if os.fork() == 0:
        os.closerange(0, 3)  # whoever reads the output of this test need not wait for it
        time.sleep(20)
        os._exit(0)


MISDEEDS = {
    "oversleep": oversleep,
    "stop": stop_here,
    "gil": hold_the_gil,
    "fail": fail,
    "fail_alone": fail_alone,
    "killed": be_killed,
    "fork": leave_a_child,
}


def main() -> None:
    folder, silence, what, who = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    rank, world, _ = process_group.start()
    pause = 0.5 if what == "slow" else 0.02
    with Watchdog(folder, None if silence == "None" else float(silence)) as watch:
        (folder / f"pid_{rank}").write_text(str(os.getpid()))
        for step in range(1, (100_000 if what == "endless" else STEPS) + 1):
            watch.at("data", step)
            (folder / f"step_{rank}").write_text(str(step))
            time.sleep(pause)
            if step == BAD_STEP and rank == who and what in MISDEEDS:
                MISDEEDS[what]()
            if step == BAD_STEP and what == "fail_alone":
                oversleep()
            watch.at("step", step)
            if world > 1:
                dist.all_reduce(torch.ones(3))
            if step == BAD_STEP and what == "patient":
                watch.at("report", step, patient=True)
                if rank == who:
                    time.sleep(2.5 * float(silence))
    process_group.stop()


if __name__ == "__main__":
    main()
