"""Checkpoints: every rank writes its part while training goes on; whole or absent, verified before they are used.

A checkpoint is a folder `step_<8 digits>` with

    part-<rank>-of-<world>.safetensors  fp32 pieces of parameters, AdamW's moments and, if kept, their average
    state.json                          step, loader cursors of all streams, threshold, skip counts, guard, shapes
    MANIFEST.json                       size and SHA-256 of each of these; written last

Pieces are found by parameter name and place, streams by number, so it loads at any world size and any ZeRO stage.
Nothing is pickled. There is no generator state: all randomness is keyed by the seed and the sample's ordinal.

The training loop is held up by a copy to host memory only. One thread of each rank then writes, hashes and syncs its
part. In which step all are done the ranks learn from the sum that every step makes anyway (engine/counts.py); rank 0
then writes the manifest and renames the folder.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from cmpt.batch import Rejection
from cmpt.dist.process_group import broadcast_object, gather_objects, sum_over_ranks
from cmpt.engine import sharded
from cmpt.engine.build import LossScale, Trained
from cmpt.engine.manifest import STATE, CheckpointError, Entry, check_shapes, entry
from cmpt.engine.parts import Parts, part_name, write_part
from cmpt.engine.store import Store


@dataclass
class TrainState:
    """Where a run stands, besides parameters and optimizer: all of it plain JSON."""

    step: int = 0
    """Steps done."""
    loader: dict[str, Any] = field(default_factory=dict)
    """The data loader's state after this step, of all streams (data/streams.py); filled when a checkpoint is due."""
    masking: dict[str, Any] = field(default_factory=dict)
    """State of the threshold controller (masking/threshold.py)."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Samples that could not be used so far, by cause, over all ranks."""
    guard: dict[str, Any] = field(default_factory=dict)
    """State of the guard of the loss (monitor/guard.py)."""
    recipe: str = ""
    """Fingerprint of the recipe, its seed included: with the step, the whole state of the run's randomness."""
    image_size: int = 0
    """Side of the training images of this step's phase, in pixels."""
    data: str = ""
    """Fingerprint of the training shards that the loader's state is about."""

    def advance(self, masking: dict[str, Any], rejections: list[Rejection]) -> None:
        """One step more."""
        self.step += 1
        self.masking = masking
        self.skip(rejections)

    def skip(self, rejections: Iterable[Rejection]) -> None:
        """Counts what could not be used."""
        for rejection in rejections:
            self.skipped[rejection.cause] = self.skipped.get(rejection.cause, 0) + rejection.samples


@dataclass(frozen=True)
class Report:
    """What became of a checkpoint; only rank 0 has them."""

    step: int
    path: Path | None = None  # None: there is no checkpoint of this step
    fault: str | None = None  # what went wrong, for people to read
    bytes: int = 0
    write_s: float = 0.0  # from the begin of the copy to host memory, which is the stall, until it was complete
    stall_s: float = 0.0  # that training was held up


