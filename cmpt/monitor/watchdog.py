"""A rank that stands still is named with its Python stack, on every host, and the run ends instead of hanging.

Each rank starts a guardian, a small process of its own (cmpt/monitor/guardian.py), and shows it a heartbeat and the
newest mark of its main thread. The guardians judge, so that a rank that is stopped, swapped out or stuck in C is seen
as well as one that waits in Python.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from cmpt.dist.process_group import barrier, broadcast_object, gather_objects
from cmpt.dist.step_clock import clock
from cmpt.monitor.heartbeat import PAGE_BYTES, Mark, Page

PATIENT_S = 1800.0
"""The limit in places that may take long, and in the first steps, which compile kernels and fill caches."""
FIRST_STEPS = 3
MIN_SILENCE_S = 3.0
_BEAT_S = 0.5
_STEPS_REMEMBERED, _TIMES_A_STEP = 20, 10
_START_S, _END_S = 60.0, 30.0


class WatchdogError(RuntimeError):
    """The guardians of a run cannot be started, or cannot reach each other."""


class Watchdog:
    """Use as a context manager, on every rank alike: entering and leaving it are collective.

    `silence_s` (at least 3) is how long a rank may show no life; None switches everything off. A main thread that makes
    no mark for so long, or for ten times the longest of the last 20 steps if that is more, stands still. What ends a
    run is recorded in `events.jsonl` of `run_folder`, and every rank's stack in `watchdog/rank_<5 digits>.txt`; the
    folder need not exist on every host.

    With one rank, a process that is stopped (Ctrl-Z) is left in peace, and so is a job that is stopped as a whole.
    An error that leaves the block on one rank ends the others after 10 s, since they would wait for this rank.
    """

    def __init__(self, run_folder: Path, silence_s: float | None = 20.0) -> None:
        if silence_s is not None and silence_s < MIN_SILENCE_S:
            raise ValueError(f"watchdog: got silence_s = {silence_s}, expected at least {MIN_SILENCE_S:.0f} or None")
        self._run_folder, self._silence_s = run_folder.absolute(), silence_s
        self._page: Page | None = None
        self._pid, self._number, self._step, self._within = os.getpid(), 1, -1, 0
        self._patient, self._marked_at = True, 0.0
        self._steps_done, self._step_s = 0, 0.0
        self._steps_s: deque[float] = deque(maxlen=_STEPS_REMEMBERED)
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        """Raises WatchdogError on every rank where a guardian of any rank does not start or cannot reach the hub."""
        if self._silence_s is None:
            return self
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        with contextlib.ExitStack() as undo:
            undo.callback(self._say_and_reap, "")
            fault = ""
            offer: tuple[str, str, int] | None = None
            if rank == 0:
                token, address = secrets.token_hex(16), os.environ.get("MASTER_ADDR", socket.gethostname())
                answer = self._start_guardian(rank, world, token, address, None)
                fault = answer.get("error", "")
                offer = (token, address, answer.get("port", 0))
            token, address, port = broadcast_object(offer)
            if rank and port:
                fault = self._start_guardian(rank, world, token, "", (address, port)).get("error", "")
                fault = fault and f"{address} port {port}: {fault}"
            faults = {number: text for number, text in enumerate(gather_objects(fault)) if text}
            if faults:
                first = min(faults)
                told = f"watchdog: no guardian for ranks {sorted(faults)}; rank {first}: {faults[first]}"
                raise WatchdogError(f"{told}; guard.watchdog_seconds=null goes without them")
            undo.pop_all()
        threading.Thread(target=self._beat, name="cmpt-heartbeat", args=(rank, world), daemon=True).start()
        return self

    def begin_phase(self) -> None:
        """What follows may have another pace: its first steps have the patience of a start."""
        self._steps_s.clear()
        self._steps_done = 0

    def at(self, place: str, step: int, patient: bool = False, least_s: float = 0.0) -> None:
        """The main thread has come to `place` of `step`; every rank marks the same places. Costs microseconds.

        The next mark must come within the limit, which is `least_s` or more; a `patient` place may take half an hour,
        and does not count into the time of its step. A running clock (dist/step_clock.py) is told too.
        """
        running = clock()
        if running is not None:
            running.at(place, step)
        if self._page is None or self._silence_s is None:
            return
        now = time.monotonic()
        if not self._patient:
            self._step_s += now - self._marked_at
        if step != self._step:
            if self._step >= 0:
                self._steps_done += 1
                if self._steps_done >= FIRST_STEPS:
                    self._steps_s.append(self._step_s)
            self._step, self._within, self._step_s = step, 0, 0.0
        self._number, self._within = self._number + 1, self._within + 1
        self._patient, self._marked_at = patient, now
        lenient = patient or not self._steps_s
        limit_s = PATIENT_S if lenient else max(self._silence_s, least_s, _TIMES_A_STEP * max(self._steps_s))
        self._page.write(Mark(self._number, step, self._within, limit_s, lenient, place))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._page is None or os.getpid() != self._pid:  # a forked child has no guardian
            return
        failed = ""
        if kind is not None and not (isinstance(error, SystemExit) and not error.code):
            failed = f"{kind.__name__}: {error}".splitlines()[0][:1000]
        try:
            if not failed:
                self.at("end", max(self._step, 0), patient=True)
                barrier()  # until then the guardian of rank 0 must watch the others
        finally:
            self._say_and_reap(failed)

    def _start_guardian(
        self, rank: int, world: int, token: str, address: str, hub: tuple[str, int] | None
    ) -> dict[str, Any]:
        """What the guardian answers: {"port": …}, or {"error": …} where it cannot do its work."""
        page_fd, stack_fd = _anonymous_file("cmpt-heartbeat"), _anonymous_file("cmpt-stack")
        os.ftruncate(page_fd, PAGE_BYTES)
        self._page = Page(page_fd)
        self._page.write(Mark(self._number, 0, 0, PATIENT_S, True, "start"))
        # C code writes the dump, in a signal handler: Python need not get on for it.
        faulthandler.register(signal.SIGUSR2, file=stack_fd, all_threads=True, chain=False)
        self._stack_fd = stack_fd
        settings = {
            "rank": rank,
            "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
            "world": world,
            "pid": self._pid,
            "silence_s": self._silence_s,
            "run_folder": str(self._run_folder),
            "page_fd": page_fd,
            "stack_fd": stack_fd,
            "token": token,
            "address": address,
            "hub": hub,
        }
        # A session of its own: Ctrl-C, Ctrl-Z and the end of a terminal are for the rank.
        script = str(Path(__file__).with_name("guardian.py"))
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", script, f"of rank {rank}, pid {self._pid}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(page_fd, stack_fd),
            start_new_session=True,
        )
        os.close(page_fd)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._tell(settings)
        with self._process.stdout as stdout:
            ready, _, _ = select.select([stdout], [], [], _START_S)
            line = stdout.readline() if ready else b""
        return json.loads(line) if line else {"error": f"its guardian did not start within {_START_S:.0f} s"}

    def _tell(self, message: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone; whoever waits for it sees that
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _say_and_reap(self, failed: str) -> None:
        """Goodbye, or the error; the guardian passes it on and ends. One that does not is killed."""
        self._ended.set()
        if self._process is None:
            return
        self._tell({"end": failed})
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        faulthandler.unregister(signal.SIGUSR2)
        os.close(self._stack_fd)
        self._page = self._process = None

    def _beat(self, rank: int, world: int) -> None:
        """Shows that threads of this process run. Without its guardian a rank of many would be left behind."""
        page, process = self._page, self._process
        assert page is not None and process is not None
        while not self._ended.wait(_BEAT_S):
            page.beat()
            if process.poll() is not None and not self._ended.is_set():
                text = f"watchdog: the guardian of rank {rank} ended before its rank (status {process.returncode})"
                print(text, file=sys.stderr, flush=True)
                if world > 1:
                    os._exit(1)
                return


def _anonymous_file(name: str) -> int:
    """In memory where the system can, so that no disk can hold up a heartbeat."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
