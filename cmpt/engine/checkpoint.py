"""Checkpoints that are whole or absent: written beside, hashed, synced, renamed; verified before they are used.

A checkpoint is a folder `step_<8 digits>` with

    model.safetensors       fp32 parameters by name
    optimizer.safetensors   "exp_avg.<name>" and "exp_avg_sq.<name>"
    state.json              step, loader cursors of all streams, threshold, skip counts, optimizer steps
    MANIFEST.json           size and SHA-256 of each of these; written last

Everything is by parameter name and by stream, never by rank, so it loads at any world size and any ZeRO stage. Nothing
is pickled. There is no generator state: all randomness is keyed by the seed and the sample's ordinal (ops/random.py).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmpt.batch import Rejection
from cmpt.dist.process_group import barrier, broadcast_object
from cmpt.engine import sharded
from cmpt.engine.manifest import (
    FORMAT,
    PARAMETERS,
    STATE,
    CheckpointError,
    check_shapes,
    checkpoints_newest_first,
    newest_sound,
    sync,
    verify,
    write_manifest,
)


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
    seed: int = 0
    """The run's seed: with the step, the whole state of its randomness."""
    image_size: int = 0
    """Side of the training images of this step's phase, in pixels."""
    data: str = ""
    """Fingerprint of the training shards that the loader's state is about."""

    def advance(self, masking: dict[str, Any], rejections: list[Rejection]) -> None:
        """One step more."""
        self.step += 1
        self.masking = masking
        for rejection in rejections:
            self.skipped[rejection.cause] = self.skipped.get(rejection.cause, 0) + 1


class Checkpoints:
    """The checkpoints of one run. `faults`: what made `load_newest` pass over a checkpoint, a line each."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.faults: list[str] = []

    def save(self, engine: deepspeed.DeepSpeedEngine, state: TrainState) -> Path:
        """Write the checkpoint of `state.step` and drop the oldest beyond `keep`; every rank calls it.

        Raises CheckpointError on every rank if rank 0 could not write (disk full, no permission).
        """
        final = self.folder / f"step_{state.step:08d}"
        primary = engine.global_rank == 0
        parameters: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for name, values in sharded.full_state(engine):
            if primary:
                parameters[name] = values["param"]
                moments.update({f"{key}.{name}": values[key] for key in sharded.MOMENTS})
        error = None
        if primary:
            try:
                extra = {"optimizer_steps": sharded.optimizer_steps(engine), "format": FORMAT}
                _write_folder(final, parameters, moments, {**asdict(state), **extra})
                self._prune()
            except (OSError, SafetensorError, CheckpointError) as cause:
                error = f"checkpoint {final} could not be written: {cause}"
        error = broadcast_object(error)
        if error:
            raise CheckpointError(error)
        return final

    def load_newest(self, engine: deepspeed.DeepSpeedEngine) -> TrainState | None:
        """Load the newest checkpoint that is sound, or return None where there is none; every rank calls it.

        One that fails verification is noted in `faults` and set aside until the next checkpoint is written. Raises
        CheckpointError if there are checkpoints but not one is sound: starting over in silence would lose the run.
        """
        chosen: Path | None = None
        if engine.global_rank == 0:
            chosen, passed_over = newest_sound(self.folder)
            for unsound, fault in passed_over:
                self.faults.append(f"checkpoint passed over: {fault}")
                unsound.rename(unsound.with_name(f".unsound_{unsound.name}"))
            if chosen is None and not self.faults:
                self.faults = [f"set aside earlier: {path}" for path in self.folder.glob(".unsound_*")]
        chosen, self.faults = broadcast_object((chosen, self.faults))
        if chosen is None:
            if self.faults:
                raise CheckpointError(f"{self.folder}: no sound checkpoint is left; " + "; ".join(self.faults))
            return None
        return load(chosen, engine)

    def _prune(self) -> None:
        for old in checkpoints_newest_first(self.folder)[max(1, self.keep) :]:
            # Renamed first, so that a kill while deleting leaves no half checkpoint under a valid name.
            doomed = old.with_name(f".deleting_{old.name}")
            old.rename(doomed)
            shutil.rmtree(doomed)
        for kind in ("writing", "deleting", "unsound"):
            for leftover in self.folder.glob(f".{kind}_*"):
                shutil.rmtree(leftover, ignore_errors=True)


def load(folder: Path, engine: deepspeed.DeepSpeedEngine) -> TrainState:
    """Put a verified checkpoint into the engine, whatever its world size and ZeRO stage; every rank calls it.

    Raises CheckpointError, naming the tensors, if the checkpoint is of another model.
    """
    parameters = load_file(folder / PARAMETERS)
    moments = load_file(folder / "optimizer.safetensors")
    expected = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    found = {name: tuple(value.shape) for name, value in parameters.items()}
    check_shapes(folder, expected, found)
    state = json.loads((folder / STATE).read_text())
    steps = state.pop("optimizer_steps")
    state.pop("format")
    full = {
        name: {"param": parameters[name], **{key: moments[f"{key}.{name}"] for key in sharded.MOMENTS}}
        for name in parameters
    }
    sharded.load_full_state(engine, full, steps)
    barrier()
    return TrainState(**state)


def _write_folder(
    final: Path, parameters: dict[str, Tensor], moments: dict[str, Tensor], state: dict[str, Any]
) -> None:
    beside = final.with_name(f".writing_{final.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file(parameters, beside / PARAMETERS)
    save_file(moments, beside / "optimizer.safetensors")
    (beside / STATE).write_text(json.dumps(state, indent=1))
    write_manifest(beside, state["step"])
    verify(beside)
    if final.exists():  # the same step again, after a resume; what lies there may be unsound
        doomed = final.with_name(f".deleting_{final.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        final.rename(doomed)
    beside.rename(final)
    sync(final.parent)