class Checkpoints:
    """The checkpoints of one run, and at most one that is being written.

    `before_publishing` is called, in another thread, before a checkpoint becomes visible: what a resume relies on has
    to be on the disk by then. All methods but `progress`, `reserve` and
    `taken_reports` are collective.
    """

    def __init__(self, store: Store, before_publishing: Callable[[], None] = lambda: None) -> None:
        self.store = store
        self.before_publishing = before_publishing
        self.faults: list[str] = []
        """What made a load pass over a checkpoint, a line each."""
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._copier = ThreadPoolExecutor(1, "checkpoint-copy")  # a slow second disk must not hold up the first
        self._copying: Future[None] | None = None
        self._buffers: dict[str, list[Tensor]] = {}
        self._part: Future[dict[str, Entry]] | None = None  # being written; None on all ranks or on none
        self._begun = Report(0)
        self._began = 0.0
        self._publishing: Future[Report] | None = None
        self._reports: SimpleQueue[Report] = SimpleQueue()

    def save(self, trained: Trained, state: TrainState, last: bool = False) -> float:
        """Begin the checkpoint of `state.step`; returns the seconds that this rank was held up.

        If the one before is still being written, the disk is too slow: this one is left out, and a report says so.
        The `last` one of a start waits instead.
        """
        began = time.perf_counter()
        primary = dist.get_rank() == 0
        if last:
            self._wait_for_parts()
        if self._part is not None:
            fault = f"no checkpoint of step {state.step}: that of step {self._begun.step} is still being written"
            if primary:
                self._reports.put(Report(state.step, fault=f"{fault}; the disk is too slow"))
            return 0.0
        starts = self._copy_to_host(trained)
        text = None
        if primary:
            more = {
                "optimizer_steps": sharded.optimizer_steps(trained.engine),
                "loss_scale": asdict(trained.loss_scale),
            }
            text = json.dumps({**asdict(state), **more, "parameters": sharded.shapes(trained.engine)}, indent=1)
        beside = self.store.beside(state.step)
        name = part_name(dist.get_rank(), dist.get_world_size())
        self._part = self._worker.submit(_write, beside, name, starts, self._buffers, text)
        stall = time.perf_counter() - began
        self._begun, self._began = Report(state.step, stall_s=stall), began
        return stall

    def progress(self) -> tuple[bool, bool]:
        """Whether this rank's part is written, or has failed; not collective. For the sum of every step."""
        if self._part is None or not self._part.done():
            return False, False
        failed = self._part.exception() is not None
        return not failed, failed

    def settle(self, written: int, failed: int) -> None:
        """Complete, or give up, the checkpoint whose parts are `written` or `failed` on so many ranks."""
        if self._part is None or written + failed < dist.get_world_size():
            return
        fault, files = None, {}
        try:
            files = self._part.result()
        except (OSError, SafetensorError, CheckpointError) as cause:
            fault = f"rank {dist.get_rank()}: {cause}"
        self._part = None
        everything = gather_objects((fault, files))
        if dist.get_rank() == 0:
            faults = [fault for fault, _ in everything if fault]
            listed = {name: listed for _, files in everything for name, listed in files.items()}
            self._publishing = self._worker.submit(self._complete, self._begun, self._began, faults, listed)

    def finish(self) -> None:
        """Wait until what was begun is complete. Raises CheckpointError, on every rank, if it could not be written."""
        self._wait_for_parts()
        report = self._publishing.result() if self._publishing is not None else None
        if self._copying is not None:
            self._copying.result()
        fault = broadcast_object(report.fault if report is not None and report.path is None else None)
        if fault:
            raise CheckpointError(fault)

    def taken_reports(self) -> list[Report]:
        """What has become of checkpoints since the last call."""
        taken = []
        while not self._reports.empty():
            taken.append(self._reports.get())
        return taken

    def load_newest(self, trained: Trained) -> TrainState | None:
        """Load the newest checkpoint that is sound, or return None where there is none.

        One that fails verification is noted in `faults` and set aside until the next checkpoint is written. Raises
        CheckpointError if there are checkpoints but not one is sound: starting over in silence would lose the run.
        """
        chosen: Path | None = None
        if dist.get_rank() == 0:
            self.store.clean()
            chosen, self.faults = self.store.newest_sound()
            if chosen is None and not self.faults:
                self.faults = [f"set aside earlier: {path}" for path in self.store.set_aside()]
        chosen, self.faults = broadcast_object((chosen, self.faults))
        if chosen is None:
            if self.faults:
                raise CheckpointError(f"{self.store.folder}: no sound checkpoint is left; " + "; ".join(self.faults))
            return None
        blind = [rank for rank, seen in enumerate(gather_objects(chosen.is_dir())) if not seen]
        if blind:
            where = f"rank {blind[0]}" + (f" and {len(blind) - 1} more" if len(blind) > 1 else "")
            raise CheckpointError(f"{chosen}: {where} cannot see it; run.folder must be shared by all hosts")
        return load(chosen, trained)

    def rewind(self, trained: Trained) -> TrainState | None:
        """Put the weights, moments and average of the newest checkpoint back; its state, or None if there is none."""
        with suppress(CheckpointError):  # there is a report of it, and an older one will do
            self.finish()
        return self.load_newest(trained)

    def _wait_for_parts(self) -> None:
        if self._part is not None:
            self._part.exception()
            written, failed = sum_over_ranks(torch.tensor(self.progress(), dtype=torch.int64)).tolist()
            self.settle(written, failed)

    def reserve(self, trained: Trained) -> None:
        """Take the host memory that saving needs: 4 bytes for each kind of value of this rank's share."""
        self._copy_to_host(trained)

    def _copy_to_host(self, trained: Trained) -> dict[str, int]:
        """This rank's pieces into buffers that are kept from one checkpoint to the next; where each piece begins."""
        own = sharded.own_pieces(trained.engine)
        for kind, tensors in sharded.kept_tensors(trained.engine, trained.average).items():
            held = [piece.of(tensors) for piece in own]
            if kind not in self._buffers:  # one piece of memory, since each pinned one is rounded up
                sizes = [len(value) for value in held]
                memory = torch.empty(sum(sizes), dtype=torch.float32, pin_memory=torch.cuda.is_available())
                self._buffers[kind] = list(memory.split(sizes))
            for buffer, value in zip(self._buffers[kind], held, strict=True):
                buffer.copy_(value, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return {piece.name: piece.start for piece in own}

    def _complete(self, begun: Report, began: float, faults: list[str], files: dict[str, Entry]) -> Report:
        """On rank 0, in the worker: make the written parts a checkpoint, or give them up; report."""
        step, path, fault = begun.step, None, None
        try:
            if faults:
                raise CheckpointError("; ".join(faults))
            self.before_publishing()
            path = self.store.publish(step, files)
        except (OSError, CheckpointError) as cause:
            fault = f"checkpoint of step {step} could not be written: {cause}"
            self.store.abandon(step)
        size = sum(listed["bytes"] for listed in files.values())
        report = Report(step, path, fault, size, time.perf_counter() - began, begun.stall_s)
        self._reports.put(report)
        if path is not None:
            self._copying = self._copier.submit(self._keep, path)
        return report

    def _keep(self, path: Path) -> None:
        """On rank 0, in the copier: the copy in the second folder, then delete what is not to stay in either."""
        step = int(path.name[5:])
        if not path.is_dir():
            return  # copying is so slow that this one is deleted already; a newer one waits
        for attempt in (lambda: self.store.copy(path), self.store.prune):
            try:
                attempt()
            except (OSError, CheckpointError) as cause:
                fault = f"checkpoint of step {step} could not be copied, or an old one not deleted: {cause}"
                self._reports.put(Report(step, fault=fault))


def load(folder: Path, trained: Trained) -> TrainState:
    """Put a verified checkpoint into the engine, whatever its world size and ZeRO stage; every rank calls it.

    Raises CheckpointError, naming the tensors, if the checkpoint is of another model.
    """
    parts = Parts(folder)
    check_shapes(folder, sharded.shapes(trained.engine), parts.shapes)
    state = parts.state
    steps, trained.loss_scale = state.pop("optimizer_steps"), LossScale(**state.pop("loss_scale"))
    # A run that keeps an average only from here on begins it with the weights.
    averages = parts.has(sharded.AVERAGE)

    def read(kind: str, piece: sharded.Piece) -> Tensor:
        kind = sharded.PARAMETER if kind == sharded.AVERAGE and not averages else kind
        return parts.read(kind, piece.name, piece.start, piece.numel)

    sharded.fill(trained.engine, trained.average, steps, read)
    return TrainState(**state)


def _write(
    beside: Path, name: str, starts: dict[str, int], tensors: dict[str, list[Tensor]], state: str | None
) -> dict[str, Entry]:
    """In the worker: one rank's part, and on rank 0 the state; what the manifest is to say of them."""
    beside.mkdir(parents=True, exist_ok=True)
    write_part(beside / name, starts, tensors)
    mask = os.umask(0)
    os.umask(mask)
    (beside / name).chmod(0o666 & ~mask)  # safetensors writes for the owner alone
    written = {name: entry(beside / name)}
    if state is not None:
        (beside / STATE).write_text(state)
        written[STATE] = entry(beside / STATE)
    return written
