"""Append-only JSON-lines files of a run: what was measured, and what happened.

`metrics.jsonl`      one object per logged step, always the keys of `METRIC_KEYS` in that order
`evaluations.jsonl`  one object per evaluation, `step` first
`events.jsonl`       one object per event: `kind`, `time` (UTC, ISO 8601), `step`, then the fields of that kind

Lines go out in a single `os.write` in append mode, so a killed process leaves whole lines and at most one torn last
line. Numbers keep every digit (`repr` of the float). JSON has no NaN and no infinity: such a value is written as
null, and a last key `not_finite` says which it was, e.g. {"loss": null, …, "not_finite": {"loss": "nan"}}. The key is
absent where everything is finite, so null alone still means "unknown".
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

METRIC_KEYS = (
    "step",
    "samples_seen",
    "epoch",
    "phase",
    "loss",
    "lr",
    "logit_scale",
    "logit_bias",
    "grad_norm",
    "grad_norm_image",
    "grad_norm_text",
    "mask_ratio",
    "mask_threshold",
    "image_tokens_per_sample",
    "text_tokens_per_sample",
    "samples_per_s",
    "tokens_per_s",
    "flops_per_sample",
    "mfu",
    "data_wait_fraction",
    "checkpoint_stall_s",
    "checkpoint_bytes_per_s",
    "moved_bytes",
    "moved_bytes_features",
    "moved_bytes_gradients",
    "moved_bytes_parameters",
    "peak_memory_bytes",
    "skipped_samples",
    "refused_batches",
    "loss_scale",
    "step_s",
    "batch_digest",
)
EVENTS = "events.jsonl"
REDONE_KINDS = frozenset({"skip", "refused"})
"""Events that happen again when a step is run again; after a resume the earlier ones would count twice."""


def to_line(record: Mapping[str, Any]) -> bytes:
    """One JSON object and its newline, as UTF-8. Numpy scalars become plain numbers.

    Raises TypeError for anything else that JSON cannot hold, tensors included: reading one here would make the host
    wait for the device.
    """
    not_finite: dict[str, str] = {}
    plain = _plain(record, "", not_finite)
    if not_finite:
        plain["not_finite"] = not_finite
    return json.dumps(plain, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _plain(value: Any, name: str, not_finite: dict[str, str]) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        not_finite[name] = str(value)
        return None
    if isinstance(value, Mapping):
        return {
            str(key): _plain(item, f"{name}.{key}" if name else str(key), not_finite) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}.{index}", not_finite) for index, item in enumerate(value)]
    return value


def metrics_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` with every metrics key, in order; what it lacks is None. Raises ValueError for a key that is not one."""
    unknown = sorted(set(row) - set(METRIC_KEYS))
    if unknown:
        raise ValueError(f"metrics row: got the unknown key {unknown[0]!r}, expected one of {', '.join(METRIC_KEYS)}")
    return {key: row.get(key) for key in METRIC_KEYS}


def utc_now() -> str:
    """The time of an event, e.g. "2026-03-01T12:30:05.123Z"."""
    now = time.time()
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now * 1000) % 1000:03d}Z"


class RecordWriter:
    """Appends records to one file. What `append` has written survives a kill; what `sync` has seen, a power cut.

    A full disk ends nothing and loses nothing: lines that could not be written are kept, in order, and go out with the
    next call that can write them. The file never has half a line in its middle. Any thread may call the methods.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fault: OSError | None = None
        """Why the last attempt to write did not write all lines, or None if it did."""
        self._unwritten = b""  # whole lines
        self._lock = threading.Lock()
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":  # a killed process left half a line
            os.ftruncate(self._fd, path.read_bytes().rfind(b"\n") + 1)

    def append(self, record: Mapping[str, Any]) -> None:
        line = to_line(record)
        with self._lock:
            self._unwritten += line
            self._write()

    def sync(self) -> None:
        """Raises OSError if there are lines that cannot be written."""
        with self._lock:
            self._write()
            if self.fault is not None:
                raise OSError(self.fault.errno, f"{self.fault.strerror}; unwritten lines", str(self.path))
            own = os.dup(self._fd)
        try:  # without the lock: on a slow disk this may take seconds, in which others append
            os.fsync(own)
        finally:
            os.close(own)

    def close(self) -> int:
        """How many lines, the last ones, could not be written."""
        with self._lock:
            if self._fd >= 0:
                self._write()
                os.close(self._fd)
                self._fd = -1
            return self._unwritten.count(b"\n")

    def _write(self) -> None:
        assert self._fd >= 0, f"{self.path}: closed"
        self.fault = None
        if not self._unwritten:
            return
        try:
            written = os.write(self._fd, self._unwritten)
            if written < len(self._unwritten):
                whole = self._unwritten.rfind(b"\n", 0, written) + 1
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - (written - whole))
                written, self.fault = whole, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unwritten = self._unwritten[written:]
        except OSError as fault:
            self.fault = fault


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a file, without a torn last line; [] where there is no file.

    Raises ValueError for a broken line that is not the last: no kill leaves one, so someone edited the file. In
    events.jsonl such a line is left out: when a host is lost, guardians on others append to it at the same moment,
    which not every network file system keeps apart, and that must not keep the run from going on.
    """
    return [record for record, _ in _whole_lines(path)]


def _whole_lines(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    last = len(lines) - 1  # what follows the final newline: empty, or a torn line
    for number, line in enumerate(lines[:last]):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == last - 1 and not lines[last]:
                return  # the last line; a power cut can leave garbage with a newline in it
            if path.name == EVENTS:
                continue
            raise ValueError(f"{path}, line {number + 1}: not a JSON object: {line[:80]!r}") from error
        yield record, line + b"\n"


def trim_after(path: Path, step: int, kinds: frozenset[str] | None = None) -> int:
    """Drops the records with `step` above `step`, and a torn last line; returns how many whole records went.

    With `kinds`, only records of those kinds are dropped. The file is replaced in one move, so a kill leaves either
    the old or the new one. Records without a step stay.
    """
    if not path.exists():
        return 0
    kept: list[bytes] = []
    dropped = 0
    for record, line in _whole_lines(path):
        at = record.get("step")
        if at is not None and at > step and (kinds is None or record.get("kind") in kinds):
            dropped += 1
        else:
            kept.append(line)
    content = b"".join(kept)
    if len(content) == path.stat().st_size:
        return 0
    beside = path.with_name(path.name + ".trimmed")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    return dropped
