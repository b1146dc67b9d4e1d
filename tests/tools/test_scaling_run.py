"""Studies that run: real starts through the launcher, points that fail, studies that are interrupted and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from small_studies import study, study_file

import scaling
from bench_collectives import CollectivesError, read_collectives
from scaling_read import MEASURED_TERMS, TimingsError, measured, read_timings
from scaling_run import Runner, StudyError, cause_of, end
from scaling_study import study_hosts, study_points

SCALING = [sys.executable, str(REPOSITORY / "tools/scaling.py")]
QUICK: dict[str, Any] = {
    "processes": [1],
    "weak": [16],
    "warmup_steps": 1,
    "measured_steps": 4,
    "environment": {"OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"},
    "overrides": ["guard.dry_run=false", "model.vision.layers=1", "model.text.layers=1"],
}
LIMIT_S = 240.0


def line(step: int, rank: int, compute_s: float, **waits: float) -> dict[str, Any]:
    return {
        "step": step, "rank": rank, "host": f"host{rank}", "flops": 64e9, "image_tokens": 640, "text_tokens": 64,
        "places": {"data": 0.125, "mask": 0.0, "gradient": compute_s, "optimizer": 0.25, "evaluation": 99.0},
        "waits": {"gradient": waits, "evaluation": {"control": 99.0}},
        "calls": {"gradient": dict.fromkeys(waits, 2), "evaluation": {"control": 9}},
        "sent_bytes": {"features": 1000, "gradients": 2000, "parameters": 0, "control": 8},
        "peak_memory_bytes": (rank + 1) * 2**30, "wire_bytes": 10_000 * step,
    }  # fmt: skip


def test_terms_add_up_and_the_slowest_rank_is_told_from_what_a_collective_takes() -> None:
    """Rank 1 computes half a second longer, for which rank 0 waits beside the 0.25 s of the collective itself."""
    steps = [[line(s, 0, 1.0, gradients=0.75), line(s, 1, 1.5, gradients=0.25)] for s in range(1, 9)]
    found = measured(steps, batch_size=64)
    terms = found["terms_s"]
    assert set(terms) == set(MEASURED_TERMS)
    assert terms["compute"] == 1.25 and terms["gradients"] == 0.25 and terms["stragglers"] == 0.25
    assert found["step_s"] == sum(terms.values()) == 0.125 + 0.25 + 1.5 + 0.25
    assert found["images_per_s"] == 64 / found["step_s"]
    assert found["flops_per_sample"] == 1e9 and found["calls"]["gradients"] == 2 and found["wire_bytes"] == 10_000
    assert found["peak_memory_bytes"] == [2**30, 2**31]


def test_a_moment_in_which_the_machine_was_busy_does_not_count() -> None:
    steps = [[line(step, 0, 1.0 if step != 5 else 30.0)] for step in range(1, 9)]
    found = measured(steps, batch_size=64)
    assert found["terms_s"]["compute"] == 1.0 and found["step_high_s"] > 30


def test_missing_lines_of_a_rank_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "timings"
    folder.mkdir()
    (folder / "rank_00000.jsonl").write_text("".join(json.dumps(line(s, 0, 1.0)) + "\n" for s in range(1, 5)))
    with pytest.raises(TimingsError, match="steps 5 to 6 are missing"):
        read_timings(tmp_path, 1, 1, 6)
    with pytest.raises(TimingsError, match=r"rank_00001.*do all hosts share this folder"):
        read_timings(tmp_path, 2, 1, 4)
    (folder / "rank_00001.jsonl").write_text("no record\n" + json.dumps(line(1, 1, 1.0)) + "\n")
    with pytest.raises(TimingsError, match="rank_00001"):
        read_timings(tmp_path, 2, 1, 4)


def test_a_run_without_its_environment_is_a_point_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = study(tmp_path, sweep=None, processes=[1], warmup_steps=1, measured_steps=4)
    (point,), runner = study_points(of, {}), Runner(of)
    timings = runner.folder / "runs" / f"{point.name}-r0" / "timings/rank_00000.jsonl"
    timings.parent.mkdir(parents=True)
    timings.write_text("".join(json.dumps(line(s, 0, 1.0)) + "\n" for s in range(1, 7)))
    monkeypatch.setattr(Runner, "launch", lambda self, point, script, log: 0)
    assert "environment.json" in runner.measure(point, 0)["cause"]


def test_a_report_of_nothing_is_refused_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = study_file(tmp_path, name="s")
    assert scaling.main([str(path), "--report-only"]) == scaling.USER_ERROR
    assert "nothing was measured yet; all 4 starts are missing" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_report_says_what_is_missing_and_takes_the_benchmarks_of_its_own_points(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study_file(tmp_path, name="s")
    runner = Runner(study(tmp_path, name="s"))
    point = study_points(runner.study, {})[0]
    runner.folder.mkdir()
    record = {"point": point.name, "repeat": 0, "status": "failed", "cause": "broken", "settings": {}}
    record |= {"scaling": "weak", "nodes": 1, "ranks_per_node": 1, "world_size": 1, "batch_size": 16}
    record |= {"hosts": [], "log": "x.log", "seconds": 1.0}
    record["fingerprint"] = runner.fingerprint(point)
    (runner.folder / "points.jsonl").write_text(json.dumps(record) + "\n")
    (runner.folder / "collectives-1x8.json").write_text("of another study")
    assert scaling.main([str(path), "--report-only"]) == 1
    assert "missing: 3 starts" in capsys.readouterr().out
    assert "starts missing: the study is not over" in (runner.folder / "scaling.html").read_text()
    assert json.loads((runner.folder / "fit.json").read_text())["missing"] == 3


def test_a_benchmark_without_an_all_reduce_is_named(tmp_path: Path) -> None:
    path = tmp_path / "collectives-1x2.json"
    for text in ("", "[]", '{"ops": {}}', '{"ops": {"all_reduce": {"points": []}}, "hosts": ["a"], "world_size": 2}'):
        path.write_text(text)
        with pytest.raises(CollectivesError, match=r"collectives-1x2.json: holds no measured all-reduce"):
            read_collectives(path)


def test_a_launcher_that_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(study(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StudyError, match="no `deepspeed` beside"):
        runner.launcher(study_points(runner.study, {})[0])


def test_simulate_behind_a_study_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        scaling.main([str(study_file(tmp_path, **QUICK)), "--simulate"])
    assert ended.value.code == 2 and "--simulate: must be the first option" in capsys.readouterr().err


def test_a_second_interrupt_ends_what_does_not_hear_the_first() -> None:
    deaf = "import signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline()
    again = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    again.start()
    with pytest.raises(KeyboardInterrupt):
        end(process)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("x\nn1: error: data.train: no shard\nn2: error: data.train: no shard\n[INFO] done\n", "data.train: no shard"),
        ("Traceback (most recent call last):\n  File x\nRuntimeError: broke\n[INFO] [launch.py] dead\n", "broke"),
        ("", "exit code 7"),
    ],
)
def test_the_cause_of_a_failed_start_is_what_it_said(log: str, cause: str) -> None:
    assert cause_of(7, log).endswith(cause)


def test_with_a_hostfile_every_start_goes_through_pdsh_with_its_hosts_and_variables(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("a slots=2\nb slots=2\n")
    (tmp_path / "env").write_text("PATH=/x\nGLOO_SOCKET_IFNAME=eth0\n\n")
    keys = {"hostfile": str(tmp_path / "hostfile"), "nodes": [1, 2], "processes": None, "sweep": None}
    of = study(tmp_path, **keys, launcher=["--no_ssh_check", "--master_addr=a"], environment={"OMP_NUM_THREADS": 4})
    runner = Runner(of)
    runner.environment["DS_ENV_FILE"] = str(tmp_path / "env")
    commands = [runner.launcher(point) for point in study_points(of, study_hosts(of))]
    assert ["a:0,1" in command for command in commands] == [True, False]
    assert "a:0,1@b:0,1" in commands[1]
    for command in commands:
        assert "--force_multi" in command and command[-2:] == ["--no_ssh_check", "--master_addr=a"]
    told = Path(runner._launch_environment()["DS_ENV_FILE"]).read_text()
    assert told == "PATH=/x\nGLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=4\n"


def test_what_was_measured_is_not_measured_again_unless_it_failed_and_is_wanted(tmp_path: Path) -> None:
    of = study(tmp_path, repeats=2)
    points, runner = study_points(of, {}), Runner(of)
    assert [(p.name, r) for p, r in runner.missing(points, again=False)][:5] == [
        *((point.name, 0) for point in points),
        (points[0].name, 1),
    ]
    runner.folder.mkdir()
    records = [
        {"point": p.name, "repeat": 0, "status": status, "fingerprint": runner.fingerprint(p)}
        for p, status in zip(points, ("done", "failed"), strict=False)
    ]
    torn = '{"point": "' + points[2].name
    (runner.folder / "points.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + torn)
    missing = [(p.name, r) for p, r in runner.missing(points, again=False)]
    assert (points[0].name, 0) not in missing and (points[1].name, 0) not in missing
    assert (points[2].name, 0) in missing and len(missing) == 2 * len(points) - 2
    assert (points[1].name, 0) in [(p.name, r) for p, r in runner.missing(points, again=True)]


def test_a_record_after_half_a_line_is_a_line_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = study(tmp_path)
    points, runner = study_points(of, {}), Runner(of)
    runner.folder.mkdir()
    (runner.folder / "points.jsonl").write_text('{"point": "half')
    monkeypatch.setattr(Runner, "launch", lambda self, point, script, log: log.write_text("error: broken\n") and 1)
    runner.measure(points[0], 0)
    assert [(record["point"], record["cause"]) for record in runner.records()] == [(points[0].name, "broken")]


def test_a_folder_with_points_of_other_settings_is_refused(tmp_path: Path) -> None:
    of = study(tmp_path)
    points, runner = study_points(of, {}), Runner(of)
    runner.folder.mkdir()
    record = {"point": points[0].name, "repeat": 0, "status": "done", "fingerprint": runner.fingerprint(points[0])}
    (runner.folder / "points.jsonl").write_text(json.dumps(record) + "\n")
    changed = Runner(study(tmp_path, overrides=["masking.ratio=0.6"]))
    with pytest.raises(StudyError, match="measured with other settings; choose another name"):
        changed.missing(points, again=False)


@pytest.mark.multiprocess
def test_a_failing_point_is_reported_and_the_rest_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    broken = tmp_path / "nowhere.safetensors"
    broken.write_bytes(b"not weights")
    path = study_file(tmp_path, **QUICK, sweep={"model.init_from": [str(broken), None]}, name="s")
    code = scaling.main([str(path)])
    told = capsys.readouterr().out
    assert code == 1, told
    records = [json.loads(row) for row in (tmp_path / "s/points.jsonl").read_text().splitlines()]
    by_status = {record["status"]: record for record in records}
    assert "nowhere.safetensors" in by_status["failed"]["cause"] and by_status["done"]["images_per_s"] > 0
    assert "failed:" in told and "nowhere.safetensors" in told
    page = (tmp_path / "s/scaling.html").read_text()
    assert "nowhere.safetensors" in page and "weak-1x1-batch16" in page
    rows = (tmp_path / "s/points.csv").read_text().splitlines()
    assert len(rows) == 3
    assert not list((tmp_path / "s/runs").glob("*/checkpoints"))
    assert scaling.main([str(path), "--report-only"]) == 1
    assert len((tmp_path / "s/points.jsonl").read_text().splitlines()) == 2, "nothing was measured again"


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_study_goes_on_where_it_was(ended_by: signal.Signals, tmp_path: Path) -> None:
    path = study_file(tmp_path, **{**QUICK, "weak": [16, 32]}, sweep=None, name="s", repeats=2)
    points, logs = tmp_path / "s/points.jsonl", tmp_path / "s/logs"
    process = subprocess.Popen([*SCALING, str(path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    limit = time.monotonic() + LIMIT_S
    while not (points.exists() and len(list(logs.glob("*.log"))) >= 2):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    time.sleep(2.0)  # well within the second start
    os.kill(process.pid, ended_by)
    assert process.wait(timeout=90) == scaling.INTERRUPTED
    assert not subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).stdout, "its processes are gone"
    before = points.read_text()
    assert len(before.splitlines()) == 1
    done = subprocess.run([*SCALING, str(path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    after = points.read_text()
    assert after.startswith(before) and len(after.splitlines()) == 4
    assert "[3/3]" in done.stdout
