"""Real processes that are stopped, killed, put to sleep; each rank is tests/monitor/watched_rank.py."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import LAUNCHER_VARIABLES, REPOSITORY, RunCli, unused_port

from cmpt.monitor.heartbeat import PAGE_BYTES
from cmpt.monitor.watchdog import Watchdog

SCRIPT = "tests/monitor/watched_rank.py"
GUARDIAN = REPOSITORY / "cmpt/monitor/guardian.py"


class Ranks:
    """The processes of one run, without a launcher that would end them."""

    def __init__(self, folder: Path, world: int, what: str, who: int = 1, silence_s: float | None = 4) -> None:
        self.folder, self.world = folder, world
        self.master, self.silence_s, self.what, self.who = str(unused_port()), silence_s, what, who
        self.processes = [self._start(rank) for rank in range(world)]

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.master}
        arguments = [str(self.folder), str(self.silence_s), self.what, str(self.who)]
        with open(self.folder / f"stderr_{rank}", "wb") as stderr:
            return subprocess.Popen(
                [sys.executable, SCRIPT, *arguments], cwd=REPOSITORY, env=environment, stderr=stderr
            )

    def wait(self) -> list[int]:
        return [process.wait(120) for process in self.processes]

    def stderr(self, rank: int = 0) -> str:
        return (self.folder / f"stderr_{rank}").read_text()

    def events(self) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def step(self, rank: int = 0) -> int:
        path = self.folder / f"step_{rank}"
        return int(path.read_text() or 0) if path.exists() else 0

    def guardians(self) -> list[int]:
        """The process ids of the guardians of these ranks, in rank order."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = path.read_text().split("\0")
            except OSError:
                continue
            if str(GUARDIAN) in command:
                found[command[-2]] = int(path.parent.name)
        names = [f"of rank {rank}, pid {process.pid}" for rank, process in enumerate(self.processes)]
        return [found[name] for name in names if name in found]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


Start = Callable[..., Ranks]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Ranks] = []

    def start_ranks(world: int, what: str, **more: Any) -> Ranks:
        started.append(Ranks(tmp_path, world, what, **more))
        return started[-1]

    yield start_ranks
    for ranks in started:
        ranks.end()


def until(condition: Callable[[], bool], seconds: float = 100) -> bool:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def stack_of(event: dict[str, Any]) -> str:
    return "\n".join(event["stack"])


