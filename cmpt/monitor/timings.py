"""With `run.timings`: one line per rank and step that says where its time went, in `timings/rank_<5 digits>.jsonl`.

A line: `step` (done with it), `host`, `rank`; `places`: seconds by place of the step, without those in collectives;
`waits` and `calls`: seconds in collectives and their number, by place and kind; `sent_bytes` of this rank by kind
(dist/traffic.py); of the global batch `flops`, `image_tokens` and `text_tokens`; of this process `peak_memory_bytes`;
of its host `wire_bytes`: what its network interfaces have sent since it started.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from cmpt.dist import step_clock
from cmpt.monitor.meters import Counts, peak_memory_bytes
from cmpt.monitor.records import RecordWriter

FOLDER = "timings"
_NETWORK = Path("/proc/net/dev")
_SENT_COLUMN = 8  # of the numbers behind the colon: bytes transmitted
_INTERFACES = Path("/sys/class/net")
_INFINIBAND = Path("/sys/class/infiniband")
_INFINIBAND_WORD_BYTES = 4
_ARPHRD_INFINIBAND = 32  # linux/if_arp.h: an interface that sends through an InfiniBand port


class Timings:
    """Use as a context manager, on every rank; with `wanted` False everything does nothing."""

    def __init__(self, run_folder: Path, wanted: bool, rank: int, device: torch.device) -> None:
        self._wanted, self._rank, self._device = wanted, rank, device
        self._path = run_folder / FOLDER / f"rank_{rank:05d}.jsonl"
        self._counts: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> Timings:
        if self._wanted:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter(self._path)
            step_clock.start(self._device)
        return self

    def add(self, step: int, counts: Counts, sent_bytes: Mapping[str, int]) -> None:
        """What the step that makes `step` steps done amounted to. Also writes the steps that are over."""
        running = step_clock.clock()
        if running is None:
            return
        self._counts[step - 1] = {
            "sent_bytes": dict(sent_bytes),
            "flops": counts.flops,
            "image_tokens": counts.kept_patches,
            "text_tokens": counts.text_tokens,
            "peak_memory_bytes": peak_memory_bytes(),
            "wire_bytes": wire_bytes(),
        }
        self._write(running)

    def _write(self, running: step_clock.StepClock) -> None:
        for spent in running.take():
            counted = self._counts.pop(spent.step, None)
            if counted is not None:  # else what came before the first step
                line = {"step": spent.step + 1, "host": socket.gethostname(), "rank": self._rank}
                self._writer.append({**line, **{k: v for k, v in asdict(spent).items() if k != "step"}, **counted})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        running = step_clock.clock()
        if self._wanted and running is not None:
            self._write(running)
            step_clock.start(None)
            self._writer.close()


def wire_bytes() -> int:
    """Sent by this host's network interfaces, InfiniBand ports included; 0 where they cannot be read.

    What the kernel counts, headers and repetitions included: independent of every count of our own. Left out are the
    loopback, interfaces that send through others (bridges, bonds, VLANs, IP over InfiniBand), and InfiniBand ports
    without a counter.
    """
    try:
        lines = [line.partition(":") for line in _NETWORK.read_text().splitlines()[2:]]
        sent = sum(int(rest.split()[_SENT_COLUMN]) for name, _, rest in lines if _sends_itself(name.strip()))
    except (OSError, ValueError, IndexError):
        return 0
    for port in _INFINIBAND.glob("*/ports/*/counters/port_xmit_data"):
        with suppress(OSError, ValueError):
            sent += _INFINIBAND_WORD_BYTES * int(port.read_text())
    return sent


def _sends_itself(interface: str) -> bool:
    folder = _INTERFACES / interface
    try:
        over_infiniband = int((folder / "type").read_text()) == _ARPHRD_INFINIBAND
    except (OSError, ValueError):
        over_infiniband = False
    return interface != "lo" and not over_infiniband and not any(folder.glob("lower_*"))
