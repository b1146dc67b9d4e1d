"""The folder of a run's checkpoints: how one becomes visible, which are kept, and their copies. Torch-free.

step_00001000/            a whole checkpoint
latest                    the name of the newest, written last
.writing_step_00002000/   being written
.deleting_, .unsound_     on their way out: never taken for a checkpoint
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from cmpt.engine.manifest import (
    MANIFEST,
    CheckpointError,
    Entry,
    checkpoints_newest_first,
    listed_files,
    newest_sound,
    sync,
    verify,
    write_manifest,
)

LATEST = "latest"


class Store:
    """`keep`: the newest so many stay; `keep_hours`: younger ones stay too; `copies`: a second folder, or None."""

    def __init__(self, folder: Path, keep: int, keep_hours: float = 0.0, copies: Path | None = None) -> None:
        self.folder, self.keep, self.keep_hours, self.copies = folder, max(1, keep), keep_hours, copies

    def final(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def beside(self, step: int) -> Path:
        """Where the checkpoint of a step is written until it is whole."""
        return self.folder / f".writing_step_{step:08d}"

    def clean(self) -> None:
        """Remove what a killed run left half done; before anything is written."""
        for folder in self._folders():
            for kind in ("writing", "deleting"):
                for leftover in folder.glob(f".{kind}_*"):
                    shutil.rmtree(leftover)

    def newest_sound(self) -> tuple[Path | None, list[str]]:
        """The newest sound checkpoint, copies included, and a line for each that was passed over and set aside."""
        chosen, passed_over = newest_sound(*self._folders())
        for unsound, _ in passed_over:
            aside = unsound.with_name(f".unsound_{unsound.name}")
            shutil.rmtree(aside, ignore_errors=True)
            unsound.rename(aside)
        return chosen, [f"checkpoint passed over: {fault}" for _, fault in passed_over]

    def set_aside(self) -> list[Path]:
        """Unsound checkpoints of earlier starts."""
        return [path for folder in self._folders() for path in folder.glob(".unsound_*")]

    def publish(self, step: int, files: dict[str, Entry]) -> Path:
        """Make what was written for `step` a checkpoint. Raises CheckpointError if a file is not there."""
        beside, final = self.beside(step), self.final(step)
        for name, listed in files.items():
            path = beside / name
            if not path.is_file() or path.stat().st_size != listed["bytes"]:
                raise CheckpointError(f"{path} is not there; run.folder must be on a file system that all hosts share")
        write_manifest(beside, step, files)
        note = self.folder / f".{LATEST}.new"
        note.write_text(final.name + "\n")  # before the renames: they need no more room on the disk
        sync(note)
        _replace(beside, final)
        os.replace(note, self.folder / LATEST)
        sync(self.folder)
        return final

    def abandon(self, step: int) -> None:
        shutil.rmtree(self.beside(step), ignore_errors=True)

    def prune(self) -> None:
        """Delete what is neither among the newest nor young."""
        for folder in self._folders():
            for old in checkpoints_newest_first(folder)[self.keep :]:
                if time.time() - old.stat().st_mtime >= self.keep_hours * 3600:
                    # Renamed first, so that a kill while deleting leaves no half checkpoint under a valid name.
                    doomed = old.with_name(f".deleting_{old.name}")
                    old.rename(doomed)
                    shutil.rmtree(doomed)
            for leftover in folder.glob(".unsound_*"):
                shutil.rmtree(leftover)

    def copy(self, checkpoint: Path) -> Path | None:
        """Put a verified copy into the second folder, if there is one."""
        if self.copies is None:
            return None
        final = self.copies / checkpoint.name
        beside = self.copies / f".writing_{checkpoint.name}"
        shutil.rmtree(beside, ignore_errors=True)
        try:
            beside.mkdir(parents=True)
            for name in (*listed_files(checkpoint), MANIFEST):
                shutil.copy(checkpoint / name, beside / name)
                sync(beside / name)
            sync(beside)
            verify(beside)
            _replace(beside, final)
        except (OSError, CheckpointError):
            shutil.rmtree(beside, ignore_errors=True)
            raise
        return final

    def forget_copies(self) -> None:
        """Delete all that is in the second folder: a run that starts over must not fall back to its predecessor."""
        if self.copies is not None and self.copies.is_dir():
            for kind in ("step_*", ".*_step_*"):
                for old in self.copies.glob(kind):
                    shutil.rmtree(old)

    def _folders(self) -> list[Path]:
        """Those that are there; trouble with the disk of the copies must not stop a run."""
        folders = [self.folder] if self.folder.is_dir() else []
        with suppress(OSError):
            if self.copies is not None and self.copies.is_dir() and os.access(self.copies, os.W_OK):
                folders.append(self.copies)
        return folders


def _replace(beside: Path, final: Path) -> None:
    """Rename to the final name. What has that name already stays if it is sound."""
    if final.exists():
        try:
            verify(final)
        except CheckpointError:
            doomed = final.with_name(f".deleting_{final.name}")
            shutil.rmtree(doomed, ignore_errors=True)
            final.rename(doomed)
        else:
            shutil.rmtree(beside)
            return
    beside.rename(final)
    sync(final.parent)
