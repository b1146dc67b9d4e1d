"""Training over two hosts through the real launcher, pdsh and ssh; hosts that die, and a supervisor that goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, RunCli
from test_train import RECIPE, TRAIN, overrides, rows
from two_hosts import Hosts, end_group, hosts_up

from cmpt.engine.manifest import checkpoints_newest_first

HELDOUT = "data.heldout=[pkg:data/clipart/heldout-0000.tar]"
ALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"
STARTED_LIMIT_S = 240.0
ENDED_LIMIT_S = 60.0
LOST_KINDS = ("lost_host", "lost_rank", "stall", "failed")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    folder = tmp_path / "hosts"
    folder.mkdir()
    with hosts_up(folder) as up:
        yield up


def start(command: list[str], hosts: Hosts, log: Path, **more: str) -> subprocess.Popen[str]:
    """The command on the first host's network, in a session of its own; what it says goes into the log."""
    with log.open("w") as output:
        return subprocess.Popen(
            hosts.on_first(command),
            cwd=REPOSITORY,
            env={**os.environ, **hosts.environment(), **more},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], log: Path, what: str) -> None:
    limit = time.monotonic() + STARTED_LIMIT_S
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} before {what}:\n{log.read_text()}"
        assert time.monotonic() < limit, f"no {what} in {STARTED_LIMIT_S} s:\n{log.read_text()}"
        time.sleep(0.05)


def steps_done(run: Path) -> int:
    return len(rows(run)) if (run / "metrics.jsonl").exists() else 0


