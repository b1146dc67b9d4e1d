"""The supervisor: what it makes of a hostfile and a command line; real runs that are killed, stopped or hopeless."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, RunCli
from test_train import RECIPE, TRAIN, overrides, rows, trajectory

import supervise
from hosts import choose, parse_hostfile, parse_launch, ssh_command, with_alive_options

LIMIT_S = 240.0


def test_a_hostfile_is_read_as_the_launcher_reads_it() -> None:
    text = "# machines\n\n  node02 slots=8  \nnode01\tslots=4 # the older one\n#node03 slots=8\n"
    assert list(parse_hostfile(text).items()) == [("node02", 8), ("node01", 4)]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("node01", "line 1: got 'node01'"),
        ("node01 slots=8\nnode02 slots=many", "line 2"),
        ("node01 slots=0", "N >= 1"),
        ("node01 slots=8\nnode01 slots=4", "node01 is there twice"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_bad_hostfile_is_refused(text: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse_hostfile(text)


@pytest.mark.parametrize(
    ("slots", "answering", "streams", "expected"),
    [
        ([8, 8, 8, 8], [0, 1, 2, 3], 32, [0, 1, 2, 3]),
        ([8, 8, 8, 8], [0, 2, 3], 32, [0, 2]),
        ([8, 8, 8, 8], [1, 2, 3], 48, [1, 2, 3]),
        ([4, 8, 8], [0, 1, 2], 16, [1, 2]),
        ([4, 8, 4], [0, 1, 2], 8, [0, 2]),
        ([3, 3], [0, 1], 8, []),
        ([1, 1], [1], 4, [1]),
        ([2, 2], [], 4, []),
        ([16], [0], 8, []),
    ],
)
def test_the_most_slots_that_divide_the_streams_are_chosen_earlier_hosts_first(
    slots: list[int], answering: list[int], streams: int, expected: list[int]
) -> None:
    hosts = {f"n{position}": count for position, count in enumerate(slots)}
    chosen = choose(hosts, [f"n{position}" for position in answering], streams)
    assert list(chosen.items()) == [(f"n{position}", slots[position]) for position in expected]


def test_choosing_among_many_hosts_takes_no_time() -> None:
    hosts = {f"n{number:03d}": 8 for number in range(512)}
    assert len(choose(hosts, set(hosts) - {"n007"}, 4096)) == 256


def test_hosts_that_are_left_get_a_hostfile_a_new_first_host_and_no_local_start(tmp_path: Path) -> None:
    command = "deepspeed --no_ssh_check -H hosts --master_addr=10.0.0.1 --master_port 29501 cmpt/train.py R a=b"
    launch = parse_launch(shlex.split(command))
    listed = {"n1": 2, "n2": 2, "n3": 2}
    file = tmp_path / "hostfile"
    same = launch.on({"n1": 2, "n3": 2}, listed, file)
    assert same.option("--master_addr") == "10.0.0.1" and "--force_multi" not in same.options
    assert file.read_text() == "n1 slots=2\nn3 slots=2\n"
    moved = launch.on({"n3": 2}, listed, file)
    assert moved.option("--master_addr") == "n3" and "--force_multi" in moved.options
    assert moved.option("-H", "--hostfile") == str(file) and moved.option("--master_port") == "29501"
    assert moved.command()[-3:] == ["cmpt/train.py", "R", "a=b"]
    assert "--master_addr" not in parse_launch(["deepspeed", "-H", "h", "train.py"]).on({"n2": 2}, listed, file).options


@pytest.mark.parametrize("option", ["--include=n1", "-e", "--num_nodes", "--num_gpus=2", "--no_ssh"])
def test_options_that_choose_among_hosts_are_refused_with_a_hostfile(option: str) -> None:
    with pytest.raises(ValueError, match=option.partition("=")[0]):
        parse_launch(["deepspeed", "--hostfile", "h", option, "1", "cmpt/train.py", "R"])
    parse_launch(["deepspeed", option, "1", "cmpt/train.py", "R"])


def test_ssh_gives_up_on_a_silent_host_unless_its_arguments_say_when() -> None:
    assert with_alive_options({})["PDSH_SSH_ARGS_APPEND"] == "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"
    ours = with_alive_options({"PDSH_SSH_ARGS_APPEND": "-F x"})
    assert ssh_command(ours, port="2222")[:5] == ["ssh", "-F", "x", "-o", "ServerAliveInterval=5"]
    assert ssh_command(ours, port="2222")[-2:] == ["-p", "2222"]
    given = {"PDSH_SSH_ARGS_APPEND": "-o serveraliveinterval=60"}
    assert with_alive_options(given) == given


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        (["deepspeed", "other.py"], "expected one that starts cmpt/train.py"),
        (["python", "cmpt/train.py"], "needs a recipe"),
        (["python", "cmpt/train.py", "nowhere.yaml"], "nowhere.yaml"),
        (["python", "cmpt/train.py", RECIPE, "run.overwrite=true"], "run.overwrite"),
        (["deepspeed", "--hostfile", "/nowhere", "cmpt/train.py", RECIPE], "/nowhere"),
    ],
)
def test_a_bad_command_is_one_clear_line(
    command: list[str], fault: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert supervise.main(["--", *command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and fault in line


def events(run: Path, event: str) -> list[dict[str, Any]]:
    return [row for row in rows(run, "events.jsonl") if row["kind"] == "supervisor" and row["event"] == event]


def pretend(tmp_path: Path, body: str) -> list[str]:
    """A train.py that only does `body`, in the run's folder, and how to start it supervised."""
    script = tmp_path / "train.py"
    first = f"import os, sys, time\nos.makedirs('{tmp_path}/run', exist_ok=True)\nos.chdir('{tmp_path}/run')\n"
    script.write_text(f"{first}open('recipe.yaml', 'w').close()\n{body}\n")
    return ["--wait", "0", "--", sys.executable, str(script), RECIPE, f"run.folder={tmp_path}", "run.name=run"]


