"""Ranks that stay from one matrix to the next: a start of DeepSpeed costs more than most cases."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import pytest
from conftest import LAUNCHER_VARIABLES, REPOSITORY, unused_port


class Matrix(Protocol):
    """What `matrix(*arguments)` of tests/engine/<module>.py returns on rank 0 of `world` processes in one group."""

    def __call__(self, world: int, module: str, *arguments: str, timeout: float = 900) -> Any: ...


class Ranks:
    """`world` processes that run rank_loop.py."""

    def __init__(self, world: int, folder: Path) -> None:
        self.folder, self.numbers = folder, itertools.count()
        env = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port", str(unused_port())]
        command = [sys.executable, *launcher, "tests/engine/rank_loop.py", str(folder), str(os.getpid())]
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=env | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, module: str, arguments: tuple[str, ...], timeout: float) -> Any:
        number, until = next(self.numbers), time.monotonic() + timeout
        (self.folder / "asked").write_text(json.dumps([module, *arguments]))
        (self.folder / "asked").rename(self.folder / f"{number}.task")
        while not (result := self.folder / f"{number}.result").exists():
            if self.process.poll() is not None or time.monotonic() > until:
                self.kill()
                said = (self.folder / "log").read_text()
                pytest.fail(f"{module} {' '.join(arguments)}: no result, time-out {timeout} s\n{said}")
            time.sleep(0.05)
        return json.loads(result.read_text())

    def end(self) -> None:
        """They go by themselves; nothing waits for them."""
        (self.folder / "end").touch()

    def kill(self) -> None:
        self.process.terminate()  # torchrun ends the ranks
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