@pytest.mark.multiprocess
@pytest.mark.parametrize("who", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stopped_rank_is_named_with_its_stack_and_all_end(who: int, start: Start) -> None:
    ranks = start(2, "stop", who=who)
    assert all(ranks.wait())
    (event,) = ranks.events()
    expected = {"kind": "stall", "rank": who, "step": 6, "place": "data", "state": "stopped by a signal"}
    assert expected.items() <= event.items()
    assert "in stop_here" in event["stack"][1], "the main thread comes first"
    assert f"rank {who} on host {socket.gethostname()} (127.0.0.1, pid {ranks.processes[who].pid})" in ranks.stderr()
    assert 'at step 6 in "data" (stopped by a signal)' in ranks.stderr() and "in stop_here" in ranks.stderr()
    assert "in all_reduce" in (ranks.folder / "watchdog" / f"rank_{1 - who:05d}.txt").read_text()
    assert until(lambda: not ranks.guardians(), 15)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_with_the_default_silence_a_stopped_rank_is_named_within_30_s(start: Start) -> None:
    ranks = start(2, "endless", silence_s=20)
    assert until(lambda: ranks.step(1) > 20)
    stopped = time.time()
    ranks.processes[1].send_signal(signal.SIGSTOP)
    assert all(ranks.wait())
    assert time.time() - stopped < 40
    (event,) = ranks.events()
    named = datetime.fromisoformat(event["time"]).timestamp()
    assert event["rank"] == 1 and 19 < named - stopped < 30


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("what", "state"),
    [
        ("oversleep", ""),
        pytest.param("gil", "no thread of Python runs: one holds the GIL", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_is_named_and_the_one_that_waits_for_it_is_not(what: str, state: str, start: Start) -> None:
    ranks = start(2, what)
    assert all(ranks.wait())
    (event,) = ranks.events()
    assert (event["kind"], event["rank"], event["place"], event["state"]) == ("stall", 1, "data", state)
    assert ("in oversleep" if what == "oversleep" else "in hold_the_gil") in stack_of(event)
    assert "rank 0 on host" not in ranks.stderr()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_under_torchrun_the_run_ends_non_zero_and_says_why(tmp_path: Path, run_cli: RunCli, free_port: int) -> None:
    command = ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port), SCRIPT]
    done = run_cli([*command, str(tmp_path), "4", "stop", "1"])
    assert done.returncode != 0
    assert done.stderr.count("watchdog: rank 1 on host") == 1, "said once for each host"
    assert "in stop_here" in done.stderr


@pytest.mark.multiprocess
@pytest.mark.parametrize("who", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_is_named_and_the_other_ends(who: int, start: Start) -> None:
    ranks = start(2, "killed", who=who)
    assert ranks.processes[who].wait(120) == -signal.SIGKILL
    assert ranks.processes[1 - who].wait(30) != 0
    assert until(lambda: not ranks.guardians(), 15)
    (event,) = ranks.events()
    assert (event["kind"], event["rank"], event["step"]) == ("lost_rank", who, 6)
    assert f"rank {who} on host" in ranks.stderr() and "is gone without a word" in ranks.stderr()


@pytest.mark.multiprocess
def test_an_error_on_one_rank_ends_the_others_which_would_wait_for_it(start: Start) -> None:
    ranks = start(2, "fail_alone")
    assert ranks.wait() == [-signal.SIGKILL, 1]
    (event,) = ranks.events()
    assert (event["kind"], event["rank"], event["error"]) == ("failed", 1, "ValueError: a rank of its own kind")
    assert 'failed at step 6 in "data": ValueError: a rank of its own kind' in ranks.stderr()
    assert "in oversleep" in (ranks.folder / "watchdog" / "rank_00000.txt").read_text()


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "what", ["slow", *(pytest.param(what, marks=pytest.mark.slow) for what in ("fork", "patient", "None"))]
)
def test_a_run_that_goes_well_ends_in_silence(what: str, start: Start) -> None:
    """Also with a child process that outlives it, with slow steps, with a long patient place, and unwatched."""
    ranks = start(2, what, who=0, silence_s=None if what == "None" else 4)
    assert ranks.wait() == [0, 0]
    assert not ranks.guardians()
    assert ranks.stderr(0) == ranks.stderr(1) == "" and not ranks.events()
    assert not (ranks.folder / "watchdog").exists()


@pytest.mark.multiprocess
def test_a_single_rank_may_be_stopped_and_continued(start: Start) -> None:
    ranks = start(1, "endless", who=0)
    assert until(lambda: ranks.step() > 10)
    (guardian,) = ranks.guardians()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(guardian, number)
    ranks.processes[0].send_signal(signal.SIGSTOP)
    time.sleep(9)
    stopped_at = ranks.step()
    ranks.processes[0].send_signal(signal.SIGCONT)
    assert until(lambda: ranks.step() > stopped_at + 100), ranks.stderr()
    assert ranks.guardians() == [guardian], "no signal of a launcher ends it"
    ranks.processes[0].kill()
    ranks.processes[0].wait()
    assert until(lambda: not ranks.guardians(), 15)
    assert ranks.stderr() == "" and not ranks.events()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_single_rank_that_hangs_is_named_and_ended(start: Start) -> None:
    ranks = start(1, "oversleep", who=0)
    assert ranks.wait() == [-signal.SIGKILL]
    (event,) = ranks.events()
    assert (event["kind"], event["rank"]) == ("stall", 0) and "in oversleep" in stack_of(event)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("who", [0, 1])
def test_ranks_do_not_go_on_where_a_guardian_is_gone(who: int, start: Start) -> None:
    """What a host that dies looks like to the others, but for the time until the connection breaks."""
    ranks = start(2, "endless")
    assert until(lambda: ranks.step() > 10 and ranks.step(1) > 10)
    os.kill(ranks.guardians()[who], signal.SIGKILL)
    assert all(ranks.wait())
    assert f"the guardian of rank {who} ended before its rank" in ranks.stderr(who)


def test_a_guardian_that_cannot_reach_the_hub_says_so() -> None:
    with guardian(hub=["127.0.0.1", unused_port()]) as process:
        assert process.stdout is not None
        assert "refused" in json.loads(process.stdout.readline())["error"]
        assert process.wait(30) == 0


def test_the_hub_drops_whoever_does_not_know_the_token() -> None:
    with guardian(hub=None) as process:
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["port"]
        report = {"rank": 1, "host": "", "address": "", "pid": 1, "state": "S", "beats": 0, "number": 1}
        for token, expected in (("wrong", b""), ("right", b'{"hub"')):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                connection.sendall(json.dumps({"token": token, "report": report}).encode() + b"\n")
                assert connection.recv(100)[:6] == expected
                if expected:  # else the hub would end its rank, since it has lost this one
                    connection.sendall(json.dumps({"report": report, "end": ""}).encode() + b"\n")


def test_a_silence_that_no_healthy_rank_could_keep_is_refused() -> None:
    with pytest.raises(ValueError, match="silence_s = 1, expected at least 3"):
        Watchdog(Path("run"), 1)


@contextmanager
def guardian(hub: list[Any] | None) -> Iterator[subprocess.Popen[bytes]]:
    """A guardian of this very process, for a run of two that never stands still."""
    page, stack = os.memfd_create("page"), os.memfd_create("stack")
    os.ftruncate(page, PAGE_BYTES)
    settings: dict[str, Any] = {
        "rank": 1 if hub else 0,
        "local_rank": 0,
        "world": 2,
        "pid": os.getpid(),
        "silence_s": 1e6,
    }
    settings |= {
        "run_folder": "/nowhere",
        "page_fd": page,
        "stack_fd": stack,
        "token": "right",
        "address": "",
        "hub": hub,
    }
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(GUARDIAN)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(page, stack),
    )
    os.close(page)
    os.close(stack)
    assert process.stdin is not None
    process.stdin.write(json.dumps(settings).encode() + b"\n")
    process.stdin.flush()
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