@pytest.mark.parametrize(("code", "expected"), [(7, 7), (0, 1)])
def test_gives_up_after_n_restarts_without_progress(code: int, expected: int, tmp_path: Path, run_cli: RunCli) -> None:
    """Exit code 0 of a run that did not say that it came to its end is a failure too."""
    command = pretend(tmp_path, f"sys.exit({code})")
    done = run_cli(["python", "tools/supervise.py", "--restarts", "2", *command])
    assert done.returncode == expected, done.stderr
    run = tmp_path / "run"
    assert [event["restart"] for event in events(run, "start")] == [0, 1, 2]
    assert [event["code"] for event in events(run, "exit")] == [code] * 3
    assert "2 restarts in a row" in events(run, "giving up")[0]["why"]
    assert "supervise: giving up at step 0" in done.stderr


def test_a_run_that_hangs_after_a_stall_was_told_is_killed(tmp_path: Path, run_cli: RunCli) -> None:
    stall = '{"kind": "stall", "step": 3, "rank": 1}'
    body = f"open('events.jsonl', 'a').write('{stall}' + chr(10))\ntime.sleep(1000)"
    program = (
        "import sys, supervise; supervise._TROUBLE_LIMIT_S = supervise._KILL_GRACE_S = 1; sys.exit(supervise.main())"
    )
    command = ["python", "-c", program, "--restarts", "0", *pretend(tmp_path, body)]
    done = run_cli(command, env={"PYTHONPATH": str(REPOSITORY / "tools")}, timeout=100)
    assert done.returncode == 128 + signal.SIGTERM
    assert [event["ended_by"] for event in events(tmp_path / "run", "exit")] == ["hang"]
    assert events(tmp_path / "run", "trouble")[0]["event_seen"]["rank"] == 1


@pytest.mark.multiprocess
def test_a_refused_recipe_is_not_started_again(tmp_path: Path, run_cli: RunCli) -> None:
    more = overrides(tmp_path, "bad", "engine.batch_size=30")
    done = run_cli(["python", "tools/supervise.py", "--wait", "0", "--", sys.executable, *TRAIN[1:], *more])
    assert done.returncode == 2
    assert done.stderr.count("supervise: start") == 1 and "engine.batch_size" in done.stderr
    assert not (tmp_path / "bad").exists()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None and time.monotonic() < limit, f"no {what}; exit code {process.returncode}"
        time.sleep(0.01)


def supervised(tmp_path: Path, *more: str) -> subprocess.Popen[str]:
    """A plain one-process run of 60 steps in tmp_path/run, under the supervisor."""
    run = overrides(tmp_path, "run", "run.duration=60 steps", *more)
    command = [sys.executable, "tools/supervise.py", "--wait", "0", "--", sys.executable, *TRAIN[1:], *run]
    with (tmp_path / "log").open("w") as log:
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log, text=True, start_new_session=True)


def child_of(process: subprocess.Popen[str]) -> int:
    """The run that the supervisor has started; 0 between two starts."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0]) if children else 0


def resumes(run: Path) -> int:
    return sum(row["kind"] == "resume" for row in rows(run, "events.jsonl"))


@pytest.mark.multiprocess
@pytest.mark.parametrize("kills", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_comes_to_the_uninterrupted_end(kills: int, tmp_path: Path, run_cli: RunCli) -> None:
    plain = run_cli([*TRAIN, *overrides(tmp_path, "plain", "run.duration=60 steps")])
    assert plain.returncode == 0, plain.stderr
    process, run = supervised(tmp_path), tmp_path / "run"
    try:
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(rows(run)) >= 10, process, "10 steps")
        os.kill(child_of(process), signal.SIGKILL)
        if kills == 2:
            wait_until(lambda: resumes(run) == 1 and len(rows(run)) >= 25, process, "25 steps after the first kill")
            os.kill(child_of(process), signal.SIGKILL)
        assert process.wait(timeout=LIMIT_S) == 0, (tmp_path / "log").read_text()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
    assert trajectory(run) == trajectory(tmp_path / "plain")
    assert [event["code"] for event in events(run, "exit")] == [*[137] * kills, 0]
    assert [event["restart"] for event in events(run, "start")] == list(range(kills + 1))
    assert all(event["progress_steps"] > 0 for event in events(run, "exit"))
    assert events(run, "finished")[0]["step"] == 60


@pytest.mark.multiprocess
def test_sigterm_to_the_supervisor_leaves_a_checkpoint_and_no_restart(tmp_path: Path) -> None:
    process, run = (
        supervised(tmp_path, "run.duration=3000 steps", "run.checkpoint_every=100000 steps"),
        tmp_path / "run",
    )
    try:
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(rows(run)) >= 3, process, "3 steps")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=LIMIT_S) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
    assert [int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")] == [len(rows(run))]
    assert len(events(run, "start")) == 1 and events(run, "exit")[0]["ended_by"] == "signal"
    assert not (run / "stop").exists(), "an old request must not end the next start"
