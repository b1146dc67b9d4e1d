"""A real disk that is really full: a small tmpfs, for which the tests must be root."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import LAUNCHER_VARIABLES, REPOSITORY
from test_train import TRAIN, overrides

from cmpt.engine.manifest import verify
from cmpt.monitor.monitor import Monitor
from cmpt.monitor.records import RecordWriter, read_records

DISK_BYTES = 24 * 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "cmpt-test", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, leave_bytes: int = 0) -> None:
    """So that not a byte more fits than `leave_bytes`, in whole pages."""
    ballast = os.open(disk / "ballast", os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(ballast, bytes(4096))
    except OSError as full:
        assert "No space left" in str(full)
    finally:
        os.ftruncate(ballast, os.fstat(ballast).st_size - leave_bytes)
        os.close(ballast)


def free(disk: Path) -> None:
    (disk / "ballast").unlink()


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_records(path)]


def test_no_line_is_lost_or_torn_on_a_full_disk(disk: Path) -> None:
    path = disk / "metrics.jsonl"
    writer = RecordWriter(path)
    text = "x" * 1500  # less than three lines in a page
    writer.append({"step": 0, "text": text})
    fill(disk, leave_bytes=4096)
    for step in range(1, 8):
        writer.append({"step": step, "text": text})
        assert path.read_bytes().endswith(b"\n")
    assert writer.fault is not None and "No space left" in str(writer.fault)
    before = steps(path)
    assert 1 < len(before) < 8 and before == list(range(len(before)))
    with pytest.raises(OSError, match="No space left on device"):
        writer.sync()
    free(disk)
    writer.append({"step": 8})
    writer.sync()
    assert writer.fault is None and writer.close() == 0
    assert steps(path) == list(range(9))


def test_what_is_still_unwritten_at_the_end_is_counted(disk: Path) -> None:
    writer = RecordWriter(disk / "metrics.jsonl")
    fill(disk)
    for step in range(3):
        writer.append({"step": step})
    assert writer.close() == writer.close() == 3


def test_half_a_line_of_a_killed_process_does_not_end_up_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    writer = RecordWriter(path)
    writer.append({"step": 2})
    writer.close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
def test_a_monitor_goes_on_over_a_full_disk_and_tells(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Monitor(disk, "toy", total_steps=309, start_step=0) as monitor:
        monitor.log({"step": 1, "loss": 1.0})
        fill(disk)
        for step in range(2, 301):  # more than fits into the pages that the files have already
            monitor.log({"step": step, "loss": 1 / step, "lr": 0.1})
        monitor.picture("masks", bytes(9000))
        assert "No space left" in monitor.listing("refused/step_00000300.txt", ["a", "b"])
        monitor.evaluation(300, {"pairs": 5})
        with pytest.raises(OSError, match="No space left"):
            monitor.sync()  # a checkpoint must not become visible now
        free(disk)
        for step in range(301, 310):
            monitor.log({"step": step, "loss": 1 / step})
        monitor.sync()
        assert Path(monitor.listing("refused/step_00000309.txt", ["a", "b"])).read_text() == "a\nb\n"
    assert steps(disk / "metrics.jsonl") == list(range(1, 310))
    assert steps(disk / "evaluations.jsonl") == [300]
    events = read_records(disk / "events.jsonl")
    assert [event["kind"] for event in (events[0], events[-1])] == ["start", "end"]
    warnings = [event["text"] for event in events if event["kind"] == "warning"]
    for told in ("metrics.jsonl: No space left on device", "masks.png could not be written", "TensorBoard"):
        assert sum(told in text for text in warnings) == 1, (told, warnings)
    output = capsys.readouterr()
    assert "warning: metrics.jsonl: No space left on device" in output.out and "could not write" not in output.err


def test_a_disk_that_stays_full_is_said_in_one_line(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Monitor(disk, "toy", total_steps=2, start_step=0) as monitor:
        fill(disk)
        for step in (1, 2):
            monitor.log({"step": step})
            monitor.event("skip", step, cause="x" * 5000)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "events.jsonl; is the disk full?" in told[0], told


@pytest.mark.multiprocess
def test_a_run_goes_on_over_a_full_disk_and_later_checkpoints_are_there(disk: Path, tmp_path: Path) -> None:
    """Full after the first checkpoint, free again once that is told: the run ends well, and no record is missing."""
    more = ["run.duration=120 steps", "run.checkpoint_every=10 steps", "evaluation.every=null"]
    command = [*TRAIN[1:], *overrides(disk, "run", *more, f"data.cache_folder={tmp_path}/cache")]
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    errors: list[str] = []
    reader = threading.Thread(target=lambda stream: errors.extend(stream), args=(process.stderr,))
    reader.start()
    watchdog = threading.Timer(280, process.kill)
    watchdog.start()
    lines: list[str] = []
    filled = False
    for line in process.stdout:
        lines.append(line)
        if not filled and ": checkpoint " in line:
            fill(disk)
            filled = True
        if "could not be written" in line and (disk / "ballast").exists():
            free(disk)
    process.wait()
    watchdog.cancel()
    reader.join()
    assert process.returncode == 0, (lines[-5:], errors)
    run = disk / "run"
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 121))
    events = read_records(run / "events.jsonl")
    failed = [e for e in events if e["kind"] == "warning" and "could not be written" in e["text"]]
    assert failed and all(f"step {event['step']} " in event["text"] for event in failed)
    assert all("No space left on device" in event["text"] for event in failed)
    made = [event["step"] for event in events if event["kind"] == "checkpoint"]
    assert made[-1] == 120 and len([step for step in made if step > failed[-1]["step"]]) > 1
    assert not {event["step"] for event in failed} & set(made)
    kept = sorted((run / "checkpoints").glob("step_*"))
    assert [path.name for path in kept] == [f"step_{step:08d}" for step in made[-3:]]
    for path in kept:
        verify(path)
