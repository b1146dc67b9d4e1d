"""What makes a checkpoint whole: the list of its files with their sizes and hashes. Torch-free."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"
PARAMETERS = "model.safetensors"
STATE = "state.json"
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint is not what its manifest says."""


def checkpoints_newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder `checkpoints`, whether sound or not."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", p.name) and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def newest_sound(folder: Path) -> tuple[Path | None, list[tuple[Path, CheckpointError]]]:
    """The newest checkpoint in a run's folder `checkpoints` that `verify` confirms, and those passed over, with why."""
    passed_over: list[tuple[Path, CheckpointError]] = []
    for candidate in checkpoints_newest_first(folder):
        try:
            verify(candidate)
        except CheckpointError as fault:
            passed_over.append((candidate, fault))
            continue
        return candidate, passed_over
    return None, passed_over


def check_shapes(source: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError, naming tensors, unless a model (`expected`) and a checkpoint (`found`) have the same."""
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        shapes = ", ".join(f"{n} (model {expected.get(n)}, checkpoint {found.get(n)})" for n in wrong[:3])
        raise CheckpointError(f"{source}: {len(wrong)} tensors do not fit the model: {shapes}")


def write_manifest(folder: Path, step: int) -> None:
    """List what is in the folder, and bring all of it to the disk."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1))
    for path in (*folder.iterdir(), folder):
        sync(path)


def verify(folder: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its size and hash."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files: dict[str, dict[str, Any]] = manifest["files"]
        written = manifest["format"]
    except (OSError, ValueError, KeyError) as cause:
        raise CheckpointError(f"{folder}: no readable {MANIFEST} ({cause})") from cause
    if written != FORMAT:
        raise CheckpointError(f"{folder}: written by another version of cmpt (format {written}, expected {FORMAT})")
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, the manifest says {entry['bytes']}")
        if _sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path}: its SHA-256 is not the manifest's")


def sync(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