def digests(run: Path) -> list[str]:
    return [row["batch_digest"] for row in rows(run)]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_hosts_give_the_one_process_run(hosts: Hosts, tmp_path: Path, run_cli: RunCli) -> None:
    """Over pdsh and ssh, with evaluation and checkpoints: the same digests, losses within 1e-4."""
    alone = run_cli([*TRAIN, *overrides(tmp_path, "alone", HELDOUT)])
    assert alone.returncode == 0, alone.stderr
    command = hosts.on_first([*hosts.launcher(), "cmpt/train.py", RECIPE, *overrides(tmp_path, "both", HELDOUT)])
    both = run_cli(command, env=hosts.environment())
    assert both.returncode == 0, both.stdout + both.stderr
    for name in hosts.names:
        assert f"{name}: " in both.stdout, "each line says which host it came from"
    assert digests(tmp_path / "both") == digests(tmp_path / "alone")
    for ours, reference in zip(rows(tmp_path / "both"), rows(tmp_path / "alone"), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-4)
    ours_last, reference_last = (rows(tmp_path / run, "evaluations.jsonl")[-1] for run in ("both", "alone"))
    assert ours_last["step"] == 12
    assert ours_last["image_to_text_r10"] == pytest.approx(reference_last["image_to_text_r10"], abs=0.01)
    saved = [path.name for path in checkpoints_newest_first(tmp_path / "both" / "checkpoints")]
    assert saved == ["step_00000012", "step_00000008", "step_00000004"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_recipe_error_on_two_hosts_is_exit_code_2(hosts: Hosts, tmp_path: Path, run_cli: RunCli) -> None:
    """The supervisor tells by this code that another start would fail again; pdsh and the launcher hand it on."""
    command = [*hosts.launcher(), "cmpt/train.py", RECIPE, *overrides(tmp_path, "bad", "engine.batch_size=30")]
    done = run_cli(hosts.on_first(command), env=hosts.environment())
    assert done.returncode == 2, done.stderr
    assert "engine.batch_size" in done.stderr and not (tmp_path / "bad").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("how", ["killed", "vanished"])
def test_losing_a_host_ends_the_run_and_names_it(how: str, hosts: Hosts, tmp_path: Path) -> None:
    """Killed: every process of the host at once. Vanished: its network goes, nobody is told, and pdsh waits for ssh."""
    run, log = tmp_path / "run", tmp_path / "log"
    more = ["run.duration=100000 steps", "run.checkpoint_every=100000 steps"]
    command = [*hosts.launcher(), "cmpt/train.py", RECIPE, *overrides(tmp_path, "run", *more)]
    process = start(command, hosts, log, PDSH_SSH_ARGS_APPEND=f"-F {hosts.ssh_config} {ALIVE}")
    try:
        wait_until(lambda: steps_done(run) >= 5, process, log, "five steps")
        lost_at = time.monotonic()
        if how == "killed":
            hosts.kill(1)
        else:
            hosts.link(1, "down")
        try:
            process.wait(timeout=ENDED_LIMIT_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"no end {ENDED_LIMIT_S} s after the host was {how}:\n{log.read_text()}")
        print(f"{how}: ended after {time.monotonic() - lost_at:.1f} s with {process.returncode}")
    finally:
        end_group(process)
    assert process.returncode != 0, log.read_text()
    told = [event for event in rows(run, "events.jsonl") if event["kind"] in LOST_KINDS]
    assert told, log.read_text()
    assert any(name in str(told) for name in (hosts.names[1], "host2")), told


def supervisor_events(run: Path, event: str) -> list[dict[str, Any]]:
    everything = rows(run, "events.jsonl") if (run / "events.jsonl").exists() else []
    return [record for record in everything if record["kind"] == "supervisor" and record["event"] == event]


@pytest.mark.multiprocess
def test_a_supervised_run_goes_on_without_a_lost_host_and_takes_it_back(
    hosts: Hosts, tmp_path: Path, run_cli: RunCli
) -> None:
    """Host 2 dies; host 1 goes on alone from the last checkpoint; host 2 is back, both go on. One order of samples.

    Losses within 1e-4 of one process's, and its evaluation at the end.
    """
    more = ["run.duration=120 steps", "run.checkpoint_every=10 steps", HELDOUT, "evaluation.every=null"]
    alone = run_cli([*TRAIN, *overrides(tmp_path, "alone", *more)])
    assert alone.returncode == 0, alone.stderr
    run, log = tmp_path / "run", tmp_path / "log"
    supervise = [sys.executable, "tools/supervise.py", "--wait", "0.5", "--rejoin-every", "1", "--"]
    command = [*supervise, *hosts.launcher(), "cmpt/train.py", RECIPE, *overrides(tmp_path, "run", *more)]
    process = start(command, hosts, log)
    try:
        wait_until(lambda: steps_done(run) >= 25, process, log, "25 steps on both hosts")
        lost_at = time.monotonic()
        hosts.kill(1)
        wait_until(lambda: bool(supervisor_events(run, "exit")), process, log, "end of the run on both hosts")
        assert time.monotonic() - lost_at < ENDED_LIMIT_S

        def resumed_alone() -> bool:
            return len(supervisor_events(run, "start")) >= 2 and any(
                event["kind"] == "resume" for event in rows(run, "events.jsonl")
            )

        wait_until(resumed_alone, process, log, "resume on one host")
        resumed_at = steps_done(run)
        wait_until(lambda: steps_done(run) >= resumed_at + 10, process, log, "ten steps on one host")
        hosts.boot(1)
        assert process.wait(timeout=STARTED_LIMIT_S) == 0, log.read_text()
    finally:
        end_group(process)
    assert digests(run) == digests(tmp_path / "alone")
    for ours, reference in zip(rows(run), rows(tmp_path / "alone"), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-4)
    ours_last, reference_last = (rows(path, "evaluations.jsonl")[-1] for path in (run, tmp_path / "alone"))
    assert ours_last["step"] == 120
    assert ours_last["image_to_text_r10"] == pytest.approx(reference_last["image_to_text_r10"], abs=0.01)
    starts, exits = supervisor_events(run, "start"), supervisor_events(run, "exit")
    assert [event["hosts"] for event in starts] == [hosts.names, hosts.names[:1], hosts.names], log.read_text()
    assert starts[1]["step"] >= 20 and starts[2]["step"] > starts[1]["step"]
    assert [event["hosts_lost"] for event in exits] == [hosts.names[1:], [], []]
    assert exits[1]["ended_by"] == "rejoin" and exits[1]["code"] == 143
    assert exits[2]["code"] == 0 and exits[2]["step"] == 120
