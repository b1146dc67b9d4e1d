"""Adds up what happens between two logged steps and turns it into one row of metrics.jsonl."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
MOVED_KINDS = ("features", "gradients", "parameters")


class Counts(Protocol):
    """What the meters read of a step's counts, over all ranks."""

    @property
    def kept_patches(self) -> int: ...
    @property
    def patches(self) -> int: ...
    @property
    def text_tokens(self) -> int: ...
    @property
    def flops(self) -> int: ...


@dataclass
class Meters:
    """Counts of this window, over all ranks unless said otherwise. `row` reads them and starts the next window."""

    global_batch: int
    peak_flops: float | None
    """Of all devices together, in FLOP/s; None where unknown."""
    began: float = field(default_factory=time.perf_counter)
    steps: int = 0
    wait_s: float = 0.0
    """Time this rank waited for data."""
    kept_patches: int = 0
    patches: int = 0
    text_tokens: int = 0
    flops: float = 0.0
    stall_s: float = 0.0
    """Time that checkpoints held up training."""
    checkpoint_bytes_per_s: float | None = None
    """Of the last checkpoint, over all ranks, from its copy to host memory until it was complete."""
    moved: dict[str, int] = field(default_factory=dict)
    """Bytes that this rank sent to others, by kind (dist/traffic.py)."""

    def add(self, counts: Counts, moved: Mapping[str, int]) -> None:
        """One step more, with the bytes that it moved between ranks, by kind."""
        for kind, size in moved.items():
            self.moved[kind] = self.moved.get(kind, 0) + size
        self.steps += 1
        self.kept_patches += counts.kept_patches
        self.patches += counts.patches
        self.text_tokens += counts.text_tokens
        self.flops += counts.flops

    def waiting(self, items: Iterator[T]) -> Iterator[T]:
        """The same items; the time until each one comes counts as waiting for data."""
        while True:
            asked = time.perf_counter()
            item = next(items)
            self.wait_s += time.perf_counter() - asked
            yield item

    def stalled(self, seconds: float) -> None:
        """Training was held up by a checkpoint; `row` counts it apart and within the step time."""
        self.stall_s += seconds

    def pause(self) -> Pause:
        """A `with` block whose time does not count as training: an evaluation."""
        return Pause(self)

    def row(self) -> dict[str, float | None]:
        """The throughput half of a metrics row; tokens are kept patches and text tokens, class tokens excluded."""
        elapsed = time.perf_counter() - self.began
        samples = self.steps * self.global_batch
        tokens = self.kept_patches + self.text_tokens
        row = {
            "mask_ratio": 1 - self.kept_patches / max(1, self.patches),
            "image_tokens_per_sample": self.kept_patches / samples,
            "text_tokens_per_sample": self.text_tokens / samples,
            "samples_per_s": samples / elapsed,
            "tokens_per_s": tokens / elapsed,
            "flops_per_sample": self.flops / samples,
            "mfu": self.flops / elapsed / self.peak_flops if self.peak_flops else None,
            "data_wait_fraction": self.wait_s / elapsed,
            "checkpoint_stall_s": self.stall_s,
            "checkpoint_bytes_per_s": self.checkpoint_bytes_per_s,
            "moved_bytes": sum(self.moved.values()) / self.steps,
            **{f"moved_bytes_{kind}": self.moved.get(kind, 0) / self.steps for kind in MOVED_KINDS},
            "peak_memory_bytes": peak_memory_bytes(),
            "step_s": elapsed / self.steps,
        }
        self.began = time.perf_counter()
        self.steps, self.wait_s, self.kept_patches, self.patches, self.text_tokens, self.flops = 0, 0.0, 0, 0, 0, 0.0
        self.stall_s, self.moved = 0.0, {}
        return row


class Pause:
    def __init__(self, meters: Meters) -> None:
        self.meters = meters

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.meters.began += time.perf_counter() - self.started


def peak_memory_bytes() -> int:
    """Most memory held so far: of the CUDA device, or of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Of this process. On Linux ru_maxrss would not do: it outlives exec, and so is never below what the process that
    started this one had."""
    if sys.platform == "linux":
        with suppress(OSError):
            return proc_bytes("self/status", "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def proc_bytes(file: str, name: str) -> int:
    """Of a row in kB of a file under /proc (Linux). Raises OSError where there is none."""
    rows = (Path("/proc") / file).read_text().splitlines()
    found = [int(row.split()[1]) * 1024 for row in rows if row.startswith(f"{name}:")]
    if not found:
        raise OSError(f"/proc/{file} has no row {name}")
    return found[0]
