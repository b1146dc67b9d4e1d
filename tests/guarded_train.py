"""cmpt/train.py with faults put into chosen steps; started by test_guarded_run.py, with python or torchrun.

    python tests/guarded_train.py '{"nan": [6]}' RECIPE [key=value ...]

The first argument is a JSON object: fault -> steps at which it strikes, counted from 1. A killed run that starts again
meets the same faults, but is not killed again.

nan    one pixel of the last rank's images becomes NaN after masking
spike  the temperature is wrong while the gradient is found, on all ranks: the loss really jumps, and is right again
ruin   all weights are doubled, on all ranks, for good (stage 0)
flip   after this step one bit of one weight flips on the last rank: what the towers compute with
bad    the same in what the optimizer steps
kill   SIGKILL after the step

"memory" is no step but bytes: so much more address space the dry run may take than the process has by then.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor

import cmpt.train as program
from cmpt.engine import sharded
from cmpt.engine.build import Trained
from cmpt.engine.step import StepResult
from cmpt.masking.strategies import Masked, MaskStage

BATCH = 32
WEIGHT = "text.transformer.blocks.1.c_fc.weight"
FAULTS: dict[str, Any] = json.loads(sys.argv[1])
now = 0  # the step that is on its way
begin_mask, find_gradient = MaskStage.begin, program.find_gradient
take_step, report_checkpoints, rehearse = program.take_step, program.report_checkpoints, program.rehearse


def strikes(fault: str) -> bool:
    return now in FAULTS.get(fault, [])


def on_last_rank() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def poisoned_mask(stage: MaskStage, images_BCHW: Tensor, ordinal_B: Tensor, *more: Any) -> Callable[[], Masked]:
    global now
    now = int(ordinal_B[0]) // BATCH + 1
    masked = begin_mask(stage, images_BCHW, ordinal_B, *more)()
    if strikes("nan") and on_last_rank():
        masked.patches.patches_TP[5, 7] = float("nan")
    return lambda: masked


@torch.no_grad()
def poisoned_gradient(trained: Trained, *args: Any) -> StepResult:
    if strikes("ruin"):
        for parameter in trained.clip.parameters():
            parameter.mul_(2)
    temperature = trained.clip.logit_scale
    right = temperature.clone()
    if strikes("spike"):
        temperature += 1.5  # the logits are 4.5 times as large
    with torch.enable_grad():
        result = find_gradient(trained, *args)
    if strikes("spike"):
        temperature.copy_(right)
    return result


def poisoned_step(trained: Trained, *args: Any) -> None:
    take_step(trained, *args)
    if not on_last_rank():
        return
    if strikes("flip"):
        flip(dict(trained.clip.named_parameters())[WEIGHT].detach().view(-1))
    if strikes("bad"):
        flip(sharded.pieces(trained.engine)[-1].of(sharded.flat_parameters(trained.engine)).detach())


def flip(weights: Tensor) -> None:
    """A low bit of the mantissa of the first one."""
    weights[:1].view(torch.int32).bitwise_xor_(1 << 12)


def deadly_report(checkpoints: Any, monitor: Any, meters: Any) -> None:
    report_checkpoints(checkpoints, monitor, meters)
    if strikes("kill") and not (checkpoints.store.folder.parent / "killed").exists():
        (checkpoints.store.folder.parent / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def short_rehearsal(*args: Any) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + FAULTS["memory"], before[1]))
    try:
        rehearse(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


if __name__ == "__main__":
    MaskStage.begin = poisoned_mask  # type: ignore[method-assign]
    program.find_gradient, program.take_step = poisoned_gradient, poisoned_step  # type: ignore[assignment]
    program.report_checkpoints = deadly_report
    if "memory" in FAULTS:
        program.rehearse = short_rehearsal
    sys.exit(program.main(sys.argv[2:]))
