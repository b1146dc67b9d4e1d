"""What makes a checkpoint whole: the list of its files with their sizes and hashes. Torch-free.

Nothing of a checkpoint is used before its hashes agree, and nothing in one is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

MANIFEST = "MANIFEST.json"
STATE = "state.json"
FORMAT = 2


class CheckpointError(RuntimeError):
    """A checkpoint is not what its manifest says, or could not be written."""


class Entry(TypedDict):
    """What the manifest says of a file."""

    bytes: int
    sha256: str


def checkpoints_newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder `checkpoints`, whether sound or not."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", p.name) and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def newest_sound(*folders: Path) -> tuple[Path | None, list[tuple[Path, CheckpointError]]]:
    """The newest checkpoint that `verify` confirms, and those passed over, with why.

    `folders`: a run's `checkpoints`, and where copies of them are; of two alike the first folder's is taken.
    """
    passed_over: list[tuple[Path, CheckpointError]] = []
    candidates = [path for folder in folders for path in checkpoints_newest_first(folder)]
    for candidate in sorted(candidates, key=lambda path: int(path.name[5:]), reverse=True):
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


def entry(path: Path) -> Entry:
    """Size and hash of a file, once it has been brought to the disk."""
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def write_manifest(folder: Path, step: int, files: Mapping[str, Entry]) -> None:
    """The last file of a checkpoint; with the folder's entries it is brought to the disk."""
    manifest = folder / MANIFEST
    manifest.write_text(_manifest_text({"format": FORMAT, "step": step, "files": files}))
    sync(manifest)
    sync(folder)


def listed_files(folder: Path) -> dict[str, Entry]:
    """What the manifest lists. Raises CheckpointError unless every byte of the manifest is as it was written."""
    try:
        text = (folder / MANIFEST).read_bytes().decode()  # read_text would take a "\r" for the "\n" that was written
        manifest = json.loads(text)
        written = manifest["format"]
        files: dict[str, Entry] = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise CheckpointError(f"{folder}: no readable {MANIFEST} ({cause})") from cause
    if written != FORMAT:
        raise CheckpointError(f"{folder}: written by another version of cmpt (format {written}, expected {FORMAT})")
    manifest.pop("sha256", None)
    if text != _manifest_text(manifest):
        raise CheckpointError(f"{folder / MANIFEST}: its SHA-256 is not the one it ends with")
    return files


def _manifest_text(manifest: dict[str, Any]) -> str:
    own = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": own}, indent=1)


def verify(folder: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its size and hash."""
    files = listed_files(folder)
    for name, listed in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != listed["bytes"]:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, the manifest says {listed['bytes']}")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(_sha256, [folder / name for name in files]))
    for (name, listed), found in zip(files.items(), hashes, strict=True):
        if found != listed["sha256"]:
            raise CheckpointError(f"{folder / name}: its SHA-256 is not the manifest's")


def sync(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as cause:
        raise CheckpointError(f"{path}: cannot be read ({cause})") from cause
