"""What every test starts from: the process environment, and fixtures that start other processes."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

import pytest

# Before torch is imported: tests share few cores, with each other and with the processes that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would download must fail at once

# What a shell starts in its background ignores SIGINT, and so do the programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

REPOSITORY = Path(__file__).parents[1]
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RunCli(Protocol):
    """`args` of a command, where "python" means this Python; `env` is added to the environment."""

    def __call__(
        self, args: Sequence[str | os.PathLike[str]], env: dict[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]: ...


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on."""
    return unused_port()


@pytest.fixture(scope="session")
def run_cli() -> RunCli:
    """Runs a command from the repository root, with a rendezvous port of its own; a time-out ends its whole group."""

    def run(
        args: Sequence[str | os.PathLike[str]], env: dict[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        bin_folder = str(Path(sys.executable).parent)
        child_env = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        child_env["PATH"] = bin_folder + os.pathsep + child_env.get("PATH", "")
        child_env["MASTER_PORT"] = str(unused_port())
        child_env |= env or {}
        command = [sys.executable if arg == "python" else os.fspath(arg) for arg in args]
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=child_env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            pytest.fail(f"no end after {timeout} s: {command}\n--- stdout\n{stdout}\n--- stderr\n{stderr}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    return run


@pytest.fixture(scope="session")
def alone() -> None:
    """A process group of this process, which is its whole world."""
    from cmpt.dist import process_group

    if not torch.distributed.is_initialized():
        process_group.start()


@pytest.fixture(scope="session")
def open_clip() -> Iterator[ModuleType]:
    """The module open_clip; skips where it is not installed."""
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("the extra open-clip is not installed")
    from with_open_clip import import_open_clip

    yield import_open_clip()
